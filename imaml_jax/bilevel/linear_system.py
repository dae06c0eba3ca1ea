"""What the linear solvers share: a system of raveled vectors, and the report of its solution.

Trees are raveled first: `jax.scipy.sparse.linalg.cg` on a tree fails under `vmap(grad(...))` of
convolutions, and one long vector means few kernels. The vector is real, of float32 or float64:
a complex entry becomes its real and imaginary part, so that every solver serves any map that is
linear over the reals, and a Hermitian matrix becomes a symmetric one; integers become floats, and
half precision is solved in float32.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.flatten_util import ravel_pytree
from jax.sharding import NamedSharding, PartitionSpec

from imaml_jax.types import Array, LinearOperator, Operator, PyTree

_ROUNDING = 10.0  # a residual of so many eps of ||A|| ||x|| is what rounding alone may leave


class SolveInfo(NamedTuple):
    """What a solver met.

    Attributes:
      relative_residual: `||b - A x|| / ||b||`, 0 where both are 0.
      num_steps: iterations taken; None where the solver does not tell, or has none.
      min_curvature: smallest `p^T A p / p^T p` met; an upper bound of the smallest eigenvalue. None
        where the solver does not tell.
      converged: whether the relative residual is within the tolerance, or is what rounding leaves
        of a backward stable solution (`10 eps ||A|| ||x|| / ||b||`, at most 1e-3); `condition` is
        below `1 / eps`; and `x` is in the range of its dtype. For the least-squares solvers the
        residual may instead be orthogonal to the range of `A`.
      condition: of the matrix. From an iterative solver a lower bound, from the products that were
        taken anyway: Ritz values overestimate the smallest eigenvalue. None where the solver does
        not tell. The relative error of `x` is at most the true condition number times the relative
        residual.
    """

    relative_residual: Array
    num_steps: Array | None
    min_curvature: Array | None
    converged: Array
    condition: Array | None = None


# `solve_*` with its settings bound: `(operator, b, *, key=None) -> (x, SolveInfo)`.
Solve = Callable[..., tuple[PyTree, SolveInfo]]


def dot(a: Array, b: Array) -> Array:
    """`a @ b` at full precision; replicated where a mesh makes shardings explicit."""
    mesh = _explicit_mesh(a)
    out = mesh and NamedSharding(mesh, PartitionSpec(*[None] * (a.ndim + b.ndim - 2)))
    return jnp.matmul(a, b, precision=lax.Precision.HIGHEST, out_sharding=out)


def norm_of(vector: Array) -> Array:
    """Of a vector, by `dot`."""
    return jnp.sqrt(dot(vector, vector))


class System(NamedTuple):
    """`A x = b` on raveled vectors: what every solver makes of its arguments, and reports on.

    Attributes:
      matvec: `x -> A x`.
      b: `[m]`, scaled to largest entry 1, since squares of tiny or huge numbers leave the range.
        NaN everywhere where an entry is not finite.
      scale: by what it was divided.
      size: number of unknowns.
      unravel: the tree of unknowns, scaled back.
      tol: relative residual up to which the system counts as solved.
      eps: rounding error of the least precise leaf of `b`.
    """

    matvec: Callable[[Array], Array]
    b: Array
    scale: Array
    size: int
    unravel: Callable[[Array], PyTree]
    tol: float | Array
    eps: float

    def relative(self, residual: Array) -> Array:
        """`||residual|| / ||b||`, 0 where both are 0. NaN stays NaN, also where `b` is 0."""
        squared = dot(residual, residual)
        return jnp.sqrt(squared / jnp.where(squared == 0, 1, dot(self.b, self.b)))

    def carry(self, tree: PyTree) -> PyTree:
        """A loop's first state, varying over the devices of a `shard_map` as `A b` does."""
        return vary_like(tree, self.b)

    def report(
        self,
        x: Array,
        relative: Array | None = None,
        num_steps: Array | None = None,
        min_curvature: Array | None = None,
        condition: Array | None = None,
        *,
        norm: Array | float = 0.0,
        optimal: Array | bool = False,
        sizes: tuple[Array, Array] | None = None,
    ) -> tuple[PyTree, SolveInfo]:
        """The solution as a tree, and what its solver met; costs a product without the residual.

        Scaled back, the solution may leave the range; then it has not converged.

        Args:
          x: the solution.
          relative: its relative residual.
          num_steps: see `SolveInfo`.
          min_curvature: see `SolveInfo`.
          condition: see `SolveInfo`.
          norm: of `A`, or a lower bound.
          optimal: whether `x` minimises the residual, which need not vanish.
          sizes: the largest entry of `x` and the norm of `b`, where they are known.
        """
        if relative is None:
            relative = self.relative(self.b - self.matvec(x))
        if sizes is None:
            sizes = jnp.max(jnp.abs(x), initial=0), norm_of(self.b)
        largest, norm_b = sizes
        converged = (relative <= self.tol) | optimal
        if not (isinstance(norm, float) and norm == 0):
            stretched = norm * largest / norm_b
            converged |= relative <= jnp.minimum(_ROUNDING * self.eps * stretched, 1e-3)
        if condition is not None:
            converged &= condition < 1 / jnp.finfo(self.b.dtype).eps
        solution = self.unravel(x)
        converged &= in_range(solution, self.scale * largest, largest == 0)
        return solution, SolveInfo(relative, num_steps, min_curvature, converged, condition)


