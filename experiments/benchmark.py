"""Time of one meta-step of the reference workload, as a share of the machine's matmul ceiling.

    python -m experiments.benchmark

The workload: 16 tasks of 5-way 1-shot Omniglot shapes, 15 queries a class, 16 inner steps, 5 CG
steps, conv4 with 64 filters. Contenders and the matrix product are timed in interleaved rounds with
fresh random inputs; medians and their ratios are printed.
"""

import dataclasses
import json
import statistics
import time
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax

import imaml_jax
from experiments import common
from imaml_jax.mapping import jit_lifted, map_over_tasks, replicated
from imaml_jax.networks import conv4
from imaml_jax.types import Batch, Task

WAYS, QUERIES, TASKS, INNER_STEPS, CG_STEPS, SIDE, FILTERS = 5, 15, 16, 16, 5, 28, 64
_MATRIX = 1536


@dataclasses.dataclass(frozen=True)
class Config:
    """What is timed."""

    rounds: int = 5
    """Interleaved rounds, at least 1."""
    devices: int | None = None
    """Devices over which the tasks are sharded; default all."""
    output: Path | None = None
    """JSON file to write."""


def forward_flops() -> int:
    """Multiplications and additions of the network's matrix products on one image."""
    total, channels, side = 0, 1, SIDE
    for _ in range(4):
        side = -(-side // 2)
        total += 2 * side * side * 9 * channels * FILTERS
        channels = FILTERS
    return total + 2 * side * side * channels * WAYS


def meta_step_flops() -> int:
    """Those of one iMAML meta-step: a gradient is 3 passes, a linearised Hessian product 6."""
    support, query = WAYS, WAYS * QUERIES
    passes = INNER_STEPS * 3 * support + 3 * query + 3 * support + CG_STEPS * 6 * support
    return TASKS * passes * forward_flops()


def contenders() -> dict[str, imaml_jax.MetaLearner]:
    """The learners timed, by name."""
    network, loss = conv4(WAYS, filters=FILTERS), imaml_jax.cross_entropy
    settings = {"inner": optax.sgd(0.05), "num_steps": INNER_STEPS}
    steihaug = partial(imaml_jax.solve_cg_steihaug, tol=0.0, max_steps=CG_STEPS)
    plain = partial(imaml_jax.solve_cg, tol=0.0, max_steps=CG_STEPS)
    imaml = partial(imaml_jax.imaml, network, loss)
    return {
        "imaml, Hessian, solve_cg_steihaug": imaml(**settings, solve=steihaug),
        "imaml, Hessian, solve_cg": imaml(**settings, solve=plain),
        "imaml, Gauss-Newton, solve_cg_steihaug": imaml(
            **settings, solve=steihaug, curvature="gauss_newton"
        ),
        "imaml, Gauss-Newton, solve_woodbury": imaml(
            **settings, solve=imaml_jax.solve_woodbury, curvature="gauss_newton"
        ),
        "maml": imaml_jax.maml(network, loss, **settings),
        "fomaml": imaml_jax.fomaml(network, loss, **settings),
    }


def main(config: Config) -> dict[str, Any]:
    """Times the contenders; returns and prints medians in seconds and shares of the ceiling."""
    if config.rounds < 1:
        raise ValueError(f"rounds={config.rounds} must be at least 1")
    devices = jax.local_devices()[: config.devices]
    devices = devices if len(devices) > 1 else None
    place = replicated(devices) if devices else None
    params = conv4(WAYS, filters=FILTERS).init(jax.random.key(0), jnp.zeros((1, SIDE, SIDE, 1)))
    params = jax.device_put(params, place)
    runs = {"matmul": _matmul(devices)}
    for name, learner in contenders().items():
        runs[name] = partial(_meta_step(learner, devices), params)
    times = {name: [] for name in runs}
    for round_number in range(-1, config.rounds):  # round -1 compiles
        for name, run in runs.items():
            inputs = jax.block_until_ready(
                jax.device_put(_inputs(name, jax.random.key(round_number + 1)), place)
            )
            started = time.perf_counter()
            jax.block_until_ready(run(inputs))
            if round_number >= 0:
                times[name].append(time.perf_counter() - started)
    medians = {name: statistics.median(values) for name, values in times.items()}
    num_devices = len(devices) if devices else 1
    ceiling = 2 * _MATRIX**3 * num_devices / medians.pop("matmul")
    share = {name: meta_step_flops() / seconds / ceiling for name, seconds in medians.items()}
    print(
        f"{num_devices} device(s) of {jax.devices()[0].device_kind}, float32 matmul "
        f"{ceiling / 1e9:.0f} GFLOP/s; medians of {config.rounds} interleaved rounds\n"
        f"{'one meta-step':40} {'seconds':>8} {'share of ceiling':>17}"
    )
    for name, seconds in medians.items():
        counted = f"{100 * share[name]:.0f}%" if "Hessian" in name else ""
        print(f"{name:40} {seconds:8.3f} {counted:>17}")
    results = {
        "seconds": medians,
        "all_seconds": times,
        "ceiling_flops": ceiling,
        "meta_step_flops": meta_step_flops(),
        "share": {name: value for name, value in share.items() if "Hessian" in name},
        **common.provenance(),
    }
    if config.output is not None:
        config.output.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    return results


def _inputs(name: str, key: jax.Array) -> Any:
    if name == "matmul":
        return jax.random.normal(key, (_MATRIX, _MATRIX))
    keys = jax.random.split(key)
    shapes = [(TASKS, count, SIDE, SIDE, 1) for count in (WAYS, WAYS * QUERIES)]
    images = [jax.random.uniform(k, shape) for k, shape in zip(keys, shapes, strict=True)]
    labels = [jnp.tile(jnp.arange(shape[1]) % WAYS, (TASKS, 1)) for shape in shapes]
    return Task(*map(Batch, images, labels))


def _meta_step(learner: imaml_jax.MetaLearner, devices) -> Any:
    def step(params, tasks):
        grads = map_over_tasks(partial(common.meta_gradient, learner), None, devices)(params, tasks)
        return jax.tree.map(lambda g: g.mean(0), grads)

    return jit_lifted(step, devices=devices)


def _matmul(devices) -> Any:
    """One product a device, all at once."""

    def product(a, _):
        return a @ a

    def step(a):
        lanes = jnp.zeros(len(devices) if devices else 1)
        return map_over_tasks(product, None, devices)(a, lanes)

    return jit_lifted(step, devices=devices)


if __name__ == "__main__":
    common.run_cli(main, Config, __doc__)
