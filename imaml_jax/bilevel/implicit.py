"""Derivatives of solutions: the implicit function theorem as JAX transformations.

If `F(x*, *args) = 0` and `A = dF/dx` is invertible there, then `A dx* = -dF/dargs dargs`. A solver
of any kind becomes differentiable in every argument by solving that linear system; its iterations
are never differentiated. The derivative is as accurate as the root.

References:
  Rajeswaran et al., "Meta-Learning with Implicit Gradients", NeurIPS 2019, Lemma 1 and
  Eq. 6, whose lambda and query gradient `learners.imaml` supplies.
  Blondel et al., "Efficient and Modular Implicit Differentiation", NeurIPS 2022.
"""

from collections.abc import Callable, Sequence
from functools import partial, wraps
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.core import Tracer, eval_jaxpr
from jax.custom_derivatives import SymbolicZero, zero_from_primal

from imaml_jax.bilevel.arguments import Skeleton, check_call, depends_on_tracers, hoist
from imaml_jax.bilevel.curvature import steepest_ascent
from imaml_jax.bilevel.failure import OnFailure, check_on_failure, handle_failure
from imaml_jax.bilevel.linear_solve import solve_auto
from imaml_jax.bilevel.linear_system import (
    Solve,
    SolveInfo,
    as_operator,
    ravel,
    transpose,
    transposed,
)
from imaml_jax.types import Array, LinearOperator, Operator, PyTree

_MOST_PROGRAMS = 16  # compiled, of one decorated function


def root_jvp(
    optimality_fn: Callable[..., PyTree],
    root: PyTree,
    args: Sequence[PyTree],
    tangents: Sequence[PyTree],
    solve: Solve | None = None,
    *,
    symmetric: bool = False,
    operator: Operator | None = None,
    on_failure: OnFailure = "raise",
) -> PyTree:
    """Tangent of a root: solves `A dx = -dF`, differentiable to any order in both modes.

    Args:
      optimality_fn: `F(x, *args)`, as many numbers as `x`, or more; zero at the root.
      root: `x*`, of floating-point leaves.
      args: the other arguments of `F`.
      tangents: one for each of `args`.
      solve: a solver of `imaml_jax.bilevel.linear_solve`; None (default) for `solve_auto`.
      symmetric: whether `A` is symmetric; else reverse mode solves with its transpose.
      operator: what stands in for `A`, as the Gauss-Newton matrix for a Hessian; None (default) for
        `dF/dx`.
      on_failure: see `custom_root`.

    Returns:
      `dx*`, shaped like `root`.

    Raises:
      LinearSolveError: the system was not solved, see `custom_root`.
      TypeError: a leaf of `root` that is not floating-point.
    """
    check_on_failure(on_failure)

    def optimality(x: PyTree, args: Sequence[PyTree], unused: None) -> PyTree:
        return optimality_fn(x, *args)

    curvature = None if operator is None else lambda *unused: operator
    system = _tangent_system(optimality, solve, symmetric, curvature)
    return _tangent(system, root, list(args), None, list(tangents), symmetric, on_failure)


def root_vjp(
    optimality_fn: Callable[..., PyTree],
    root: PyTree,
    args: Sequence[PyTree],
    cotangent: PyTree,
    solve: Solve | None = None,
    *,
    symmetric: bool = False,
    operator: Operator | None = None,
    key: jax.Array | None = None,
) -> tuple[tuple[PyTree, ...], SolveInfo]:
    """Cotangents of the arguments of a root, with the report of the linear solve.

    `u = A^-T v` and `-(dF/dargs)^T u`. A truncated solve is meant here, and the report says how far
    it came. Not itself differentiable past the operator; for exact higher orders use `custom_root`.

    Args:
      optimality_fn: `F(x, *args)`, shaped like `x`.
      root: `x*`.
      args: the other arguments of `F`.
      cotangent: `v`, shaped like `root`.
      solve: a solver of `imaml_jax.bilevel.linear_solve`; None (default) for `solve_auto`.
      symmetric: whether `A` is symmetric; else the solver gets its transpose.
      operator: what stands in for `A`, not transposed; None (default) for `dF/dx`.
      key: passed to the solver.

    Returns:
      `(cotangents, info)`, one cotangent for each of `args`; of dtype float0 for integers.
    """
    args = tuple(args)
    if operator is None:
        operator = LinearOperator(jax.linearize(lambda x: optimality_fn(x, *args), root)[1])
    if not symmetric:
        operator = transpose(operator, cotangent)
    solve = partial(solve_auto, symmetric=symmetric) if solve is None else solve
    adjoint, info = solve(operator, cotangent, key=key)
    _, pullback = jax.vjp(partial(optimality_fn, root), *args)

    def negative(x: Array) -> Array:
        return x if x.dtype == jax.dtypes.float0 else -x

    return jax.tree.map(negative, pullback(adjoint)), info


