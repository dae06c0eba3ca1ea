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
from experiments.shared import accuracy_table, common, few_shot

TASKS = ((5, 1), (5, 5), (20, 1), (20, 5))
# Rajeswaran et al., NeurIPS 2019, table 2, which takes the first four rows from their own papers:
# per cent and half-width of the interval, in the order of TASKS.
_PRINTED: dict[few_shot.Algorithm, tuple[tuple[float, float], ...]] = {
    "maml": ((98.7, 0.4), (99.9, 0.1), (95.8, 0.3), (98.9, 0.2)),
    "fomaml": ((98.3, 0.5), (99.2, 0.2), (89.4, 0.5), (97.9, 0.1)),
    "reptile": ((95.39, 0.09), (98.90, 0.10), (88.14, 0.15), (96.65, 0.33)),
    "reptile_transductive": ((97.68, 0.04), (99.48, 0.06), (89.43, 0.14), (97.12, 0.32)),
    "imaml": ((99.16, 0.35), (99.67, 0.12), (94.46, 0.42), (98.69, 0.1)),
    "imaml_hf": ((99.50, 0.26), (99.74, 0.11), (96.18, 0.36), (99.14, 0.1)),
}
PUBLISHED: accuracy_table.Published = {
    **{name: dict(zip(TASKS, row, strict=True)) for name, row in _PRINTED.items()},
    # Antoniou et al., ICLR 2019 (an ensemble), Raghu et al., ICLR 2020: spreads over three seeds.
    "mamlpp": {(5, 1): (99.47, None), (20, 1): (97.65, 0.05), (20, 5): (99.33, 0.03)},
    "anil": {(20, 1): (96.2, 0.5), (20, 5): (98.0, 0.3)},
    "implicit_anil": {},
    "platipus": {},
    "bmaml": {},
}


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
    make = partial(omniglot.Config, download=config.download)
    table = accuracy_table.Table("omniglot", PUBLISHED, omniglot.main, make)
    return accuracy_table.main(config, table)


if __name__ == "__main__":
    common.run_cli(main, Config, __doc__)
