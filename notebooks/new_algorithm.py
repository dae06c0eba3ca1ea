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
# # Writing a new algorithm
#
# [![Open in Colab][badge]](https://colab.research.google.com/)
#
# An algorithm is a function that returns four pure functions. This notebook writes one that the
# library does not have, checks its gradient, and hands it to the training and evaluation that all
# algorithms share.
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
from typing import NamedTuple

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

from imaml_jax import MetaLearner, custom_argmin, mean_squared_error
from imaml_jax.data import sinusoid
from imaml_jax.learners.base import MetaInfo
from imaml_jax.networks import mlp
from imaml_jax.training import train
from imaml_jax.training.evaluation import make_evaluate

# %% [markdown]
# ## The idea
#
# Adapt only the last layer, and do it in closed form: ridge regression of the support targets on
# the features that the network gives them (Bertinetto, Henriques, Torr and Vedaldi,
# "Meta-learning with differentiable closed-form solvers", ICLR 2019). The features and the
# strength of the penalty are meta-learned:
#
# $$W = \arg\min_W \frac{1}{2n} \lVert f_\theta(X)\, W - Y\rVert^2
#   + \frac{\lambda}{2} \lVert W\rVert^2.$$
#
# ## The contract
#
# | function | takes | returns |
# |---|---|---|
# | `init` | key, example inputs | meta-parameters, any pytree |
# | `adapt` | meta-parameters, support batch, key | whatever `predict` needs, and an `info` |
# | `predict` | that, inputs `[n, ...]` | outputs `[n, ...]` |
# | `meta_grad` | meta-parameters, task, key, meta-step | a tree like the meta-parameters, `info` |
#
# No state, no classes to inherit from, no loop over tasks: the library maps and averages.
# `meta_grad` need not be the gradient of anything; Reptile's is a displacement.


# %%
class RidgeParams(NamedTuple):
    network: dict
    log_strength: jax.Array


class Fitted(NamedTuple):
    network: dict
    head: jax.Array


def ridge_head(network, *, strength=0.1):
    if not strength > 0:
        raise ValueError(f"ridge_head: strength={strength} must be positive")

    def features(params, inputs):
        outputs = network.features(params, inputs)
        return jnp.concatenate([outputs, jnp.ones_like(outputs[:, :1])], 1)

    def fit(meta_params, support):
        x, n = features(meta_params.network, support.inputs), support.inputs.shape[0]
        penalty = jnp.exp(meta_params.log_strength) * jnp.eye(x.shape[1])
        return jnp.linalg.solve(x.T @ x / n + penalty, x.T @ support.targets / n)

    def init(key, example_inputs):
        return RidgeParams(network.init(key, example_inputs), jnp.log(jnp.asarray(strength)))

    def adapt(meta_params, support, key):
        del key
        adapted = Fitted(meta_params.network, fit(meta_params, support))
        loss = mean_squared_error(predict(adapted, support.inputs), support.targets)
        return adapted, MetaInfo(support_loss=loss)

    def predict(adapted, inputs):
        return features(adapted.network, inputs) @ adapted.head

    def meta_grad(meta_params, task, key, step):
        del step

        def query_loss(meta_params):
            adapted, info = adapt(meta_params, task.support, key)
            loss = mean_squared_error(predict(adapted, task.query.inputs), task.query.targets)
            return loss, info._replace(query_loss=loss)

        return jax.grad(query_loss, has_aux=True)(meta_params)

    return MetaLearner(init, adapt, predict, meta_grad)


# %% [markdown]
# ## Check the gradient, not the accuracy
#
# A wrong gradient often trains to something. In float64 it must agree with central differences
# along a random direction; and as $W$ is a minimum, with the implicit gradient of `custom_argmin`,
# which never looks at how $W$ was computed.


# %%
def sample(key, num_tasks=10):
    return sinusoid.sample_tasks(key, num_tasks=num_tasks, shots=10, queries=10)


def along(meta_params, direction, step):
    return jax.tree.map(lambda p, d: p + step * d, meta_params, direction)


