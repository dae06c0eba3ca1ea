"""Arguments of any kind for a differentiable function: arrays apart from all else, and closures.

JAX's custom derivatives take arrays only, and nothing that a function closes over.
"""

import inspect
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from imaml_jax.types import Array, PyTree


class Skeleton:
    """A tree without its arrays; equal to another of the same structure and the same other leaves.

    Arrays are those of JAX and NumPy, floats and complex numbers. Leaves that cannot be hashed are
    compared by identity.
    """

    def __init__(self, tree: PyTree):
        leaves, self._structure = jax.tree.flatten(tree)
        self._is_array = tuple(map(_is_array, leaves))
        pairs = zip(leaves, self._is_array, strict=True)
        self.others = tuple(leaf for leaf, is_array in pairs if not is_array)
        self._key = (self._structure, self._is_array, tuple(map(_key, self.others)))

    def arrays(self, tree: PyTree) -> list[Array]:
        """The arrays of a tree of this structure."""
        pairs = zip(jax.tree.leaves(tree), self._is_array, strict=True)
        leaves = [leaf for leaf, is_array in pairs if is_array]
        return [jnp.asarray(x) if isinstance(x, np.ndarray) else x for x in leaves]

    def merge(self, arrays: Sequence[Array]) -> PyTree:
        """The tree with these arrays."""
        given, others = iter(arrays), iter(self.others)
        leaves = [next(given if is_array else others) for is_array in self._is_array]
        return jax.tree.unflatten(self._structure, leaves)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Skeleton) and self._key == other._key

    def __hash__(self) -> int:
        return hash(self._key)


def closes_over_tracers(fun: Any) -> bool:
    """Whether a function closes over values that JAX is tracing, as far as Python tells.

    Looks into closures, defaults of partial functions, bound objects and wrapped functions.
    """
    seen, todo = set(), [fun]
    while todo:
        value = todo.pop()
        if isinstance(value, Tracer):
            return True
        if id(value) in seen or isinstance(value, (str, bytes, np.ndarray, jax.Array, type)):
            continue
        seen.add(id(value))
        if isinstance(value, partial):
            todo += [value.func, value.args, value.keywords]
        elif inspect.ismethod(value):
            todo += [value.__func__, value.__self__]
        elif callable(value):
            todo += [c.cell_contents for c in getattr(value, "__closure__", None) or () if _full(c)]
            todo += [getattr(value, "__wrapped__", None), jax.tree.leaves(value)]
        elif not jax.tree_util.all_leaves([value]):
            todo += jax.tree.leaves(value)
    return False


def hoist(fun: Callable[..., Any], *args: PyTree) -> tuple[Callable[..., Any], list[Array]]:
    """`(new_fun, values)`, where `new_fun(values, *args)` closes over no differentiated value."""
    converted, values = jax.closure_convert(fun, *args)
    return lambda values, *args: converted(*args, *values), values


def check_call(fun: Callable[..., Any], name: str, *args: Any, **kwargs: Any) -> None:
    """TypeError where a function does not take the arguments that a solver was called with."""
    try:
        signature = inspect.signature(fun)
    except (TypeError, ValueError):
        return
    try:
        signature.bind(*args, **kwargs)
    except TypeError as error:
        raise TypeError(
            f"{name}{signature} is called with x and the solver's arguments after the first: "
            f"{error}. Write the solver as solver(init, *args) with the args of {name}; one that "
            "needs no start takes init all the same, and is called with None"
        ) from None


def _is_array(leaf: Any) -> bool:
    return isinstance(leaf, (jax.Array, np.ndarray, np.generic, float, complex))


def _key(leaf: Any) -> Any:
    try:
        hash(leaf)
    except TypeError:
        return type(leaf), id(leaf)
    return type(leaf), leaf


def _full(cell: Any) -> bool:
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:
        return False
    return True
