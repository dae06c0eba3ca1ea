"""From a protocol's words to a learner and an optimiser."""

import operator
from functools import partial
from typing import Any

import jax
import optax
from jax.nn import initializers

from imaml_jax import learners
from imaml_jax.bilevel.inner import adaptive_gd, newton_cg
from imaml_jax.bilevel.linear_solve import solve_cg, solve_cg_steihaug
from imaml_jax.bilevel.low_rank import solve_woodbury
from imaml_jax.bilevel.minres import solve_minres
from imaml_jax.learners.base import is_head, is_norm, learned_rates
from imaml_jax.networks import conv4
from imaml_jax.protocols.protocols import Protocol
from imaml_jax.types import MetaLearner

_INITIALIZERS = {
    "zero": initializers.zeros,
    "normal": initializers.normal(1.0),
    "xavier": initializers.xavier_uniform(),
    "xavier_1.73": initializers.variance_scaling(1.73**2, "fan_avg", "uniform"),
}
_GRANULARITIES = {None: False, "one": True, "leaf": "leaf", "parameter": "parameter"}
_HEAD_ONLY = ("anil", "bmaml", "implicit_anil")
_EPOCHS = 100  # of a MAML++ run, whatever its length
_SOLVERS = {
    "cg": lambda steps: partial(solve_cg, tol=0.0, max_steps=steps),
    "cg_steihaug": lambda steps: partial(solve_cg_steihaug, tol=0.0, max_steps=steps),
    "minres": lambda steps: partial(solve_minres, tol=0.0, max_steps=steps),
    "woodbury": lambda steps: solve_woodbury,
}


def build_learner(protocol: Protocol, ways: int) -> MetaLearner:
    """The learner of a protocol, on `conv4`."""
    settings = dict(protocol.network)
    network = conv4(
        ways,
        kernel_init=_INITIALIZERS[settings.pop("kernel", "xavier")],
        head_init=_INITIALIZERS[settings.pop("head", "zero")],
        activation=getattr(jax.nn, protocol.activation),
        **settings,
    )
    loss_fn = learners.cross_entropy
    shared: dict[str, Any] = {
        "num_steps": protocol.num_steps,
        "eval_num_steps": protocol.eval_num_steps,
        "statistics": protocol.statistics,
    }
    if protocol.cg_damping is not None:
        return learners.imaml_dev(
            network,
            loss_fn,
            **shared,
            inner_rate=protocol.inner_rate,
            reg_strength=protocol.reg_strength,
            cg_damping=protocol.cg_damping,
            cg_steps=protocol.cg_steps,
        )
    norms_rest = None if protocol.adapts_norm else _is_not_norm
    if protocol.algorithm == "mamlpp":
        return learners.mamlpp(
            network,
            loss_fn,
            **shared,
            inner_rate=protocol.inner_rate,
            learn_rates=protocol.learn_rates,
            multi_step_epochs=protocol.multi_step_epochs,
            first_order_epochs=protocol.first_order_epochs,
            epoch_length=max(1, protocol.meta_steps // _EPOCHS),
            per_step=is_norm if protocol.per_step_norm else None,
            fast=norms_rest,
        )
    shared |= {
        "inner": _make_inner(protocol),
        "fast": is_head if protocol.algorithm in _HEAD_ONLY else norms_rest,
    }
    if protocol.algorithm == "platipus":
        return learners.platipus(network, loss_fn, **shared, num_samples=protocol.num_samples)
    if protocol.algorithm == "bmaml":
        return learners.bmaml(network, loss_fn, **shared, num_particles=protocol.num_samples)
    if protocol.algorithm in ("anil", "maml"):
        return learners.maml(network, loss_fn, **shared)
    if protocol.algorithm == "fomaml":
        return learners.fomaml(network, loss_fn, **shared)
    if protocol.algorithm.startswith("reptile"):
        return learners.reptile(
            network,
            loss_fn,
            **shared,
            batch_size=protocol.batch_size,
            eval_batch_size=protocol.eval_batch_size,
        )
    return learners.imaml(
        network,
        loss_fn,
        **shared,
        reg_strength=protocol.reg_strength,
        eval_reg_strength=protocol.eval_reg_strength,
        learn_reg_strength=_GRANULARITIES[protocol.learn_reg_strength],
        curvature=protocol.curvature,
        solve=_SOLVERS[protocol.solve](protocol.cg_steps),
    )


def make_outer(protocol: Protocol, meta_steps: int) -> optax.GradientTransformation:
    """The outer optimiser of a protocol, with its schedule over `meta_steps`."""
    start, end = protocol.outer_rate, protocol.final_outer_rate
    rate = {
        "constant": lambda: start,
        "linear": lambda: optax.linear_schedule(start, 0.0, meta_steps),
        "cosine": lambda: optax.cosine_decay_schedule(start, meta_steps, end / start),
    }[protocol.schedule]()
    adam = partial(optax.adam, eps=protocol.outer_epsilon)
    outer = optax.sgd(rate) if protocol.outer == "sgd" else adam(rate)
    if protocol.outer_clip is None:
        return outer
    clip = optax.clip(protocol.outer_clip)
    return optax.chain(optax.masked(clip, _all_but_rates), outer)


def _make_inner(protocol: Protocol) -> optax.GradientTransformation:
    # Without it Adam has no derivative at a gradient of 0, such as that below a head of zeros.
    eps_root = 1e-16 if protocol.algorithm in ("anil", "maml") else 0.0
    return {
        "sgd": lambda: optax.sgd(protocol.inner_rate),
        "nesterov": lambda: optax.sgd(protocol.inner_rate, momentum=0.8, nesterov=True),
        "adam": lambda: optax.adam(protocol.inner_rate, b1=0.0, eps_root=eps_root),
        "adaptive_gd": lambda: adaptive_gd(protocol.inner_rate),
        "newton_cg": lambda: newton_cg(max_cg_steps=protocol.cg_steps),
    }[protocol.inner]()


def _all_but_rates(meta_params: Any) -> Any:
    return jax.tree.map(operator.not_, learned_rates(meta_params))


def _is_not_norm(path: str) -> bool:
    return not is_norm(path)
