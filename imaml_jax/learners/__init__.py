"""Meta-learning algorithms, one family per file: a factory of `MetaLearner` and its settings.

Imports `bilevel` and `types`. Read `maml.py` first, the simplest complete example; `base.py` has
shared functions, `algorithm.py` shared settings, and `registry.py` lists what commands train.
"""

from imaml_jax.learners.base import (
    cross_entropy,
    mean_outputs,
    mean_squared_error,
    mixture_logits,
)
from imaml_jax.learners.bmaml import bmaml
from imaml_jax.learners.imaml import imaml
from imaml_jax.learners.imaml_dev import imaml_dev
from imaml_jax.learners.implicit_bmaml import implicit_bmaml
from imaml_jax.learners.leo import leo
from imaml_jax.learners.maml import fomaml, maml
from imaml_jax.learners.mamlpp import mamlpp
from imaml_jax.learners.nearest_centroid import nearest_centroid
from imaml_jax.learners.platipus import PlatipusParams, platipus
from imaml_jax.learners.posterior import learned_precisions, likelihood
from imaml_jax.learners.reptile import reptile

__all__ = [
    "PlatipusParams",
    "bmaml",
    "cross_entropy",
    "fomaml",
    "imaml",
    "imaml_dev",
    "implicit_bmaml",
    "learned_precisions",
    "leo",
    "likelihood",
    "maml",
    "mamlpp",
    "mean_outputs",
    "mean_squared_error",
    "mixture_logits",
    "nearest_centroid",
    "platipus",
    "reptile",
]
