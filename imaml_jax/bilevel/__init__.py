"""The toolbox for bilevel problems: curvature, linear solves, implicit gradients, inner loops.

Imports JAX, Optax and `types` alone; nothing here knows of few-shot learning. Read `implicit.py`
first: `root_vjp` is the implicit function theorem, and the rest serves it.
"""
