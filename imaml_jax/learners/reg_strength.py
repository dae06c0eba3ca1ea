"""Lambda of implicit MAML: what it may be, and lambda as a meta-parameter."""

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from imaml_jax.types import Array, PyTree


class LearnedStrength(NamedTuple):
    """Meta-parameters of an iMAML that learns lambda.

    Attributes:
      params: the network's.
      log_reg_strength: log lambda, shaped like `reg_strength`, or as `learn_reg_strength` says.
    """

    params: PyTree
    log_reg_strength: PyTree


def check_strength(strength: PyTree, eval_strength: PyTree | None, learned: Any) -> None:
    """Raises ValueError for arguments of `imaml` that are no lambda, or no way to learn it."""
    if not jax.tree.leaves(strength):
        raise ValueError(f"imaml: reg_strength={strength!r} must be a scalar or a tree of them")
    for leaf in _concrete_leaves(strength):
        if not _is_number(leaf) or not np.all((leaf > 0) & np.isfinite(leaf)):
            raise ValueError(f"imaml: reg_strength={leaf} must be positive and finite in float32")
    for leaf in _concrete_leaves(eval_strength):
        if not _is_number(leaf) or not np.all((leaf >= 0) & np.isfinite(leaf)):
            raise ValueError(f"imaml: eval_reg_strength={leaf} must be at least 0 and finite")
    by_flag = isinstance(learned, bool)
    if not by_flag and learned not in ("leaf", "parameter"):
        raise ValueError(
            f"imaml: learn_reg_strength={learned!r} must be True, False, 'leaf' or 'parameter'"
        )


def spread(learned: Literal["leaf", "parameter"], strength: Array, branch: PyTree) -> PyTree:
    """Lambda for each array of parameters below `branch`, or for each of their entries.

    Raises:
      ValueError: arrays of lambdas where each array of parameters has one.
    """
    whole = learned == "leaf"
    if whole and strength.shape:
        raise ValueError(
            f"imaml: reg_strength of shape {strength.shape} must hold scalars with "
            "learn_reg_strength='leaf'; 'parameter' and True take arrays"
        )
    return jax.tree.map(lambda p: jnp.broadcast_to(strength, () if whole else p.shape), branch)


def _concrete_leaves(tree: PyTree) -> list[np.ndarray]:
    """The leaves whose values are known, in float32 where they are numbers."""
    leaves = [np.asarray(x) for x in jax.tree.leaves(tree) if not isinstance(x, Tracer)]
    with np.errstate(over="ignore", under="ignore"):
        return [x.astype(np.float32) if _is_number(x) else x for x in leaves]


def _is_number(x: np.ndarray) -> bool:
    return np.issubdtype(x.dtype, np.floating) or np.issubdtype(x.dtype, np.integer)
