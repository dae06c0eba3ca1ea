"""Stochastic bilevel optimisation: meta-steps whose gradients and products are of mini-batches.

`min over h of F(x*(h), h)` with `x*(h) = argmin over x of G(x, h)`, both means over examples. The
gradient in `h` is `dF/dh - (d2G/dh dx) u`, where the adjoint `u` solves `(d2G/dx2) u = dF/dx`.
Every method below keeps the parameters `x` from meta-step to meta-step and moves them only a
little; all but stocBiO keep the adjoint too.

References:
  Dagreou et al., "A framework for bilevel optimization that enables stochastic and global variance
  reduction algorithms", NeurIPS 2022: SOBA.
  Arbel and Mairal, "Amortized implicit differentiation for stochastic bilevel optimization", ICLR
  2022: AmIGO.
  Ji et al., "Bilevel optimization: convergence analysis and enhanced design", ICML 2021: stocBiO.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from imaml_jax import hvp, solve_cg_steihaug
from imaml_jax.types import LinearOperator


class Problem(NamedTuple):
    """Two objectives, each the mean over some of its examples.

    Attributes:
      inner: `(params, hyperparams, rows) -> scalar`, G over the inner examples `rows` `[batch]`.
      outer: the same of F, over the outer examples.
      curvature: `(params, hyperparams, rows) -> LinearOperator`, the Hessian of G in the
        parameters, or a positive definite matrix that stands in for it. Only `implicit` uses it.
      num_inner: number of inner examples.
      num_outer: number of outer examples.
    """

    inner: Callable[..., jax.Array]
    outer: Callable[..., jax.Array]
    curvature: Callable[..., LinearOperator]
    num_inner: int
    num_outer: int


class Sizes(NamedTuple):
    """What a meta-step is made of.

    Attributes:
      batch: examples a gradient or product; all there are where it is as many or more.
      inner_steps: steps of the parameters.
      solve_steps: steps of the linear solve.
      solve_batch: examples of the linear solve of `implicit`, the same in all of its steps.
      average: share of the newest inner iterate in the running mean of `implicit`; 1 for none.
    """

    batch: int = 64
    inner_steps: int = 10
    solve_steps: int = 10
    solve_batch: int = 128
    average: float = 0.05


class Rates(NamedTuple):
    """Learning rates; the published methods use that of the parameters in the linear solve too."""

    inner: Any
    outer: Any


class State(NamedTuple):
    """What is kept from meta-step to meta-step.

    Attributes:
      params: x.
      iterate: what the inner steps of `implicit` move; its `params` are the running mean.
      adjoint: u.
      hyperparams: h.
      num_steps: meta-steps so far.
    """

    params: Any
    iterate: Any
    adjoint: Any
    hyperparams: Any
    num_steps: Any


class Method(NamedTuple):
    """One of the methods.

    Attributes:
      step: `(problem, sizes, rates, state, key) -> state`, a meta-step.
      evaluations: `(problem, sizes) -> number` of gradients and products with second derivatives in
        a meta-step, each of one example.
    """

    step: Callable[[Problem, Sizes, Rates, State, jax.Array], State]
    evaluations: Callable[[Problem, Sizes], int]


def start(params: Any, hyperparams: Any) -> State:
    """The state before the first meta-step; the adjoint is zero."""
    zeros = jax.tree.map(jnp.zeros_like, params)
    return State(params, params, zeros, hyperparams, jnp.zeros((), int))


def run(
    method: Method,
    problem: Problem,
    sizes: Sizes,
    rates: Rates,
    state: State,
    key: jax.Array,
    num_steps: Any,
) -> State:
    """`num_steps` meta-steps, a number that need not be known when this is compiled.

    Their random numbers depend on `key` and on how many meta-steps were made before.
    """

    def body(_, state):
        step_key = jax.random.fold_in(key, state.num_steps)
        return method.step(problem, sizes, rates, state, step_key)

    return lax.fori_loop(0, num_steps, body, state)


def implicit(problem: Problem, sizes: Sizes, rates: Rates, state: State, key: jax.Array) -> State:
    """Ours: averaged inner steps, conjugate gradients on one mini-batch, and all hyperparameters.

    Derivatives are taken at the running mean of the inner iterates. Conjugate gradients solve for
    what is missing to the last meta-step's adjoint, with `problem.curvature`. The hypergradient is
    that of all examples: all that differ from one to the next are products with the same adjoint,
    which one forward-mode pass gives, for about two thirds of what a gradient costs.
    """
    keys = jax.random.split(key, 3)
    hyperparams = state.hyperparams

    def descend(carry, key):
        params, iterate = carry
        rows = _draw(key, problem.num_inner, sizes.batch)
        grads = jax.grad(problem.inner)(iterate, hyperparams, rows)
        iterate = _add(iterate, -rates.inner, grads)
        return (_add(params, sizes.average, _add(iterate, -1, params)), iterate), None

    (params, iterate), _ = lax.scan(
        descend, (state.params, state.iterate), jax.random.split(keys[0], sizes.inner_steps)
    )
    outer_rows = _draw(keys[1], problem.num_outer, sizes.solve_batch)
    b, direct = jax.grad(problem.outer, (0, 1))(params, hyperparams, outer_rows)
    rows = _draw(keys[2], problem.num_inner, sizes.solve_batch)
    operator = problem.curvature(params, hyperparams, rows)
    residual = _add(b, -1, operator.matvec(state.adjoint))
    change, _ = solve_cg_steihaug(operator, residual, tol=0.0, max_steps=sizes.solve_steps)
    adjoint = _add(state.adjoint, 1, change)
    rows = jnp.arange(problem.num_inner)
    grads = _hypergradient(problem, params, hyperparams, adjoint, direct, rows)
    hyperparams = _add(hyperparams, -rates.outer, grads)
    return State(params, iterate, adjoint, hyperparams, state.num_steps + 1)


def soba(problem: Problem, sizes: Sizes, rates: Rates, state: State, key: jax.Array) -> State:
    """One step of parameters, adjoint and hyperparameters at once, all from the same mini-batch.

    The rates fall as `1 / sqrt(meta-step)`, as in benchopt/benchmark_bilevel.
    """
    inner_key, outer_key = jax.random.split(key)
    rows = _draw(inner_key, problem.num_inner, sizes.batch)
    outer_rows = _draw(outer_key, problem.num_outer, sizes.batch)
    hyperparams = state.hyperparams

    def both_gradients(params):
        return jax.grad(problem.inner, (0, 1))(params, hyperparams, rows)

    (grads, _), (product, mixed) = jax.jvp(both_gradients, (state.params,), (state.adjoint,))
    b, direct = jax.grad(problem.outer, (0, 1))(state.params, hyperparams, outer_rows)
    decay = lax.rsqrt(1.0 + state.num_steps)
    rate = rates.inner * decay
    return state._replace(
        params=_add(state.params, -rate, grads),
        adjoint=_add(state.adjoint, -rate, _add(product, -1, b)),
        hyperparams=_add(hyperparams, -rates.outer * decay, _add(direct, -1, mixed)),
        num_steps=state.num_steps + 1,
    )


def amigo(problem: Problem, sizes: Sizes, rates: Rates, state: State, key: jax.Array) -> State:
    """Gradient steps of the parameters, then of the adjoint's system from the last adjoint."""

    def solve(product, b, keys):
        def step(adjoint, key):
            return _add(adjoint, -rates.inner, _add(product(adjoint, key), -1, b)), None

        return lax.scan(step, state.adjoint, keys)[0]

    return _two_loops(solve, problem, sizes, rates, state, key)


