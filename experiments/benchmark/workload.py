"""The workload of the benchmark, its contenders, and how a process takes orders; NumPy only."""

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

WAYS, QUERIES, CG_STEPS, INNER_RATE, EPSILON = 5, 15, 5, 0.05, 1e-3
CHECK_TASKS = 2
MATMUL, MATRIX, PRODUCTS = "matrix product", 1536, 5

Algorithm = Literal["imaml", "implicit_anil", "maml", "fomaml", "reptile"]
Tasks = tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]


class Size(NamedTuple):
    """Images, network and inner problem; the default is the reference workload.

    Attributes:
      side: of the images.
      channels: of the images.
      filters: of each block of conv4.
      pools: whether it max-pools, rather than has strides of 2.
      tasks: of a meta-gradient.
      inner_steps: of MAML, first-order MAML and Reptile.
      implicit_steps: those of iMAML.
      reg_strength: of iMAML.
    """

    side: int = 28
    channels: int = 1
    filters: int = 64
    pools: bool = False
    tasks: int = 16
    inner_steps: int = 16
    implicit_steps: int = 16
    reg_strength: float = 2.0


SizeName = Literal["omniglot", "mini_imagenet"]
SIZES: dict[str, Size] = {
    "omniglot": Size(),
    "mini_imagenet": Size(84, 3, 32, True, 4, 5, 10, 0.5),
}
REFERENCE = SIZES["omniglot"]


class Contender(NamedTuple):
    """What is timed.

    Attributes:
      name: as printed.
      algorithm: what it computes; ratios are to the first contender of the same algorithm.
      same: whether its meta-gradient is that one's, in exact arithmetic.
      library: the package that it needs; None for this one.
      quick: whether it takes part in the quick benchmark.
    """

    name: str
    algorithm: Algorithm
    same: bool = True
    library: str | None = None
    quick: bool = False


CONTENDERS = (
    Contender("iMAML, Hessian, solve_cg_steihaug", "imaml", quick=True),
    Contender("iMAML, Hessian, solve_cg", "imaml"),
    Contender("iMAML, Gauss-Newton, solve_cg_steihaug", "imaml", same=False),
    Contender("iMAML, Gauss-Newton, solve_woodbury", "imaml", same=False),
    Contender("iMAML, Hessian-free, 3 Newton steps", "imaml", same=False),
    Contender("MAML", "maml", quick=True),
    Contender("MAML, no recomputation", "maml"),
    Contender("first-order MAML", "fomaml", quick=True),
    Contender("implicit ANIL", "implicit_anil"),
    Contender("Reptile", "reptile"),
    Contender("torchopt iMAML, solve_cg", "imaml", library="torchopt", quick=True),
    Contender("torchopt iMAML, solve_normal_cg", "imaml", same=False, library="torchopt"),
    Contender("torchopt MAML", "maml", library="torchopt", quick=True),
    Contender("higher MAML", "maml", library="higher", quick=True),
    Contender("PyTorch iMAML", "imaml", library="torch"),
    Contender("PyTorch MAML", "maml", library="torch"),
    Contender("PyTorch first-order MAML", "fomaml", library="torch"),
    Contender("PyTorch implicit ANIL", "implicit_anil", library="torch"),
)


def reference_of(contender: Contender) -> Contender:
    """The first contender of the same algorithm."""
    return next(other for other in CONTENDERS if other.algorithm == contender.algorithm)


class Program(NamedTuple):
    """A contender in its own process.

    Attributes:
      prepare: `Tasks -> inputs`, not timed.
      run: `inputs -> info`, timed; returns when the result is there. `info` holds what the run
        reports of itself, by name.
      gradients: `Tasks -> {path: float64 array}` in JAX's layout, the mean over tasks, calculated
        in float64.
      temp_bytes: what the compiled program allocates on all devices, after the first run; None
        where that is unknown.
      text: the compiled program as text, after the first run.
    """

    prepare: Callable[[Tasks], Any]
    run: Callable[[Any], dict[str, float]]
    gradients: Callable[[Tasks], dict[str, np.ndarray]] | None = None
    temp_bytes: Callable[[], int | None] | None = None
    text: Callable[[], str | None] | None = None


def params(size: Size = REFERENCE) -> dict[str, np.ndarray]:
    """Parameters of conv4 by path, in JAX's layout."""
    rng = np.random.default_rng(0)
    named, channels, filters = {}, size.channels, size.filters
    for i in range(4):
        scale = np.sqrt(2 / (9 * (channels + filters)))
        named[f"block_{i}/kernel"] = scale * rng.normal(size=(3, 3, channels, filters))
        named[f"block_{i}/scale"], named[f"block_{i}/offset"] = np.ones(filters), np.zeros(filters)
        channels = filters
    features = layers(size)[-1].weights // WAYS
    named["head/kernel"] = 0.05 * rng.normal(size=(features, WAYS))
    named["head/bias"] = np.zeros(WAYS)
    return {path: array.astype(np.float32) for path, array in named.items()}


