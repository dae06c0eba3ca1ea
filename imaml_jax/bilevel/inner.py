"""Inner adaptation: a loop over any Optax transform, and transforms made for it."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from imaml_jax.bilevel.curvature import hessian
from imaml_jax.bilevel.linear_solve import solve_cg_steihaug
from imaml_jax.types import Array, LinearOperator, PyTree


class MinimizeInfo(NamedTuple):
    """How far a minimisation came.

    Attributes:
      loss: objective at the end.
      relative_residual: norm of the gradient at the end, relative to the first step's. 0 at a
        stationary point; an implicit gradient is as exact as this is small.
      num_steps: steps taken.
    """

    loss: Array
    relative_residual: Array
    num_steps: Array


class CurvedFunction(NamedTuple):
    """A scalar function with the matrix that a Newton step is to take for its Hessian.

    One argument of Optax's updates, whose line searches refuse others that they do not know.

    Attributes:
      fun: `params -> scalar`.
      curvature: `params -> LinearOperator`.
    """

    fun: Callable[[PyTree], Array]
    curvature: Callable[[PyTree], LinearOperator]

    def __call__(self, params: PyTree) -> Array:
        """Calls `fun`."""
        return self.fun(params)


def minimize(
    objective: Callable[..., Array],
    init_params: PyTree,
    *args: PyTree,
    tx: optax.GradientTransformation,
    num_steps: int,
    batches: PyTree | None = None,
    remat: bool = True,
    curvature: Callable[..., LinearOperator] | None = None,
    tol: float | None = None,
) -> tuple[PyTree, MinimizeInfo]:
    """Runs `num_steps` of an Optax transform on `objective(params, *args)` in a `lax.scan`.

    Differentiable by unrolling (MAML); memory is constant in `num_steps` where it is not
    differentiated (implicit MAML). Transforms that want the value, the gradient or the function
    (`optax.lbfgs`, line searches, `newton_cg`) get them.

    Args:
      objective: `(params, *args) -> scalar`, or `(params, *args, batch) -> scalar` with `batches`.
      init_params: where to start.
      *args: passed to `objective`.
      tx: the Optax transform.
      num_steps: number of steps, at least 0; the most of them with `tol`.
      batches: tree of arrays `[num_steps, ...]`, one slice a step.
      remat: where the result is differentiated by unrolling, recompute each step in the backward
        pass instead of storing its activations. No effect otherwise.
      curvature: `(params, *args) -> LinearOperator`, what `newton_cg` solves with in place of the
        objective's Hessian; its arguments are the objective's.
      tol: stops in a `lax.while_loop` once the norm of the gradient is at most this times the first
        one's. JAX does not reverse-differentiate such a loop; `custom_argmin` has no need to. None
        (default) takes all steps.

    Returns:
      `(params, MinimizeInfo)`. With `batches` the report is for the last batch.

    Raises:
      ValueError: a negative `num_steps` or `tol`, or `batches` with 0 steps or with `tol`.
    """
    if num_steps < 0:
        raise ValueError(f"minimize: num_steps={num_steps} must be at least 0")
    if batches is not None and num_steps == 0:
        raise ValueError("minimize: num_steps=0 leaves no batch to report on; leave batches out")
    if tol is not None and not tol >= 0:
        raise ValueError(f"minimize: tol={tol} must be at least 0, or None to take all steps")
    if tol is not None and batches is not None:
        raise ValueError(f"minimize: tol={tol} needs the same objective at each step; drop batches")
    update = optax.with_extra_args_support(tx).update

    def given(batch, fun):
        call_args = args if batches is None else (*args, batch)
        return lambda params: fun(params, *call_args)

    def evaluate(params, batch):
        return jax.value_and_grad(given(batch, objective))(params)

    def move(params, state, value, grads, batch):
        value_fn = given(batch, objective)
        if curvature is not None:
            value_fn = CurvedFunction(value_fn, given(batch, curvature))
        updates, state = update(grads, state, params, value=value, grad=grads, value_fn=value_fn)
        return optax.apply_updates(params, updates), state

    def step(carry, batch):
        params, state = carry
        value, grads = evaluate(params, batch)
        return move(params, state, value, grads, batch), optax.tree.norm(grads)

    if tol is not None:
        value, grads = evaluate(init_params, None)
        first = optax.tree.norm(grads)

        def unfinished(carry):
            taken, _, _, (_, grads) = carry
            return (taken < num_steps) & (optax.tree.norm(grads) > tol * first)

        def advance(carry):
            taken, params, state, (value, grads) = carry
            params, state = move(params, state, value, grads, None)
            return taken + 1, params, state, evaluate(params, None)

        carry = jnp.int32(0), init_params, tx.init(init_params), (value, grads)
        taken, params, _, (loss, grads) = lax.while_loop(unfinished, advance, carry)
        return params, _info(loss, optax.tree.norm(grads), first, taken)

    if remat:
        step = jax.checkpoint(step, prevent_cse=False)
    carry = (init_params, tx.init(init_params))
    (params, _), norms = lax.scan(step, carry, batches, length=num_steps)
    last_batch = jax.tree.map(lambda x: x[-1], batches)
    loss, grads = evaluate(params, last_batch)
    norm = optax.tree.norm(grads)
    return params, _info(loss, norm, norms[0] if num_steps else norm, jnp.int32(num_steps))


def _info(loss: Array, norm: Array, first: Array, num_steps: Array) -> MinimizeInfo:
    return MinimizeInfo(loss, norm / jnp.where(first > 0, first, 1), num_steps)


def mini_batches(key: Array, examples: PyTree, num_batches: int, batch_size: int) -> PyTree:
    """Mini-batches drawn by passing through one shuffle of the examples after another.

    Args:
      key: random key.
      examples: tree of arrays `[n, ...]`.
      num_batches: batches.
      batch_size: examples a batch; a batch may reach into the next shuffle.

    Returns:
      Tree of arrays `[num_batches, batch_size, ...]`.
    """
    num_examples = jax.tree.leaves(examples)[0].shape[0]
    passes = -(-num_batches * batch_size // num_examples)
    keys = jax.random.split(key, passes)
    order = jax.vmap(lambda k: jax.random.permutation(k, num_examples))(keys).reshape(-1)
    order = order[: num_batches * batch_size].reshape(num_batches, batch_size)
    return jax.tree.map(lambda x: x[order], examples)


def proximal_objective(loss: Callable[..., Array]) -> Callable[..., Array]:
    """Adds the proximal term of iMAML to a loss.

    Args:
      loss: `(params, *args) -> scalar`.

    Returns:
      `(params, anchor, reg_strength, *args) -> loss + reg_strength/2 ||params - anchor||^2`. The
      strength is a scalar or a tree prefix of the parameters.

    References:
      Rajeswaran et al., "Meta-Learning with Implicit Gradients", NeurIPS 2019, Eq. 3.
    """

    def objective(params: PyTree, anchor: PyTree, reg_strength: PyTree, *args: PyTree) -> Array:
        penalties = jax.tree.map(
            lambda p, a, s: jnp.sum(s * jnp.square(p - a)),
            params,
            anchor,
            jax.tree.broadcast(reg_strength, params),
        )
        return loss(params, *args) + 0.5 * sum(jax.tree.leaves(penalties))

    return objective


class AdaptiveGDState(NamedTuple):
    """Rate of the last step, its ratio to the one before, and the last gradient."""

    rate: Array
    growth: Array
    previous_grads: PyTree


def adaptive_gd(learning_rate: float, *, max_rate: float = jnp.inf) -> optax.GradientTransformation:
    """Gradient descent whose rate follows the local curvature, without a line search.

    `rate_k = min(sqrt(1 + growth) rate_{k-1}, ||x_k - x_{k-1}|| / (2 ||g_k - g_{k-1}||))`. Costs no
    function or gradient beyond the one of each step, so that an inner problem whose curvature grows
    during meta-training stays inside gradient descent's region of stability. Where the gradient has
    not changed, neither does the rate.

    Args:
      learning_rate: rate of the first step, positive; err on the small side.
      max_rate: bound on the rate.

    Returns:
      The Optax transform.

    Raises:
      ValueError: a rate that is not positive.

    References:
      Malitsky and Mishchenko, "Adaptive gradient descent without descent", ICML 2020, Algorithm 1.
    """
    if not learning_rate > 0 or not max_rate >= learning_rate:
        raise ValueError(
            f"adaptive_gd: learning_rate={learning_rate} and max_rate={max_rate} must satisfy "
            "0 < learning_rate <= max_rate"
        )

    def init(params):
        dtype = jnp.result_type(*jax.tree.leaves(params))
        return AdaptiveGDState(
            rate=jnp.asarray(learning_rate, dtype),
            growth=jnp.full((), jnp.inf, dtype),
            previous_grads=jax.tree.map(jnp.zeros_like, params),
        )

    def update(updates, state, params=None):
        del params
        grads = updates
        moved = state.rate * _norm(state.previous_grads)
        changed = _norm(optax.tree.sub(grads, state.previous_grads))
        # A change lost in rounding, as at convergence in float32, says nothing of the curvature.
        seen = (moved > 0) & (changed > jnp.finfo(changed.dtype).eps * _norm(grads))
        bound = moved / jnp.where(seen, 2 * changed, 1)
        candidate = jnp.minimum(jnp.sqrt(1 + state.growth) * state.rate, bound)
        rate = jnp.where(seen, jnp.minimum(candidate, max_rate), state.rate)
        steps = jax.tree.map(lambda g: -rate.astype(g.dtype) * g, grads)
        growth = jnp.where(seen, rate / state.rate, state.growth)
        return steps, AdaptiveGDState(rate, growth, grads)

    return optax.GradientTransformation(init, update)


def _norm(tree: PyTree) -> Array:
    """Of a tree; its derivative at 0 is 0, where the square root's alone would be infinite."""
    square = jnp.asarray(optax.tree.norm(tree, squared=True))
    return jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1)), 0)


