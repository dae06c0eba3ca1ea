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
# # Quickstart
#
# [![Open in Colab][badge]](https://colab.research.google.com/)
#
# A task; adaptation to it; a meta-gradient and a check that it is exact; a short training run; and
# the same machinery on a problem that is not few-shot learning. Nothing is downloaded: the images
# are characters rendered from fonts that matplotlib ships, which takes some seconds the first time.
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
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import optax
from jax.flatten_util import ravel_pytree

from imaml_jax import (
    Batch,
    Task,
    adaptive_gd,
    custom_argmin,
    imaml,
    mean_squared_error,
    newton_cg,
    solve_cg,
    solve_cg_steihaug,
    solve_woodbury,
)
from imaml_jax.data import episodes, glyphs, sinusoid
from imaml_jax.learners import cross_entropy
from imaml_jax.networks import conv4, mlp
from imaml_jax.training import train
from imaml_jax.training.evaluation import evaluate


def first(tasks):
    """Task 0 of a batch of tasks."""
    return jax.tree.map(lambda x: x[0], tasks)


# %% [markdown]
# ## A task
#
# A few-shot task has a *support* set, from which a network is adapted, and a *query* set, on which
# it is judged. `sample_tasks` draws a batch of tasks from a key: everything has a leading task
# axis. Here: five classes (5-way), one support example of each (1-shot) and three queries of each.
# Labels are dealt anew in every task, so they mean nothing outside it. The classes are of the test
# split: no training run sees them.

# %%
splits = glyphs.load()
tasks = episodes.sample_tasks(
    jax.random.key(3), splits.test, num_tasks=1, ways=5, shots=1, queries=3, invert=True
)
task = first(tasks)
print("support inputs ", task.support.inputs.shape, " targets", task.support.targets)
print("query inputs  ", task.query.inputs.shape, " targets", task.query.targets)


def show(axes, image, title=""):
    axes.imshow(image[..., 0], cmap="gray_r")
    axes.set(xticks=[], yticks=[])
    axes.set_title(title, fontsize=9)


figure, grid = plt.subplots(4, 5, figsize=(6, 5.2), layout="constrained")
for label in range(5):
    show(grid[0, label], task.support.inputs[label], f"label {label}")
    for i in range(3):
        show(grid[1 + i, label], task.query.inputs[3 * label + i])
for axes, name in zip(grid[:, 0], ["support", "query", "query", "query"], strict=True):
    axes.set_ylabel(name)

# %% [markdown]
# ## Adaptation
#
# A learner is a record of four pure functions: `init`, `adapt`, `predict` and `meta_grad`. Here it
# is implicit MAML on the usual network of four convolutions. `adapt` starts at the meta-parameters
# $\theta$ and takes inner steps on
# $L_\text{support}(\phi) + \frac{\lambda}{2}\lVert\phi - \theta\rVert^2$.
#
# The network is fresh and its head is zero, so that before adaptation every class has the same
# probability, 1/5. After sixteen steps on five images the predictions on the queries are already
# better than chance; meta-training is what makes them good.

# %%
network = conv4(ways=5)
learner = imaml(network, cross_entropy, reg_strength=2.0, inner=optax.sgd(0.05), num_steps=16)
theta = learner.init(jax.random.key(0), task.support.inputs)

adapted, info = jax.jit(learner.adapt)(theta, task.support, jax.random.key(1))
before = jax.nn.softmax(network.apply(theta, task.query.inputs))
after = jax.nn.softmax(learner.predict(adapted, task.query.inputs))

figure, panels = plt.subplots(1, 2, figsize=(7, 4), layout="constrained", sharey=True)
for axes, probabilities, title in zip(panels, (before, after), ("before", "after"), strict=True):
    image = axes.imshow(probabilities, vmin=0, vmax=1, cmap="viridis", aspect="auto")
    axes.scatter(task.query.targets, range(15), marker="s", s=90, facecolors="none", edgecolors="w")
    axes.set(title=f"{title} adaptation", xlabel="predicted class", xticks=range(5))
panels[0].set_ylabel("query example (true class framed)")
figure.colorbar(image, label="probability")
print(f"support objective at the end {info.support_loss:.3f}")
print(f"query accuracy after adaptation {(after.argmax(-1) == task.query.targets).mean():.0%}")

