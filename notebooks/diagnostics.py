# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3 (ipykernel)
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Reading the diagnostics: what to do when a residual rises
#
# [![Open in Colab][badge]](https://colab.research.google.com/)
#
# An implicit gradient is that of the inner *minimum*, whatever point it is computed at, by the
# solution of a *linear system*, however far that was solved. A loss that falls shows neither. The
# `info` of `meta_grad` does, and `train` logs it at every point of the learning curve. This
# notebook breaks a meta-gradient in each possible way, looks at what `info` says, and mends it.
#
# [badge]: https://colab.research.google.com/assets/colab-badge.svg

# %% tags=["remove-cell"]
# Where imaml_jax is missing, pip install it: from the clone around this notebook or, in Colab, from
# an archive of the clone uploaded beside it (git archive --output imaml_jax.zip HEAD).
import importlib.util
from pathlib import Path

from IPython import get_ipython

if importlib.util.find_spec("imaml_jax") is None:
    source = ".." if Path("../setup.cfg").exists() else "imaml_jax.zip"
    get_ipython().run_line_magic("pip", f"install --quiet {source}")

# %%
from functools import partial

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import optax
from jax.flatten_util import ravel_pytree

from imaml_jax import (
    Batch,
    Task,
    adaptive_gd,
    imaml,
    mean_squared_error,
    newton_cg,
    solve_cg_steihaug,
    solve_woodbury,
)
from imaml_jax.data import sinusoid
from imaml_jax.networks import mlp
from imaml_jax.training import train

# %% [markdown]
# ## One task, six ways
#
# A network of 41 parameters in float64, so that the exact meta-gradient is at hand: Newton's method
# to the minimum, and the linear system to the last digit. Every other row spoils one thing. The
# last column is the true error, which only such a small problem can show; the others are what you
# see in a real run.

# %%
STRENGTH = 0.05
tight_solve = partial(solve_cg_steihaug, tol=1e-12, max_steps=200)
newton = newton_cg(max_cg_steps=100, cg_tol=1e-10)
WAYS = {
    "minimum and system solved": dict(inner=newton, num_steps=30, solve=tight_solve),
    "5 inner steps of rate 0.1": dict(inner=optax.sgd(0.1), num_steps=5, solve=tight_solve),
    "30 inner steps of rate 1": dict(inner=optax.sgd(1.0), num_steps=30, solve=tight_solve),
    "30 steps of adaptive_gd": dict(inner=adaptive_gd(0.05), num_steps=30, solve=tight_solve),
    "300 steps of adaptive_gd": dict(inner=adaptive_gd(0.05), num_steps=300, solve=tight_solve),
    "3 steps of CG": dict(
        inner=newton, num_steps=30, solve=partial(solve_cg_steihaug, tol=1e-12, max_steps=3)
    ),
}

with jax.enable_x64(True):
    keys = jax.random.split(jax.random.key(0), 5)
    inputs = jax.random.normal(keys[0], (20, 3))
    targets = jnp.sin(2 * inputs @ jnp.ones((3, 1))) + 0.1 * jax.random.normal(keys[1], (20, 1))
    task = Task(Batch(inputs[:10], targets[:10]), Batch(inputs[10:], targets[10:]))
    network = mlp([8, 1], activation=jnp.tanh, kernel_init=jax.nn.initializers.normal(0.5))
    theta = network.init(keys[2], inputs)

    results = {}
    for name, settings in WAYS.items():
        learner = imaml(network, mean_squared_error, reg_strength=STRENGTH, **settings)
        gradient, info = jax.jit(learner.meta_grad)(theta, task, keys[3], 0)
        results[name] = ravel_pytree(gradient)[0], info

    exact, _ = results["minimum and system solved"]
    errors = {
        n: float(jnp.linalg.norm(g - exact) / jnp.linalg.norm(exact))
        for n, (g, _) in results.items()
    }
    print(f"{'':28}{'inner':>10}{'solve':>10}{'smallest':>11}{'true':>10}")
    print(f"{'':28}{'residual':>10}{'residual':>10}{'curvature':>11}{'error':>10}")
    for name, (_, info) in results.items():
        row = info.inner_residual, info.solve_residual, info.min_curvature, errors[name]
        print(f"{name:28}{row[0]:10.0e}{row[1]:10.0e}{row[2]:11.3f}{row[3]:10.0e}")
assert errors["30 inner steps of rate 1"] > 0.1 and errors["3 steps of CG"] > 0.01
assert errors["300 steps of adaptive_gd"] < errors["30 steps of adaptive_gd"]

# %% [markdown]
# Read a row from left to right. The inner residual is the norm of the inner objective's gradient at
# the end over that at the start: near 1 nothing was solved, above 1 the steps diverge. Only at the
# minimum does the linear system mean anything; its residual comes second. The smallest curvature
# that the solver met must be positive: λ plus the Hessian of a minimum is. At or below 0 there is
# no minimum here, and conjugate gradient stops.
#
# ## Errors in place of residuals
#
# A residual is not an error: in a flat direction a small gradient can be far from the minimum, and
# 300 steps of `adaptive_gd` above left far more error than residual. With `accuracy`, `imaml`
# estimates the error of each meta-gradient and goes on in rounds until that is small enough;
# `gradient_error` in `info` is the estimate. It costs some solves a round.

