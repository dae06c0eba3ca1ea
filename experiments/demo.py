"""The main job on the embedded data, in a few minutes: `make demo`.

Meta-trains first-order MAML and implicit MAML on glyphs and prints their accuracy on unseen ones
beside that of the untrained initialisation. Exits with 1 unless implicit MAML's 95% interval lies
above the untrained one's.
"""

import dataclasses
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from experiments import glyphs
from experiments.shared import common, few_shot

WORKDIR = Path("runs/demo")
META_STEPS = {"fomaml": 400, "imaml": 400}


def main(
    workdir: Path = WORKDIR,
    meta_steps: Mapping[str, int] = META_STEPS,
    **settings: Any,
) -> bool:
    """Runs the demo.

    Args:
      workdir: where runs are kept; a finished one is not repeated.
      meta_steps: budget of each algorithm.
      **settings: other fields of `glyphs.Config`.

    Returns:
      Whether implicit MAML's interval lies above the untrained one's.
    """
    config = glyphs.Config.of(algorithm="imaml", **settings)
    base = few_shot.untrained(*glyphs.prepare(config)[:2])
    rows = [("untrained initialisation", base.mean, base.ci95, 0.0)]
    for algorithm, steps in meta_steps.items():
        results = glyphs.main(
            glyphs.Config.of(
                algorithm=algorithm,
                meta_steps=steps,
                workdir=workdir / algorithm,
                **{"validate_every": 200, **settings},
            )
        )
        rows.append((algorithm, results["test_accuracy"], results["test_ci95"], results["seconds"]))
    print(f"\n{'5-way 1-shot, unseen glyphs':28} {'test accuracy, 95% CI':>22} {'training':>9}")
    for name, mean, half_width, seconds in rows:
        accuracy = f"{100 * mean:.2f} ± {100 * half_width:.2f}%"
        print(f"{name:28} {accuracy:>22} {seconds:7.0f} s")
    summary = workdir / "results.json"
    fields = ("name", "test_accuracy", "test_ci95", "seconds")
    common.write_json(summary, [dict(zip(fields, row, strict=True)) for row in rows])
    print(f"\nlearning curve: {workdir / 'imaml' / 'learning_curve.png'}\nresults: {summary}")
    _, mean, half_width, _ = rows[-1]
    return mean - half_width > base.mean + base.ci95


@dataclasses.dataclass(frozen=True)
class Config:
    """The demo has no settings but its folder."""

    workdir: Path = WORKDIR
    """Where runs are kept; a finished one is not repeated."""


if __name__ == "__main__":
    sys.exit(not common.run_cli(lambda config: main(config.workdir), Config, __doc__))
