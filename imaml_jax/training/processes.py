"""Several processes, on one machine or many, that train as one."""

import re

import jax
import numpy as np
from jax.experimental import multihost_utils


def start(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    timeout_seconds: int = 100,
) -> None:
    """Joins this process with the others; call it before anything touches a device.

    Args:
      coordinator: `HOST:PORT` of process 0. All three None (default) leave it to the cluster's
        environment: SLURM, Open MPI, Kubernetes, TPU pods.
      num_processes: how many there are.
      process_id: which one this is, from 0.
      timeout_seconds: how long a process may be silent before it counts as lost, and how long the
        others are waited for at the start.

    Raises:
      ValueError: only some of the three, one out of its range, or no cluster that JAX knows. Where
        the others do not come in time, JAX aborts the process.
    """
    given = {"coordinator": coordinator, "num_processes": num_processes, "process_id": process_id}
    missing = [name for name, value in given.items() if value is None]
    if 0 < len(missing) < 3:
        raise ValueError(
            f"{missing[0]}={given[missing[0]]} must be given with the other two of "
            f"{', '.join(given)}, or leave out all three"
        )
    if num_processes is not None and process_id is not None:
        if num_processes < 1:
            raise ValueError(f"num_processes={num_processes} must be at least 1")
        if not 0 <= process_id < num_processes:
            raise ValueError(
                f"process_id={process_id} must lie between 0 and {num_processes - 1}, one less "
                "than num_processes"
            )
    if coordinator is not None and not re.fullmatch(r".+:\d+", coordinator):
        raise ValueError(f"coordinator={coordinator!r} must be HOST:PORT")
    if timeout_seconds < 1:
        raise ValueError(f"timeout_seconds={timeout_seconds} must be at least 1")
    try:
        jax.distributed.initialize(
            coordinator,
            num_processes,
            process_id,
            heartbeat_timeout_seconds=timeout_seconds,
            initialization_timeout=timeout_seconds,
        )
    except ValueError as error:
        if coordinator is not None:
            raise
        raise ValueError(
            f"no cluster that JAX knows started this process ({error}): give coordinator, "
            "num_processes and process_id"
        ) from None


def is_first() -> bool:
    """Whether this process is the one that writes."""
    return jax.process_index() == 0


def check_same(name: str, value: int) -> None:
    """Raises ValueError where the processes bring different values; every one must call it."""
    if jax.process_count() == 1:
        return
    values = multihost_utils.process_allgather(np.int32(value)).tolist()
    if len(set(values)) > 1:
        raise ValueError(f"{name} must be the same for all processes; got {values}")


def any_of(flag: bool) -> bool:
    """Whether any process says so; every process must call it, and waits for the others."""
    if jax.process_count() == 1:
        return flag
    return bool(np.any(multihost_utils.process_allgather(np.int32(flag))))
