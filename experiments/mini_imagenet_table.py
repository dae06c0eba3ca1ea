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

# Per cent and half-width of the interval. Five ways: Rajeswaran et al., NeurIPS 2019, table 3, with
# the five-shot values from the papers that it cites. Ten ways, printed without intervals: Reptile.
PUBLISHED: accuracy_table.Published = {
    "maml": {(5, 1): (48.70, 1.84), (5, 5): (63.11, 0.92)},
    "fomaml": {(5, 1): (48.07, 1.75), (5, 5): (63.15, 0.91)},
    "reptile": {
        (5, 1): (47.07, 0.26),
        (5, 5): (62.74, 0.37),
        (10, 1): (31.1, None),
        (10, 5): (44.7, None),
    },
    "reptile_transductive": {
        (5, 1): (49.97, 0.32),
        (5, 5): (65.99, 0.58),
        (10, 1): (32.0, None),
        (10, 5): (47.6, None),
    },
    "imaml": {(5, 1): (48.96, 1.84)},
    "imaml_hf": {(5, 1): (49.30, 1.88)},
    # Antoniou et al., ICLR 2019 (an ensemble), Raghu et al., ICLR 2020: spreads over three seeds.
    "mamlpp": {(5, 1): (52.15, 0.26), (5, 5): (68.32, 0.44)},
    "anil": {(5, 1): (46.7, 0.4), (5, 5): (61.5, 0.5)},
    "implicit_anil": {},
    # Finn et al., NeurIPS 2018, and Yoon et al., NeurIPS 2018; a re-run of the latter gave 44.46.
    "platipus": {(5, 1): (50.13, 1.86)},
    "bmaml": {(5, 1): (53.80, None)},
}


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
    table = accuracy_table.Table(
        "mini_imagenet", PUBLISHED, mini_imagenet.main, mini_imagenet.Config
    )
    return accuracy_table.main(config, table)


if __name__ == "__main__":
    common.run_cli(main, Config, __doc__)