def ravel_system(
    operator: Operator, b: PyTree, tol: float | Array | None = None, *, scaled: bool = True
) -> System:
    """The `System` of an operator and a right-hand side.

    Args:
      operator: `A`; a function `v -> A v` or a matrix will do.
      b: right-hand side.
      tol: relative residual; None for `eps ** (2/3)` of the least precise leaf of `b`: 2e-5 in
        float32, 4e-11 in float64.
      scaled: whether to scale `b`; a direct solver, which takes no squares of it, need not.
    """
    operator, b = as_operator(operator, b)
    flat_b, unravel_b = ravel(b)
    size, unravel = flat_b.size, unravel_b
    if operator.domain is not None:
        nothing, unravel = ravel(_zeros(operator.domain))
        size = nothing.size
    eps = precision(b)
    scale = jnp.ones((), flat_b.dtype)
    if scaled:
        largest = lax.stop_gradient(jnp.max(jnp.abs(flat_b), initial=0))
        scale = jnp.where(largest == 0, 1, jnp.where(jnp.isfinite(largest), largest, jnp.nan))

    def matvec(flat: Array) -> Array:
        image = ravel(operator.matvec(unravel(flat.astype(flat_b.dtype))))[0]
        if image.size != flat_b.size:
            raise ValueError(
                f"the operator maps {size} numbers to {image.size}, and b has {flat_b.size}: for a "
                "matrix that is not square give LinearOperator(matvec, domain=...) the shapes of "
                "the unknowns and use solve_lstsq or solve_lsmr"
            )
        return image.astype(flat_b.dtype)

    flat_b = flat_b / scale if scaled else flat_b
    if size == flat_b.size:
        flat_b = _vary_as_image(matvec, flat_b)
    wanted = eps ** (2 / 3) if tol is None else tol

    def unravel_scaled(flat: Array) -> PyTree:
        return unravel(scale * flat if scaled else flat)

    return System(matvec, flat_b, scale, size, unravel_scaled, wanted, eps)


def require_square(system: System, name: str) -> None:
    """ValueError where the number of unknowns is not that of equations."""
    if system.size != system.b.size:
        raise ValueError(
            f"{name} needs as many equations as unknowns; got {system.b.size} equations for "
            f"{system.size} unknowns: use solve_lstsq or solve_lsmr"
        )


