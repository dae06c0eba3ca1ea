"""The settings of a run as a YAML file."""

import contextlib
import dataclasses
import difflib
import types
import typing
from collections import Counter
from collections.abc import Collection
from pathlib import Path
from typing import Any, Literal

import yaml

_UNIONS = (typing.Union, types.UnionType)
# What PyYAML raises, and what it lets through from a value that its tag does not fit.
_NO_YAML = (yaml.YAMLError, ValueError, LookupError, AttributeError, OverflowError, RecursionError)


class _Loader(yaml.SafeLoader):
    """Refuses a key that is there twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        found = super().construct_mapping(node, deep)
        for name, count in Counter(str(key.value) for key, _ in node.value).items():
            if count > 1:
                raise ValueError(f"{name} is there twice; take one of the two out")
        return found


def read(path: Path, config: type) -> dict[str, Any]:
    """The settings that a file gives, of the types that the fields of `config` have.

    Args:
      path: a YAML file, one mapping of field names to values; an empty one gives none.
      config: dataclass whose fields are of numbers, strings, paths, booleans, literals, None,
        unions of these and tuples of them.

    Raises:
      ValueError: the file cannot be read or is no mapping, a key is no field, or a value is not of
        its field's type; the message names the key, what is allowed and the nearest match.
    """
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except (OSError, *_NO_YAML) as error:
        raise ValueError(
            f"config={path} cannot be read as YAML ({' '.join(str(error).split())})"
        ) from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ValueError(f"config={path} must map names of settings to values, such as `seed: 1`")
    hints = typing.get_type_hints(config)
    names = [field.name for field in dataclasses.fields(config)]
    found = {}
    for key, value in values.items():
        if key not in names:
            raise ValueError(f"config={path}: {key} is no setting{_nearest(key, names)}")
        try:
            found[key] = _converted(value, hints[key])
        except (ValueError, OverflowError):
            choices = [option for option in _options(hints[key]) if isinstance(option, str)]
            raise ValueError(
                f"config={path}: {key}={value!r} must be {_said(hints[key])}"
                + _nearest(value, choices)
            ) from None
    return found


def text(config: Any, leave_out: Collection[str] = ()) -> str:
    """A YAML text from which `read` makes the same config."""
    values = {
        field.name: _plain(getattr(config, field.name))
        for field in dataclasses.fields(config)
        if field.name not in leave_out
    }
    return yaml.safe_dump(values, sort_keys=False)


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_plain(each) for each in value]
    return str(value) if isinstance(value, Path) else value


def _options(hint: Any) -> list[Any]:
    """The types, and values of literals, that a hint allows."""
    if typing.get_origin(hint) in (*_UNIONS, Literal):
        return [each for part in typing.get_args(hint) for each in _options(part)]
    if typing.get_origin(hint) is tuple:
        return _options(typing.get_args(hint)[0])
    return [hint]


def _converted(value: Any, hint: Any) -> Any:
    """`value` as the hint has it; ValueError or OverflowError where that cannot be."""
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin in _UNIONS:
        for part in parts:
            with contextlib.suppress(ValueError, OverflowError):
                return _converted(value, part)
        raise ValueError
    if origin is tuple:
        if not isinstance(value, list):
            raise ValueError
        hints = parts[:1] * len(value) if parts[-1] is ... else parts
        return tuple(_converted(each, part) for each, part in zip(value, hints, strict=True))
    for option in _options(hint):
        if option in (None, types.NoneType) and value is None:
            return None
        if option in (bool, str) and isinstance(value, option):
            return value
        if option is int and isinstance(value, int) and not isinstance(value, bool):
            return value
        if option is float and isinstance(value, int | float | str) and not isinstance(value, bool):
            return float(value)  # YAML takes 1e-3, without a point, for a string
        if option is Path and isinstance(value, str):
            return Path(value)
        if not isinstance(option, type) and type(option) is type(value) and option == value:
            return value
    raise ValueError


def _said(hint: Any) -> str:
    *most, last = _words(hint)
    return f"{', '.join(most)} or {last}" if most else last


def _words(hint: Any) -> list[str]:
    """What a hint allows, in words."""
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin in (*_UNIONS, Literal):
        return [word for part in parts for word in _words(part)]
    if origin is tuple:
        size = "" if parts[-1] is ... else f" of {len(parts)}"
        return [f"a list{size} (each {_said(parts[0])})"]
    words = {
        bool: "true or false",
        int: "a whole number",
        float: "a number",
        str: "text",
        Path: "a path",
        types.NoneType: "null",
    }
    return [words.get(hint) or repr(hint)]


def _nearest(value: Any, names: Collection[str]) -> str:
    near = difflib.get_close_matches(str(value), names, 1)
    return f"; did you mean {near[0]}?" if near else ""
