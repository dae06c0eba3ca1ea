"""Programs that compute next to nothing, compiled in less time."""

from functools import partial
from typing import Any

import jax
import jaxlib

# LLVM's optimisations take longer than they save, as do the CPU's fusion emitters of jaxlib 0.10,
# which later versions cannot do without.
_OPTIONS: dict[str, Any] = {"xla_backend_optimization_level": 0}
if jax.default_backend() == "cpu" and jaxlib.__version__.startswith("0.10."):
    _OPTIONS["xla_cpu_use_fusion_emitters"] = False

XLA_FLAGS = " ".join(f"--{name}={str(value).lower()}" for name, value in _OPTIONS.items())
jit = partial(jax.jit, compiler_options=_OPTIONS)
