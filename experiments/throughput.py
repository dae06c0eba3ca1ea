"""Rate of whole training runs beside that of their bare meta-steps.

    python -m experiments.throughput

Trains on glyphs with sampling, logging and a checkpoint at every log point, and times the same
meta-step alone: a compiled call on tasks that lie ready, nothing reported. Rounds of both take
turns; compilation and the first log point are left out. What training needs until its first
meta-step, which is compilation without the cache of earlier runs, stands beside it.
"""

import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax

from experiments import glyphs
from experiments.shared import common, few_shot, reports
from imaml_jax.learners.registry import ALGORITHMS
from imaml_jax.learners.settings import Count, Record
from imaml_jax.training import mapping, train
from imaml_jax.training.step import init_meta_params
from imaml_jax.types import MetaLearner


@dataclass(frozen=True)
class Config(Record):
    """What is timed."""

    algorithm: str = "imaml"
    """Meta-learning algorithm, with the settings of the protocol `common`, 5-way 1-shot."""
    log_every: Count = 50
    """Meta-steps between two log points with their checkpoints, at least 1."""
    chunks: Count = 3
    """Log points a round, at least 1."""
    rounds: Count = 3
    """Rounds of both, at least 1."""
    output: Path = Path("runs/throughput")
    """Where to write, without an ending."""

    @classmethod
    def choices(cls) -> Mapping[str, tuple[str, ...]]:
        """The values of settings that are names."""
        return {"algorithm": (*ALGORITHMS,)}


def main(config: Config) -> dict[str, Any]:
    """Times, writes and prints.

    Returns:
      Meta-steps a second of training and of the bare meta-step and the seconds before training's
      first meta-step, one for each round, and the median of training's share.
    """
    common.check_output(config.output)
    num_steps = config.log_every * (1 + config.chunks)
    run, splits, _ = glyphs.prepare(
        glyphs.Config.of(
            algorithm=config.algorithm, meta_steps=num_steps, log_every=1, validate_every=1
        )
    )
    protocol = run.settings
    example = jnp.zeros((1, *splits.train.images.shape[1:]))
    learner = protocol.build(run.ways)
    devices = common.task_devices(None, protocol.tasks.meta_batch)
    tx = protocol.build_outer()
    sample = few_shot.training_tasks(run, splits.train)

    def trained_rate() -> tuple[float, float]:
        with tempfile.TemporaryDirectory() as folder:
            result = train(
                learner,
                tx,
                sample,
                key=jax.random.key(0),
                num_steps=num_steps,
                example_inputs=example,
                log_every=config.log_every,
                workdir=folder,
                devices=devices,
                progress=False,
            )
        first, last = result.history[0], result.history[-1]
        rate = (last["step"] - first["step"]) / (last["seconds"] - first["seconds"])
        return rate, first["seconds"] - first["step"] / rate

    meta_params = init_meta_params(learner, jax.random.key(0), example)
    bare_rate = _bare(learner, tx, meta_params, jax.jit(sample)(jax.random.key(0)), devices)
    rounds = [(*trained_rate(), bare_rate(num_steps)) for _ in range(config.rounds)]
    trained, startup, bare = zip(*rounds, strict=True)
    measured = {
        "trained": trained,
        "startup_seconds": startup,
        "bare": bare,
        "share": statistics.median(t / b for t, b in zip(trained, bare, strict=True)),
    }
    return reports.report(config, measured, table)


def table(results: dict[str, Any]) -> str:
    """The medians as text."""
    trained, bare, startup = (
        statistics.median(results[name]) for name in ("trained", "bare", "startup_seconds")
    )
    return (
        f"{results['algorithm']}: {trained:.2f} meta-steps a second in training, {bare:.2f} bare: "
        f"{100 * results['share']:.1f}%; {startup:.1f} s until training starts"
    )


def _bare(
    learner: MetaLearner, tx: Any, meta_params: Any, tasks: Any, devices: Any
) -> Callable[[int], float]:
    """`number of meta-steps -> meta-steps a second`, compiled."""
    mean_grad = common.mean_over_tasks(partial(common.meta_gradient, learner), None, devices)

    @jax.jit
    def step(params, opt_state, tasks):
        updates, opt_state = tx.update(mean_grad(params, tasks), opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    start = (meta_params, tx.init(meta_params))
    if devices is not None:
        start = jax.device_put(start, mapping.replicated(devices))
        tasks = jax.device_put(tasks, mapping.replicated(devices))
    jax.block_until_ready(step(*start, tasks))

    def rate(num_steps: int) -> float:
        state, started = start, time.perf_counter()
        for _ in range(num_steps):
            state = jax.block_until_ready(step(*state, tasks))
        return num_steps / (time.perf_counter() - started)

    return rate


if __name__ == "__main__":
    common.run_cli(main, Config, __doc__)
