"""One module a published table or figure: `python -m experiments.<name> --help`."""

import os


def _one_device_a_core() -> None:
    """On the CPU, as many tasks side by side as there are cores: one device each, one thread each.

    JAX reads this when it first looks for devices. No effect on GPUs and TPUs.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    flags = f"--xla_force_host_platform_device_count={cores} --xla_cpu_multi_thread_eigen=false"
    os.environ.setdefault("XLA_FLAGS", flags)


_one_device_a_core()
