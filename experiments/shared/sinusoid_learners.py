"""The tasks of the sinusoid experiment, and the learners with their settings."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import optax

import imaml_jax
from imaml_jax.learners.base import is_head, learned_rates
from imaml_jax.networks import Network, mlp
from imaml_jax.types import MetaLearner

Algorithm = Literal[
    "anil",
    "bmaml",
    "fomaml",
    "imaml",
    "implicit_anil",
    "implicit_bmaml",
    "implicit_platipus",
    "maml",
    "mamlpp",
    "platipus",
    "reptile",
]
WITH_KERNEL: tuple[Algorithm, ...] = ("bmaml", "implicit_bmaml")
_EVAL_SAMPLES = 10
_POSTERIORS = {
    "learned_precisions": imaml_jax.learned_precisions(),
    "likelihood": None,  # the learner's default, of its loss
}


class Settings(NamedTuple):
    """What an algorithm brings along; a config may override it."""

    inner: str
    inner_rate: float
    num_steps: int
    eval_num_steps: int
    outer_rate: float
    meta_steps: int
    reg_strength: float | None = None
    num_samples: int | None = None
    kl_weight: float | None = None
    meta_loss: Literal["chaser", "particles", "query"] | None = None
    leader_steps: int | None = None
    posterior: Literal["learned_precisions", "likelihood"] | None = None
    kernel: Literal["exact", "official"] | None = None
    bandwidth: float | None = None


SETTINGS: dict[Algorithm, Settings] = {
    "maml": Settings("sgd", 0.01, 1, 10, 1e-3, 70_000),
    "fomaml": Settings("sgd", 0.01, 1, 10, 1e-3, 70_000),
    "reptile": Settings("sgd", 0.02, 5, 32, 1.0, 15_000),
    "imaml": Settings("adaptive_gd", 0.01, 8, 16, 3e-3, 5_000, reg_strength=2.0),
    "mamlpp": Settings("sgd", 0.01, 5, 5, 1e-3, 20_000),
    "anil": Settings("sgd", 0.01, 5, 5, 1e-3, 20_000),
    "implicit_anil": Settings("newton_cg", 1.0, 2, 2, 1e-3, 20_000, reg_strength=0.1),
    "platipus": Settings("sgd", 0.01, 5, 10, 3e-3, 20_000, num_samples=2, kl_weight=0.01),
    "implicit_platipus": Settings(
        "adaptive_gd", 0.01, 8, 16, 3e-3, 5_000, reg_strength=2.0, num_samples=2, kl_weight=0.03
    ),
    "bmaml": Settings(
        "sgd",
        0.003,
        5,
        5,
        3e-3,
        20_000,
        num_samples=10,
        meta_loss="particles",
        posterior="likelihood",
        kernel="exact",
    ),
    "implicit_bmaml": Settings(
        "adaptive_gd",
        0.001,
        30,
        60,
        3e-3,
        5_000,
        reg_strength=20.0,
        num_samples=5,
        meta_loss="particles",
        posterior="likelihood",
        kernel="exact",
    ),
}


class Tasks(NamedTuple):
    """A distribution of tasks and what is trained on it.

    Attributes:
      ranges: arguments of `imaml_jax.data.sinusoid.sample_tasks`.
      network: the regressor.
      meta_batch: tasks a meta-step.
      train_tasks: how many tasks there are to train on, None for no end.
      said: in words.
      settings: where an algorithm's differ from `SETTINGS`.
    """

    ranges: dict[str, Any]
    network: Network
    meta_batch: int
    train_tasks: int | None
    said: str
    settings: dict[Algorithm, dict[str, Any]]


TASKS = {
    "maml": Tasks({}, mlp([40, 40, 1]), 25, None, "phase in [0, pi]", {}),
    "bmaml": Tasks(
        {"phase": (0.0, 2 * math.pi), "frequency": (0.5, 2.0), "relative_noise": 0.01},
        mlp([40, 40, 40, 1], kernel_init=jax.nn.initializers.glorot_uniform()),  # its code's
        10,
        1000,
        "phase in [0, 2 pi], frequency in [0.5, 2], noise 0.01 of the amplitude, 1000 tasks",
        {
            # One step in training and ten at test diverge on these frequencies.
            "maml": {"num_steps": 5, "eval_num_steps": 5},
            "fomaml": {"num_steps": 5, "eval_num_steps": 5},
            "bmaml": {
                "inner_rate": 1e-3,
                "outer_rate": 1e-3,
                "posterior": "learned_precisions",
            },
        },
    ),
}


def settings_of(algorithm: Algorithm, setting: str) -> Settings:
    """An algorithm's settings on these tasks."""
    return SETTINGS[algorithm]._replace(**TASKS[setting].settings.get(algorithm, {}))


