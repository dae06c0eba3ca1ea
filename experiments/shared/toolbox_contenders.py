"""What `toolbox_comparison` compares: differentiable solvers, made by this toolbox and by others.

Each is made by `(problem, tol) -> solver`, whose tolerance is that of the linear solves and of the
library's own inner solvers. Libraries are imported when they are used.
"""
# pyright: reportMissingImports=false

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from experiments.shared.toolbox_problems import Problem, Solver


class Contender(NamedTuple):
    """One way to the gradient of a problem.

    Attributes:
      problem: its name.
      libraries: what must be installed, the one compared first.
      inner: who solves the inner problem: "given" for the solver of the problem, else whose.
      linear: how the linear system is solved; "default" by what the library takes if not told.
      make: `(problem, tol) -> solver`.
    """

    problem: str
    libraries: tuple[str, ...]
    inner: str
    linear: str
    make: Callable[[Problem, float], Solver]


def _ours_newton(problem, tol):
    from functools import partial

    from imaml_jax import custom_argmin, solve_cg

    @custom_argmin(problem.fun, partial(solve_cg, tol=tol))
    def solver(init, *args):
        hessian, gradient = (f(problem.fun)(init, *args) for f in (jax.hessian, jax.grad))
        return init - jnp.linalg.solve(hessian, gradient)

    return solver


def _jaxopt_newton(problem, tol):
    from functools import partial

    from jaxopt.implicit_diff import custom_root
    from jaxopt.linear_solve import solve_cg

    @custom_root(jax.grad(problem.fun), solve=partial(solve_cg, tol=tol))
    def solver(init, *args):
        hessian, gradient = (f(problem.fun)(init, *args) for f in (jax.hessian, jax.grad))
        return init - jnp.linalg.solve(hessian, gradient)

    return solver


def _optimistix_newton(problem, tol):
    import lineax
    import optimistix

    def solver(init, *args):
        solution = optimistix.root_find(
            lambda x, args: jax.grad(problem.fun)(x, *args),
            optimistix.Newton(rtol=tol, atol=tol),
            init,
            args,
            adjoint=optimistix.ImplicitAdjoint(lineax.CG(rtol=tol, atol=tol)),
            tags=frozenset({lineax.positive_semidefinite_tag}),
        )
        return solution.value

    return solver


def _ours_minimiser(problem, tol):
    from functools import partial

    from imaml_jax import custom_argmin, minimize, newton_cg, solve_cg

    tx = newton_cg(max_cg_steps=100, cg_tol=tol)
    solver = partial(minimize, problem.fun, tx=tx, num_steps=2)
    implicit = custom_argmin(problem.fun, partial(solve_cg, tol=tol), has_aux=True)(solver)
    return lambda init, *args: implicit(init, *args)[0]


def _jaxopt_minimiser(problem, tol):
    from functools import partial

    from jaxopt import LBFGS
    from jaxopt.linear_solve import solve_cg

    implicit = partial(solve_cg, tol=tol)
    solver = LBFGS(problem.fun, tol=tol, maxiter=500, implicit_diff_solve=implicit)
    return lambda init, *args: solver.run(init, *args).params


def _optimistix_minimiser(problem, tol):
    import lineax
    import optimistix

    def solver(init, *args):
        solution = optimistix.minimise(
            lambda x, args: problem.fun(x, *args),
            optimistix.BFGS(rtol=tol, atol=tol),
            init,
            args,
            adjoint=optimistix.ImplicitAdjoint(lineax.CG(rtol=tol, atol=tol)),
            tags=frozenset({lineax.positive_semidefinite_tag}),
            max_steps=500,
        )
        return solution.value

    return solver


def _ours(problem: Problem, tol: float, *, linear: str) -> Solver:
    """The solver of the problem, with a `solve_*` of this toolbox or its default."""
    import imaml_jax

    found = None if linear == "default" else getattr(imaml_jax, f"solve_{linear}")
    solve = found and partial(found, tol=tol)
    if problem.kind == "minimum":
        return imaml_jax.custom_argmin(problem.fun, solve)(problem.solver)
    return imaml_jax.custom_root(problem.residual, solve)(problem.solver)


