"""Meta-learning algorithms, one a file; each a factory of a `MetaLearner`."""

from imaml_jax.learners.base import cross_entropy, mean_squared_error
from imaml_jax.learners.imaml import imaml
from imaml_jax.learners.imaml_dev import imaml_dev
from imaml_jax.learners.leo import leo
from imaml_jax.learners.maml import fomaml, maml
from imaml_jax.learners.nearest_centroid import nearest_centroid
from imaml_jax.learners.reptile import reptile

__all__ = [
    "cross_entropy",
    "fomaml",
    "imaml",
    "imaml_dev",
    "leo",
    "maml",
    "mean_squared_error",
    "nearest_centroid",
    "reptile",
]
