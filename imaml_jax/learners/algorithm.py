"""What the settings of all algorithms share."""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Annotated, Any, ClassVar, Literal

import optax

from imaml_jax.bilevel.inner import adaptive_gd, newton_cg
from imaml_jax.bilevel.linear_solve import solve_cg, solve_cg_steihaug
from imaml_jax.bilevel.linear_system import Solve
from imaml_jax.bilevel.low_rank import solve_woodbury
from imaml_jax.bilevel.minres import solve_minres
from imaml_jax.learners.base import FastPredicate, LossFn, Statistics, is_head, is_norm
from imaml_jax.learners.settings import Positive, Record, Steps, When, values_of
from imaml_jax.types import MetaLearner, PyTree

Descent = Literal["adam", "adaptive_gd", "nesterov", "sgd"]
AnyInner = Literal["adam", "adaptive_gd", "nesterov", "newton_cg", "sgd"]
Solver = Literal["cg", "cg_steihaug", "minres", "woodbury"]
Adapts = Literal["all", "head", "not_norms"]


@dataclasses.dataclass(frozen=True)
class LearnerSettings(Record):
    """Settings of one algorithm, from which `build` makes the learner.

    All fields have defaults. `registry.register` makes an algorithm known to protocols, command
    lines and saved models.

    Attributes:
      algorithm: its name there.
      title: its name in tables.
      factory: makes the learner of a network, a loss and the `arguments`.
    """

    algorithm: ClassVar[str]
    title: ClassVar[str]
    factory: ClassVar[Callable[..., MetaLearner]]

    statistics: Statistics = "batch"
    """Whose batch statistics normalise the query examples."""

    def build(self, network: Any, loss_fn: LossFn) -> MetaLearner:
        """The learner on a network, an `(init, apply)` pair, and a mean loss."""
        return self.factory(network, loss_fn, **self.arguments())

    def build_samples(self, network: Any, loss_fn: LossFn) -> MetaLearner:
        """The same; where it averages samples, `predict` returns the outputs of each."""
        return self.build(network, loss_fn)

    def arguments(self) -> dict[str, Any]:
        """The arguments of the factory: the settings that have an effect, by its names."""
        return values_of(self)

    def for_run(self, meta_steps: int) -> "LearnerSettings":
        """The settings in a run of so many meta-steps."""
        del meta_steps
        return self

    def before_adaptation(self, meta_params: PyTree) -> PyTree:
        """The parameters, of each sample where there are some, that adaptation starts from."""
        return meta_params


@dataclasses.dataclass(frozen=True)
class StepSettings(LearnerSettings):
    """Settings of an algorithm with inner steps."""

    num_steps: Steps = 5
    """Inner steps in training."""
    adapts: Adapts = "all"
    """Parameters that the inner loop adapts: all, the head, or all but norm scales and offsets."""

    def arguments(self) -> dict[str, Any]:
        """The arguments of the factory."""
        values = super().arguments()
        fast = fast_predicate(values.pop("adapts"))
        return values | {"fast": fast}


@dataclasses.dataclass(frozen=True)
class InnerSettings(StepSettings):
    """Settings of an algorithm that can take other inner steps in evaluation."""

    eval_num_steps: Steps | None = None
    """Inner steps at validation and test; None for as many as in training."""


@dataclasses.dataclass(frozen=True)
class DescentSettings(InnerSettings):
    """Settings of an algorithm whose inner steps are those of a gradient transform."""

    inner: Descent = "sgd"
    """Inner optimiser; nesterov is SGD with momentum 0.8."""
    inner_rate: Positive = 0.1
    """Learning rate of the inner loop."""

    def arguments(self) -> dict[str, Any]:
        """The arguments of the factory."""
        values = super().arguments()
        inner = make_inner(values["inner"], values.pop("inner_rate"))
        return values | {"inner": inner}


@dataclasses.dataclass(frozen=True)
class SampleSettings(DescentSettings):
    """Settings of an algorithm with samples or particles, whose outputs it averages."""

    def build_samples(self, network: Any, loss_fn: LossFn) -> MetaLearner:
        """The learner whose `predict` returns the outputs of each sample."""
        return self.factory(network, loss_fn, average=None, **self.arguments())


NewtonOrNot = Annotated[Positive, When(lambda own: own.inner != "newton_cg", "inner=newton_cg")]


def fast_predicate(adapts: Adapts) -> FastPredicate | None:
    """The predicate on a parameter's path; None for all."""
    return {"all": None, "head": is_head, "not_norms": lambda path: not is_norm(path)}[adapts]


def make_inner(
    name: AnyInner, rate: float, *, cg_steps: int = 1, eps_root: float = 0.0
) -> optax.GradientTransformation:
    """The inner transform of that name.

    Args:
      name: "nesterov" is SGD with momentum 0.8, "adam" has no first moment, as in Reptile.
      rate: its learning rate, but of "newton_cg".
      cg_steps: CG steps of a direction of "newton_cg".
      eps_root: Adam's, under the square root. Without it Adam has no derivative at a gradient of 0,
        such as that below a head of zeros.
    """
    return {
        "sgd": lambda: optax.sgd(rate),
        "nesterov": lambda: optax.sgd(rate, momentum=0.8, nesterov=True),
        "adam": lambda: optax.adam(rate, b1=0.0, eps_root=eps_root),
        "adaptive_gd": lambda: adaptive_gd(rate),
        "newton_cg": lambda: newton_cg(max_cg_steps=cg_steps),
    }[name]()


def make_solver(name: Solver, steps: int) -> Solve:
    """The solver of the linear system of that name, with a fixed number of steps."""
    solvers = {"cg": solve_cg, "cg_steihaug": solve_cg_steihaug, "minres": solve_minres}
    if name == "woodbury":
        return solve_woodbury
    return partial(solvers[name], tol=0.0, max_steps=steps)