def unadapted_params(algorithm: Algorithm, meta_params: Any) -> Any:
    """The parameters, those of all samples where there are some, that adaptation starts from."""
    if algorithm == "mamlpp":
        return meta_params.params
    if algorithm in ("platipus", "implicit_platipus"):
        return jax.tree.map(lambda x: x[None], meta_params.mean)
    return meta_params


def build_learner(
    algorithm: Algorithm,
    settings: Settings,
    network: Network = TASKS["maml"].network,
    average: Literal["auto"] | None = "auto",
) -> MetaLearner:
    """The learner of an algorithm; `average=None` makes samples predict one by one."""
    loss_fn = imaml_jax.mean_squared_error
    steps: dict[str, Any] = {
        "num_steps": settings.num_steps,
        "eval_num_steps": settings.eval_num_steps,
    }
    if algorithm == "mamlpp":
        return imaml_jax.mamlpp(network, loss_fn, inner_rate=settings.inner_rate, **steps)
    inner = {
        "sgd": optax.sgd,
        "adaptive_gd": imaml_jax.adaptive_gd,
        "newton_cg": lambda rate: imaml_jax.newton_cg(max_cg_steps=20),
    }[settings.inner](settings.inner_rate)
    implicit = partial(
        imaml_jax.imaml,
        reg_strength=settings.reg_strength,
        curvature="gauss_newton",
        solve=imaml_jax.solve_woodbury,
    )
    samples = {
        "num_samples": settings.num_samples,
        "eval_num_samples": _EVAL_SAMPLES,
        "kl_weight": settings.kl_weight,
        "average": average,
    }
    particles = {
        "num_particles": settings.num_samples,
        "average": average,
        "posterior": _POSTERIORS[settings.posterior or "likelihood"],
        "kernel": settings.kernel or "exact",
        "bandwidth": settings.bandwidth,
    }
    outer: dict[str, Any] = {"meta_loss": settings.meta_loss}
    if settings.leader_steps:
        outer["leader_steps"] = settings.leader_steps
    factories: dict[str, Callable[..., MetaLearner]] = {
        "maml": imaml_jax.maml,
        "fomaml": imaml_jax.fomaml,
        "reptile": partial(imaml_jax.reptile, statistics="batch"),
        "imaml": implicit,
        "anil": partial(imaml_jax.maml, fast=is_head),
        "implicit_anil": partial(implicit, fast=is_head),
        "platipus": partial(imaml_jax.platipus, **samples),
        "implicit_platipus": partial(imaml_jax.platipus, adaptation=implicit, **samples),
        "bmaml": partial(imaml_jax.bmaml, remat=False, **outer, **particles),
        "implicit_bmaml": partial(
            imaml_jax.implicit_bmaml,
            reg_strength=settings.reg_strength,
            precondition=True,
            solve=partial(imaml_jax.solve_gmres, restart=10, max_restarts=1),
            **outer,
            **particles,
        ),
    }
    return factories[algorithm](network, loss_fn, inner=inner, **steps)


def make_outer(algorithm: Algorithm, settings: Settings) -> optax.GradientTransformation:
    """SGD for Reptile, else Adam; the rates of Reptile and BMAML decay to 0.

    MAML++ learns its inner rates in units of the one they start from: Adam at the weights' own pace
    would double a rate of 0.01 in ten meta-steps, and the largest sinusoids then diverge.
    """
    if algorithm == "reptile":
        return optax.sgd(optax.linear_schedule(settings.outer_rate, 0.0, settings.meta_steps))
    rate = settings.outer_rate
    decays = algorithm in WITH_KERNEL
    adam = optax.adam(optax.cosine_decay_schedule(rate, settings.meta_steps) if decays else rate)
    if algorithm != "mamlpp":
        return adam
    return optax.chain(adam, optax.masked(optax.scale(settings.inner_rate), learned_rates))
