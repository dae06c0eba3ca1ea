"""Sensitivities of two markets, by implicit differentiation and in closed form, and a tax by both.

    python -m experiments.market

Cournot competition: each firm chooses the quantity q_i that is best for it at the price
Q^(-1/eta) of the total quantity Q, with unit costs c_i:

    Q^(-1/eta) (1 - q_i / (eta Q)) = c_i,    so that    q_i = eta Q (1 - c_i / P),
    P = sum(c) / (n - 1/eta),                Q = P^(-eta).

Its roots are found by Newton's method in a loop. Exchange: consumers spend shares a_ij of the
wealth w_i = p . e_i that the endowments e_ij make, the first good has price 1, and prices clear the
markets, `sum_i a_ij w_i = p_j E_j` with `E_j = sum_i e_ij`. SciPy finds them, through
`jax.pure_callback`. Where all consumers have the same tastes a_j,

    p_j = a_j E_1 / (a_1 E_j),    dp_j = (sum_i w_i da_ij + a_j / a_1 sum_ik w_i da_ik) / E_j.

Jacobians of both in all that they depend on, in forward and reverse mode, are compared with the
closed forms. Last, a tax t on each unit is added to the firms' costs and set by Newton's method on
the logarithm of its revenue t Q, with second derivatives through their equilibrium; the revenue is
known to be highest at t = mean(c) / (eta - 1). All in float64. Writes OUTPUT.json and OUTPUT.png.
"""

import dataclasses
import math
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from experiments.shared import common, reports
from imaml_jax import custom_root, minimize, newton_cg, solve_dense
from imaml_jax.learners.settings import Count, Range, Record, Seed

MOST_STEPS, TOLERANCE, TAX_STEPS, FIRST_TAX = 50, 1e-15, 20, 0.1


@dataclasses.dataclass(frozen=True)
class Config(Record):
    """The markets."""

    firms: Count = 5
    """Firms, with costs from 1 up, so close that none leaves the market; at least 1."""
    elasticity: Annotated[float, Range(above=1)] = 2.0
    """Of demand, eta, above 1; the revenue of the tax has no maximum otherwise."""
    consumers: Count = 6
    """Consumers, with endowments drawn between 0.5 and 1.5; at least 1."""
    goods: Annotated[int, Range(least=2)] = 4
    """Goods, at least 2, with tastes drawn at random."""
    seed: Seed = 0
    """Seed of costs, endowments and tastes; at least 0."""
    output: Path = Path("runs/market")
    """Where to write, without an ending."""


def main(config: Config) -> dict[str, Any]:
    """Solves, differentiates, writes and prints.

    Returns:
      The settings; for each market the relative error of its root and, for each argument, the
      Jacobian in closed form with the relative errors of both modes; the tax with its error.
    """
    reports.begin(config)
    with jax.enable_x64(True):
        costs, tastes, endowments = draw_markets(config)
        eta = np.asarray(config.elasticity)
        firms = {"costs": costs, "elasticity": eta}
        consumers = {"tastes": np.tile(tastes, (config.consumers, 1)), "endowments": endowments}
        markets = {
            "Cournot": _compare(quantities, cournot_closed_form(costs, eta), firms),
            "exchange": _compare(prices, exchange_closed_form(tastes, endowments), consumers),
        }
        tax = float(jax.jit(best_tax)(costs, eta))
    exact_tax = float(costs.mean() / (eta - 1))
    measured = {
        "markets": markets,
        "mean_cost": float(costs.mean()),
        "tax": tax,
        "exact_tax": exact_tax,
        "tax_error": abs(tax / exact_tax - 1),
    }
    return reports.report(config, measured, table, draw)


