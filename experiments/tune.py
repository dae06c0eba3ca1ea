"""The same number of short trials for every algorithm, judged on validation characters only.

    python -m experiments.tune --algorithm imaml --data-dir DIR --output experiments/results/tuning

Each trial changes some settings of the `common` protocol, which has the best of them. Finished
trials are skipped, so that a run that was stopped goes on.
"""

import dataclasses
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from experiments import omniglot
from experiments.shared import common, few_shot
from imaml_jax import protocols
from imaml_jax.learners.settings import Count, Record, Seed, check_choice
from imaml_jax.protocols.trials import TRIALS


@dataclasses.dataclass(frozen=True)
class Config(Record):
    """Which trials to run."""

    algorithm: str = "imaml"
    """Meta-learning algorithm."""
    data_dir: Path | None = None
    """Directory of the public zips; default the environment variable IMAML_DATA_DIR."""
    meta_steps: Count = 500
    """Meta-steps of a trial."""
    validation_tasks: Count = 300
    """Validation tasks, the same for every trial and algorithm."""
    seed: Seed = 0
    """Seed of every trial."""
    output: Path = Path("runs/tuning")
    """Directory for one JSON file an algorithm."""

    @classmethod
    def choices(cls) -> Mapping[str, tuple[str, ...]]:
        """The values of settings that are names."""
        return {"algorithm": (*TRIALS,)}

    def check_together(self) -> None:
        """Raises ValueError for an algorithm without trials."""
        check_choice("algorithm", self.algorithm, TRIALS)


def main(config: Config) -> list[dict[str, Any]]:
    """Runs the trials; returns and writes one row each, with the accuracy at the last step."""
    path = config.output / f"{config.algorithm}.json"
    rows = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    config.output.mkdir(parents=True, exist_ok=True)
    for changes in TRIALS[config.algorithm]:
        own = omniglot.Config.of(
            algorithm=config.algorithm,
            data_dir=config.data_dir,
            meta_steps=config.meta_steps,
            validate_every=config.meta_steps,
            validation_tasks=config.validation_tasks,
            seed=config.seed,
            **changes,
        )
        trial = {
            "settings": own.settings.recorded(),
            "seed": config.seed,
            "validation_tasks": config.validation_tasks,
        }
        if any(_is_of(row, trial) for row in rows):
            continue
        prepared = omniglot.prepare(own)
        started = time.perf_counter()
        history = few_shot.meta_train(*prepared).history
        rows.append(
            {
                "algorithm": config.algorithm,
                "changes": changes,
                **trial,
                "validation": history[-1]["validation"],
                "validation_ci95": history[-1]["validation_ci95"],
                "inner_residual": history[-1].get("inner_residual"),
                "seconds": round(time.perf_counter() - started, 1),
                **common.provenance(),
            }
        )
        common.write_json(path, rows)
        print(f"{changes}: {100 * rows[-1]['validation']:.2f}%", flush=True)
    return rows


def _is_of(row: dict[str, Any], trial: dict[str, Any]) -> bool:
    """Whether a row is of the trial; earlier versions recorded the settings of all algorithms."""
    settings = protocols.from_settings(row["settings"]).recorded()
    return row | {"settings": settings} | trial == row | {"settings": settings}


if __name__ == "__main__":
    common.run_cli(main, Config, __doc__)
