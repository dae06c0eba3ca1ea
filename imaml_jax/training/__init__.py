"""Meta-training and what makes a run last: checkpoints, resume, logs, several devices, evaluation.

Imports `types` and `learners/base.py`. Read `loop.py` first: `train` is Algorithm 1.
"""

from imaml_jax.training.loop import TrainResult, train
from imaml_jax.training.non_finite import NonFiniteError
from imaml_jax.training.run import Scored

__all__ = ["NonFiniteError", "Scored", "TrainResult", "train"]
