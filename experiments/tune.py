"""The same number of short trials for every algorithm, judged on validation characters only.

    python -m experiments.tune --algorithm imaml --data-dir DIR --output experiments/results/tuning

Each trial is the `common` protocol but for what is named here; that protocol has what came out
best. Finished trials are skipped, so that a run that was stopped goes on.
"""

import dataclasses
import json
import time
from pathlib import Path
from typing import Any

from experiments.shared import common, few_shot
from imaml_jax.data import omniglot

_MAML = (
    {"inner_rate": 0.1},
    {"inner_rate": 0.1, "outer_rate": 1e-3},
    {"inner_rate": 0.4},
    {"inner_rate": 0.03},
)
# Reptile trains alike with and without transduction, so that one set of trials serves both. They
# have the published 5 tasks a meta-step; `common` has 8, which two devices can share.
_REPTILE = (
    {"meta_batch": 5, "inner_rate": 1e-3},
    {"meta_batch": 5, "inner_rate": 3e-3},
    {"meta_batch": 5, "inner_rate": 1e-3, "num_steps": 10},
    {"meta_batch": 5, "inner_rate": 3e-3, "num_steps": 10},
)
_FEWER = {"num_steps": 2, "eval_num_steps": 2, "cg_steps": 5}
TRIALS: dict[few_shot.Algorithm, tuple[dict[str, Any], ...]] = {
    "imaml": (
        {"reg_strength": 0.1},
        {"reg_strength": 0.1, "outer_rate": 1e-3},
        {"reg_strength": 0.03},
        {"reg_strength": 0.1, "curvature": "hessian"},
    ),
    "implicit_anil": (
        {"reg_strength": 0.03},
        {"reg_strength": 0.003},
        {"reg_strength": 0.3},
        {"reg_strength": 0.03, "outer_rate": 1e-3},
    ),
    "anil": (*_MAML[:2], {"inner_rate": 0.4}, {"inner_rate": 1.0}),
    "mamlpp": _MAML,
    "platipus": _MAML,
    "bmaml": ({"inner_rate": 0.03}, {"inner_rate": 0.1}, {"inner_rate": 0.3}, {"inner_rate": 0.01}),
    "imaml_hf": (
        {"reg_strength": 0.1, "num_steps": 3, "eval_num_steps": 3, "cg_steps": 8},
        {"reg_strength": 0.1, **_FEWER},
        {"reg_strength": 0.1, **_FEWER, "num_steps": 1, "eval_num_steps": 1},
        {"reg_strength": 0.5, **_FEWER},
    ),
    "maml": _MAML,
    "fomaml": _MAML,
    "reptile": _REPTILE,
    "reptile_transductive": _REPTILE,
}


@dataclasses.dataclass(frozen=True)
class Config:
    """Which trials to run."""

    algorithm: few_shot.Algorithm = "imaml"
    """Meta-learning algorithm."""
    data_dir: Path | None = None
    """Directory of the public zips; default the environment variable IMAML_DATA_DIR."""
    meta_steps: int = 500
    """Meta-steps of a trial, at least 1."""
    validation_tasks: int = 300
    """Validation tasks, the same for every trial and algorithm; at least 1."""
    seed: int = 0
    """Seed of every trial, at least 0."""
    output: Path = Path("runs/tuning")
    """Directory for one JSON file an algorithm."""


def main(config: Config) -> list[dict[str, Any]]:
    """Runs the trials; returns and writes one row each, with the accuracy at the last step."""
    path = config.output / f"{config.algorithm}.json"
    rows = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    config.output.mkdir(parents=True, exist_ok=True)
    for changes in TRIALS[config.algorithm]:
        settings = few_shot.Config(
            algorithm=config.algorithm,
            meta_steps=config.meta_steps,
            validate_every=config.meta_steps,
            validation_tasks=config.validation_tasks,
            seed=config.seed,
            **changes,
        )
        protocol = few_shot.resolve(settings)
        trial = {
            "settings": protocol._asdict(),
            "seed": config.seed,
            "validation_tasks": config.validation_tasks,
        }
        if any(all(row[k] == v for k, v in trial.items()) for row in rows):
            continue
        splits = omniglot.load(config.data_dir, split=protocol.split)
        started = time.perf_counter()
        history = few_shot.meta_train(settings, protocol, splits, "Omniglot").history
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


if __name__ == "__main__":
    common.run_cli(main, Config, __doc__)
