"""Time and memory of a meta-gradient beside PyTorch: `python -m experiments.benchmark`."""

import os

# Many processes share the accelerator: none may take all of its memory.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
