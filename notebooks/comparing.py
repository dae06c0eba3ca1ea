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
# # Comparing algorithms with confidence intervals
#
# [![Open in Colab][badge]](https://colab.research.google.com/)
#
# One accuracy says little without how it was found and how far chance may have moved it. A fair
# comparison gives every algorithm the same number of tuning trials on validation tasks and the same
# test tasks, and tells two kinds of chance apart: which tasks were drawn, and which seed trained.
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
import numpy as np
import optax

from imaml_jax import fomaml, imaml, maml, mean_squared_error, solve_woodbury
from imaml_jax.data import sinusoid
from imaml_jax.networks import mlp
from imaml_jax.training.evaluation import make_evaluate
from imaml_jax.training.metrics import mean_ci95
from imaml_jax.training.step import init_meta_params, init_state, make_train_step

# %% [markdown]
# ## The same trials for all
#
# Sinusoid regression, ten points a task. Each algorithm has three trials, one an inner rate, judged
# by the same validation tasks. Training is a pure function of the rate and the seed, so the three
# trials of an algorithm are one compiled program. 200 meta-steps of five tasks are a small part of
# what is published: this is about the comparison, not about the ranking.

# %%
META_STEPS, RATES, SEEDS = 200, (0.0025, 0.005, 0.01), (1, 2, 3)
network = mlp([40, 40, 1], kernel_init=jax.nn.initializers.glorot_uniform())
steps = dict(num_steps=5, eval_num_steps=5)
ALGORITHMS = {
    "MAML": partial(maml, **steps),
    "first-order MAML": partial(fomaml, **steps),
    "iMAML": partial(imaml, curvature="gauss_newton", solve=solve_woodbury, **steps),
}


def sample(key, num_tasks=5):
    return sinusoid.sample_tasks(key, num_tasks=num_tasks, shots=10, queries=10)


validation_tasks = sample(jax.random.key(1000), num_tasks=100)
TEST_KEY = jax.random.key(2000)


def make_learner(factory, rate):
    return factory(network, mean_squared_error, inner=optax.sgd(rate))


def run(factory, trial):
    """Meta-parameters after training, and their mean squared error on validation tasks."""
    rate, seed = trial
    learner, tx, key = make_learner(factory, rate), optax.adam(3e-3), jax.random.key(seed)
    train_step = make_train_step(learner, tx, sample)
    state = init_state(tx, init_meta_params(learner, key, jnp.zeros((1, 1))))
    state, _ = jax.lax.scan(lambda s, _: train_step(s, key), state, length=META_STEPS)

    def error(task):
        adapted, _ = learner.adapt(state.meta_params, task.support, key)
        return mean_squared_error(learner.predict(adapted, task.query.inputs), task.query.targets)

    return state.meta_params, jax.lax.map(error, validation_tasks).mean()


trained, chosen = {}, {}
print("validation error by inner rate" + "".join(f"{rate:>10}" for rate in RATES))
for name, factory in ALGORITHMS.items():
    run_all = jax.jit(partial(jax.lax.map, partial(run, factory)))
    _, errors = run_all((jnp.array(RATES), jnp.zeros(3, int)))
    chosen[name] = RATES[int(jnp.nanargmin(errors))]
    trained[name], _ = run_all((jnp.full(3, chosen[name]), jnp.array(SEEDS)))
    print(f"{name:30}" + "".join(f"{error:10.2f}" for error in errors))

# %% [markdown]
# ## The same test tasks for all
#
# `make_evaluate` draws its tasks from the key and the number of the call alone, so one key gives
# every algorithm and every seed the same test tasks. It keeps the score of each of them.

# %%
scores = {}  # [seeds, tasks]
for name, factory in ALGORITHMS.items():
    evaluate = make_evaluate(
        make_learner(factory, chosen[name]),
        sample,
        num_tasks=600,
        score_fn=mean_squared_error,
    )
    members = [jax.tree.map(lambda p, i=i: p[i], trained[name]) for i in range(len(SEEDS))]
    scores[name] = np.stack([evaluate(params, TEST_KEY).per_task for params in members])

print(f"{'mean squared error, 600 tasks':30}" + "".join(f"{f'seed {s}':>16}" for s in SEEDS))
for name, per_seed in scores.items():
    cells = ("{:.2f} ± {:.2f}".format(*mean_ci95(per_task)) for per_task in per_seed)
    print(f"{name:30}" + "".join(f"{cell:>16}" for cell in cells))

# %% [markdown]
# Each ± is a 95% confidence interval *over tasks*: how far the mean would move with other test
# tasks, for these trained parameters. It says nothing of another seed. Where the seeds differ by
# more than their intervals, training is the larger chance, and one seed cannot rank the algorithms.
#
# ## Is the interval right?
#
# Take the 600 scores for the whole population, draw 100 of them a thousand times, and count how
# often the interval holds the mean of all.

# %%
rng = np.random.default_rng(0)
population = scores["iMAML"][0]
draws = rng.choice(population, (1000, 100))
intervals = np.array([mean_ci95(draw) for draw in draws])
held = np.abs(intervals[:, 0] - population.mean()) <= intervals[:, 1]
print(f"{held.mean():.1%} of 1,000 intervals from 100 tasks hold the mean")
assert 0.85 < held.mean() < 0.98

# %% [markdown]
# A little less than 95%: errors of regressions have a long tail, and a sample often misses it.
#
# ## Differences are sharper than intervals
#
# A hard task is hard for every algorithm. On the same tasks, compare task by task: the interval of
# the *difference* leaves that common part out. Two overlapping intervals prove nothing; the
# interval of the difference, which does or does not contain 0, is the one to look at.

# %%
print(f"{'difference from iMAML, seed 1':34}{'same tasks':>16}{'if unrelated':>16}")
differences = {}
for name in ("MAML", "first-order MAML"):
    ours, theirs = scores["iMAML"][0], scores[name][0]
    mean, paired = differences[name] = mean_ci95(theirs - ours)
    unpaired = np.hypot(mean_ci95(ours)[1], mean_ci95(theirs)[1])
    print(f"{name:34}{f'{mean:+.2f} ± {paired:.2f}':>16}{f'{mean:+.2f} ± {unpaired:.2f}':>16}")

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3), layout="constrained")
for row, per_seed in enumerate(scores.values()):
    for i, per_task in enumerate(per_seed):
        mean, ci95 = mean_ci95(per_task)
        left.errorbar(mean, row + (i - 1) / 5, xerr=ci95, fmt="o", color=f"C{row}", capsize=3)
left.set(yticks=range(3), yticklabels=list(scores), xlabel="mean squared error")
left.set_title("three seeds, 95% CI over 600 tasks", fontsize=10)
for row, (mean, ci95) in enumerate(differences.values()):
    right.errorbar(mean, row, xerr=ci95, fmt="o", color=f"C{row}", capsize=3)
right.axvline(0, color="gray", linestyle="--")
right.set(yticks=range(2), yticklabels=list(differences), ylim=(-0.5, 1.5))
right.set(xlabel="error less iMAML's, task by task")
_ = right.set_title("seed 1, 95% CI of the difference", fontsize=10)

# %% [markdown]
# On the command line: `python -m experiments.tune` makes the trials, and `python -m
# experiments.compare --runs A B` sets finished runs side by side and refuses those that were tested
# on different tasks.
