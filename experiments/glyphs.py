"""Few-shot accuracy on unseen glyphs: characters of many scripts, rendered from bundled fonts.

    python -m experiments.glyphs --algorithm imaml

Needs no download. Rotations are off: many glyphs are quarter turns of one another.
"""

import dataclasses
from typing import Any

from experiments.shared import common, few_shot
from imaml_jax.data import glyphs
from imaml_jax.data.episodes import Splits
from imaml_jax.protocols import Protocol


@dataclasses.dataclass(frozen=True)
class Config(few_shot.Config):
    """Glyph few-shot classification."""

    meta_steps: int | None = 1000
    """Meta-steps in all, a multiple of log_every; the schedule of the outer rate ends there."""


def resolve(config: Config) -> Protocol:
    """The protocol for glyphs: the config's, on the data's own split and without rotations."""
    protocol = few_shot.resolve(config)
    return protocol._replace(split="glyphs", train_rotations=None, test_rotations=None)


def prepare(config: Config) -> tuple[Protocol, Splits, str]:
    """The protocol, the data and their name, as `few_shot.run` takes them."""
    return resolve(config), glyphs.load(), "glyphs"


def main(config: Config) -> dict[str, Any]:
    """Runs the experiment; see `few_shot.run`."""
    return few_shot.run(config, *prepare(config))


if __name__ == "__main__":
    common.run_cli(main, Config, __doc__)