def _jaxopt(problem: Problem, tol: float, *, linear: str) -> Solver:
    """The solver of the problem; its default is CG on the normal equations."""
    from jaxopt import implicit_diff, linear_solve

    solve = getattr(linear_solve, f"solve_{'normal_cg' if linear == 'default' else linear}")
    solve = solve if linear == "lu" else partial(solve, tol=tol)
    return implicit_diff.custom_root(problem.residual, solve=solve)(problem.solver)


def _adjoint_and_tags(problem, tol, linear):
    """Of optimistix; its default is a dense decomposition."""
    import lineax
    import optimistix

    dense = lineax.AutoLinearSolver(well_posed=None)
    krylov = {"cg": lineax.CG, "gmres": lineax.GMRES}
    solve = dense if linear == "default" else krylov[linear](rtol=tol, atol=tol)
    tags = {lineax.positive_semidefinite_tag} if problem.kind == "minimum" else ()
    return optimistix.ImplicitAdjoint(solve), frozenset(tags)


def _solution(inputs):
    solver, _, init, args, _ = inputs
    return solver(init, *args), None


def _residual(x, _, inputs):
    _, residual, _, args, _ = inputs
    return residual(x, *args)


def _optimistix(problem: Problem, tol: float, *, linear: str) -> Solver:
    """The adjoint of optimistix around the solver of the problem."""
    adjoint, tags = _adjoint_and_tags(problem, tol, linear)

    def solver(init, *args):
        inputs = (problem.solver, problem.residual, init, args)
        return adjoint.apply(_solution, _residual, inputs, tags)[0]

    return solver


def _optimistix_alone(problem: Problem, tol: float, *, linear: str) -> Solver:
    """A solver of optimistix: its iteration for fixed points, else Newton's method."""
    import optimistix

    adjoint, tags = _adjoint_and_tags(problem, tol, linear)
    if problem.kind == "fixed point":
        find, fun, method = optimistix.fixed_point, problem.fun, optimistix.FixedPointIteration
    else:
        find, fun, method = optimistix.root_find, problem.residual, optimistix.Newton

    def solver(init, *args):
        settings = {"adjoint": adjoint, "tags": tags, "max_steps": 5000}
        inner = method(rtol=tol, atol=tol)
        return find(lambda x, args: fun(x, *args), inner, init, args, **settings).value

    return solver


_OURS, _JAXOPT, _OPTIMISTIX = ("imaml_jax",), ("jaxopt",), ("optimistix", "lineax")


def _with(problem: str, *linear: str) -> tuple[Contender, ...]:
    """All libraries with each way of solving the linear system; jaxopt also by `_lu`."""
    makers = ((_OURS, _ours), (_JAXOPT, _jaxopt), (_OPTIMISTIX, _optimistix))
    found = []
    for name in linear:
        found += [
            Contender(problem, lib, "given", name, partial(f, linear=name)) for lib, f in makers
        ]
        if name == "default" and problem != "kepler":  # jaxopt's LU takes no traced scalar
            lu = partial(_jaxopt, linear="lu")
            found.insert(-1, Contender(problem, _JAXOPT, "given", "lu", lu))
    alone = partial(_optimistix_alone, linear=linear[-1])
    own = "its iteration" if problem in ("sinkhorn", "equilibrium") else "its Newton"
    return (*found, Contender(problem, _OPTIMISTIX, own, linear[-1], alone))


# A contender is compared with the one of this toolbox that stands before it.
CONTENDERS = (
    *_with("sinkhorn", "gmres", "default"),
    *_with("kepler", "default"),
    Contender("ridge", _OURS, "Newton step", "cg", _ours_newton),
    Contender("ridge", _JAXOPT, "Newton step", "cg", _jaxopt_newton),
    Contender("ridge", _OPTIMISTIX, "its Newton", "cg", _optimistix_newton),
    *_with("ridge", "default"),
    Contender("ridge", _OURS, "newton_cg", "cg", _ours_minimiser),
    Contender("ridge", _JAXOPT, "LBFGS", "cg", _jaxopt_minimiser),
    Contender("ridge", _OPTIMISTIX, "BFGS", "cg", _optimistix_minimiser),
    *_with("logistic", "cg", "default"),
    *_with("equilibrium", "default", "gmres"),
)
