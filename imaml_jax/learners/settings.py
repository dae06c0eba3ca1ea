"""Settings as records: frozen dataclasses whose fields declare their ranges, once.

A range serves whoever takes the setting: the record itself, the factory of an algorithm (see
`check_arguments`), a command line, a YAML file, a saved model. Records hold records, and no two
settings have one name, so that a tree of records is also one flat mapping.
"""

import ast
import dataclasses
import difflib
import functools
import inspect
import itertools
import math
import sys
import textwrap
import types
import typing
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from numbers import Integral, Real
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Self, TypeVar

import jax
import numpy as np
from jax.core import Tracer

_R = TypeVar("_R")


@dataclasses.dataclass(frozen=True)
class Range:
    """The finite numbers that a setting may have; a bound of None means no bound."""

    least: float | None = None
    above: float | None = None
    most: float | None = None
    below: float | None = None

    def __contains__(self, value: Any) -> bool:
        return (
            -math.inf < value < math.inf
            and (self.least is None or value >= self.least)
            and (self.above is None or value > self.above)
            and (self.most is None or value <= self.most)
            and (self.below is None or value < self.below)
        )

    def __str__(self) -> str:
        words = ("at least", self.least), ("above", self.above), ("at most", self.most)
        bounds = (*words, ("below", self.below))
        return " and ".join(f"{word} {bound}" for word, bound in bounds if bound is not None)


@dataclasses.dataclass(frozen=True)
class When:
    """A setting that has an effect only where `holds` is true of its record.

    Attributes:
      holds: `record -> bool`.
      otherwise: what it has no effect on, where it is not.
    """

    holds: Callable[[Any], bool]
    otherwise: str


class Fixed:
    """Marks a field that says something about a record and is no setting of a user's."""


Count = Annotated[int, Range(least=1)]
Steps = Annotated[int, Range(least=1, most=1_000_000)]
NotNegative = Annotated[float, Range(least=0)]
Positive = Annotated[float, Range(above=0)]
Seed = Annotated[int, Range(least=0, most=2**32 - 1)]
Share = Annotated[float, Range(least=0, most=1)]


class Setting(NamedTuple):
    """One setting of a record: its type with the range, its value and its documentation."""

    hint: Any
    value: Any
    doc: str


@dataclasses.dataclass(frozen=True)
class Record:
    """What a frozen dataclass of settings derives from: it exists only with values in range.

    Raises:
      ValueError: a value of another type or out of its range, or values that do not go together.
    """

    def __post_init__(self) -> None:
        check(self)
        self.check_together()

    def check_together(self) -> None:
        """Raises ValueError for values that do not go together; a record overrides it."""

    def with_settings(self, values: Mapping[str, Any]) -> Self:
        """A copy with other values, by the flat names of this record and of those in it.

        Raises:
          ValueError: an unknown name, a value out of its range, or one that has no effect.
        """
        known = settings_of(self, all_of_them=True)
        for name, value in values.items():
            if name not in known:
                raise ValueError(f"{name}={value} is not a setting here{nearest(name, known)}")
        made = _replaced(self, values)
        for name in values.keys() - settings_of(made).keys():
            (condition,) = _metadata(known[name].hint, When)
            raise ValueError(
                f"{name}={values[name]} has no effect on {condition.otherwise}; leave it out"
            )
        return made


def _replaced(record: Any, values: Mapping[str, Any]) -> Any:
    changes = {}
    for field in dataclasses.fields(record):
        value = getattr(record, field.name)
        if isinstance(value, Record):
            changes[field.name] = _replaced(value, values)
        elif field.name in values:
            changes[field.name] = values[field.name]
    return dataclasses.replace(record, **changes)


def made_of(kind: type[_R], values: Mapping[str, Any]) -> _R:
    """The record of these values, such as a file has them.

    Raises:
      ValueError: a field that is missing or unknown, or what the record itself raises.
    """
    fields = {field.name: field for field in dataclasses.fields(kind)}  # pyright: ignore
    for name in values:
        if name not in fields:
            raise ValueError(f"unknown field {name}{nearest(name, fields)}")
    for name, field in fields.items():
        if name not in values and field.default is dataclasses.MISSING:
            raise ValueError(f"the field {name} is missing")
    return kind(**values)


