"""What the learners share whose adapted parameters are several particles."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import optax

from imaml_jax.bilevel.curvature import gauss_newton
from imaml_jax.learners.algorithm import Adapts, SampleSettings
from imaml_jax.learners.base import (
    Adapted,
    AverageOption,
    FastPredicate,
    LossFn,
    Statistics,
    accuracy_of,
    check_steps,
    combine,
    fitting_average,
    partition,
)
from imaml_jax.learners.posterior import Posterior, PosteriorName, likelihood, posterior_of
from imaml_jax.learners.settings import Count, Positive
from imaml_jax.learners.supervised import supervised
from imaml_jax.learners.svgd import Kernel, check_kernel
from imaml_jax.types import Array, Batch, LowRank, Params, PyTree, Task


class Ensemble(NamedTuple):
    """A few-shot problem whose adapted parameters have a leading axis of `M` particles.

    Attributes:
      init: `(key, example_inputs) -> meta_params`, the network's parameters, the adapted ones
        `[M, ...]`.
      split: `meta_params -> (particles, slow)`, each with None where the other has a leaf.
      encode: `(slow, task) -> slow`, as in `Problem`.
      log_densities: `(particles, slow, batch) -> [M]`.
      low_rank: `(particle, slow, batch) -> LowRank`, the Gauss-Newton matrix of one particle's
        negative log-likelihood.
      outer_loss: `(particles, slow, task, of_particles) -> (scalar, (query_loss, accuracy))`, the
        mean of the particles' own query losses, or that of their one prediction again, which the
        pair is of; accuracy None for regression.
      compared: `particles -> particles`, without what the chaser loss leaves out.
      finish: `(particles, slow, support) -> Adapted`.
      predict: `(adapted, inputs) -> outputs`, as `average` says.
    """

    init: Callable[[Array, Any], Params]
    split: Callable[[Params], tuple[PyTree, PyTree]]
    encode: Callable[[PyTree, Task], PyTree]
    log_densities: Callable[[PyTree, PyTree, Batch], Array]
    low_rank: Callable[[PyTree, PyTree, Batch], LowRank]
    outer_loss: Callable[[PyTree, PyTree, Task, bool], tuple[Array, tuple[Array, Array | None]]]
    compared: Callable[[PyTree], PyTree]
    finish: Callable[[PyTree, PyTree, Batch], Adapted]
    predict: Callable[[Adapted, Any], Any]


def ensemble(
    name: str,
    network: Any,
    loss_fn: LossFn,
    *,
    num_particles: int,
    posterior: Posterior | None,
    average: AverageOption,
    fast: FastPredicate | None,
    statistics: Statistics,
    init_spread: float,
) -> Ensemble:
    """The few-shot problem of an ensemble of particles.

    Args:
      name: of the learner, for messages.
      network: `(init, apply)` pair.
      loss_fn: `(outputs, targets) -> scalar`, a mean over examples.
      num_particles: `M`.
      posterior: what the particles are adapted to; None for `likelihood(loss_fn)`.
      average: `outputs [M, n, ...] -> prediction`; "auto" for `mixture_logits` with `cross_entropy`
        and `mean_outputs` with `mean_squared_error`. None to predict all `M`; their query loss is
        then that of "auto".
      fast: which parameters are particles, by path; None for all.
      statistics: batch-norm mode of the query examples, see `supervised`.
      init_spread: standard deviation of the noise on the initial particles.

    Returns:
      The `Ensemble`.

    Raises:
      ValueError: a setting out of its range.
    """
    check_steps(name, num_particles=num_particles)
    if not 0 <= init_spread < float("inf"):
        raise ValueError(f"{name}: init_spread={init_spread} must be at least 0 and finite")
    posterior = posterior or likelihood(loss_fn)
    one_prediction = fitting_average(name, average, loss_fn)
    problem = supervised(posterior.wrap(network), loss_fn, fast=fast, statistics=statistics)

    def init(key, example_inputs):
        keys = jax.random.split(key, num_particles)
        drawn = jax.vmap(problem.init, in_axes=(0, None))(keys, example_inputs)
        particles, slow = problem.split(drawn)
        slow = jax.tree.map(lambda x: x[0], slow)
        if num_particles > 1:
            noise = optax.tree.random_like(jax.random.fold_in(key, num_particles), particles)
            particles = optax.tree.add_scale(particles, init_spread, noise)
        return combine(particles, slow)

    def log_densities(particles, slow, batch):
        def log_density(particle):
            outputs = problem.support_outputs(particle, slow, batch)
            return posterior.log_density(particle, outputs, batch.targets)

        return jax.vmap(log_density)(particles)

    def low_rank(particle, slow, batch):
        factor = gauss_newton(
            lambda p: problem.support_outputs(p, slow, batch),
            lambda outputs: -posterior.log_density(particle, outputs, batch.targets),
            particle,
        ).factor
        assert factor is not None
        return factor()

    def predict(adapted, inputs):
        particles, slow = problem.split(adapted.params)

        def sample_outputs(particle):
            one = Adapted(combine(particle, slow), adapted.support_inputs)
            return problem.predict(one, inputs)

        outputs = jax.vmap(sample_outputs)(particles)
        return outputs if average is None else one_prediction(outputs)

    def outer_loss(particles, slow, task, of_particles):
        outputs = jax.vmap(lambda particle: problem.query_outputs(particle, slow, task))(particles)
        prediction, targets = one_prediction(outputs), task.query.targets
        loss = loss_fn(prediction, targets)
        value = (
            jax.vmap(lambda own: loss_fn(own, targets))(outputs).mean() if of_particles else loss
        )
        return value, (loss, accuracy_of(prediction, targets))

    return Ensemble(
        init,
        problem.split,
        problem.encode,
        log_densities,
        low_rank,
        outer_loss,
        lambda particles: partition(particles, posterior.compared)[0],
        problem.finish,
        predict,
    )


@dataclasses.dataclass(frozen=True)
class ParticleSettings(SampleSettings):
    """Settings that both Bayesian MAMLs have."""

    adapts: Adapts = "head"
    """Parameters that the inner loop adapts, of which there are particles; published for
    classification is the head."""
    num_samples: Count = 5
    """Particles."""
    posterior: PosteriorName = "likelihood"
    """Density of the particles; published for regression is learned_precisions."""
    kernel: Kernel = "exact"
    """exact, or the constants of the published code."""
    bandwidth: Positive | None = None
    """Of the kernel; None for the median's, with which the gradients of the other particles
    together count as much as a particle's own."""

    def check_together(self) -> None:
        """Raises ValueError for one particle and the median's bandwidth."""
        check_kernel(self.algorithm, self.num_samples, self.bandwidth, self.kernel)

    def arguments(self) -> dict[str, Any]:
        """The arguments of the factory."""
        values = super().arguments()
        number = values.pop("num_samples")
        return values | {"num_particles": number, "posterior": posterior_of(self.posterior)}