def tasks(seed: int, size: Size = REFERENCE, num_tasks: int | None = None) -> Tasks:
    """Support and query images and labels of random tasks."""
    rng = np.random.default_rng(seed)
    num_tasks, image = num_tasks or size.tasks, (size.side, size.side, size.channels)
    pairs = []
    for count in (WAYS, WAYS * QUERIES):
        images = rng.random((num_tasks, count, *image), np.float32)
        pairs.append((images, np.tile(np.arange(count, dtype=np.int32) % WAYS, (num_tasks, 1))))
    return pairs[0], pairs[1]


class Layer(NamedTuple):
    """Costs of a layer of conv4.

    Attributes:
      flops: multiplications and additions for one image.
      numbers: inputs and outputs for one image.
      weights: shared by all images.
    """

    flops: int
    numbers: int
    weights: int


def layers(size: Size = REFERENCE, ways: int = WAYS) -> list[Layer]:
    """The four convolutions and the head."""
    side, channels, filters, pools = size[:4]
    found = []
    for _ in range(4):
        halved = side // 2 if pools else -(-side // 2)
        positions = side * side if pools else halved * halved
        weights = 9 * channels * filters
        numbers = side * side * channels + positions * filters
        found.append(Layer(2 * positions * weights, numbers, weights))
        side, channels = halved, filters
    features = side * side * channels
    return [*found, Layer(2 * features * ways, features + ways, features * ways)]


def forward_flops(size: Size = REFERENCE) -> tuple[int, int]:
    """Multiplications and additions for one image: of the first layer, and of all the others."""
    first, *others = (layer.flops for layer in layers(size))
    return first, sum(others)


def flops(
    algorithm: Algorithm,
    size: Size = REFERENCE,
    forward: tuple[float, float] | None = None,
    *,
    support: int = WAYS,
    query: int = WAYS * QUERIES,
    cg_steps: int = CG_STEPS,
) -> float:
    """Those of the matrix products of the meta-gradient.

    A gradient is 3 forward passes and a Hessian product 6, but 2 of each in the first layer, whose
    inputs have no derivative. MAML's backward pass is one Hessian product a step. iMAML linearises
    one gradient more, at the end; implicit ANIL passes through the body once, for its head is all
    that adapts. What is computed twice to save memory is counted once.

    Args:
      algorithm: what is computed.
      size: of the workload.
      forward: what one image costs, see `forward_flops`; default that of `size`.
      support: images of a task's support set.
      query: and of its query set.
      cg_steps: of iMAML.
    """
    first, others = forward or forward_flops(size)
    gradient, product = 2 * first + 3 * others, 2 * first + 6 * others
    on_support = {
        "imaml": (size.implicit_steps + 1) * gradient + cg_steps * product,
        "implicit_anil": gradient,
        "maml": size.inner_steps * (gradient + product),
        "fomaml": size.inner_steps * gradient,
        "reptile": size.inner_steps * gradient,
    }[algorithm]
    on_query = 0 if algorithm == "reptile" else gradient
    return size.tasks * (support * on_support + query * on_query)


def serve(program: Program, size: Size) -> None:
    """Takes orders from standard input, one JSON value a line, and answers on standard output.

    A number asks for one run on the tasks of that seed: its seconds and what it reports;
    "gradients" for those of the check tasks by path; "memory" for that used so far.
    """
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints is no answer
    for line in sys.stdin:
        answer = _answer(program, size, json.loads(line))
        print(json.dumps(answer), file=answers, flush=True)


def _answer(program: Program, size: Size, order: Any) -> dict[str, Any]:
    if order == "memory":
        temp = program.temp_bytes() if program.temp_bytes else None
        return {"temp_bytes": temp, "peak_resident_bytes": _peak_resident_bytes()}
    if order == "gradients":
        assert program.gradients is not None
        gradients = program.gradients(tasks(0, size, CHECK_TASKS))
        return {path: array.tolist() for path, array in gradients.items()}
    inputs = program.prepare(tasks(order, size))
    started = time.perf_counter()
    info = program.run(inputs)
    return {"seconds": time.perf_counter() - started, "info": info}


def _peak_resident_bytes() -> int | None:
    """Of this process, with the library and its compiler; None where the system does not tell."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM")), None)
