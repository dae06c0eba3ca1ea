"""A tenth of `python -m tests.faults`; all of it is slow."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
IN_PROCESS = ["checkpoints", "interrupted writes", "full disks", "logs", "directories"]
IN_PROCESS += ["settings", "hostile data"]


def inject(*arguments, timeout):
    return subprocess.run(
        [sys.executable, "-m", "tests.faults", *arguments],
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def test_nothing_is_lost_in_this_process():
    done = inject("--share", "0.15", "--kinds", *IN_PROCESS, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert done.stdout.splitlines()[-1] == "30 faults survived, 0 kinds lost something"


@pytest.mark.slow
def test_nothing_is_lost():
    done = inject(timeout=1500)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
