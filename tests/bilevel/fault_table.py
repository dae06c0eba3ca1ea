"""What becomes of a derivative whose linear system is hard: the table of docs/which_solver.md.

python -m tests.bilevel.fault_table

prints it. A cell says what happens in every mode: forward and reverse, outside of `jit`, inside,
and under `vmap`.
"""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np

import imaml_jax
from imaml_jax import LinearSolveError, custom_root

SIZE, TOLERANCE = 6, 1e-7
SOLVERS = {
    "solve_auto": imaml_jax.solve_auto,
    "solve_dense": imaml_jax.solve_dense,
    "solve_gmres": partial(imaml_jax.solve_gmres, restart=3),
    "solve_lstsq": imaml_jax.solve_lstsq,
    "solve_lsmr": imaml_jax.solve_lsmr,
    "solve_cg": imaml_jax.solve_cg,
    "solve_cg_steihaug": imaml_jax.solve_cg_steihaug,
    "solve_minres": imaml_jax.solve_minres,
    "solve_neumann": partial(imaml_jax.solve_neumann, step_size=0.4, max_steps=500),
}
RIGHT, TOLD = "right", "told"


def systems():
    """Matrices and whether both right-hand sides lie in their range, by the name of the fault."""
    rng = np.random.default_rng(0)
    basis = np.linalg.qr(rng.normal(size=(SIZE, SIZE)))[0]
    values = np.linspace(1, 4, SIZE)
    signs = np.array([1, 1, -1, 1, -1, 1])
    phases = np.linalg.qr(rng.normal(size=(SIZE, SIZE)) + 1j * rng.normal(size=(SIZE, SIZE)))[0]
    singular = values * (np.arange(SIZE) > 1)
    return {
        "positive definite": ((basis * values) @ basis.T, True),
        "indefinite (a saddle point)": ((basis * values * signs) @ basis.T, True),
        "far from symmetric": (rng.normal(size=(SIZE, SIZE)), True),
        "a permutation": (np.roll(np.eye(SIZE), 1, 0), True),
        "condition 1e6": ((basis * np.geomspace(1e-6, 1, SIZE)) @ basis.T, False),
        "singular, solvable": ((basis * singular) @ basis.T, True),
        "singular, not solvable": ((basis * singular) @ basis.T, False),
        "complex, Hermitian": ((phases * values) @ phases.conj().T, True),
        "complex": (rng.normal(size=(SIZE, SIZE)) * (1 + 1j) + 2j * np.eye(SIZE), True),
        "NaN": (np.full((SIZE, SIZE), np.nan), False),
    }


@cache
def derivatives(solver):
    """By mode: `(matrix, root, direction, cotangent) -> derivative`."""

    @custom_root(lambda x, matrix, right: matrix @ x - right, SOLVERS[solver])
    def find(root, matrix, right):
        del matrix, right
        return root

    def forward(matrix, root, direction, cotangent):
        del cotangent
        return jax.jvp(partial(find, root, matrix), (direction,), (direction,))[1]

    def reverse(matrix, root, direction, cotangent):
        return jax.vjp(partial(find, root, matrix), direction)[1](cotangent)[0]

    modes = {}
    for name, fn in (("forward", forward), ("reverse", reverse)):
        modes[f"{name}, eager"] = fn
        modes[f"{name}, jit"] = jax.jit(fn)
        modes[f"{name}, vmap"] = jax.jit(jax.vmap(fn, in_axes=(None, None, 0, 0)))
    return modes


def outcomes(solver, fault):
    """What happens in every mode."""
    matrix, in_range = systems()[fault]
    rng = np.random.default_rng(1)
    direction, cotangent = rng.normal(size=(2, SIZE))
    if in_range:
        direction, cotangent = matrix @ direction, matrix.T @ cotangent
    direction, cotangent = (v.astype(matrix.dtype) for v in (direction, cotangent))
    args = (jnp.asarray(matrix), jnp.zeros(SIZE, matrix.dtype), direction, cotangent)
    args = tuple(map(jnp.asarray, args))
    found = {}
    for mode, fn in derivatives(solver).items():
        forwards = mode.startswith("forward")
        system = matrix if forwards else matrix.T
        right = direction if forwards else cotangent
        stacked = tuple(jnp.stack([a, 2 * a]) for a in args[2:]) if "vmap" in mode else args[2:]
        try:
            x = np.asarray(fn(*args[:2], *stacked))
        except LinearSolveError:
            found[mode] = TOLD
            continue
        lanes = x if "vmap" in mode else x[None]
        found[mode] = [outcome(lane, system, (1 + i) * right) for i, lane in enumerate(lanes)]
        (found[mode],) = set(found[mode])
        if "eager" in mode and found[mode] == TOLD:
            found[mode] = "NaN without an error"
    return found


def outcome(x, matrix, right):
    """Whether a derivative is right, NaN (told), or neither."""
    if np.isnan(x).all():
        return TOLD
    solution = np.linalg.pinv(matrix) @ right
    solves = np.linalg.norm(matrix @ (x - solution)) <= TOLERANCE * np.linalg.norm(right)
    return RIGHT if solves else "wrong"


def cell(solver, fault):
    """The outcome where it is one in all modes, else those of forward and reverse mode."""
    found = outcomes(solver, fault)
    ways = {
        way: {v for mode, v in found.items() if mode.startswith(way)}
        for way in ("forward", "reverse")
    }
    texts = {way: " or ".join(sorted(values)) for way, values in ways.items()}
    if texts["forward"] == texts["reverse"]:
        return texts["forward"]
    return ", ".join(f"{way} {text}" for way, text in texts.items())


def table():
    """In Markdown."""
    faults = list(systems())
    lines = ["| matrix | " + " | ".join(f"`{s.removeprefix('solve_')}`" for s in SOLVERS) + " |"]
    lines.append("|---" * (len(SOLVERS) + 1) + "|")
    for fault in faults:
        lines.append(f"| {fault} | " + " | ".join(cell(s, fault) for s in SOLVERS) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    jax.config.update("jax_enable_x64", True)
    print(table())