# %% [markdown]
# ## A meta-gradient, and a check that it is exact
#
# Implicit MAML does not differentiate through the inner steps. With $\phi^*$ the minimiser and
# $H$ the Hessian of the support loss there, the implicit function theorem gives
#
# $$\frac{dL_\text{query}(\phi^*(\theta))}{d\theta} =
#   (I + H/\lambda)^{-1}\,\nabla L_\text{query}(\phi^*).$$
#
# `meta_grad` solves the linear system by conjugate gradient on Hessian-vector products and never
# forms $H$. On a small problem we can afford to form it. In float64, with a Newton solver inside
# and conjugate gradient run to convergence, the two must agree to many digits.

# %%
with jax.enable_x64(True):
    keys = jax.random.split(jax.random.key(0), 4)
    small_task = Task(
        support=Batch(jax.random.normal(keys[0], (10, 3)), jax.random.normal(keys[1], (10, 1))),
        query=Batch(jax.random.normal(keys[2], (12, 3)), jax.random.normal(keys[3], (12, 1))),
    )
    small_network = mlp([8, 1], activation=jnp.tanh, kernel_init=jax.nn.initializers.normal(0.5))
    strength = 0.5
    small_learner = imaml(
        small_network,
        mean_squared_error,
        reg_strength=strength,
        inner=newton_cg(max_cg_steps=50, cg_tol=1e-10),
        num_steps=12,
        solve=lambda *args, **kwargs: solve_cg_steihaug(*args, tol=1e-12, **kwargs),
    )
    anchor = small_learner.init(keys[0], small_task.support.inputs)
    grads, report = jax.jit(small_learner.meta_grad)(anchor, small_task, keys[0], 0)

    # The same from the formula, with the Hessian written out.
    minimiser, _ = jax.jit(small_learner.adapt)(anchor, small_task.support, keys[0])
    phi, unravel = ravel_pytree(minimiser.params)

    def loss(flat_params, batch):
        return mean_squared_error(
            small_network.apply(unravel(flat_params), batch.inputs), batch.targets
        )

    hessian = jax.hessian(loss)(phi, small_task.support)
    query_grad = jax.grad(loss)(phi, small_task.query)
    expected = jnp.linalg.solve(jnp.eye(phi.size) + hessian / strength, query_grad)
    difference = ravel_pytree(grads)[0] - expected
    error = jnp.linalg.norm(difference) / jnp.linalg.norm(expected)
    print(f"{phi.size} parameters, relative error to the dense solve {error:.1e}")
    for name, value in report._asdict().items():
        if value is not None:
            print(f"{name:>15}  {value:.6g}")

# %% [markdown]
# The fields of `info` are what one must see to trust a meta-gradient:
#
# - `inner_residual`: norm of the inner objective's gradient at the end, relative to the start. The
#   formula holds at the minimiser, so this must be small.
# - `solve_residual` and `solve_steps`: how well, and in how many products with the Hessian, the
#   linear system was solved.
# - `min_curvature`: the smallest curvature of the damped matrix that the solver met. At or below
#   zero the inner point is no minimum, and the solver stops there and says so.
# - `cosine`: between the meta-gradient and the plain query gradient, which is what first-order
#   MAML takes. 1 would mean that the implicit correction does not turn it.
#
# ## A short training run
#
# MAML's regression of sinusoids: ten points of a curve of random amplitude and phase are the
# support set. `train` draws the tasks, averages `meta_grad` over them, feeds the mean to any Optax
# optimiser, and runs `log_every` meta-steps in one compiled call. The linear system is solved here
# with the Gauss-Newton matrix, whose rank is at most the number of support outputs, so that the
# Woodbury identity solves it exactly; `adaptive_gd` finds its own step size.

# %%
regressor = mlp([40, 40, 1])
sine_learner = imaml(
    regressor,
    mean_squared_error,
    reg_strength=2.0,
    inner=adaptive_gd(0.01),
    num_steps=8,
    eval_num_steps=16,
    curvature="gauss_newton",
    solve=solve_woodbury,
)


def sample_sines(key):
    return sinusoid.sample_tasks(key, num_tasks=25, shots=10, queries=10)


def negative_error(outputs, targets):
    return -mean_squared_error(outputs, targets)


result = train(
    sine_learner,
    optax.adam(3e-3),
    sample_sines,
    key=jax.random.key(0),
    num_steps=800,
    example_inputs=jnp.zeros((1, 1)),
    log_every=50,
    map_tasks="vmap",
    progress=False,
)
test = evaluate(
    sine_learner,
    result.meta_params,
    sample_sines,
    jax.random.key(1),
    num_tasks=300,
    score_fn=negative_error,
    map_tasks="vmap",
)
print(f"mean squared error on 300 new tasks {-test.mean:.3f} ± {test.ci95:.3f} (95% CI)")