def as_operator(operator: Operator, b: PyTree) -> tuple[LinearOperator, PyTree]:
    """A `LinearOperator` from one, from a function `v -> A v`, or from a matrix `[m, n]`.

    Returns:
      The operator, and `b`, which a complex matrix makes complex.
    """
    if isinstance(operator, LinearOperator):
        return operator, b
    if isinstance(operator, (jax.Array, np.ndarray)):
        if operator.ndim != 2 or jnp.shape(b) != operator.shape[:1]:
            shapes = jax.tree.map(jnp.shape, b)
            raise ValueError(
                f"a matrix as an operator must be [m, n] with b an array [m]; got "
                f"{operator.shape} and b {shapes}: give a LinearOperator for trees"
            )
        b = jnp.asarray(b, jnp.result_type(operator, b, float))
        square = operator.shape[0] == operator.shape[1]
        domain = None if square else jax.ShapeDtypeStruct(operator.shape[1:], b.dtype)
        return LinearOperator(lambda v: jnp.matmul(operator, v), domain=domain), b
    if callable(operator):
        return LinearOperator(operator), b
    raise TypeError(
        f"the operator is a {type(operator).__name__}: give a LinearOperator, a function v -> A v, "
        "or a matrix"
    )


def transpose(operator: Operator, b: PyTree) -> LinearOperator:
    """`A^T`, in the inner product of the real vectors: for complex matrices the adjoint `A^H`.

    Keeps the dampings and the factor, both of symmetric matrices, and says that it is `transposed`,
    so that a solver transposes what it was given for `A`, such as a preconditioner.

    Args:
      operator: `A`; a function or a matrix will do.
      b: anything shaped like `A v`; only its structure matters.

    Returns:
      An operator on trees shaped like `b`.
    """
    operator, b = as_operator(operator, b)
    image = jax.tree.map(lambda x: jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x)), b)
    domain = image if operator.domain is None else operator.domain
    nothing, unravel_domain = ravel(_zeros(domain))
    dtype = ravel(_zeros(image))[0].dtype

    def flat_matvec(flat: Array) -> Array:
        return ravel(operator.matvec(unravel_domain(flat)))[0].astype(dtype)

    def matvec(v: PyTree) -> PyTree:
        flat, _ = ravel(v)
        return unravel_domain(transposed(flat_matvec, nothing, flat.astype(dtype)))

    swapped = image if operator.domain is not None else None
    return operator._replace(matvec=matvec, domain=swapped, transposed=not operator.transposed)


def ravel(tree: PyTree) -> tuple[Array, Callable[[Array], PyTree]]:
    """A tree as one real vector of float32 or float64, and the way back to its dtypes.

    Complex leaves count twice, integer leaves come back as floats.
    """
    leaves, structure = jax.tree.flatten(tree)
    leaves = [jnp.asarray(leaf) for leaf in leaves]
    common = jnp.result_type(*leaves, float) if leaves else jnp.dtype(jnp.float32)
    floating = jnp.finfo(jnp.promote_types(common, jnp.float32)).dtype

    def to_real(leaf: Array) -> Any:
        if mesh := _explicit_mesh(leaf):
            leaf = jax.sharding.reshard(leaf, NamedSharding(mesh, PartitionSpec()))
        if jnp.iscomplexobj(leaf):
            return leaf.real.astype(floating), leaf.imag.astype(floating)
        return leaf.astype(floating)

    flat, unravel_real = ravel_pytree([to_real(leaf) for leaf in leaves])

    def from_real(real: Any, leaf: Array) -> Array:
        value = lax.complex(*real) if isinstance(real, tuple) else real
        if jnp.issubdtype(leaf.dtype, jnp.inexact):
            value = value.astype(leaf.dtype)
        return (
            jax.sharding.reshard(value, jax.typeof(leaf).sharding)
            if _explicit_mesh(leaf)
            else value
        )

    def unravel(vector: Array) -> PyTree:
        return jax.tree.unflatten(structure, map(from_real, unravel_real(vector), leaves))

    return flat.astype(floating), unravel


def transposed(matvec: Callable[[Array], Array], x: Array, v: Array) -> Array:
    """`A^T v` on vectors, of a map of vectors like `x`.

    Inside `shard_map`, `x` is made to vary over the devices as `A x` does: the transpose of a map
    of what is the same everywhere would sum over them.
    """
    if jax.sharding.get_abstract_mesh().manual_axes:
        x = vary_like(x, v)
        image = matvec(x)
        x, v = vary_like(x, image), vary_like(v, image)
    return jax.linear_transpose(matvec, x)(v)[0]


