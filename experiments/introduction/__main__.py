"""An interactive introduction to meta-learning by implicit gradients: writes one HTML file.

    python -m experiments.introduction --output introduction.html

The file opens from disk in any browser, without a server and without a network. Every arrow,
contour and curve in it is computed here, by the library's public functions, on grids; the page
looks values up. It takes a minute or two on one core.
"""

import dataclasses
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from experiments.introduction import costs, game, implicit, landscape, page, plane, sinusoids
from experiments.shared import common

_POSITION = 1 / 4096  # positions on the plane to 0.0002, up to 8 away from its middle
_PREDICTION = 1e-3


@dataclasses.dataclass(frozen=True)
class Config:
    """Where the page goes."""

    output: Path = Path("introduction.html")
    """The HTML file to write."""
    seed: int = 0
    """Seed of the tasks, the initialisations and the training runs, at least 0."""


class Sizes(NamedTuple):
    """How much is computed, of every figure."""

    tasks: plane.Sizes = plane.Sizes()
    lens: implicit.Sizes = implicit.Sizes()
    fits: sinusoids.Sizes = sinusoids.Sizes()
    rounds: game.Sizes = game.Sizes()
    measured: costs.Sizes = costs.Sizes()


def main(config: Config, sizes: Sizes | None = None) -> dict[str, Any]:
    """Computes the figures and writes the page.

    Args:
      config: the settings.
      sizes: how much is computed; default what the page is made for.

    Returns:
      The data in the page.

    Raises:
      ValueError: a setting out of its range.
    """
    common.check_seed(config.seed)
    if config.output.suffix != ".html":
        raise ValueError(f"output={config.output} must be a file that ends in .html")
    common.check_output(config.output)
    common.cache_compilations()
    started = time.perf_counter()
    data = compute(config.seed, sizes or Sizes())
    size = page.write(config.output, data)
    seconds = time.perf_counter() - started
    common.say(f"{config.output}: {size / 1e6:.2f} MB, computed in {seconds:.0f} s")
    return data


def compute(seed: int, sizes: Sizes) -> dict[str, Any]:
    """All figures' data, packed."""
    size = sizes.tasks
    return {
        "seed": seed,
        **common.provenance(),
        "plane": {
            **size._asdict(),
            "extent": plane.EXTENT,
            "outer_rate": landscape.OUTER_RATE,
            "reach": landscape.REACH,
            **_landscape(size, seed),
        },
        "runs": _runs(size, seed),
        "inner": {
            "task": implicit.TASK,
            "starts": implicit.STARTS,
            "rates": sizes.lens.rates,
            "steps": sizes.lens.steps,
            **_inner_problem(sizes.lens, size.strengths, seed),
        },
        "solver": {
            "conditions": sizes.lens.conditions,
            "steps": sizes.lens.descent_steps,
            **{k: page.pack(x) for k, x in implicit.solver_errors(sizes.lens, seed).items()},
        },
        "sinusoid": _sinusoids(sizes.fits, seed),
        "game": _game(sizes.rounds, seed),
        "costs": {"steps": sizes.measured.num_steps, **costs.measure(sizes.measured, seed)},
    }


def _pack(found: dict[str, Any], positions: set[str]) -> dict[str, Any]:
    return {k: page.pack(x, _POSITION if k in positions else None) for k, x in found.items()}


def _landscape(size: plane.Sizes, seed: int) -> dict[str, Any]:
    positions = {"ends", "minima", "support_centres", "query_centres"}
    return _pack(landscape.compute(size, seed), positions)


def _runs(size: plane.Sizes, seed: int) -> dict[str, Any]:
    found = landscape.trajectories(size, seed)
    return {
        "paths": {name: page.pack(x, _POSITION) for name, x in found["paths"].items()},
        "losses": {name: page.pack(x) for name, x in found["losses"].items()},
    }


def _inner_problem(size: implicit.Sizes, strengths: tuple[float, ...], seed: int) -> dict[str, Any]:
    return _pack(implicit.inner_problem(size, strengths, seed), {"paths", "minimum"})


def _sinusoids(size: sinusoids.Sizes, seed: int) -> dict[str, Any]:
    found = sinusoids.fits(size, seed)
    return {
        **size._asdict(),
        "rate": sinusoids.RATE,
        "strength": sinusoids.STRENGTH,
        "inputs": sinusoids.curve_inputs(size).tolist(),
        "fits": page.pack(found["fits"], _PREDICTION),
        "losses": page.pack(found["losses"]),
    }


def _game(size: game.Sizes, seed: int) -> dict[str, Any]:
    found = game.play(size, seed)
    return {
        **size._asdict(),
        "sprite": page.sprite(found["images"]),
        "answers": found["answers"].tolist(),
        "probabilities": np.round(found["probabilities"].astype(float), 4).tolist(),
        "accuracy": round(float(found["accuracy"]), 4),
        "ci95": round(float(found["ci95"]), 4),
    }


if __name__ == "__main__":
    common.run_cli(main, Config, __doc__)