def draw_markets(config: Config) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Costs, tastes for all goods but the first, and endowments."""
    rng = np.random.default_rng(config.seed)
    spread = 1 / (config.elasticity * config.firms)  # a firm that costs more sells nothing
    costs = 1 + spread * rng.uniform(size=config.firms)
    tastes = rng.dirichlet(np.full(config.goods, 5.0))[1:]
    return costs, tastes, rng.uniform(0.5, 1.5, (config.consumers, config.goods))


def _marginal_profits(log_quantities: Any, costs: Any, eta: Any) -> jax.Array:
    own = jnp.exp(log_quantities)
    total = jnp.sum(own)
    return total ** (-1 / eta) * (1 - own / (eta * total)) - costs


@custom_root(_marginal_profits, solve_dense)
def _newton(init: Any, costs: Any, eta: Any) -> jax.Array:
    def unfinished(carry):
        _, slopes, count = carry
        return (jnp.max(jnp.abs(slopes)) > TOLERANCE) & (count < MOST_STEPS)

    def step(carry):
        x, slopes, count = carry
        x = x - jnp.linalg.solve(jax.jacfwd(_marginal_profits)(x, costs, eta), slopes)
        return x, _marginal_profits(x, costs, eta), count + 1

    return lax.while_loop(unfinished, step, (init, _marginal_profits(init, costs, eta), 0))[0]


def quantities(costs: Any, eta: Any) -> jax.Array:
    """The Cournot equilibrium."""
    few = jnp.full_like(costs, -math.log(100 * len(costs)))  # from a high price down
    return jnp.exp(_newton(few, costs, eta))


def cournot_closed_form(costs: np.ndarray, eta: np.ndarray) -> tuple[np.ndarray, dict[str, Any]]:
    """The quantities and their derivatives."""
    slope = 1 / (len(costs) - 1 / eta)
    price = slope * costs.sum()
    by_price = eta * price ** (-eta - 2) * ((eta + 1) * costs - eta * price)
    by_own_cost = -eta * price ** (-eta - 1)
    own = by_own_cost * (costs - price)
    return own, {
        "costs": slope * by_price[:, None] + by_own_cost * np.eye(len(costs)),
        "elasticity": own * (1 / eta - np.log(price)) - by_price * slope * price / eta**2,
    }


def _excess_demand(log_prices: Any, tastes: Any, endowments: Any, xp: Any = jnp) -> Any:
    """Value of what is demanded less what there is, for all goods but the first."""
    own = xp.concatenate([xp.ones(1), xp.exp(log_prices)])
    return (endowments @ own) @ tastes - own[1:] * endowments.sum(0)[1:]


@custom_root(_excess_demand, solve_dense)
def _clear(init: Any, tastes: Any, endowments: Any) -> jax.Array:
    def by_scipy(*args):
        from scipy import optimize

        first, *others = map(np.asarray, args)
        return optimize.root(_excess_demand, first, (*others, np), tol=TOLERANCE).x

    shape = jax.ShapeDtypeStruct(init.shape, init.dtype)
    return jax.pure_callback(by_scipy, shape, init, tastes, endowments, vmap_method="sequential")


def prices(tastes: Any, endowments: Any) -> jax.Array:
    """Prices of all goods but the first, whose price is 1."""
    return jnp.exp(_clear(jnp.zeros(endowments.shape[1] - 1), tastes, endowments))


def exchange_closed_form(
    tastes: np.ndarray, endowments: np.ndarray
) -> tuple[np.ndarray, dict[str, Any]]:
    """The prices where all have the same tastes, and their derivatives there."""
    totals = endowments.sum(0)
    ratios = tastes / (1 - tastes.sum())
    own = ratios * totals[0] / totals[1:]
    wealth = endowments @ np.concatenate([[1.0], own])
    by_taste = (np.eye(len(tastes)) + ratios[:, None]) / totals[1:, None]
    by_total = np.column_stack([own / totals[0], -np.diag(own / totals[1:])])
    return own, {
        "tastes": by_taste[:, None, :] * wealth[None, :, None],
        "endowments": np.repeat(by_total[:, None, :], len(endowments), axis=1),
    }


def _compare(solve: Any, closed_form: tuple[np.ndarray, dict[str, Any]], args: Any) -> Any:
    """The errors of the root and of its Jacobians in `args`, arrays by name."""
    root, jacobians = closed_form
    forward, reverse = (
        jax.jit(jacobian(solve, argnums=tuple(range(len(args)))))(*args.values())
        for jacobian in (jax.jacfwd, jax.jacrev)
    )
    return {
        "root": root.tolist(),
        "root_error": common.relative_difference(jax.jit(solve)(*args.values()), root),
        "jacobians": {
            name: {
                "exact": jacobians[name].ravel().tolist(),
                "implicit": np.ravel(by_reverse).tolist(),
                "forward_error": common.relative_difference(by_forward, jacobians[name]),
                "reverse_error": common.relative_difference(by_reverse, jacobians[name]),
            }
            for name, by_forward, by_reverse in zip(args, forward, reverse, strict=True)
        },
    }


def best_tax(costs: Any, eta: Any) -> jax.Array:
    """The tax a unit of the highest revenue, found through the firms' equilibrium."""

    def loss(log_tax, costs, eta):
        return -log_tax - jnp.log(jnp.sum(quantities(costs + jnp.exp(log_tax), eta)))

    start = jnp.asarray(math.log(FIRST_TAX))
    log_tax, _ = minimize(loss, start, costs, eta, tx=newton_cg(), num_steps=TAX_STEPS)
    return jnp.exp(log_tax)


def table(results: dict[str, Any]) -> str:
    """The errors as text."""
    columns = {"relative error of": "", "root": ".0e", "Jacobian in": ""}
    columns |= {"forward": ".0e", "reverse": ".0e"}
    rows = [
        (name, market["root_error"], argument, own["forward_error"], own["reverse_error"])
        for name, market in results["markets"].items()
        for argument, own in market["jacobians"].items()
    ]
    tax = f"tax of the highest revenue: {results['tax']:.10f}, relative error "
    return f"{reports.text_table(columns, rows)}\n{tax}{results['tax_error']:.0e}"


def draw(results: dict[str, Any], path: Path) -> None:
    """Entries of the Jacobians against their closed forms, and revenue against the tax."""
    with reports.panels(path, 2, (9, 3.5)) as (left, right):
        for name, market in results["markets"].items():
            for argument, own in market["jacobians"].items():
                left.plot(own["exact"], own["implicit"], "o", ms=4, label=f"{name}: {argument}")
        left.axline((0, 0), slope=1, color="gray", lw=0.8, zorder=0)
        left.set(xlabel="derivative in closed form", ylabel="implicit derivative")
        eta, firms = results["elasticity"], results["firms"]
        taxes = np.linspace(0, 4 * results["exact_tax"], 200)
        taxed_price = firms * (results["mean_cost"] + taxes) / (firms - 1 / eta)
        right.plot(taxes, taxes * taxed_price**-eta, label="closed form")
        right.axvline(results["tax"], color="C1", ls="--", label="found through the equilibrium")
        right.set(xlabel="tax a unit", ylabel="revenue")


if __name__ == "__main__":
    common.run_cli(main, Config, __doc__)