def _zeros(shapes: PyTree) -> PyTree:
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)


def precision(tree: PyTree) -> float:
    """`eps` of the least precise leaf; integers do not count."""
    dtypes = [jnp.result_type(leaf) for leaf in jax.tree.leaves(tree)]
    inexact = [dtype for dtype in dtypes if jnp.issubdtype(dtype, jnp.inexact)]
    return max(float(jnp.finfo(dtype).eps) for dtype in inexact or [jnp.result_type(float)])


def vary_like(tree: PyTree, vector: Array) -> PyTree:
    """The tree itself; inside `shard_map`, varying over the devices as `vector` does."""
    if not jax.sharding.get_abstract_mesh().manual_axes:
        return tree
    never = jnp.zeros((), bool)
    return jax.tree.map(lambda x: jnp.where(never, vector.ravel()[0].astype(x.dtype), x), tree)


def _vary_as_image(matvec: Callable[[Array], Array], vector: Array) -> Array:
    if not jax.sharding.get_abstract_mesh().manual_axes:
        return vector
    return jnp.where(jnp.zeros((), bool), matvec(vector), vector)


def _explicit_mesh(x: Array) -> Any:
    mesh = jax.typeof(x).sharding.mesh
    return mesh if mesh.explicit_axes else None


def safe_ratio(numerator: Array, denominator: Array) -> Array:
    """`numerator / denominator`, 0 where the denominator is 0."""
    zero = denominator == 0  # and not `denominator > 0`, which would take NaN for solved
    return jnp.where(zero, 0.0, numerator / jnp.where(zero, 1, denominator))


def random_products(
    operator: Operator, b: PyTree, key: Array | None, number: int, draw: Callable[..., Array]
) -> tuple[Array, Array]:
    """`Q [P, min(number, P)]`, drawn by `(key, shape, dtype)` and made orthonormal, and `A Q`."""
    system = ravel_system(operator, b, 0.0)
    size, key = system.b.size, jax.random.key(0) if key is None else key
    basis, _ = jnp.linalg.qr(draw(key, (size, min(number, size)), system.b.dtype))
    return basis, jax.vmap(system.matvec, 1, 1)(basis)


def raveled_damping(operator: LinearOperator, b: PyTree, *, needed_by: str | None = None) -> Array:
    """What was added to the operator's diagonal; ValueError where nothing was, but it is needed."""
    if needed_by and not operator.dampings:
        raise ValueError(f"{needed_by} needs damping > 0; wrap the operator in damped(...)")

    def both_parts(damping: Array) -> Array:
        return lax.complex(damping.real, damping.real) if jnp.iscomplexobj(damping) else damping

    trees = [jax.tree.map(both_parts, broadcast_to_leaves(d, b)) for d in operator.dampings]
    return sum([ravel(tree)[0] for tree in trees], jnp.zeros_like(ravel(b)[0]))


def broadcast_to_leaves(prefix: PyTree, tree: PyTree) -> PyTree:
    """A tree like `tree` from a scalar or a tree prefix whose leaves broadcast to its leaves."""
    return jax.tree.map(
        lambda d, x: jnp.broadcast_to(d, jnp.shape(x)).astype(jnp.result_type(x)),
        jax.tree.broadcast(prefix, tree),
        tree,
    )


def in_range(solution: PyTree, largest: Array, is_zero: Array) -> Array:
    """Whether the largest entry fits its dtypes, and is not so small that digits are lost.

    Args:
      solution: of whose dtypes.
      largest: its largest entry, in the dtype of the computation.
      is_zero: whether that is 0 exactly.
    """
    limits = [jnp.finfo(x.dtype) for x in jax.tree.leaves(solution)]
    most = min((float(limit.max) for limit in limits), default=1.0)
    least = max((float(limit.tiny) / float(limit.eps) for limit in limits), default=0.0)
    return (largest <= most) & ((largest > least) | is_zero)
