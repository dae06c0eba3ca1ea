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
# # An introduction in pictures
#
# [![Open in Colab][badge]](https://colab.research.google.com/)
#
# These are figures of the interactive introduction, computed by the same functions on smaller
# grids. The page itself, in which θ and much else can be dragged, is one HTML file, written by
# `python -m experiments.introduction --output introduction.html`.
#
# [badge]: https://colab.research.google.com/assets/colab-badge.svg

# %% tags=["remove-cell"]
# Where imaml_jax is missing, pip install it: from the clone around this notebook or, in Colab, from
# an archive of the clone uploaded beside it (git archive --output imaml_jax.zip HEAD).
import importlib.util
import sys
from pathlib import Path

from IPython import get_ipython

if importlib.util.find_spec("imaml_jax") is None:
    source = ".." if Path("../setup.cfg").exists() else "imaml_jax.zip"
    get_ipython().run_line_magic("pip", f"install --quiet {source}")
    sys.path.append(source)  # for its experiments

# %%
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

import imaml_jax

sys.path.insert(0, str(Path(imaml_jax.__file__).parents[1]))  # the clone, for its experiments

from experiments.introduction import costs, game, implicit, landscape, plane, sinusoids

SEED = 0
COLORS = {"maml": "#0072b2", "fomaml": "#e69f00", "reptile": "#009e73", "imaml": "#ad1f7d"}

# %% [markdown]
# ## What a few-shot task is
#
# One image of each of five characters, and one of them written again: which is it? The model, whose
# answer stands under each query, was meta-trained on other characters. The page asks the reader
# first.

# %%
played = game.play(game.Sizes(filters=16, meta_steps=100, rounds=20, test_tasks=100), SEED)
guesses = played["probabilities"].argmax(1)
figure, rows = plt.subplots(4, 6, figsize=(7, 5), layout="constrained")
for r, row_axes in zip(range(0, 20, 5), rows, strict=True):
    for c, axes in enumerate(row_axes):
        axes.imshow(played["images"][r, c], cmap="gray", vmin=0, vmax=255)
        axes.set(xticks=[], yticks=[])
        if c < 5:
            axes.set_xlabel(f"{c + 1}")
    right = "right" if guesses[r] == played["answers"][r] else "wrong"
    row_axes[5].set_xlabel(f"{guesses[r] + 1}, {right}")
    row_axes[5].set_title("which?" if r == 0 else "")
print(f"{100 * played['accuracy']:.1f} ± {100 * played['ci95']:.1f}% of 100 such tasks")

# %% [markdown]
# ## Four answers to one question
#
# A learner starts every task at the same parameters $\theta$ and adapts them by $T$ steps of
# gradient descent at rate $\alpha$ on the support loss. With $\phi$ where that ends, $v$ the
# gradient of the query loss there and $H$ a Hessian of the support loss, $\theta$ is moved against
#
# - MAML: $(I - \alpha H_0)(I - \alpha H_1)\cdots(I - \alpha H_{T-1})\,v$, one factor a step;
# - first-order MAML: $v$;
# - Reptile: $(\theta - \phi)/(\alpha T)$;
# - implicit MAML: $(I + H/\lambda)^{-1} v$ at
#   $\phi = \arg\min_\phi L(\phi) + \frac{\lambda}{2}\lVert\phi - \theta\rVert^2$.
#
# Four tasks of two parameters, each a curved valley. Two meta-losses have exact gradients: the loss
# after $T$ steps, and the loss at the regularised minimum.

# %%
sizes = plane.Sizes(side=11, rates=(0.2,), steps=(1, 8), strengths=(0.5,), starts_side=2)
found = landscape.compute(sizes, SEED)
runs = landscape.trajectories(sizes._replace(steps=(8,)), SEED)

coarse, fine = (np.linspace(-plane.EXTENT, plane.EXTENT, n) for n in (11, 21))
row, column = 3, 8
theta = np.array([coarse[column], coarse[row]])
figure, panels = plt.subplots(1, 2, figsize=(10, 4.8), layout="constrained")
for axes, t in zip(panels, range(2), strict=True):
    axes.contour(fine, fine, found["unrolled_loss"][0, t], 14, colors="0.75", linewidths=0.8)
    axes.plot(*found["support_centres"].T, "o", color="0.4", markersize=5)
    exact = {"after T steps": found["exact_unrolled"][0, t, row, column]}
    exact["at the minimum"] = found["exact_implicit"][0, row, column]
    print(f"T = {sizes.steps[t]}: angle to the exact gradient " + " and ".join(exact))
    for name, color in COLORS.items():
        place = (0, t, 0, row, column) if name == "imaml" else (0, t, row, column)
        arrow = found[name][place]
        axes.annotate(
            "",
            theta - arrow / 2,
            theta,
            arrowprops={"arrowstyle": "-|>", "color": color, "linewidth": 2},
        )
        axes.plot([], [], color=color, label=name)
        off = [np.arctan2(a[0] * arrow[1] - a[1] * arrow[0], a @ arrow) for a in exact.values()]
        print(f"  {name:8}" + "".join(f"{abs(np.degrees(x)):8.1f}°" for x in off))
    axes.plot(*theta, "ko")
    axes.set(title=f"{sizes.steps[t]} inner steps", aspect="equal")
_ = panels[0].legend(fontsize=8, loc="lower left")

