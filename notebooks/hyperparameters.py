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
# # Implicit gradients for hyperparameters
#
# [![Open in Colab][badge]](https://colab.research.google.com/)
#
# One regularisation weight for every feature is too much for a grid search: three values for each
# of forty features are $3^{40}$ trainings. The derivative of the validation loss in all forty costs
# one training and one linear solve. This notebook computes it, checks it, and follows it.
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

from imaml_jax import Batch, custom_argmin, minimize, newton_cg, solve_cg_steihaug

jax.config.update("jax_enable_x64", True)  # so that the check below is sharp

# %% [markdown]
# ## Two levels
#
# Logistic regression on forty features, of which five carry information. The inner problem is the
# training, the outer one the choice of $a \in \mathbb{R}^{40}$ by the validation loss:
#
# $$w^*(a) = \arg\min_w\; L_\text{train}(w) + \frac{1}{2} \sum_i e^{a_i} w_i^2,
#   \qquad \min_a\; F(a) = L_\text{validation}(w^*(a)).$$
#
# With $A$ the Hessian of the inner objective at $w^*$, the implicit function theorem gives
# $\partial F/\partial a_i = -e^{a_i} w^*_i\, u_i$, where $A u = \nabla L_\text{validation}(w^*)$.

# %%
FEATURES, INFORMATIVE = 40, 5
true_weights = jnp.zeros(FEATURES).at[:INFORMATIVE].set(1.5)


def draw(seed, count):
    inputs_key, label_key = jax.random.split(jax.random.key(seed))
    inputs = jax.random.normal(inputs_key, (count, FEATURES))
    labels = jax.random.bernoulli(label_key, jax.nn.sigmoid(inputs @ true_weights))
    return Batch(inputs, labels.astype(float))


training, validation, test = draw(0, 80), draw(1, 300), draw(2, 5000)


def loss(weights, batch):
    return optax.sigmoid_binary_cross_entropy(batch.inputs @ weights, batch.targets).mean()


def objective(weights, log_strengths, batch):
    return loss(weights, batch) + 0.5 * jnp.sum(jnp.exp(log_strengths) * weights**2)


# %% [markdown]
# ## A solver becomes differentiable
#
# `custom_argmin` takes the objective and decorates any function that minimises it, here ten
# Hessian-free Newton steps. It never looks inside: the derivative comes from one linear solve with
# the Hessian at the answer. What is to be differentiated is an argument of the function, never a
# variable from outside.

# %%
solve = partial(solve_cg_steihaug, tol=1e-12, max_steps=200)


@custom_argmin(objective, solve, has_aux=True)
def fit(init, log_strengths, batch):
    tx = newton_cg(max_cg_steps=100, cg_tol=1e-6)
    return minimize(objective, init, log_strengths, batch, tx=tx, num_steps=10)


def outer_loss(log_strengths):
    weights, info = fit(jnp.zeros(FEATURES), log_strengths, training)
    return loss(weights, validation), (weights, info)


hypergradient = jax.jit(jax.value_and_grad(outer_loss, has_aux=True))

# %% [markdown]
# ## Is it right?
#
# Forty central differences, each with two trainings of its own, beside the one hypergradient. Look
# at the inner residual first: the theorem speaks of the minimum, and away from it the derivative is
# one of nothing (the notebook on diagnostics shows how that looks).

# %%
start = jnp.full(FEATURES, jnp.log(0.05))
(_, (_, info)), gradient = hypergradient(start)

step = 1e-4
moves = jnp.concatenate([step * jnp.eye(FEATURES), -step * jnp.eye(FEATURES)])
ahead, behind = jnp.split(jax.jit(jax.vmap(lambda move: outer_loss(start + move)[0]))(moves), 2)
differences = (ahead - behind) / (2 * step)

error = jnp.linalg.norm(gradient - differences) / jnp.linalg.norm(differences)
print(f"inner residual {info.relative_residual:.0e}, relative error of the gradient {error:.0e}")
assert info.relative_residual < 1e-8
assert error < 1e-6

# %% [markdown]
# ## Following it
#
# From the best common strength of a grid, Adam moves all forty. So many can be fitted too well to
# the validation examples; test examples, which neither level has seen, tell what they are worth.


# %%
def describe(name, log_strengths):
    value, (weights, _) = jax.jit(outer_loss)(log_strengths)
    right = ((test.inputs @ weights > 0) == test.targets).mean()
    print(f"{name:32}{value:12.3f}{loss(weights, test):12.3f}{right:12.1%}")
    return weights


grid = jnp.linspace(jnp.log(1e-4), jnp.log(1.0), 25)
grid_losses, _ = jax.jit(jax.vmap(lambda a: outer_loss(jnp.full(FEATURES, a))))(grid)
common = jnp.full(FEATURES, grid[grid_losses.argmin()])

tx = optax.adam(0.2)


def outer_step(carry, _):
    log_strengths, state = carry
    (value, _), gradient = hypergradient(log_strengths)
    updates, state = tx.update(gradient, state)
    return (optax.apply_updates(log_strengths, updates), state), value


(learned, _), path = jax.lax.scan(outer_step, (common, tx.init(common)), length=100)

print(f"{'one strength a feature':32}{'validation':>12}{'test loss':>12}{'accuracy':>12}")
describe("hardly any (1e-4)", jnp.full(FEATURES, grid[0]))
common_weights = describe(f"common, best of 25 ({jnp.exp(common[0]):.3f})", common)
learned_weights = describe("learned by implicit gradients", learned)

# %%
figure, (curve, bars) = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
curve.plot(path, label="forty strengths, implicit gradients")
curve.axhline(grid_losses.min(), color="gray", linestyle="--", label="one strength, grid of 25")
curve.set(xlabel="steps of Adam", ylabel="validation loss", title="the outer problem")
curve.legend(fontsize=8)
bars.semilogy(jnp.exp(learned), "o", markersize=4)
bars.axhline(jnp.exp(common[0]), color="gray", linestyle="--")
bars.axvspan(-0.5, INFORMATIVE - 0.5, color="C1", alpha=0.2, label="carry information")
bars.set(xlabel="feature", ylabel="learned strength", title="what it found")
_ = bars.legend(fontsize=8)

# %% [markdown]
# The same lines serve any hyperparameter that the objective is smooth in: a weight for each example
# (`python -m experiments.hyper_cleaning`), the training images themselves (`python -m
# experiments.distillation`), or iMAML's anchor $\theta$, which is how this library meta-learns.
