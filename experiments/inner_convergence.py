"""How far the published step counts of iMAML stop from its inner minimum, and what more steps cost.

    python -m experiments.inner_convergence --data-dir DIR

iMAML's meta-gradient is that of the inner minimum, wherever the inner steps stopped. First-order
MAML meta-trains the network for a while; from there new tasks are adapted by the published settings
(mini-ImageNet: lambda 0.5, 10 gradient steps of 0.1, 5 CG steps) and by others, and each
meta-gradient is compared with the one at the minimum, as far as 40 Newton steps find it. For each:
what is left of the inner gradient and of the way to the minimum, the error of the meta-gradient
with the exact Hessian and with the Gauss-Newton matrix, each against its own limit, and seconds a
task on one device. Writes OUTPUT.json.
"""

import statistics
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from experiments import glyphs, mini_imagenet
from experiments.shared import common, reports
from experiments.shared.inner_problems import start_and_tasks
from imaml_jax import protocols
from imaml_jax.learners.settings import Count, Record, Seed
from imaml_jax.protocols import Protocol
from imaml_jax.types import Task

_GAUSS_NEWTON = {"curvature": "gauss_newton", "solve": "cg_steihaug"}
_NEWTON = {**_GAUSS_NEWTON, "inner": "newton_cg"}
SETTINGS: dict[str, dict[str, Any]] = {
    "published": {},
    "10 times the steps, 20 CG steps": {"times": 10, "cg_steps": 20},
    "Gauss-Newton": _GAUSS_NEWTON,
    "Gauss-Newton, Nesterov": {**_GAUSS_NEWTON, "inner": "nesterov"},
    "Gauss-Newton, adaptive_gd, 8 steps": {**_GAUSS_NEWTON, "inner": "adaptive_gd", "num_steps": 8},
    "Gauss-Newton, 1 Newton step of 5": {**_NEWTON, "num_steps": 1},
    "Gauss-Newton, 2 Newton steps of 5": {**_NEWTON, "num_steps": 2},
    "Gauss-Newton, 3 Newton steps of 8": {**_NEWTON, "num_steps": 3, "cg_steps": 8},
    "Gauss-Newton, 10 Newton steps of 20": {**_NEWTON, "num_steps": 10, "cg_steps": 20},
}
_LIMIT = {**_NEWTON, "num_steps": 40, "cg_steps": 30}
LIMITS = {
    "limit, hessian": {**_LIMIT, "curvature": "hessian", "solve": "minres"},
    "limit, gauss_newton": _LIMIT,
}


@dataclass(frozen=True)
class Config(Record):
    """What is measured."""

    dataset: Literal["glyphs", "mini_imagenet"] = "mini_imagenet"
    """Images of the tasks."""
    data_dir: Path | None = None
    """Directory of mini_imagenet; default the environment variable IMAML_DATA_DIR."""
    shots: Count = 1
    """Support examples of each of 5 classes, at least 1."""
    activation: Literal["gelu", "relu", "silu", "softplus"] = "relu"
    """Of the network; only relu is published."""
    meta_steps: Count = 50
    """Meta-steps before, at least 1."""
    num_tasks: Count = 3
    """Tasks that are measured, at least 1."""
    rounds: Count = 3
    """Interleaved rounds of the timing, at least 1."""
    seed: Seed = 0
    """Seed of the initialisation and of the tasks, at least 0."""
    output: Path = Path("runs/inner_convergence")
    """Where to write, without an ending."""


def main(config: Config) -> list[dict[str, Any]]:
    """Measures, writes and prints.

    Returns:
      One row a setting, with medians over the tasks.
    """
    reports.begin(config)
    command, where = glyphs, {}
    if config.dataset == "mini_imagenet":
        command, where = mini_imagenet, {"data_dir": config.data_dir}
    params, tasks = start_and_tasks(
        command,
        config.num_tasks,
        published(config).network,
        shots=config.shots,
        activation=config.activation,
        meta_steps=config.meta_steps,
        seed=config.seed,
        **where,
    )
    rows = measure(config, params, tasks)
    written = {"rows": rows, "about": reports.about(config)}
    common.write_json(common.with_ending(config.output, "json"), written)
    print(table(rows), flush=True)
    return rows


def published(config: Config) -> Protocol:
    """The paper's protocol, which is adapted in the same way at test."""
    kind = "mini_imagenet" if config.dataset == "mini_imagenet" else "omniglot"
    task = {"algorithm": "imaml", "ways": 5, "shots": config.shots}
    protocol = protocols.get("imaml_paper", **task, dataset=kind)
    return protocol.with_settings({"eval_reg_strength": None, "activation": config.activation})


def measure(config: Config, params: Any, tasks: list[Task]) -> list[dict[str, Any]]:
    """The rows of the table."""
    base = published(config)
    chosen = {name: _replaced(base, own) for name, own in (SETTINGS | LIMITS).items()}
    programs = {name: _program(protocol) for name, protocol in chosen.items()}
    found = {name: [run(params, task) for task in tasks] for name, run in programs.items()}
    timed = {name: partial(programs[name], params, tasks[0]) for name in SETTINGS}
    seconds = reports.seconds_in_rounds(timed, config.rounds)
    return [
        _row(
            name,
            params,
            list(zip(found[name], found[f"limit, {protocol.learner.curvature}"], strict=True)),
            statistics.median(seconds[name]) if name in seconds else None,
        )
        for name, protocol in chosen.items()
    ]


def _replaced(base: Protocol, changes: dict[str, Any]) -> Protocol:
    own = {name: value for name, value in changes.items() if name != "times"}
    protocol = base.with_settings(own)
    steps = protocol.learner.num_steps * changes.get("times", 1)
    return protocol.with_settings({"num_steps": steps, "eval_num_steps": steps})


def _program(protocol: Protocol) -> Any:
    learner = protocol.build(5)

    @jax.jit
    def run(params, task):
        key = jax.random.key(0)
        grads, info = learner.meta_grad(params, task, key, jnp.int32(0))
        return learner.adapt(params, task.support, key)[0].params, grads, info

    return run


def _row(
    name: str, params: Any, pairs: list[tuple[Any, Any]], seconds: float | None
) -> dict[str, Any]:
    """Medians over the tasks, of results beside their limits."""

    def median(values):
        return float(np.median([float(value) for value in values]))

    def distance(adapted, limit):
        way = common.relative_difference(params, limit)
        return common.relative_difference(adapted, limit) / way

    return {
        "setting": name,
        "inner_residual": median(own[2].inner_residual for own, _ in pairs),
        "distance": median(distance(own[0], limit[0]) for own, limit in pairs),
        "solve_residual": median(own[2].solve_residual for own, _ in pairs),
        "min_curvature": min(
            (float(own[2].min_curvature) for own, _ in pairs if own[2].min_curvature is not None),
            default=None,
        ),
        "error": median(common.relative_difference(own[1], limit[1]) for own, limit in pairs),
        "query_accuracy": float(np.mean([own[2].query_accuracy for own, _ in pairs])),
        "seconds": seconds,
    }


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as text."""
    columns = {"": "", "inner residual": ".2g", "distance": ".2g", "solve residual": ".2g"}
    columns |= {"error": ".2g", "ms": ".0f"}
    cells = []
    for row in rows:
        shown = ("setting", "inner_residual", "distance", "solve_residual", "error")
        took = row["seconds"] and 1e3 * row["seconds"]
        cells.append([*(row[name] for name in shown), took])
    return reports.text_table(columns, cells)


if __name__ == "__main__":
    common.run_cli(main, Config, __doc__)
