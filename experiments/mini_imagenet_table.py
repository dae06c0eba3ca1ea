"""The published table of mini-ImageNet accuracies, beside what this library gives.

    python -m experiments.mini_imagenet_table --data-dir DIR --budget 0.01
    python -m experiments.mini_imagenet_table --data-dir DIR --ways 10 --algorithms reptile

As `omniglot_table`; ten ways are Reptile's.
"""

import dataclasses
from pathlib import Path
from typing import Any, Literal

from experiments import mini_imagenet
from experiments.shared import accuracy_table, common


@dataclasses.dataclass(frozen=True)
class Config(accuracy_table.Config):
    """Which cells to run, and for how long."""

    ways: tuple[Literal[5, 10], ...] = (5,)
    """Classes a task."""
    shots: tuple[Literal[1, 5], ...] = (1, 5)
    """Support examples a class."""
    workdir: Path = Path("runs/mini_imagenet_table")
    """One folder a cell."""
    output: Path = Path("runs/mini_imagenet_table/table")
    """Where to write the table, without an ending."""


def main(config: Config) -> list[dict[str, Any]]:
    """Runs the cells and writes the table; see `accuracy_table.main`."""
    table = accuracy_table.Table("mini_imagenet", mini_imagenet.main, mini_imagenet.Config.of)
    return accuracy_table.main(config, table)


if __name__ == "__main__":
    common.run_cli(main, Config, __doc__)
