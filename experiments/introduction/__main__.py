"""An interactive introduction to meta-learning by implicit gradients: writes one HTML file.

    python -m experiments.introduction --output introduction.html

The file opens from disk in any browser, without a server and without a network. Every arrow,
contour and curve in it is computed here, by the library's public functions, on grids; the page
looks values up. It takes a minute or two on one core.
"""

import dataclasses
import time
from pathlib import Path
from typing import Any

import numpy as np

from experiments.introduction import costs, game, implicit, landscape, page, plane, sinusoids
from experiments.shared import common, reports
from imaml_jax.learners.settings import Record, Seed

# What is kept to a fixed precision: positions on the plane, up to 8 away from its middle, and
# predictions.
_POSITIONS = ("ends", "minima", "support_centres", "query_centres", "paths", "minimum")
_SCALES = {**dict.fromkeys(_POSITIONS, 1 / 4096), "fits": 1e-3}


@dataclasses.dataclass(frozen=True)
class Config(Record):
    """Where the page goes."""

    output: Path = Path("introduction.html")
    """The HTML file to write."""
    seed: Seed = 0
    """Seed of the tasks, the initialisations and the training runs, at least 0."""

    def check_together(self) -> None:
        if self.output.suffix != ".html":
            raise ValueError(f"output={self.output} must be a file that ends in .html")


def main(config: Config) -> dict[str, Any]:
    """Computes the figures and writes the page.

    Returns:
      The data in the page.

    Raises:
      ValueError: the page cannot be written there.
    """
    reports.begin(config)
    started = time.perf_counter()
    data = compute(config.seed)
    size = page.write(config.output, data)
    seconds = time.perf_counter() - started
    common.say(f"{config.output}: {size / 1e6:.2f} MB, computed in {seconds:.0f} s")
    return data


def compute(seed: int) -> dict[str, Any]:
    """All figures' data, packed."""
    tasks, lens, fits = plane.Sizes(), implicit.Sizes(), sinusoids.Sizes()
    rounds, measured = game.Sizes(), costs.Sizes()
    figures = {
        "seed": seed,
        **common.provenance(),
        "plane": {
            **tasks._asdict(),
            "extent": plane.EXTENT,
            "outer_rate": landscape.OUTER_RATE,
            "reach": landscape.REACH,
            **landscape.compute(tasks, seed),
        },
        "runs": landscape.trajectories(tasks, seed),
        "inner": {
            "task": implicit.TASK,
            "starts": implicit.STARTS,
            "rates": lens.rates,
            "steps": lens.steps,
            **implicit.inner_problem(lens, tasks.strengths, seed),
        },
        "solver": {
            "conditions": lens.conditions,
            "steps": lens.descent_steps,
            **implicit.solver_errors(lens, seed),
        },
        "sinusoid": {
            **fits._asdict(),
            "rate": sinusoids.RATE,
            "strength": sinusoids.STRENGTH,
            "inputs": sinusoids.curve_inputs(fits).tolist(),
            **sinusoids.fits(fits, seed),
        },
        "game": {**rounds._asdict(), **_game(game.play(rounds, seed))},
        "costs": {"steps": measured.num_steps, **costs.measure(measured, seed)},
    }
    return _packed(figures)


def _packed(found: Any, scale: float | None = None) -> Any:
    """With every array as text, to the precision of its name or that of the figure's part."""
    if isinstance(found, dict):
        return {name: _packed(each, _SCALES.get(name, scale)) for name, each in found.items()}
    return page.pack(found, scale) if isinstance(found, np.ndarray) else found


def _game(found: dict[str, Any]) -> dict[str, Any]:
    return {
        "sprite": page.sprite(found["images"]),
        "answers": found["answers"].tolist(),
        "probabilities": np.round(found["probabilities"].astype(float), 4).tolist(),
        "accuracy": round(float(found["accuracy"]), 4),
        "ci95": round(float(found["ci95"]), 4),
    }


if __name__ == "__main__":
    common.run_cli(main, Config, __doc__)
