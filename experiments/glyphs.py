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
from imaml_jax.protocols.protocol import ImageTasks


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(few_shot.Config):
    """Glyph few-shot classification."""

    @classmethod
    def published(cls, **selectors: Any) -> Protocol:
        """The protocol of Omniglot on the glyphs' own split, without rotations and shorter."""
        protocol = super().published(**selectors)
        none = {"train_rotations": None, "test_rotations": None}
        protocol = few_shot.with_tasks(protocol, ImageTasks, split="glyphs", **none)
        return protocol.with_settings({"meta_steps": 1000})


def prepare(config: Config) -> tuple[Config, Splits, str]:
    """The config, the data and their name, as `few_shot.run` takes them."""
    return config, glyphs.load(), "glyphs"


def main(config: Config) -> dict[str, Any]:
    """Runs the experiment; see `few_shot.run`."""
    return few_shot.run(*prepare(config))


if __name__ == "__main__":
    common.run_cli(main, Config, __doc__)
