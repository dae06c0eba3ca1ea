"""Meta-training: the loop, what lets a run survive interruption, several devices, evaluation.

Imports `types` and `learners/base.py`. Read `loop.py` first: `train` is Algorithm 1 of iMAML;
`run.py` resumes a run, and `checkpoint.py` reads and writes its state.
"""

from imaml_jax.training.loop import TrainResult, train
from imaml_jax.training.non_finite import NonFiniteError
from imaml_jax.training.run import Scored

__all__ = ["NonFiniteError", "Scored", "TrainResult", "train"]
