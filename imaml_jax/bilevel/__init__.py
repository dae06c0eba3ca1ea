"""The toolbox for bilevel problems: curvature, linear solves, implicit gradients, inner loops.

Imports JAX, Optax and, of this package, `types` alone; nothing here is specific to few-shot
learning. Read `implicit.py` first: `root_vjp` is the implicit function theorem (Eq. 6 of iMAML).
"""