# %% [markdown]
# Each step that first-order MAML differentiates as if it were not there turns it away from MAML.
# Implicit MAML is inexact while its inner problem is not solved; after eight steps it nearly meets
# the exact gradient of its own meta-loss, the second column.
#
# ## How many steps, and where meta-training ends
#
# On the left the mean query loss after 0, 1, 2, … steps from that $\theta$; on the right whole runs
# of meta-training by gradient descent from one start. Each algorithm ends at a place of its own.

# %%
figure, (curve, path) = plt.subplots(1, 2, figsize=(10, 4.2), layout="constrained")
curve.plot(found["curves"][0, row, column], "o-", color="k", markersize=4)
curve.set(xlabel="inner steps", ylabel="query loss", ylim=(0, None))
path.contour(fine, fine, found["unrolled_loss"][0, 1], 14, colors="0.75", linewidths=0.8)
for name, color in COLORS.items():
    points = runs["paths"][name][(0, 0, 0, 0) if name == "imaml" else (0, 0, 0)]
    path.plot(*points.T, "o-", color=color, markersize=3, label=name)
path.set(aspect="equal", xlim=(-2, 2), ylim=(-2, 2))
_ = path.legend(fontsize=8)

# %% [markdown]
# ## When the implicit gradient is to be trusted
#
# One task, $\lambda$ = 0.5. Below the limit $2/(\lambda_\max + \lambda)$ the iterates settle, and
# the inner residual, which every `meta_grad` reports, falls with them. Past it they jump, and it
# does not. On the right the error of a 50-parameter meta-gradient against the steps of conjugate
# gradient: it falls until the inner problem is the weaker part, at about the inner residual.

# %%
lens = implicit.Sizes(rates=(0.1, 0.6), steps=(1, 16), conditions=(50.0,), descent_steps=(16, 64))
inner = implicit.inner_problem(lens, (0.5,), SEED)
solver = implicit.solver_errors(lens, SEED)
figure, (picture, errors) = plt.subplots(1, 2, figsize=(10, 4.2), layout="constrained")
picture.contour(fine, fine, found["task_losses"][implicit.TASK], 14, colors="0.75", linewidths=0.8)
for a, rate in enumerate(lens.rates):
    picture.plot(*inner["paths"][0, 0, a].T, "o-", markersize=3, label=f"rate {rate}")
    residuals = ", ".join(f"{x:.2g}" for x in inner["inner_residual"][0, 0, a])
    print(f"rate {rate} (limit {inner['rate_limit'][0, 0]:.2f}): inner residual {residuals}")
picture.plot(*inner["minimum"][0, 0], "k*", markersize=12)
picture.set(aspect="equal", xlim=(-2, 2), ylim=(-2, 2))
picture.legend(fontsize=8)
for t, steps in enumerate(lens.descent_steps):
    (line,) = errors.semilogy(range(1, 21), solver["error"][0, t], label=f"{steps} inner steps")
    errors.axhline(solver["inner_residual"][0, t], color=line.get_color(), ls="--", lw=1)
errors.set(xlabel="CG steps", title="error (dashed: inner residual reported)", ylim=(1e-4, 3))
_ = errors.legend(fontsize=8)

# %% [markdown]
# ## A curve from three points
#
# Ten inner steps on three points, from a fresh initialisation and from two that were meta-trained
# on sinusoids for a short while.

# %%
fit_sizes = sinusoids.Sizes(meta_steps=400, levels=(-3.0, 3.0))
fits = sinusoids.fits(fit_sizes, SEED)
figure, panels = plt.subplots(1, 3, figsize=(10, 3), layout="constrained", sharey=True)
chosen = 1  # the points at -3, -3 and 3
for axes, predictions, name in zip(panels, fits["fits"], ("fresh", "MAML", "iMAML"), strict=True):
    for step in (0, 1, 5, 10):
        shade = str(0.8 - 0.08 * step)
        axes.plot(sinusoids.curve_inputs(fit_sizes), predictions[chosen, step], color=shade)
    axes.plot(fit_sizes.points, [-3, -3, 3], "o", color="#0072b2")
    axes.set(title=name, xlabel="x", ylim=(-6, 6))

# %% [markdown]
# ## What it costs
#
# The memory of one compiled meta-gradient. Unrolling stores of every step what its derivative
# needs; recomputing the steps stores their parameters instead, which in these dense layers is more.
# The implicit gradient needs the last step only, and room for its products with the Hessian, which
# does not grow.

# %%
measured = costs.measure(costs.Sizes(num_steps=(2, 8), rounds=1), SEED)
plt.figure(figsize=(5, 3), layout="constrained")
for name, cost in measured.items():
    plt.plot(
        (2, 8), np.array(cost["bytes"]) / 1024, "o-", label=name, color=COLORS.get(name, "0.5")
    )
plt.xlabel("inner steps")
plt.ylabel("KiB")
plt.ylim(0, None)
_ = plt.legend(fontsize=8)

# %% [markdown]
# ## Checked by hand
#
# The arrow of MAML is the slope of the query loss after adaptation, here by central differences in
# float64.

# %%
with jax.enable_x64(True):
    tasks = plane.sample_tasks(jax.random.key(SEED))
    learner = plane.make_learner("maml", 0.2, 8)
    loss = jax.jit(lambda x: plane.query_loss(learner, x, tasks))
    h = 1e-5
    slopes = [(loss(theta + h * e) - loss(theta - h * e)) / (2 * h) for e in jnp.eye(2)]
    print("central differences", np.array(slopes))
    print("MAML's meta-gradient", found["maml"][0, 1, row, column])
