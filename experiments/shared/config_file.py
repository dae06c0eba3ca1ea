"""The settings of a run as a YAML file."""

import contextlib
import types
from collections import Counter
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import yaml

from imaml_jax.learners.registry import ALGORITHMS
from imaml_jax.learners.settings import Setting, check_value, nearest, plain, settings_of
from imaml_jax.policies.settings import POLICY_ALGORITHMS

# What PyYAML raises, and what it lets through from a value that its tag does not fit.
_NO_YAML = (yaml.YAMLError, ValueError, LookupError, AttributeError, OverflowError, RecursionError)


class _Loader(yaml.SafeLoader):
    """Refuses a key that is there twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        found = super().construct_mapping(node, deep)
        for name, count in Counter(str(key.value) for key, _ in node.value).items():
            if count > 1:
                raise ValueError(f"{name} is given twice: remove one")
        return found


def load(path: Path) -> dict[str, Any]:
    """The mapping that a file holds; an empty file has none.

    Raises:
      ValueError: the file cannot be read or is no mapping.
    """
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except (OSError, *_NO_YAML) as error:
        raise ValueError(
            f"config={path} cannot be read as YAML ({' '.join(str(error).split())})"
        ) from None
    if not isinstance(values, dict | None):
        raise ValueError(f"config={path} must map names of settings to values, such as `seed: 1`")
    return values or {}


def convert(
    path: Path,
    values: Mapping[str, Any],
    known: Mapping[str, Setting],
    constants: Mapping[str, Any],
) -> dict[str, Any]:
    """The values of a file in the types of the settings that they are for.

    A null is what is not given, also for a setting of another algorithm, since earlier versions
    wrote every name; the word None is None. The only value that a setting can have is passed over.

    Args:
      path: of the file, for errors.
      values: what `load` found there.
      known: the settings that there are.
      constants: those that have one value only.

    Raises:
      ValueError: an unknown name, or a value that is not of its type and range; the message has the
        nearest match.
    """
    found = {}
    for name, value in values.items():
        if value is None and (name in known or name in _names_of_all_algorithms()):
            continue
        if name in known:
            found[name] = typed(value, known[name].hint)
            check_value(name, found[name], known[name].hint, f"config={path}: ")
        elif value is None or name not in constants or value != constants[name]:
            raise ValueError(f"config={path}: {name} is no setting{nearest(name, known)}")
    return found


def text(config: Any, leave_out: Collection[str] = ()) -> str:
    """A YAML text from which the same config is read."""
    values = {
        name: _writable(setting.value)
        for name, setting in settings_of(config).items()
        if name not in leave_out
    }
    return yaml.safe_dump(values, sort_keys=False)


def typed(value: Any, hint: Any) -> Any:
    """What YAML or JSON has for a value of that hint: lists for tuples, texts for paths."""
    options = get_args(hint) if get_origin(hint := plain(hint)) not in (Literal, tuple) else ()
    options = options or (hint,)
    if value == "None" and types.NoneType in options:
        return None
    if isinstance(value, list):
        for option in options:
            if get_origin(option) is tuple:
                return tuple(typed(each, get_args(option)[0]) for each in value)
    if isinstance(value, str) and Path in options:
        return Path(value)
    if isinstance(value, str | int) and not isinstance(value, bool) and float in options:
        with contextlib.suppress(ValueError, OverflowError):
            return float(value)  # YAML takes 1e-3, without a point, for a text
    return value


def _names_of_all_algorithms() -> set[str]:
    kinds = (*ALGORITHMS.values(), *POLICY_ALGORITHMS.values())
    return {name for kind in kinds for name in settings_of(kind(), all_of_them=True)}


def _writable(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_writable(each) for each in value]
    return str(value) if isinstance(value, Path | types.NoneType) else value
