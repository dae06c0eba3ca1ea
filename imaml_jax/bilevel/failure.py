"""What happens where the linear system of a derivative was not solved.

The derivative becomes NaN, in place of a number that looks right. Where the values are concrete, as
in a call that is not inside `jax.jit`, an error says what was met; JAX evaluates a program outside
of `jit` operation by operation, so that a primitive can look at its values.
"""

from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir

from imaml_jax.bilevel.linear_system import SolveInfo
from imaml_jax.types import Array

OnFailure = Literal["raise", "nan", "accept"] | Callable[[SolveInfo], None]


class LinearSolveError(ArithmeticError):
    """The linear system of a derivative was not solved, so that the derivative is unknown."""


def check_on_failure(on_failure: OnFailure) -> None:
    """ValueError for what is none of the options."""
    if on_failure not in ("raise", "nan", "accept") and not callable(on_failure):
        raise ValueError(
            f"on_failure={on_failure!r} must be 'raise', 'nan', 'accept' or a function of SolveInfo"
        )


def handle_failure(x: Array, info: SolveInfo, on_failure: OnFailure) -> Array:
    """The solution, or what is to stand for it where it has not converged.

    Args:
      x: `[P]`.
      info: the solver's report.
      on_failure: "accept" returns `x` as it is. The others return NaN: "raise" raises
        `LinearSolveError` besides where the values are concrete, "nan" does not, and a function is
        called with the report on the host, also from compiled programs.
    """
    if on_failure == "accept":
        return x
    if on_failure == "raise":
        nothing = jnp.full_like(info.relative_residual, jnp.nan)
        known = [nothing if v is None else v for v in (info.min_curvature, info.condition)]
        x = _check_p.bind(x, info.converged, info.relative_residual, *known)
    elif callable(on_failure):
        report = on_failure

        def tell(report_of_solve: SolveInfo) -> None:
            if not report_of_solve.converged:
                report(report_of_solve)

        jax.debug.callback(tell, info)
    return jnp.where(info.converged, x, jnp.nan)


_check_p = Primitive("check_linear_solve")


@_check_p.def_impl
def _check(x, converged, residual, curvature, condition):
    failed = ~np.asarray(converged)
    if failed.any():
        first = np.flatnonzero(failed.ravel())[0]
        numbers = [
            np.broadcast_to(np.asarray(v), failed.shape).ravel()[first]
            for v in (residual, curvature, condition)
        ]
        which = (
            f" ({failed.sum()} of {failed.size} in the batch; the first:)" if failed.ndim else ""
        )
        raise LinearSolveError(_message(which, *map(float, numbers)))
    return x


@_check_p.def_abstract_eval
def _same(x, *unused):
    del unused
    return x


def _batched(args, axes):
    size = next(x.shape[a] for x, a in zip(args, axes, strict=True) if a is not None)
    moved = [batching.bdim_at_front(x, a, size) for x, a in zip(args, axes, strict=True)]
    return _check_p.bind(*moved), 0


batching.primitive_batchers[_check_p] = _batched
mlir.register_lowering(_check_p, lambda ctx, x, *unused: [x])


def _message(which: str, residual: float, curvature: float, condition: float) -> str:
    met = [f"relative residual {residual:.2g}"]
    if not np.isnan(curvature):
        met.append(f"smallest curvature met {curvature:.2g}")
    if not np.isnan(condition):
        met.append(f"condition number about {condition:.2g}")
    if curvature <= 0:
        remedy = (
            "The matrix is not positive definite. If the point is a minimum, let its solver go on; "
            "otherwise take solve_minres, or solve_dense for a small system."
        )
    elif condition > 1e6 and not residual > 1e-2:
        remedy = (
            "The matrix is singular to working precision. Take solve_lstsq or solve_lsmr for the "
            "solution of least norm, add the equations that fix the root (a conserved total, a "
            "gauge), or compute in float64."
        )
    elif not np.isfinite(residual):
        remedy = "An entry of the system is not finite: look at the root and at F there."
    else:
        remedy = (
            "Give the solver more steps (max_steps, restart) or a larger tol, a preconditioner, or "
            "take solve_dense for a small system."
        )
    return (
        f"the linear system of the derivative was not solved{which}: {', '.join(met)}. {remedy} "
        "on_failure='accept' takes the truncated solution where that is meant, on_failure='nan' "
        "gives NaN without this error, as in compiled programs."
    )