with jax.enable_x64(True):
    small = mlp([6, 1], activation=jnp.tanh, kernel_init=jax.nn.initializers.normal(0.5))
    learner = ridge_head(small)
    tasks = sample(jax.random.key(0), num_tasks=3)
    task = jax.tree.map(lambda x: x[0], tasks)
    meta_params = learner.init(jax.random.key(1), task.support.inputs)
    key = jax.random.key(2)
    gradient, info = jax.jit(learner.meta_grad)(meta_params, task, key, 0)

    leaves, structure = jax.tree.flatten(meta_params)
    keys = jax.tree.unflatten(structure, list(jax.random.split(jax.random.key(3), len(leaves))))
    direction = jax.tree.map(lambda k, p: jax.random.normal(k, p.shape), keys, meta_params)

    @jax.jit
    def query_loss(meta_params):
        return learner.meta_grad(meta_params, task, key, 0)[1].query_loss

    ahead, behind = (query_loss(along(meta_params, direction, h)) for h in (1e-5, -1e-5))
    numeric = (ahead - behind) / 2e-5
    error = abs(optax.tree.vdot(gradient, direction) / numeric - 1)
    print(f"relative difference from central differences {error:.0e}")
    assert error < 1e-7

    def ridge_objective(head, meta_params):
        outputs = learner.predict(Fitted(meta_params.network, head), task.support.inputs)
        penalty = jnp.exp(meta_params.log_strength) * jnp.sum(head**2)
        return 0.5 * mean_squared_error(outputs, task.support.targets) + 0.5 * penalty

    @custom_argmin(ridge_objective)
    def best_head(init, meta_params):
        return learner.adapt(meta_params, task.support, key)[0].head

    @jax.jit
    @jax.grad
    def implicit_gradient(meta_params):
        adapted = Fitted(meta_params.network, best_head(jnp.zeros((7, 1)), meta_params))
        return mean_squared_error(learner.predict(adapted, task.query.inputs), task.query.targets)

    difference = optax.tree.sub(implicit_gradient(meta_params), gradient)
    error = optax.tree.norm(difference) / optax.tree.norm(gradient)
    print(f"relative difference from the implicit gradient   {error:.0e}")
    assert error < 1e-4  # the tolerance of custom_argmin's default solver

# %% [markdown]
# ## Check the contract
#
# What training relies on: gradients fit the meta-parameters, nothing but the arguments matters, and
# a batch of tasks is a loop over them.

# %%
keys = jax.random.split(jax.random.key(4), 3)
with jax.enable_x64(True):
    mapped, _ = jax.jit(jax.vmap(learner.meta_grad, (None, 0, 0, None)))(
        meta_params, tasks, keys, 0
    )
    assert jax.tree.structure(gradient) == jax.tree.structure(meta_params)
    for g, p, m in zip(*map(jax.tree.leaves, (gradient, meta_params, mapped)), strict=True):
        assert (g.shape, g.dtype) == (p.shape, p.dtype)
        np.testing.assert_allclose(m[0], g, rtol=1e-9, atol=1e-12)
print("gradients fit the meta-parameters; vmap over tasks changes nothing")

# %% [markdown]
# ## Train it
#
# `train` and `make_evaluate` take it as they take `imaml`.

# %%
learner = ridge_head(mlp([40, 40, 1]))


def negative_error(outputs, targets):
    return -mean_squared_error(outputs, targets)


evaluate = make_evaluate(learner, sample, num_tasks=500, score_fn=negative_error, map_tasks="vmap")
untrained = learner.init(jax.random.key(0), jnp.zeros((1, 1)))
result = train(
    learner,
    optax.adam(3e-3),
    sample,
    key=jax.random.key(0),
    num_steps=600,
    meta_params=untrained,
    log_every=30,
    map_tasks="vmap",
    progress=False,
)
test_key = jax.random.key(1)  # the same test tasks for both
scores = {}
for name, params in (("untrained", untrained), ("trained", result.meta_params)):
    scores[name] = evaluate(params, test_key)
    error, ci95 = -scores[name].mean, scores[name].ci95
    print(f"{name:10} mean squared error {error:.3f} ± {ci95:.3f} (95% CI, 500 new tasks)")
print(f"learned strength {jnp.exp(result.meta_params.log_strength):.1e}")
assert -scores["trained"].mean < 0.5 * -scores["untrained"].mean

# %%
task = jax.tree.map(lambda x: x[0], sample(jax.random.key(7)))
x = jnp.linspace(-5, 5, 200)[:, None]
figure, (curve, fit) = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
curve.semilogy([r["step"] for r in result.history], [r["query_loss"] for r in result.history])
curve.set(xlabel="meta-step", ylabel="query loss", title="learning curve")
for name, params in (("untrained", untrained), ("trained", result.meta_params)):
    adapted, _ = learner.adapt(params, task.support, jax.random.key(0))
    fit.plot(x, learner.predict(adapted, x), label=f"adapted, {name}")
fit.scatter(*task.support, color="k", zorder=3, label="support")
fit.set(xlabel="x", title="a new task", ylim=(-6, 6))
_ = fit.legend(fontsize=8)

# %% [markdown]
# To train it by every command: a record of its settings whose `build` calls the factory, and
# `imaml_jax.learners.registry.register`. To bring it into the library: both become
# `imaml_jax/learners/ridge_head.py`, with one line in the registry; one row in
# `tests/learners/test_contract.py` runs the whole contract on it, and the two checks of the
# gradient become its own test. CONTRIBUTING.md has the rules.