def custom_root(
    optimality_fn: Callable[..., PyTree],
    solve: Solve | None = None,
    *,
    symmetric: bool = False,
    has_aux: bool = False,
    curvature: Callable[..., Operator] | None = None,
    on_failure: OnFailure = "raise",
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorator that makes `solver(init, *args, **kwargs) -> x*` differentiable in its arguments.

    Differentiable, in both modes and to any order, in every floating-point array among `args` and
    `kwargs`, and in those that `optimality_fn` closes over. The derivative in `init` is zero, as a
    root does not depend on where the search began. Strings, integers, functions and modules that
    hold them may be arguments too.

    Call it under `jax.jit`. Outside, `optimality_fn` is traced at every derivative, and compiled
    once as long as its operations stay the same; with `curvature` it is compiled every time. Values
    that JAX traces and that are hidden deep in an object are refused.

    Args:
      optimality_fn: `F(x, *args, **kwargs)`, as many numbers as `x`; zero at the root. More numbers
        than `x` has, as with equations that say the same twice, need `solve_lstsq` or `solve_lsmr`.
      solve: a solver of `imaml_jax.bilevel.linear_solve` for the tangent system; None (default) for
        `solve_auto`.
      symmetric: whether `dF/dx` is symmetric, as for a minimum.
      has_aux: whether the solver returns `(x*, aux)`; `aux` is not differentiated.
      curvature: `(x, *args, **kwargs) -> LinearOperator`, a matrix in place of `dF/dx`, with its
        dampings and its factor; None (default) for `dF/dx` itself.
      on_failure: what to do where the solver has not converged. "raise" (default): the derivative
        is NaN, and outside of `jax.jit` `LinearSolveError` is raised. "nan": NaN alone. "accept":
        the solution as far as it came, where a truncated solve is meant. A function: NaN, and it is
        called with the `SolveInfo` on the host.

    Returns:
      The decorator.

    Raises:
      LinearSolveError: on differentiation, see `on_failure`.
      TypeError: an argument that `optimality_fn` does not take; a root with leaves that are not
        floating-point; a pair returned without `has_aux`.
      ValueError: an unknown `on_failure`; more or fewer equations than unknowns for a solver of
        square systems.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from imaml_jax import custom_root
      >>> @custom_root(lambda x, a: x**2 - a)
      ... def square_root(init, a):
      ...     return jnp.sqrt(a)  # any solver; here the answer itself
      >>> print(jax.jit(jax.grad(square_root, argnums=1))(1.0, 4.0))
      0.25
    """
    check_on_failure(on_failure)

    def decorate(solver):
        programs = _Programs(solve, symmetric)

        @wraps(solver, updated=())  # a solver that is itself a custom_jvp keeps its rule to itself
        def differentiable(init, *args, **kwargs):
            check_call(optimality_fn, "optimality_fn", init, *args, **kwargs)
            start, call = Skeleton(init), Skeleton((args, kwargs))
            starts, arrays = start.arrays(init), call.arrays((args, kwargs))

            def find(starts, arrays):
                args, kwargs = call.merge(arrays)
                return solver(start.merge(starts), *args, **kwargs)

            def with_call(fun, x, arrays):
                args, kwargs = call.merge(arrays)
                return fun(x, *args, **kwargs)

            optimality = partial(with_call, optimality_fn)
            matrix = curvature and partial(with_call, curvature)
            if any(map(depends_on_tracers, (solver, optimality_fn, curvature, start, call))):
                if curvature is not None:
                    raise TypeError(
                        "custom_root: with curvature, pass what its functions close over and is "
                        "traced (differentiated or compiled) as arguments of the solver"
                    )
                find, optimality, arrays = _hoisted(find, optimality, starts, arrays, has_aux)
            find_root = _differentiable(find, optimality, matrix, programs, has_aux, on_failure)
            return find_root(starts, arrays)

        return differentiable

    return decorate


def custom_argmin(
    objective: Callable[..., jax.Array],
    solve: Solve | None = None,
    *,
    has_aux: bool = False,
    curvature: Callable[..., Operator] | None = None,
    on_failure: OnFailure = "raise",
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorator that makes a minimiser `solver(init, *args, **kwargs) -> x*` differentiable.

    `custom_root` of the gradient, with a symmetric solve.

    Args:
      objective: `(x, *args, **kwargs) -> scalar`, minimised by the solver in `x`.
      solve: a solver of `imaml_jax.bilevel.linear_solve` for systems with the Hessian; None
        (default) for `solve_auto`.
      has_aux: whether the solver returns `(x*, aux)`; `aux` is not differentiated.
      curvature: `(x, *args, **kwargs) -> LinearOperator`, a symmetric matrix in place of the
        Hessian, as `damped(gauss_newton(...), strength)`; None (default) for the Hessian.
      on_failure: see `custom_root`.

    Returns:
      The decorator.

    Raises:
      As `custom_root`.

    Example:
      The derivative of a ridge regression in its regularisation strength:

      >>> import jax, jax.numpy as jnp
      >>> from imaml_jax import custom_argmin
      >>> inputs, targets = jnp.eye(2), jnp.ones(2)
      >>> def objective(w, strength):
      ...     return 0.5 * jnp.sum((inputs @ w - targets) ** 2) + 0.5 * strength * jnp.sum(w**2)
      >>> @custom_argmin(objective)
      ... def ridge(init, strength):
      ...     return jnp.linalg.solve(inputs.T @ inputs + strength * jnp.eye(2), inputs.T @ targets)
      >>> derivative = jax.jit(jax.jacobian(ridge, argnums=1))
      >>> print(derivative(jnp.zeros(2), 1.0))  # -1 / (1 + strength)^2
      [-0.25 -0.25]
    """
    return custom_root(
        steepest_ascent(objective),
        solve,
        symmetric=True,
        has_aux=has_aux,
        curvature=curvature,
        on_failure=on_failure,
    )


class _TangentSystem(NamedTuple):
    """`A dx = -dF` on raveled vectors, as functions of `(x, moving, still)`.

    `moving` are the arrays that have a tangent, `still` those that have none.
    """

    right: Callable[..., Array]  # (..., tangents of moving) -> -dF
    linearized: Callable[..., Callable[[Array], Array]]  # (...) -> (v -> A v)
    solve: Callable[..., tuple[Array, SolveInfo]]
    solve_transposed: Callable[..., tuple[Array, SolveInfo]]


def _tangent_system(
    optimality: Callable[..., PyTree],
    solve: Solve | None,
    symmetric: bool,
    curvature: Callable[..., Operator] | None,
) -> _TangentSystem:
    """Of `optimality(x, moving, still)` and `curvature` of the same arguments."""
    linear_solve = partial(solve_auto, symmetric=symmetric) if solve is None else solve

    def right(x, moving, still, tangents):
        _, right = jax.jvp(lambda m: flat_optimality(x, m, still), (moving,), (tangents,))
        return -right

    def flat_optimality(x, moving, still):
        return ravel(optimality(x, moving, still))[0].astype(ravel(x)[0].dtype)

    def operator_at(x, moving, still):
        flat, unravel = ravel(x)
        if curvature is not None:
            return as_operator(curvature(x, moving, still), x)[0], x
        value, flat_matvec = jax.linearize(
            lambda v: flat_optimality(unravel(v), moving, still), flat
        )
        if value.size != flat.size:
            if solve is None:
                raise ValueError(
                    f"the optimality function returns {value.size} numbers for {flat.size} "
                    "unknowns: give solve=solve_lstsq or solve_lsmr"
                )
            return LinearOperator(lambda v: flat_matvec(ravel(v)[0]), domain=x), value
        return LinearOperator(lambda v: unravel(flat_matvec(ravel(v)[0]))), x

    def linearized(x, moving, still):
        flat, unravel = ravel(x)
        operator, _ = operator_at(x, moving, still)

        def matvec(v):
            return ravel(operator.matvec(unravel(v)))[0].astype(flat.dtype)

        return jax.linearize(matvec, flat)[1]

    def solve_with(x, moving, still, b, *, turned):
        operator, image = operator_at(x, moving, still)
        domain = image
        if turned:
            operator, domain = transpose(operator, image), x
        solved = linear_solve(operator, ravel(domain)[1](b))
        if not (isinstance(solved, tuple) and isinstance(solved[-1], SolveInfo)):
            raise TypeError("solve must return (x, SolveInfo), as the solvers of imaml_jax do")
        return ravel(solved[0])[0].astype(b.dtype), solved[1]

    return _TangentSystem(
        right, linearized, partial(solve_with, turned=False), partial(solve_with, turned=True)
    )


class _Programs:
    """Tangent systems, compiled once for an optimality function that JAX traces to the same text.

    The function is traced at every derivative, so that nothing that it depends on can be outdated;
    what it closes over becomes an argument of the programs.
    """

    def __init__(self, solve: Solve | None, symmetric: bool):
        self.settings = solve, symmetric
        self.known: dict[Any, Any] = {}

    def system(
        self,
        optimality: Callable[..., PyTree],
        curvature: Callable[..., Operator] | None,
        root: PyTree,
        moving: list[Array | None],
        still: list[Array | None],
    ) -> tuple[_TangentSystem, tuple[list[Array | None], list[Array]]]:
        """The programs, and their last argument: the arrays without tangent, and the constants."""

        def of_parts(x, moving, still):
            return optimality(x, _merge(moving, still))

        if curvature is not None:  # a record of functions, of which there is no text

            def matrix(x, moving, still):
                return curvature(x, _merge(moving, still[0]))

            solve, symmetric = self.settings
            system = _tangent_system(
                lambda x, moving, still: of_parts(x, moving, still[0]), solve, symmetric, matrix
            )
            return _TangentSystem(*map(jax.jit, system)), (still, [])

        closed, shape = jax.make_jaxpr(of_parts, return_shape=True)(root, moving, still)
        traced = [c for c in closed.consts if isinstance(c, Tracer)]
        if any(jnp.issubdtype(c.dtype, jnp.inexact) for c in traced):
            raise TypeError(
                "custom_root: optimality_fn depends on a value that is traced (differentiated or "
                "compiled) and hidden in an object: pass it as an argument of the solver"
            )
        structure = jax.tree.structure((root, moving, still, shape))
        key = str(closed.jaxpr), structure
        if key not in self.known:

            def evaluate(x, moving, still):
                leaves = jax.tree.leaves((x, moving, still[0]))
                values = eval_jaxpr(closed.jaxpr, still[1], *leaves)
                return jax.tree.unflatten(jax.tree.structure(shape), values)

            if len(self.known) == _MOST_PROGRAMS:
                self.known.pop(next(iter(self.known)))
            system = _tangent_system(evaluate, *self.settings, None)
            # The text may name functions by their address: they live as long as it is known.
            self.known[key] = closed.jaxpr, _TangentSystem(*map(jax.jit, system))
        return self.known[key][1], (still, list(closed.consts))


def _merge(moving: list[Array | None], still: list[Array | None]) -> list[Array | None]:
    return [s if m is None else m for m, s in zip(moving, still, strict=True)]


def _tangent(
    system: _TangentSystem,
    root: PyTree,
    moving: PyTree,
    still: PyTree,
    tangents: PyTree,
    symmetric: bool,
    on_failure: OnFailure,
) -> PyTree:
    for path, leaf in jax.tree_util.tree_leaves_with_path(root):
        if not jnp.issubdtype(jnp.result_type(leaf), jnp.inexact):
            raise TypeError(
                f"the root's leaf {jax.tree_util.keystr(path) or 'x'} has dtype "
                f"{jnp.result_type(leaf)}; a root must be floating-point: return such values as "
                "aux (has_aux=True), or pass them as arguments"
            )
    flat, unravel = ravel(root)
    at = (root, moving, still)
    right = system.right(*at, tangents)
    matvec = system.linearized(*at)

    # How it is solved has no derivative; JAX would stumble over one where F is linear.
    fixed = lax.stop_gradient(at)

    def solved(solve, b):
        solution, info = solve(*fixed, b)
        if info.condition is not None:  # of a masked lane: nothing to solve, whatever the matrix
            nothing = jnp.all(b == 0) & (info.condition == jnp.inf)
            solution = jnp.where(nothing, 0, solution)
            info = info._replace(converged=info.converged | nothing)
        return handle_failure(solution, info, on_failure)

    if right.size == flat.size:
        transposed_solve = system.solve if symmetric else system.solve_transposed
        linear_solve = partial(
            lax.custom_linear_solve, matvec, right, lambda _, b: solved(system.solve, b)
        )
        try:
            tangent = linear_solve(
                transpose_solve=lambda _, b: solved(transposed_solve, b), symmetric=symmetric
            )
        except (TypeError, ValueError, NotImplementedError):
            if _has_transpose(matvec, flat):
                raise
            tangent = linear_solve()
        return unravel(tangent)

    pull = partial(transposed, matvec, flat)

    def solve_normal(_, b):  # (A^T A)^+ = A^+ (A^T)^+
        return solved(system.solve, solved(system.solve_transposed, b))

    tangent = lax.custom_linear_solve(
        lambda v: pull(matvec(v)), pull(right), solve_normal, symmetric=True
    )
    return unravel(tangent)


def _has_transpose(matvec: Callable[[Array], Array], x: Array) -> bool:
    """Whether JAX can differentiate in reverse mode what `matvec` is the derivative of."""
    try:
        jax.eval_shape(lambda v: transposed(matvec, x, v), x)
    except (TypeError, ValueError, NotImplementedError):
        return False
    return True


def _differentiable(
    find: Callable[..., Any],
    optimality: Callable[..., PyTree],
    curvature: Callable[..., Operator] | None,
    programs: _Programs,
    has_aux: bool,
    on_failure: OnFailure,
) -> Callable[..., Any]:
    """`find(starts, arrays)`, differentiable in the arrays; `optimality(x, arrays)`."""
    find_root = jax.custom_jvp(find)

    @partial(find_root.defjvp, symbolic_zeros=True)
    def rule(primals, tangents):
        (starts, arrays), (_, tangents) = primals, tangents
        result = find_root(starts, arrays)
        if all(isinstance(t, SymbolicZero) for t in tangents):
            return result, zero_from_primal(result)
        root, aux = result if has_aux else (result, None)
        moves = [not isinstance(t, SymbolicZero) for t in tangents]
        moving = [x if m else None for x, m in zip(arrays, moves, strict=True)]
        still = [None if m else x for x, m in zip(arrays, moves, strict=True)]
        tangents = [t if m else None for t, m in zip(tangents, moves, strict=True)]
        try:
            system, still = programs.system(optimality, curvature, root, moving, still)
        except Exception as error:
            if not has_aux and _is_root_and_more(result, optimality, arrays):
                raise TypeError(
                    "the solver returned a pair, of which the first is what the optimality "
                    "function takes: give has_aux=True, as for minimize"
                ) from error
            raise
        symmetric = programs.settings[1]
        tangent = _tangent(system, root, moving, still, tangents, symmetric, on_failure)
        return result, (tangent, zero_from_primal(aux)) if has_aux else tangent

    return find_root


def _is_root_and_more(result: Any, optimality: Callable[..., PyTree], arrays: list[Array]) -> bool:
    if not isinstance(result, tuple) or len(result) != 2:
        return False
    try:
        jax.eval_shape(optimality, result[0], arrays)
    except Exception:
        return False
    return True


def _hoisted(
    find: Callable[..., Any],
    optimality: Callable[..., PyTree],
    starts: list[Array],
    arrays: list[Array],
    has_aux: bool,
) -> tuple[Callable[..., Any], Callable[..., PyTree], list[Array]]:
    """The functions, and the arrays with what the functions closed over behind them."""
    find, found = hoist(find, starts, arrays)
    result = jax.eval_shape(find, found, starts, arrays)
    root = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), result[0] if has_aux else result)
    optimality, closed = hoist(optimality, root, arrays)
    size, more = len(arrays), len(arrays) + len(found)

    def find_with(starts, arrays):
        return find(arrays[size:more], starts, arrays[:size])

    def optimality_with(x, arrays):
        return optimality(arrays[more:], x, arrays[:size])

    return find_with, optimality_with, [*arrays, *found, *closed]