def stocbio(problem: Problem, sizes: Sizes, rates: Rates, state: State, key: jax.Array) -> State:
    """Gradient steps of the parameters, then a Neumann series for the adjoint, from nothing.

    All mini-batches have one size, as in benchopt/benchmark_bilevel; the paper's shrink along the
    series.
    """

    def solve(product, b, keys):
        def step(carry, key):
            power, total = carry
            power = _add(power, -rates.inner, product(power, key))
            return (power, _add(total, 1, power)), None

        (_, total), _ = lax.scan(step, (b, b), keys)
        return jax.tree.map(lambda x: rates.inner * x, total)

    return _two_loops(solve, problem, sizes, rates, state, key)


def _two_loops(
    solve: Callable[..., Any],
    problem: Problem,
    sizes: Sizes,
    rates: Rates,
    state: State,
    key: jax.Array,
) -> State:
    """A meta-step whose adjoint is `solve(product, b, keys)`, with the Hessian of a mini-batch.

    `product(v, key)` has a mini-batch of its own each time.
    """
    keys = jax.random.split(key, 4)
    hyperparams = state.hyperparams
    draw = partial(_draw, num=problem.num_inner, batch=sizes.batch)

    def descend(params, key):
        grads = jax.grad(problem.inner)(params, hyperparams, draw(key))
        return _add(params, -rates.inner, grads), None

    params, _ = lax.scan(descend, state.params, jax.random.split(keys[0], sizes.inner_steps))
    outer_rows = _draw(keys[1], problem.num_outer, sizes.batch)
    b, direct = jax.grad(problem.outer, (0, 1))(params, hyperparams, outer_rows)

    def product(v, key):
        rows = draw(key)
        return hvp(lambda x: problem.inner(x, hyperparams, rows), params, v)

    adjoint = solve(product, b, jax.random.split(keys[2], sizes.solve_steps))
    rows = draw(keys[3])
    grads = _hypergradient(problem, params, hyperparams, adjoint, direct, rows)
    return state._replace(
        params=params,
        adjoint=adjoint,
        hyperparams=_add(hyperparams, -rates.outer, grads),
        num_steps=state.num_steps + 1,
    )


