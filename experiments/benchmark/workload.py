"""The workload of the benchmark, and how a contender's process takes orders; NumPy only."""

import json
import resource
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

WAYS, QUERIES, TASKS, INNER_STEPS, CG_STEPS, SIDE, FILTERS = 5, 15, 16, 16, 5, 28, 64
INNER_RATE, REG_STRENGTH, EPSILON = 0.05, 2.0, 1e-3
CHECK_TASKS = 2

Tasks = tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]


class Contender(NamedTuple):
    """One way to do the workload's meta-step.

    Attributes:
      prepare: `Tasks -> inputs`, not timed.
      run: `inputs -> outputs`, timed; returns when the result is there.
      gradients: `Tasks -> {path: float64 array}` in JAX's layout, the mean over tasks, calculated
        in float64; None where there is nothing to compare with.
      temp_bytes: what the compiled program allocates, after the first run; None where unknown.
    """

    prepare: Callable[[Tasks], Any]
    run: Callable[[Any], Any]
    gradients: Callable[[Tasks], dict[str, np.ndarray]] | None = None
    temp_bytes: Callable[[], int | None] | None = None


def params() -> dict[str, np.ndarray]:
    """Parameters of conv4 by path, in JAX's layout."""
    rng = np.random.default_rng(0)
    named, channels, side = {}, 1, SIDE
    for i in range(4):
        scale = np.sqrt(2 / (9 * (channels + FILTERS)))
        named[f"block_{i}/kernel"] = scale * rng.normal(size=(3, 3, channels, FILTERS))
        named[f"block_{i}/scale"], named[f"block_{i}/offset"] = np.ones(FILTERS), np.zeros(FILTERS)
        channels, side = FILTERS, -(-side // 2)
    named["head/kernel"] = 0.05 * rng.normal(size=(side * side * FILTERS, WAYS))
    named["head/bias"] = np.zeros(WAYS)
    return {path: array.astype(np.float32) for path, array in named.items()}


def tasks(seed: int, num_tasks: int = TASKS) -> Tasks:
    """Support and query images and labels of random tasks."""
    rng = np.random.default_rng(seed)
    pairs = []
    for count in (WAYS, WAYS * QUERIES):
        images = rng.random((num_tasks, count, SIDE, SIDE, 1), np.float32)
        pairs.append((images, np.tile(np.arange(count, dtype=np.int32) % WAYS, (num_tasks, 1))))
    return pairs[0], pairs[1]


def forward_flops() -> int:
    """Multiplications and additions of the network's matrix products on one image."""
    total, channels, side = 0, 1, SIDE
    for _ in range(4):
        side = -(-side // 2)
        total += 2 * side * side * 9 * channels * FILTERS
        channels = FILTERS
    return total + 2 * side * side * channels * WAYS


def flops(algorithm: str) -> int:
    """Those of one meta-step of "imaml" (Hessian, CG), "maml" or "fomaml".

    A gradient is 3 forward passes, and a Hessian product, of which MAML's backward pass is one a
    step, 6. What is computed twice to save memory is counted once.
    """
    gradients = INNER_STEPS * 3 * WAYS + 3 * WAYS * QUERIES
    products = {"imaml": CG_STEPS, "maml": INNER_STEPS, "fomaml": 0}[algorithm]
    return TASKS * (gradients + products * 6 * WAYS) * forward_flops()


def serve(contender: Contender) -> None:
    """Takes orders from standard input, one JSON value a line, and answers on standard output.

    A number asks for the seconds of one run on the tasks of that seed, a string for a file of that
    name with the gradients of the check tasks, null for the memory used so far.
    """
    answers, sys.stdout = sys.stdout, sys.stderr
    for line in sys.stdin:
        order = json.loads(line)
        if order is None:
            temp = contender.temp_bytes() if contender.temp_bytes else None
            peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            answer = {"temp_bytes": temp, "peak_rss_bytes": peak}
        elif isinstance(order, str):
            assert contender.gradients is not None
            np.savez(order, allow_pickle=False, **contender.gradients(tasks(0, CHECK_TASKS)))
            answer = True
        else:
            inputs = contender.prepare(tasks(order))
            started = time.perf_counter()
            contender.run(inputs)
            answer = time.perf_counter() - started
        print(json.dumps(answer), file=answers, flush=True)
