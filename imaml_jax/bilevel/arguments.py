"""Arguments of any kind for a differentiable function: arrays apart from all else, and closures.

JAX's custom derivatives take arrays only, and nothing that a function closes over.
"""

import inspect
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from types import BuiltinFunctionType, CodeType, ModuleType
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


class Same:
    """Equal to what holds the same object, which it keeps alive."""

    def __init__(self, value: Any):
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Same) and self.value is other.value

    def __hash__(self) -> int:
        return id(self.value)


def closure(fun: Any) -> list[Any]:
    """What the value of a function may depend on besides its arguments, as far as Python tells.

    Looks into closures, defaults, the globals that are named, partial functions, bound objects and
    wrapped functions; not into the globals of installed libraries, nor into modules.
    """
    found: list[Any] = []
    seen: dict[int, Any] = {}
    todo = [fun]
    while todo:
        value = todo.pop()
        if value is None or isinstance(value, _CONSTANT) or id(value) in seen:
            continue
        if isinstance(value, _VALUES):
            found.append(value)
            continue
        seen[id(value)] = value
        if isinstance(value, partial):
            todo += [value.func, *value.args, *value.keywords.values()]
        elif inspect.ismethod(value):
            todo += [value.__func__, value.__self__]
        elif inspect.isfunction(value):
            cells = value.__closure__ or ()
            todo += [cell.cell_contents for cell in cells if _is_full(cell)]
            todo.append(getattr(value, "__wrapped__", None))
            if not value.__code__.co_filename.startswith(_LIBRARIES):
                todo += [value.__defaults__, value.__kwdefaults__]
                todo += [value.__globals__.get(name) for name in _names(value.__code__)]
        elif callable(value) and hasattr(value, "__wrapped__"):  # jit, custom_jvp, custom_vjp
            rules = (getattr(value, name, None) for name in ("jvp", "fwd", "bwd"))
            todo += [value.__wrapped__, *rules]
        elif jax.tree_util.all_leaves([value]):
            found.append(value)
        else:
            leaves, structure = jax.tree.flatten(value)
            found.append(structure)
            todo += leaves
    return found


def has_tracers(values: list[Any]) -> bool:
    """Whether JAX is differentiating, batching or compiling one of them."""
    return any(isinstance(value, Tracer) for value in values)


def fingerprint(values: list[Any]) -> tuple[Any, ...] | None:
    """Equal for what a compiled function may take for equal; None where an object may change.

    Arrays of JAX are compared by identity, those of NumPy, which can be changed, by their contents.
    """
    keys = []
    for value in values:
        if isinstance(value, jax.Array):
            keys.append(Same(value))
        elif isinstance(value, np.ndarray):
            keys.append((value.shape, value.dtype.str, value.tobytes()))
        elif isinstance(value, (*_VALUES, jax.tree_util.PyTreeDef)):
            keys.append((type(value), value))
        else:
            return None
    return tuple(keys)


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


def _is_full(cell: Any) -> bool:
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:
        return False
    return True


def _names(code: CodeType) -> set[str]:
    """Global names in a function and in those that it defines."""
    inner = [_names(const) for const in code.co_consts if isinstance(const, CodeType)]
    return set(code.co_names).union(*inner)


_VALUES = (Tracer, jax.Array, np.ndarray, np.generic, str, bytes, int, float, complex)
_CONSTANT = (ModuleType, BuiltinFunctionType, type, np.ufunc, np.dtype)
_LIBRARIES = tuple({str(Path(str(module.__file__)).parents[1]) for module in (jax, np)}) + (
    str(Path(__file__).parents[1]),
    str(Path(inspect.__file__).parent),
)
