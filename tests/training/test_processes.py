"""Several processes and devices train as one: the same meta-step whatever the topology.

    python tests/training/test_processes.py

prints the table of equality for 1, 2 and 4 processes with 1 and 2 devices each.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TASKS, STEPS = 8, 12


def worker(process_id, num_processes, port, workdir, precision, lost_at):
    """One process: trains, and prints what it got."""
    from imaml_jax.training import processes

    if num_processes > 1:
        processes.start(f"localhost:{port}", num_processes, process_id, timeout_seconds=20)
    import jax
    import jax.numpy as jnp
    import numpy as np
    import optax

    import imaml_jax
    from experiments.shared import common
    from imaml_jax import training
    from imaml_jax.data import sinusoid
    from imaml_jax.networks import mlp
    from imaml_jax.training import evaluation

    jax.config.update("jax_enable_x64", precision == "float64")
    learner = imaml_jax.imaml(
        mlp([16, 1], activation=jnp.tanh),
        imaml_jax.mean_squared_error,
        inner=optax.sgd(0.1),
        num_steps=5,
    )

    def sample(key):
        tasks = sinusoid.sample_tasks(key, num_tasks=TASKS, shots=5, queries=5)
        return jax.tree.map(lambda x: x.astype(precision), tasks)

    devices = common.task_devices(None, TASKS)
    score = evaluation.make_evaluate(
        learner,
        sample,
        num_tasks=12,
        score_fn=lambda y, targets: -jnp.mean((y - targets) ** 2),
        devices=devices,
    )

    def validate(params):
        if lost_at is not None and process_id == num_processes - 1:
            passed.append(1)
            if len(passed) == lost_at:
                os.kill(os.getpid(), signal.SIGKILL)
        return score(params, jax.random.key(1))

    passed = []
    started = time.perf_counter()
    result = training.train(
        learner,
        optax.adam(1e-2),
        sample,
        key=jax.random.key(0),
        num_steps=STEPS,
        example_inputs=jnp.zeros((1, 1)),
        log_every=3,
        validate=validate,
        workdir=workdir,
        map_tasks="vmap",
        devices=devices,
        progress=False,
    )
    seconds = time.perf_counter() - started
    params = [np.asarray(x, np.float64).tolist() for x in jax.tree.leaves(result.meta_params)]
    scores = [row["validation"] for row in result.history]
    report = {"devices": len(devices or [0]), "params": params, "scores": scores}
    print(json.dumps(report | {"seconds": seconds}), flush=True)


def launch(num_processes, num_devices, workdir=None, precision="float64", lost_at=None):
    """Starts the processes; each prints one line of JSON at its end."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    flags = os.environ.get("XLA_FLAGS", "")
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "XLA_FLAGS": f"{flags} --xla_force_host_platform_device_count={num_devices}",
        "JAX_PLATFORMS": "cpu",
        "JAX_DEFAULT_MATMUL_PRECISION": "highest",
    }
    started = []
    for process_id in range(num_processes):
        arguments = (process_id, num_processes, port, workdir and str(workdir), precision, lost_at)
        started.append(
            subprocess.Popen(
                [sys.executable, __file__, json.dumps(arguments)],
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    return started


def finish(started, timeout=300):
    """What each process printed, as `(status, report or None, standard error)`."""
    found = []
    for process in started:
        output, errors = process.communicate(timeout=timeout)
        lines = [line for line in output.splitlines() if line.startswith("{")]
        found.append((process.returncode, json.loads(lines[-1]) if lines else None, errors))
    return found


def train_on(num_processes, num_devices, **settings):
    found = finish(launch(num_processes, num_devices, **settings))
    for status, _, errors in found:
        assert status == 0, errors[-2000:]
    return [report for _, report, _ in found]


def difference(a, b):
    import numpy as np

    def flat(report):
        return np.concatenate([np.ravel(x) for x in (*report["params"], report["scores"])])

    return float(np.max(np.abs(flat(a) - flat(b))))


@pytest.fixture(scope="module")
def alone():
    return train_on(1, 1)[0]


def test_two_processes_train_as_one(alone, tmp_path):
    """Bit for bit the same in both, to rounding the same as one, and written once."""
    first, second = train_on(2, 1, workdir=tmp_path)
    assert first["devices"] == second["devices"] == 2
    assert difference(first, second) == 0
    assert difference(first, alone) < 1e-10
    rows = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(row)["step"] for row in rows] == [3, 6, 9, 12]


@pytest.mark.slow
def test_a_run_resumes_on_another_number_of_processes(alone, tmp_path):
    found = finish(launch(2, 1, workdir=tmp_path, lost_at=3))
    assert found[1][0] == -signal.SIGKILL  # the lost one
    assert found[0][0] not in (0, None)  # the other ends too, in time
    resumed = train_on(1, 2, workdir=tmp_path)[0]
    assert len(resumed["scores"]) == 4
    assert difference(resumed, alone) < 1e-10


@pytest.mark.slow
@pytest.mark.parametrize(("num_processes", "num_devices"), [(1, 2), (2, 2), (4, 1), (4, 2)])
def test_every_topology_trains_the_same(alone, num_processes, num_devices):
    reports = train_on(num_processes, num_devices)
    assert {report["devices"] for report in reports} == {num_processes * num_devices}
    assert difference(reports[0], alone) < 1e-10


def table():
    """The equality of all topologies, as text."""
    print(f"{'processes x devices':>20}{'float64':>12}{'float32':>12}{'tasks/s':>10}")
    references = {}
    for num_processes, num_devices in [(1, 1), (1, 2), (2, 1), (2, 2), (4, 1), (4, 2)]:
        cells = []
        for precision in ("float64", "float32"):
            with tempfile.TemporaryDirectory() as folder:
                run = partial(train_on, workdir=Path(folder) / "run", precision=precision)
                report = run(num_processes, num_devices)[0]
            reference = references.setdefault(precision, report)
            cells.append(difference(report, reference))
        rate = TASKS * STEPS / report["seconds"]
        name = f"{num_processes} x {num_devices}"
        print(f"{name:>20}{cells[0]:12.1e}{cells[1]:12.1e}{rate:10.1f}", flush=True)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        worker(*json.loads(sys.argv[1]))
    else:
        table()