def newton_cg(
    *, max_cg_steps: int = 5, cg_tol: float = 1e-3, max_backtracks: int = 10
) -> optax.GradientTransformationExtraArgs:
    """Hessian-free Newton steps: truncated CG for the direction, then a backtracking line search.

    The direction solves `H d = -g` by at most `max_cg_steps` of CG, stopped at negative curvature;
    where it does not descend, it is the negative gradient. The step halves until Armijo's condition
    holds with the constant 1e-4, up to rounding of the loss; where it never does, nothing moves.

    Args:
      max_cg_steps: CG steps a direction, at least 1.
      cg_tol: relative residual at which CG stops sooner.
      max_backtracks: most halvings.

    Returns:
      An Optax transform without state, whose `update` needs `value` and `value_fn`, as `minimize`
      gives them; a `CurvedFunction` brings its own matrix in place of the Hessian.

    Raises:
      ValueError: a setting out of its range.

    References:
      Rajeswaran et al., NeurIPS 2019, section 4 (Hessian-free inner optimisation).
      Martens, "Deep learning via Hessian-free optimization", ICML 2010.
    """
    if max_cg_steps < 1 or max_backtracks < 0:
        raise ValueError(
            f"newton_cg: max_cg_steps={max_cg_steps} must be at least 1 and "
            f"max_backtracks={max_backtracks} at least 0"
        )

    def update(updates, state, params=None, *, value, value_fn, **unused):
        del unused
        grads = updates
        steepest = jax.tree.map(jnp.negative, grads)
        curved = isinstance(value_fn, CurvedFunction)
        operator = value_fn.curvature(params) if curved else hessian(value_fn, params)
        newton, _ = solve_cg_steihaug(operator, steepest, tol=cg_tol, max_steps=max_cg_steps)
        slope = jnp.asarray(optax.tree.vdot(newton, grads))
        descends = slope < 0
        direction = jax.tree.map(lambda n, s: jnp.where(descends, n, s), newton, steepest)
        slope = jnp.where(descends, slope, jnp.asarray(optax.tree.vdot(steepest, grads)))
        rounding = 4 * jnp.finfo(value.dtype).eps * jnp.abs(value)

        def try_length(length):
            trial = value_fn(optax.tree.add_scale(params, length, direction))
            return length, trial <= value + 1e-4 * length * slope + rounding

        def too_long(search):
            (_, accepted), tries = search
            return ~accepted & (tries < max_backtracks)

        def backtrack(search):
            (length, _), tries = search
            return try_length(0.5 * length), tries + 1

        start = try_length(jnp.ones((), value.dtype)), 0
        (length, accepted), _ = lax.while_loop(too_long, backtrack, start)
        return optax.tree.scale(jnp.where(accepted, length, 0), direction), state

    return optax.GradientTransformationExtraArgs(
        optax.init_empty_state,
        update,  # pyright: ignore[reportArgumentType]
    )