def settings_of(
    record: Any, all_of_them: bool = False, with_fixed: bool = False
) -> dict[str, Setting]:
    """The settings of a record and of the records in it by name.

    Args:
      record: a dataclass instance.
      all_of_them: also those that have no effect, by their `When`.
      with_fixed: also what is marked as `Fixed`, or has one value only.
    """
    found = {}
    hints, docs = _hints(type(record)), field_docs(type(record))
    for field in dataclasses.fields(record):
        value, hint = getattr(record, field.name), hints[field.name]
        if isinstance(value, Record):
            inner = settings_of(value, all_of_them, with_fixed)
            if twice := found.keys() & inner.keys():
                raise ValueError(f"two settings are named {sorted(twice)[0]}; rename one of them")
            found |= inner
        elif _is_fixed(hint) and not with_fixed:
            continue
        elif all_of_them or all(each.holds(record) for each in _metadata(hint, When)):
            found[field.name] = Setting(hint, value, docs.get(field.name, ""))
    return found


def values_of(record: Any) -> dict[str, Any]:
    """The values of all settings that have an effect, and of what is fixed, by name."""
    found = settings_of(record, with_fixed=True)
    return {name: setting.value for name, setting in found.items()}


def words(record: Any) -> str:
    """The settings in words, without those that are None, False or empty."""
    said = []
    for name, value in values_of(record).items():
        name = name.replace("_", " ")
        if value is True:
            said.append(name)
        elif value is not None and value is not False and value != ():
            said.append(f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}")
    return ", ".join(said)


def check(record: Any) -> None:
    """Raises ValueError for the first field of a dataclass that is not of its type and range."""
    hints = _hints(type(record))
    for field in dataclasses.fields(record):
        check_value(field.name, getattr(record, field.name), hints[field.name])


def check_arguments(factory: str, record: type, arguments: Mapping[str, Any]) -> None:
    """The range checks of a factory, for its arguments that are fields of a record.

    Args:
      factory: its name, for the message.
      record: where the ranges are declared.
      arguments: by name, such as `locals()`; those without a range in the record, and traced ones,
        are passed over.

    Raises:
      ValueError: the first value that is out of its range.
    """
    for name, hint in _hints(record).items():
        value: Any = arguments.get(name)
        if name not in arguments or not any(_metadata(hint, Range)) or isinstance(value, Tracer):
            continue
        is_scalar = isinstance(value, jax.Array | np.ndarray) and value.ndim == 0
        check_value(name, value.item() if is_scalar else value, hint, f"{factory}: ")


def check_value(name: str, value: Any, hint: Any, prefix: str = "") -> None:
    """Raises ValueError for a value that is not of the type and range of a hint."""
    if not fits(value, hint):
        raise ValueError(
            f"{prefix}{name}={value!r:.60} must be {_said(hint)}{_near_choice(value, hint)}"
        )


def check_choice(name: str, value: str, choices: Collection[str]) -> None:
    """Raises ValueError for a value that is none of the choices."""
    if value not in choices:
        raise ValueError(
            f"{name}={value!r} must be one of {', '.join(choices)}{nearest(value, choices)}"
        )


def nearest(name: Any, names: Iterable[str]) -> str:
    """A hint at the most similar of some names, or nothing."""
    found = difflib.get_close_matches(str(name), list(names), 1)
    return f"; did you mean {found[0]}?" if found else ""


def range_of(hint: Any) -> str:
    """The range of a hint in words; nothing where it has none."""
    return "; ".join(dict.fromkeys(str(each) for each in _metadata(hint, Range)))


