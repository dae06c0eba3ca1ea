"""Conv-4, ResNet-12 and MLP as `(init, apply)` pairs of pure functions; the only wing with flax.

Imports, of this package, `types` alone; any other such pair serves the learners as well. Read
`layers.py` first: it defines the record `Network`.
"""

from imaml_jax.networks.conv4 import conv4
from imaml_jax.networks.layers import Network, batch_norm, max_pool2x2
from imaml_jax.networks.mlp import mlp
from imaml_jax.networks.resnet12 import resnet12

__all__ = ["Network", "batch_norm", "conv4", "max_pool2x2", "mlp", "resnet12"]
