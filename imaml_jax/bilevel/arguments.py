"""Arguments of any kind for a differentiable function: arrays apart from all else, and closures.

JAX's custom derivatives take arrays only, and nothing that a function closes over.
"""

import inspect
from collections.abc import Callable, Sequence
from functools import partial
from types import BuiltinFunctionType, ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from imaml_jax.types import Array, PyTree


class Skeleton:
    """A tree without its arrays: those of JAX and NumPy, floats and complex numbers."""

    def __init__(self, tree: PyTree):
        leaves, self._structure = jax.tree.flatten(tree)
        self._is_array = tuple(map(_is_array, leaves))
        pairs = zip(leaves, self._is_array, strict=True)
        self.others = tuple(leaf for leaf, is_array in pairs if not is_array)

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


def depends_on_tracers(fun: Any) -> bool:
    """Whether a function depends on values that JAX is tracing, as far as Python tells.

    Looks into closures, defaults, partial functions, objects, and wrapped functions.
    """
    seen: dict[int, Any] = {}
    todo = [fun]
    while todo:
        value = todo.pop()
        if isinstance(value, Tracer):
            return True
        if id(value) in seen or value is None or isinstance(value, _WITHOUT_TRACERS):
            continue
        seen[id(value)] = value
        if isinstance(value, partial):
            todo += [value.func, value.args, value.keywords]
        elif inspect.isfunction(value):
            todo += [cell.cell_contents for cell in value.__closure__ or () if _is_full(cell)]
            todo += [value.__defaults__, value.__kwdefaults__]
        elif isinstance(value, (tuple, list, set, frozenset)):
            todo += value
        elif isinstance(value, dict):
            todo += value.values()
        todo += [getattr(value, name, None) for name in ("__func__", "__self__", "__wrapped__")]
        todo += getattr(value, "__dict__", {}).values()
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
    if isinstance(leaf, (np.ndarray, np.generic)):
        return leaf.dtype.kind not in "OSU"
    return isinstance(leaf, (jax.Array, float, complex))


def _is_full(cell: Any) -> bool:
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:
        return False
    return True


_WITHOUT_TRACERS = (
    *(str, bytes, bool, int, float, complex, np.ndarray, np.generic, jax.Array),
    *(ModuleType, BuiltinFunctionType, type),
)
