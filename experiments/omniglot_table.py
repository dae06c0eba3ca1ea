"""The published table of Omniglot accuracies, beside what this library gives.

    python -m experiments.omniglot_table --data-dir DIR --budget 0.01
    python -m experiments.omniglot_table --data-dir DIR --ways 5 --protocols common

One run for each cell, under the protocol that the published value belongs to and under `common`,
whose data and test tasks are the same for all. Runs resume, and finished ones are skipped. The
table is printed, and written to OUTPUT.json, OUTPUT.md and OUTPUT.html.
"""

import dataclasses
from functools import partial
from pathlib import Path
from typing import Any, Literal

from experiments import omniglot
from experiments.shared import accuracy_table, common


@dataclasses.dataclass(frozen=True)
class Config(accuracy_table.Config):
    """Which cells to run, and for how long."""

    ways: tuple[Literal[5, 20], ...] = (5, 20)
    """Classes a task."""
    shots: tuple[Literal[1, 5], ...] = (1, 5)
    """Support examples a class."""
    download: bool = False
    """Fetch the zips through tensorflow-datasets where they are absent."""
    workdir: Path = Path("runs/omniglot_table")
    """One folder a cell."""
    output: Path = Path("runs/omniglot_table/table")
    """Where to write the table, without an ending."""


def main(config: Config) -> list[dict[str, Any]]:
    """Runs the cells and writes the table; see `accuracy_table.main`."""
    make = partial(omniglot.Config.of, download=config.download)
    return accuracy_table.main(config, accuracy_table.Table("omniglot", omniglot.main, make))


if __name__ == "__main__":
    common.run_cli(main, Config, __doc__)
