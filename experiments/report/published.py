"""What is in print of a run's task: the value, the protocol that it belongs to, its budget."""

import re
from typing import Any, NamedTuple

from experiments.report.runs import mapping, provenance, word
from imaml_jax import protocols
from imaml_jax.protocols import leo, navigation, sinusoid
from imaml_jax.protocols.published import OWN_PROTOCOL, PUBLISHED, SPREADS

_OVER_TASKS, _NO_INTERVAL = "95% interval over test tasks", "no interval in print"


class Published(NamedTuple):
    """A published value, the half-width of its interval or None, and what that is."""

    value: float
    half_width: float | None
    kind: str


def shape_of(results: dict[str, Any]) -> tuple[str, int | None, int | None]:
    """Data set, ways and shots."""
    places = results, mapping(results, "test_tasks")
    dataset, ways, shots = (
        next((place[name] for place in places if place.get(name) is not None), None)
        for name in ("dataset", "ways", "shots")
    )
    said = re.fullmatch(r"(\S+) (\d{1,9})-way (\d{1,9})-shot", str(results.get("task", "")))
    if said:
        dataset, ways, shots = said[1], int(said[2]), int(said[3])
    if dataset is None:  # a row of the tables has its data set in the command alone
        command = str(provenance(results).get("command", ""))
        if "experiments.tune " in command:
            return "Omniglot", 5, 1
        names = [name for name in PUBLISHED if f"experiments.{name}_table" in command]
        dataset = "Omniglot" if names == ["omniglot"] else names[0] if names else None
    known = [value if isinstance(value, int) else None for value in (ways, shots)]
    return str(dataset or ""), known[0], known[1]


def published_of(results: dict[str, Any]) -> Published | None:
    dataset, ways, shots = shape_of(results)
    algorithm: Any = word(results, "algorithm")
    if results.get("constants") and algorithm == "leo":
        match results.get("published"):
            case [int() | float() as value, int() | float() as half]:
                return Published(value, half, "95% interval, on its authors' features")
        return None
    if dataset == "navigation" or results.get("task") == "2D navigation":
        value = navigation.AFTER_ONE_UPDATE.get(algorithm)
        return None if value is None else Published(value, None, _NO_INTERVAL)
    shape: Any = (ways, shots)
    found = PUBLISHED.get(dataset.lower(), {}).get(algorithm, {}).get(shape)
    if not found:
        return None
    value, half = found
    kind = SPREADS.get(algorithm, _OVER_TASKS)
    return Published(value, half, _NO_INTERVAL if half is None else kind)


def full_steps_of(results: dict[str, Any]) -> int | None:
    dataset, algorithm = shape_of(results)[0], word(results, "algorithm")
    if isinstance(results.get("full_meta_steps"), int):
        return results["full_meta_steps"]
    if results.get("constants"):
        return leo.META_STEPS if algorithm in ("leo", "deterministic") else None
    if dataset == "navigation" and algorithm in navigation.SETTINGS:
        return navigation.SETTINGS[algorithm][1].meta_steps
    if dataset == "sinusoid" and algorithm in sinusoid.SETTINGS:
        return sinusoid.SETTINGS[algorithm][1].meta_steps
    name = word(mapping(results, "settings"), "name")
    names = name, word(results, "protocol"), own_protocol(results)
    found = (protocol_of(name, results) for name in names)
    return next((protocol.outer.meta_steps for protocol in found if protocol is not None), None)


def own_protocol(results: dict[str, Any]) -> str | None:
    """The name of the one that was published with the algorithm."""
    return OWN_PROTOCOL.get(str(word(results, "algorithm")))


def protocol_of(name: Any, results: dict[str, Any]) -> protocols.Protocol | None:
    dataset, ways, shots = shape_of(results)
    if name not in protocols.PROTOCOLS or ways is None or shots is None:
        return None
    kind = "omniglot" if dataset.lower() in ("omniglot", "glyphs") else "mini_imagenet"
    try:
        return protocols.get(
            name, algorithm=str(results.get("algorithm")), ways=ways, shots=shots, dataset=kind
        )
    except (ValueError, OverflowError):  # it does not cover the algorithm, or such shots
        return None
