"""Few-shot accuracy on characters never seen in training, on the complete Omniglot set.

python -m experiments.omniglot --algorithm imaml --data-dir DIR
python -m experiments.omniglot --algorithm maml --protocol finn --ways 20 --download
"""

import dataclasses
from pathlib import Path
from typing import Any

from experiments.shared import common, few_shot
from imaml_jax.data import omniglot
from imaml_jax.data.episodes import Splits


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(few_shot.Config):
    """Omniglot few-shot classification."""

    data_dir: Path | None = None
    """Directory of the public zips; default the environment variable IMAML_DATA_DIR."""
    download: bool = False
    """Fetch the zips through tensorflow-datasets where they are absent."""


def prepare(config: Config) -> tuple[Config, Splits, str]:
    """The config, the data and their name, as `few_shot.run` takes them."""
    split = config.settings.tasks.split
    splits = omniglot.load(config.data_dir, split=split, download=config.download)
    return config, splits, "Omniglot"


def main(config: Config) -> dict[str, Any]:
    """Runs the experiment; see `few_shot.run`."""
    return few_shot.run(*prepare(config))


if __name__ == "__main__":
    common.run_cli(main, Config, __doc__)