def plain(hint: Any) -> Any:
    """A hint without its ranges, as a parser of command lines takes it."""
    if typing.get_origin(hint) is Annotated:
        return plain(typing.get_args(hint)[0])
    if _is_union(hint):
        return functools.reduce(lambda a, b: a | b, map(plain, typing.get_args(hint)))
    if typing.get_origin(hint) is tuple:
        return tuple[tuple(each if each is ... else plain(each) for each in typing.get_args(hint))]
    return hint


def field_docs(record: type) -> dict[str, str]:
    """The strings below the fields of a dataclass, by name; bases included."""
    found: dict[str, str] = {}
    for each in reversed(record.__mro__):
        if dataclasses.is_dataclass(each):
            found |= _own_field_docs(each)
    return found


@functools.cache
def _own_field_docs(record: type) -> dict[str, str]:
    try:
        (tree,) = ast.parse(textwrap.dedent(inspect.getsource(record))).body
    except (OSError, TypeError):  # made in an interactive session
        return {}
    assert isinstance(tree, ast.ClassDef)
    found = {}
    for field, doc in itertools.pairwise(tree.body):
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
            match doc:
                case ast.Expr(ast.Constant(str() as text)):
                    found[field.target.id] = " ".join(text.split())
    return found


@functools.cache
def _hints(record: type) -> dict[str, Any]:
    return typing.get_type_hints(record, include_extras=True)


def _is_fixed(hint: Any) -> bool:
    one_choice = typing.get_origin(hint) is Literal and len(typing.get_args(hint)) == 1
    return one_choice or any(_metadata(hint, Fixed))


def _is_union(hint: Any) -> bool:
    return typing.get_origin(hint) in (typing.Union, types.UnionType)


def _metadata(hint: Any, kind: type) -> Iterator[Any]:
    """What a hint is annotated with, also inside a union or a tuple."""
    if typing.get_origin(hint) is Annotated:
        yield from (each for each in hint.__metadata__ if isinstance(each, kind))
        yield from _metadata(typing.get_args(hint)[0], kind)
    elif _is_union(hint) or typing.get_origin(hint) is tuple:
        for option in typing.get_args(hint):
            yield from _metadata(option, kind)


def fits(value: Any, hint: Any) -> bool:
    """Whether a value is of the type and range of a hint."""
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return True
    if origin is Annotated:
        ranges = [each for each in hint.__metadata__ if isinstance(each, Range)]
        return fits(value, parts[0]) and all(value in each for each in ranges)
    if _is_union(hint):
        return any(fits(value, option) for option in parts)
    if origin is Literal:
        return any(type(value) is type(option) and value == option for option in parts)
    if origin is tuple:
        options = parts[:1] * len(value) if isinstance(value, tuple) and parts[-1] is ... else parts
        return (
            isinstance(value, tuple)
            and len(value) == len(options)
            and all(map(fits, value, options))
        )
    if hint in (int, float):
        kind: Any = Integral if hint is int else Real
        if not isinstance(value, kind) or isinstance(value, bool):
            return False
        return hint is int or isinstance(value, float) or abs(value) <= sys.float_info.max
    return isinstance(value, origin or hint)


def _said(hint: Any) -> str:
    """What a hint allows, in words."""
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        return ", ".join(filter(None, [_said(parts[0]), range_of(hint)]))
    if origin is Literal:
        return f"one of {', '.join(map(str, parts))}"
    if _is_union(hint):
        return " or ".join(map(_said, parts))
    if origin is tuple:
        count = "" if parts[-1] is ... else f" of {len(parts)}"
        return f"a list{count}, each {_said(parts[0])}"
    return _WORDS.get(hint) or getattr(hint, "__name__", str(hint))


def _near_choice(value: Any, hint: Any) -> str:
    options = typing.get_args(plain(hint))
    options += tuple(itertools.chain(*map(typing.get_args, options)))
    return nearest(value, [each for each in options if isinstance(each, str)])


_WORDS: dict[Any, str] = {
    int: "an integer",
    float: "a finite number",
    bool: "True or False",
    str: "text",
    Path: "a path",
    types.NoneType: "None",
}
