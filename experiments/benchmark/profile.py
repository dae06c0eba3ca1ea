"""What the time of one of our contenders is spent on, by kind of operation.

    python -m experiments.benchmark.profile
    python -m experiments.benchmark.profile --contender MAML

Runs it once under JAX's profiler, on one device, and adds up what the compiled program's operations
took. On a GPU these are kernels, and command buffers, which would hide them, are turned off.
"""

import collections
import dataclasses
import itertools
import os
import re
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax

from experiments.benchmark import ours, workload
from experiments.shared import common
from imaml_jax.learners.settings import Count, Record

_INSTRUCTION = re.compile(r"\s*(?:ROOT )?%?([\w.-]+) = .*? ([\w-]+)\(")
_HEADER = re.compile(r"(?:ENTRY )?%?([\w.-]+) .*\{$")
_CALLED = re.compile(r"(?:calls|to_apply)=%?([\w.-]+)")
_SOURCE = re.compile(r'op_name="([^"]*)"')
_TARGET = re.compile(r'custom_call_target="([^"]*)"')
_PRODUCT = re.compile(r"cublas|cudnn|gemm|matmul|conv|dot", re.IGNORECASE)
# What a fusion is named after, most telling first.
_KINDS = {
    "matrix products": {"dot", "convolution"},
    "reductions": {"reduce", "reduce-window"},
    "gathers and scatters": {"gather", "scatter", "dynamic-update-slice", "dynamic-slice"},
}
_MOVES = {"copy", "transpose", "concatenate", "pad", "slice", "broadcast", "reshape", "bitcast"}
_MOVES |= {"parameter", "constant", "tuple", "get-tuple-element", "iota"}
# They hold other operations, whose time theirs includes.
CONTAINERS = {"while", "call", "conditional"}


@dataclasses.dataclass(frozen=True)
class Config(Record):
    """What is profiled."""

    contender: str = workload.CONTENDERS[0].name
    """Name of one of our contenders in the benchmark."""
    largest: Count = 10
    """Single operations to print, those that took longest; at least 1."""

    def check_together(self) -> None:
        names = [each.name for each in workload.CONTENDERS if each.library is None]
        if self.contender not in names:
            raise ValueError(f"contender={self.contender!r} must be one of {names}")


def main(config: Config) -> dict[str, Any]:
    """Profiles and prints.

    Returns:
      Seconds of the run, and `{kind: (seconds, count)}`.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    os.environ["XLA_FLAGS"] = f"{flags} --xla_gpu_enable_command_buffer="
    common.cache_compilations()
    program = ours.meta_gradient(config.contender, num_devices=1)
    inputs = program.prepare(workload.tasks(1))
    program.run(inputs)
    seconds, times = traced(lambda: program.run(inputs))
    text = program.text and program.text()
    operations = {name: (kind, source) for name, kind, source in parsed(text or "")}
    kinds, single = collections.defaultdict(list), []
    for name, spent in times.items():
        kind, source = operations.get(name, ("other", ""))
        if kind not in CONTAINERS:
            kinds[kind] += spent
            single.append((sum(spent), f"{name} x {len(spent)}, {source}"))
    print(f"{config.contender}, {jax.devices()[0].device_kind}: {seconds:.3f} s under the profiler")
    for kind, spent in sorted(kinds.items(), key=lambda item: -sum(item[1])):
        share = 100 * sum(spent) / seconds
        print(f"{kind:24}{1e3 * sum(spent):9.1f} ms {share:5.1f}% {len(spent):9} calls")
    for spent, label in sorted(single, reverse=True)[: config.largest]:
        print(f"{1e3 * spent:9.1f} ms  {label}")
    return {"seconds": seconds, "kinds": {k: (sum(own), len(own)) for k, own in kinds.items()}}


def traced(run: Callable[[], Any]) -> tuple[float, dict[str, list[float]]]:
    """Seconds of a run, and of every call of each of its operations.

    On a GPU, of every kernel, by the operation that it belongs to where the profiler tells, else by
    its own name. Empty where the profiler saw nothing.
    """
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            started = time.perf_counter()
            run()
            seconds = time.perf_counter() - started
        files = Path(folder).rglob("*.xplane.pb")
        # Planes point into the profile that they came from, which must outlive them.
        profiles = [jax.profiler.ProfileData.from_file(str(file)) for file in files]
    planes = [plane for profile in profiles for plane in profile.planes]
    if jax.default_backend() != "cpu":
        planes = [plane for plane in planes if plane.name.startswith("/device:")]
    times = collections.defaultdict(list)
    with warnings.catch_warnings():
        # JAX's reader is deprecated in Python 3.12 for types without the name of a module.
        warnings.simplefilter("ignore", DeprecationWarning)
        for event in (event for plane in planes for line in plane.lines for event in line.events):
            stats = dict(event.stats)
            name = stats.get("hlo_op")
            if name is not None or "kernel_details" in stats:
                times[str(name or event.name)].append(1e-9 * event.duration_ns)
    return seconds, dict(times)


def parsed(text: str) -> Iterator[tuple[str, str, str]]:
    """Name, kind and source of every instruction of a compiled program."""
    bodies, computation = collections.defaultdict(list), ""
    for line in text.splitlines():
        if header := _HEADER.match(line):
            computation = header[1]
        if found := _INSTRUCTION.match(line):
            name, opcode = found.groups()
            target = _TARGET.search(line)
            is_product = target and _PRODUCT.search(target[1])
            bodies[computation].append((name, "dot" if is_product else opcode, line))
    opcodes = {
        computation: {opcode for _, opcode, _ in body} for computation, body in bodies.items()
    }
    for name, opcode, line in itertools.chain.from_iterable(bodies.values()):
        called, source = _CALLED.search(line), _SOURCE.search(line)
        inside = opcodes.get(called[1], set()) if opcode == "fusion" and called else {opcode}
        kind = opcode if opcode in CONTAINERS else _kind(inside)
        yield name, kind, source[1] if source else ""


def _kind(opcodes: set[str]) -> str:
    other = "elementwise" if opcodes - _MOVES else "copies and pads"
    return next((kind for kind, own in _KINDS.items() if opcodes & own), other)


if __name__ == "__main__":
    common.run_cli(main, Config, __doc__)