# %%
with jax.enable_x64(True):
    adaptive = imaml(
        network,
        mean_squared_error,
        reg_strength=STRENGTH,
        inner=adaptive_gd(0.05),
        num_steps=30,
        solve=partial(solve_cg_steihaug, max_steps=30),
        accuracy=1e-2,
        max_rounds=100,
    )
    gradient, info = jax.jit(adaptive.meta_grad)(theta, task, keys[3], 0)
    error = jnp.linalg.norm(ravel_pytree(gradient)[0] - exact) / jnp.linalg.norm(exact)
    print(f"after {info.num_rounds} rounds of 30 steps: inner residual {info.inner_residual:.0e},")
    print(f"estimated error {info.gradient_error:.0e}, true error {error:.0e}")
    assert info.missed_accuracy == 0 and error < info.gradient_error < 1e-2

# %% [markdown]
# ## A residual that rises in the middle of training
#
# Gradient descent needs a rate below 2 / (largest curvature + λ), and meta-training raises the
# curvature: a rate that was fine at the start is not fine for ever. Two runs on sinusoids, which
# differ in the inner solver alone. `adaptive_gd` measures the curvature on its way and stays
# inside. `non_finite="skip"` lets a run go on where a task ends in infinity, and counts such tasks;
# by default `train` stops there and names the meta-step, the task and its key.

# %%
regressor = mlp([40, 40, 1], kernel_init=jax.nn.initializers.glorot_uniform())


def sample(key):
    return sinusoid.sample_tasks(key, num_tasks=10, shots=10, queries=10)


NUM_STEPS, CHUNK = 300, 20
histories = {}
for name, inner in (("fixed rate 0.015", optax.sgd(0.015)), ("adaptive_gd", adaptive_gd(0.01))):
    learner = imaml(
        regressor,
        mean_squared_error,
        reg_strength=2.0,
        inner=inner,
        num_steps=8,
        curvature="gauss_newton",
        solve=solve_woodbury,
    )
    histories[name] = train(
        learner,
        optax.adam(3e-3),
        sample,
        key=jax.random.key(0),
        num_steps=NUM_STEPS,
        example_inputs=jnp.zeros((1, 1)),
        log_every=CHUNK,
        map_tasks="vmap",
        non_finite="skip",
        progress=False,
    ).history


def column(history, field):
    """What was logged; null in the log, None here, is a number that was not finite."""
    return jnp.array([jnp.inf if row[field] is None else row[field] for row in history])


for name, history in histories.items():
    residuals = column(history, "inner_residual")
    skipped = CHUNK * column(history, "skipped_tasks").sum()
    early, late = residuals[:5].max(), residuals[5:].max()
    print(f"{name:17} largest inner residual {early:.2f} in the first 100 meta-steps,", end=" ")
    print(f"{late:.2g} after them; {skipped:.0f} tasks skipped")

assert column(histories["fixed rate 0.015"], "inner_residual").max() > 1
assert column(histories["adaptive_gd"], "inner_residual").max() < 1

# %%
figure, panels = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
for axes, field in zip(panels, ("query_loss", "inner_residual"), strict=True):
    for name, history in histories.items():
        axes.semilogy(column(history, "step"), column(history, field), "o-", ms=3, label=name)
    axes.set(xlabel="meta-step", title=field.replace("_", " "))
panels[1].axhline(1, color="gray", linestyle="--", label="nothing solved")
_ = panels[1].legend(fontsize=8)

# %% [markdown]
# For two hundred meta-steps the losses of the two runs are alike. Each point is a mean over twenty
# meta-steps of ten tasks: one task that diverges is enough to throw it off the scale, and to throw
# the outer optimiser with its gradient.
#
# ## What to do
#
# | you see | it means | what to do |
# |---|---|---|
# | `inner_residual` high | too few inner steps | more steps; `adaptive_gd`; `newton_cg` |
# | it rises, or is above 1 | rate past 2 / (curvature + λ) | `adaptive_gd`; a lower rate |
# | it is low, the result in doubt | flat directions | `accuracy=1e-2`; a larger λ |
# | `solve_residual` high | ill-conditioned | more `max_steps`; a larger λ; `solve_woodbury` |
# | `min_curvature` not positive | no minimum here, or a kink (ReLU) | `curvature="gauss_newton"` |
# | `cosine` at 1 | the correction turns nothing | first-order MAML, or a smaller λ |
# | `NonFiniteError` | a task diverged; it is named | the rows above; `non_finite.replay` |
#
# From the top: first the inner problem, then the linear system, then the rest. `solve_woodbury`
# needs `curvature="gauss_newton"`, which is positive semi-definite wherever the steps end, at the
# price of a bias; `solve_minres` takes an indefinite Hessian as it is.