# %%
sine = first(sample_sines(jax.random.key(7)))
fitted, _ = jax.jit(sine_learner.adapt)(result.meta_params, sine.support, jax.random.key(0))
x = jnp.linspace(-5, 5, 200)[:, None]

figure, (curve, fit) = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
steps = [row["step"] for row in result.history]
curve.plot(steps, [row["query_loss"] for row in result.history], label="query loss")
curve.plot(steps, [row["support_loss"] for row in result.history], label="support objective")
curve.set(xlabel="meta-step", yscale="log", title="learning curve")
curve.legend()
fit.plot(x, sine_learner.predict(fitted, x), label="adapted")
fit.plot(x, regressor.apply(result.meta_params, x), "--", label="before adaptation")
fit.scatter(*sine.support, color="k", zorder=3, label="support")
fit.scatter(*sine.query, marker="x", color="gray", label="query")
fit.set(xlabel="x", title="a new task")
_ = fit.legend(fontsize=8)
# %% [markdown]
# ## An implicit gradient outside few-shot learning
#
# `custom_argmin` makes any minimiser differentiable in all of its arguments; how it finds the
# minimum does not matter. Here it is ridge regression,
# $w^*(\lambda) = \arg\min_w \frac{1}{2n}\lVert Xw - y\rVert^2 + \frac{\lambda}{2}\lVert w\rVert^2$,
# solved in closed form, and we want the derivative of the loss on held-out data in the
# regularisation strength $\lambda$. Central differences tell whether it is right.

# %%
with jax.enable_x64(True):
    keys = jax.random.split(jax.random.key(0), 4)
    true_weights = jax.random.normal(keys[0], (20,)) / 4
    inputs = jax.random.normal(keys[1], (60, 20))
    targets = inputs @ true_weights + jax.random.normal(keys[2], (60,))
    (inputs, held_out_inputs), (targets, held_out_targets) = (
        jnp.split(inputs, 2),
        jnp.split(targets, 2),
    )

    def objective(weights, log_strength, inputs, targets):
        errors = inputs @ weights - targets
        return 0.5 * jnp.mean(errors**2) + 0.5 * jnp.exp(log_strength) * jnp.sum(weights**2)

    @custom_argmin(objective, solve=lambda *args, **kwargs: solve_cg(*args, tol=1e-12, **kwargs))
    def ridge(init, log_strength, inputs, targets):
        gram = inputs.T @ inputs / len(targets) + jnp.exp(log_strength) * jnp.eye(init.size)
        return jnp.linalg.solve(gram, inputs.T @ targets / len(targets))

    @jax.jit
    def held_out_loss(log_strength):
        weights = ridge(jnp.zeros(20), log_strength, inputs, targets)
        return jnp.mean((held_out_inputs @ weights - held_out_targets) ** 2)

    start, step = jnp.log(0.1), 1e-5
    implicit = jax.grad(held_out_loss)(start)
    numeric = (held_out_loss(start + step) - held_out_loss(start - step)) / (2 * step)
    print(f"implicit {implicit:.8f}, central difference {numeric:.8f}")
    print(f"relative difference {abs(implicit - numeric) / abs(numeric):.1e}")

    # The derivative is good enough to choose the strength by gradient descent.
    log_strength, path = start, []
    for _ in range(40):
        value, slope = jax.value_and_grad(held_out_loss)(log_strength)
        path.append((float(jnp.exp(log_strength)), float(value)))
        log_strength = log_strength - 1.0 * slope
    range_shown = jnp.linspace(jnp.log(0.02), jnp.log(5.0), 100)
    losses = jax.vmap(held_out_loss)(range_shown)

plt.figure(figsize=(5, 3), layout="constrained")
plt.plot(jnp.exp(range_shown), losses, label="held-out loss")
plt.plot(*zip(*path, strict=True), "o-", markersize=3, label="gradient descent")
plt.xscale("log")
plt.xlabel("regularisation strength")
_ = plt.legend()

# %% [markdown]
# From here: `python -m experiments.glyphs --help` trains on the images above,
# `python -m experiments.omniglot --help` on Omniglot, and `python -m experiments.sinusoid --help`
# repeats the regression with MAML, first-order MAML and Reptile beside implicit MAML.
