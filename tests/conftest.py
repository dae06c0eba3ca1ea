"""Settings and fixtures of the whole suite."""

import os
import shutil
import signal
import socket
import tempfile
from pathlib import Path

# Several test processes may share one GPU: none may take all of its memory.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax
import jaxlib
import pytest

# Most tests compute next to nothing: LLVM's optimisations take longer than they save, as do the
# CPU's fusion emitters of jaxlib 0.10, which later versions cannot do without.
_QUICK = "--xla_backend_optimization_level=0"
if jaxlib.__version__.startswith("0.10."):
    _QUICK += " --xla_cpu_use_fusion_emitters=false"
_PROGRAMS = "IMAML_JAX_TEST_PROGRAMS"

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_default_matmul_precision", "highest")  # GPUs would round to TF32
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def pytest_configure(config):
    """The processes of a run share what they compile, and with no other run.

    All of them have the same XLA_FLAGS, which importing the experiments would set in their children
    alone, if the backend has started by then; the bits would differ.
    """
    os.environ.setdefault("XLA_FLAGS", _QUICK if config.option.markexpr == "not slow" else "")
    if not hasattr(config, "workerinput"):
        folder = os.environ[_PROGRAMS] = tempfile.mkdtemp(prefix="imaml_jax_")
        config.add_cleanup(lambda: shutil.rmtree(folder))
    jax.config.update("jax_compilation_cache_dir", os.environ[_PROGRAMS])


@pytest.fixture(autouse=True, scope="session")
def no_network():
    """Refuses connections to other machines."""
    connect = socket.socket.connect

    def connect_here(self, address):
        here = self.family == socket.AF_UNIX or address[0] in ("127.0.0.1", "::1", "localhost")
        assert here, f"a test reached for {address}"
        return connect(self, address)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", connect_here)
        yield


@pytest.fixture(autouse=True, scope="session")
def interruptible():
    """Heeds SIGINT, which a shell lets its background jobs ignore, and they their children."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def x64():
    """Runs the test with float64 enabled."""
    before = jax.config.read("jax_enable_x64")
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", before)


@pytest.fixture(scope="module")
def x64_module():
    """Runs a whole module with float64 enabled, so that its fixtures can be shared."""
    before = jax.config.read("jax_enable_x64")
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", before)


@pytest.fixture
def key():
    """A fixed random key."""
    return jax.random.key(0)


@pytest.fixture(scope="session")
def data_dir():
    """The folder of the real data sets, as `--data-dir` takes it."""
    path = os.environ.get("IMAML_DATA_DIR")
    if not path:
        pytest.skip("needs the real data sets: set IMAML_DATA_DIR to the folder that holds them")
    if not Path(path).is_dir():
        pytest.fail(f"IMAML_DATA_DIR is not a folder: {path}")
    return Path(path)