def _hypergradient(problem, params, hyperparams, adjoint, direct, rows):
    """`dF/dh - (d2G/dh dx) u`: the derivative in h of that of G along u."""

    def slope(hyperparams):
        return jax.jvp(lambda x: problem.inner(x, hyperparams, rows), (params,), (adjoint,))[1]

    return _add(direct, -1, jax.grad(slope)(hyperparams))


def _draw(key: jax.Array, num: int, batch: int) -> jax.Array:
    """Row numbers `[batch]`, drawn with replacement, or all of them."""
    return jnp.arange(num) if batch >= num else jax.random.randint(key, (batch,), 0, num)


def _add(x: Any, scale: Any, y: Any) -> Any:
    """`x + scale y`."""
    return optax.tree.add_scale(x, scale, y)


def _implicit_evaluations(problem: Problem, sizes: Sizes) -> int:
    batch, solve_batch = (min(n, problem.num_inner) for n in (sizes.batch, sizes.solve_batch))
    inner = sizes.inner_steps * batch + (sizes.solve_steps + 1) * solve_batch + problem.num_inner
    return inner + min(sizes.solve_batch, problem.num_outer)


def _soba_evaluations(problem: Problem, sizes: Sizes) -> int:
    return 3 * min(sizes.batch, problem.num_inner) + min(sizes.batch, problem.num_outer)


def _two_loops_evaluations(problem: Problem, sizes: Sizes) -> int:
    inner = (sizes.inner_steps + sizes.solve_steps + 1) * min(sizes.batch, problem.num_inner)
    return inner + min(sizes.batch, problem.num_outer)


IMPLICIT = Method(implicit, _implicit_evaluations)
SOBA = Method(soba, _soba_evaluations)
AMIGO = Method(amigo, _two_loops_evaluations)
STOCBIO = Method(stocbio, _two_loops_evaluations)
