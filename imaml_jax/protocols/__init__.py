"""Training and evaluation settings as records: one file per published source; and saved models.

Imports any other wing. Read `protocol.py` first: it defines the record that the other files fill;
`published.py` has the accuracies in print, `model_file.py` saved models. "Omniglot 5-way 1-shot"
is used for several different benchmarks, so always report the protocol.
"""

from collections.abc import Callable, Collection
from typing import NamedTuple

from imaml_jax.learners.registry import settings_class
from imaml_jax.learners.settings import Count, check_value, nearest
from imaml_jax.protocols import common, finn, imaml, mamlpp, reptile
from imaml_jax.protocols.protocol import Protocol, from_settings

__all__ = ["DATASETS", "PROTOCOLS", "Protocol", "Source", "from_settings", "get"]

DATASETS = ("mini_imagenet", "omniglot")


class Source(NamedTuple):
    """A published protocol: the algorithms that it covers, and the function that makes it."""

    covers: Collection[str]
    make: Callable[[str, int, int, bool], Protocol]


PROTOCOLS = {
    "common": Source(common.COVERS, common.make),
    "finn": Source(finn.COVERS, finn.make),
    "imaml_dev": Source(imaml.CODE_COVERS, imaml.make_code),
    "imaml_paper": Source(imaml.COVERS, imaml.make_paper),
    "mamlpp_code": Source(mamlpp.COVERS, mamlpp.make_code),
    "mamlpp_paper": Source(mamlpp.COVERS, mamlpp.make_paper),
    "reptile": Source(reptile.COVERS, reptile.make),
}


def get(name: str, *, algorithm: str, ways: int, shots: int, dataset: str = "omniglot") -> Protocol:
    """Looks a protocol up.

    Args:
      name: one of `PROTOCOLS`.
      algorithm: one of `imaml_jax.learners.registry.ALGORITHMS`.
      ways: classes a task.
      shots: support examples a class at test.
      dataset: one of `DATASETS`; "mini_imagenet" for other photographs too.

    Returns:
      The `Protocol`; its `with_settings` changes it.

    Raises:
      ValueError: an unknown name, a number out of its range, or a protocol that does not cover the
        algorithm or data set.
    """
    for argument, value, allowed in (
        ("protocol", name, tuple(PROTOCOLS)),
        ("dataset", dataset, DATASETS),
    ):
        if value not in allowed:
            raise ValueError(
                f"{argument}={value!r} must be one of {allowed}{nearest(value, allowed)}"
            )
    check_value("ways", ways, Count)
    check_value("shots", shots, Count)
    if algorithm == "leo":
        raise ValueError(
            "algorithm='leo' learns from features, not images: python -m experiments.features "
            "makes them, python -m experiments.leo trains on them"
        )
    settings_class(algorithm)
    source = PROTOCOLS[name]
    if algorithm not in source.covers:
        raise ValueError(
            f"protocol={name!r} covers {' and '.join(source.covers)}, not algorithm={algorithm!r}"
        )
    return source.make(algorithm, ways, shots, dataset == "mini_imagenet")
