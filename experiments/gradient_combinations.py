"""Learning curves of combinations of the inner gradients, and the gradients' inner products.

    python -m experiments.gradient_combinations --data-dir data/omniglot
    python -m experiments.gradient_combinations --dataset glyphs

Section 6.2 and figure 3 of Nichol, Achiam, Schulman, "On First-Order Meta-Learning Algorithms",
2018: four mini-batches of a task that do not overlap, one SGD step on each; g_i is the gradient on
mini-batch i where step i starts, and the outer step follows a combination of them. Section 5.1:

    E[g_i] = AvgGrad - (i - 1) alpha AvgGradInner + O(alpha^2),

where alpha is the inner rate and AvgGradInner half the gradient of the expected inner product of
the gradients on two mini-batches of one task, so that descent along g_2, g_3, ... raises it. That
product, its cosine, and those of mini-batches of two tasks are measured along training. Writes
OUTPUT.json and OUTPUT.png.

From the code of the paper, supervised-reptile: SGD inside and outside, one task a meta-step;
network, split, rotations, mini-batches of 25 examples in random order, rates, 5 SGD steps at test;
its loss is a sum over the mini-batch, here it is the mean, so alpha is 25 * 0.003. Ours: fewer
meta-steps than its 40,000; 15 queries a class at test, normalised by the support set (there: one,
normalised with it); every combination sees the first mini-batches of the same 20 examples a class
(there: 5 for each that it uses); g2, g3 and g4 alone weigh as much as the sums, which --average
turns into means (there: g2, g3 and g4 unscaled, beside sums and means).
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

import imaml_jax
from experiments.shared import common, reports
from experiments.shared.inner_gradients import NUM_BATCHES, combination, make_measure, taylor
from imaml_jax.data import episodes, glyphs, omniglot
from imaml_jax.learners.settings import Count, Positive, Range, Record, Seed
from imaml_jax.networks import conv4
from imaml_jax.training import train
from imaml_jax.training.evaluation import make_evaluate
from imaml_jax.training.step import init_meta_params

# Weights of g1, g2, ...; as many inner steps are made.
COMBINATIONS = {
    "g1": (1,),
    "2·g2": (0, 2),
    "g1+g2": (1, 1),
    "3·g3": (0, 0, 3),
    "g1+g2+g3": (1, 1, 1),
    "4·g4": (0, 0, 0, 4),
    "g1+g2+g3+g4": (1, 1, 1, 1),
}
# Of the two mini-batches whose gradients are multiplied.
PAIRS = {"within": "one task", "between": "two tasks"}
EVAL_STEPS, QUERIES = 5, 15
_TASKS_A_CALL = 50
AtLeastTwo = Annotated[int, Range(least=2)]


@dataclass(frozen=True)
class Config(Record):
    """What is trained and measured."""

    dataset: Literal["glyphs", "omniglot"] = "omniglot"
    """Images; glyphs need no download and are not rotated."""
    data_dir: Path | None = None
    """Directory of the Omniglot zips; default the environment variable IMAML_DATA_DIR."""
    meta_steps: Count = 1500
    """Meta-steps of each combination, a multiple of eval_every; the outer rate falls to 0."""
    eval_every: Count = 250
    """Meta-steps between two points of the curves, at least 1."""
    test_tasks: AtLeastTwo = 50
    """Test tasks, the same for every point; at least 2."""
    product_tasks: AtLeastTwo = 20
    """Training tasks whose gradients are multiplied, the same for every point; at least 2."""
    ways: AtLeastTwo = 5
    """Classes a task, at least 2."""
    shots: Count = 5
    """Support examples a class; a mini-batch has as many examples as the support set; at least
    1."""
    filters: Count = 64
    """Channels of the network, at least 1."""
    inner_rate: Positive = 0.075
    """Alpha, the learning rate of the inner SGD; above 0."""
    outer_rate: Positive = 0.25
    """Learning rate of the outer SGD at the start, in units of alpha; above 0."""
    average: bool = False
    """Divide the weights of every combination by their sum."""
    seed: Seed = 0
    """Seed of the initialisation and of the training tasks, the same for every combination; at
    least 0."""
    output: Path = Path("runs/gradient_combinations")
    """Where to write, without an ending."""

    def check_together(self) -> None:
        if self.meta_steps % self.eval_every:
            raise ValueError(
                f"meta_steps={self.meta_steps} must be a multiple of eval_every={self.eval_every}; "
                "change either"
            )
        if self.dataset == "glyphs" and self.data_dir is not None:
            raise ValueError(f"data_dir={self.data_dir} has no effect on glyphs; leave it out")


def main(config: Config) -> dict[str, Any]:
    """Trains every combination, writes and prints.

    Returns:
      For each combination its weights, what `taylor` says of them, and its curve: rows of the
      meta-step, the test accuracy with its 95% confidence interval, and `products`. The first row,
      before training, is common to all.

    Raises:
      ValueError: tasks that the data do not allow.
    """
    common.check_output(config.output)
    if config.dataset == "glyphs":
        splits, rotations = glyphs.load(), None
    else:
        splits, rotations = omniglot.load(config.data_dir, split="reptile"), "classes"
    of_test: dict[str, Any] = {"ways": config.ways, "shots": config.shots, "queries": QUERIES}
    # Support and query examples are pooled: enough for all mini-batches.
    of_training: dict[str, Any] = {
        "ways": config.ways,
        "shots": (NUM_BATCHES - 1) * config.shots,
        "queries": config.shots,
        "rotations": rotations,
    }
    episodes.check_task_shape(splits.test, **of_test)
    episodes.check_task_shape(splits.train, **of_training)
    common.cache_compilations()

    head = jax.nn.initializers.glorot_uniform()
    network = conv4(config.ways, filters=config.filters, conv_bias=True, head_init=head)
    adapting = imaml_jax.reptile(
        network,
        imaml_jax.cross_entropy,
        inner=optax.sgd(config.inner_rate),
        num_steps=EVAL_STEPS,
        statistics="support",
    )

    def loss(params, batch):
        return imaml_jax.cross_entropy(network.apply(params, batch.inputs), batch.targets)

    def sample_train(key, num_tasks=1):
        return episodes.sample_tasks(key, splits.train, num_tasks=num_tasks, **of_training)

    def sample_test(key):
        number = min(config.test_tasks, _TASKS_A_CALL)
        return episodes.sample_tasks(key, splits.test, num_tasks=number, **of_test)

    batch_size = config.ways * config.shots
    score = make_evaluate(adapting, sample_test, num_tasks=config.test_tasks)
    sample_products = partial(sample_train, num_tasks=config.product_tasks)
    measure = make_measure(loss, sample_products, batch_size)
    weights = {
        name: [w / sum(own) if config.average else float(w) for w in own]
        for name, own in COMBINATIONS.items()
    }
    key = jax.random.key(config.seed)
    start = init_meta_params(adapting, key, jnp.zeros((1, *splits.train.images.shape[1:])))

    def point(step, meta_params):
        evaluation = score(meta_params, common.fixed_key(common.TEST_KEY))
        row = {"step": step, "accuracy": evaluation.mean, "ci95": evaluation.ci95}
        return row | measure(meta_params, common.fixed_key(common.VALIDATION_KEY)), evaluation

    initial, _ = point(0, start)

    def curve(name: str) -> list[dict[str, Any]]:
        rows = [initial]

        def validate(meta_params):
            row, evaluation = point(len(rows) * config.eval_every, meta_params)
            rows.append(row)
            values = ", ".join(f"{field} {value:.5g}" for field, value in row.items())
            print(f"{name}: {values}", flush=True)
            return evaluation

        rate = config.outer_rate * config.inner_rate
        train(
            combination(adapting, loss, weights[name], config.inner_rate, batch_size),
            optax.sgd(optax.linear_schedule(rate, 0.0, config.meta_steps)),
            sample_train,
            key=key,
            num_steps=config.meta_steps,
            meta_params=start,
            log_every=config.eval_every,
            validate=validate,
            progress=False,
        )
        return rows

    curves = _side_by_side(curve, list(weights))
    rows = {
        name: {"weights": own, "taylor": taylor(own), "curve": curves[name]}
        for name, own in weights.items()
    }
    return reports.report(config, {"combinations": rows}, table, draw)


def _side_by_side(run: Callable[[str], Any], names: Sequence[str]) -> dict[str, Any]:
    """`run` of every name, in one thread a device: a meta-step of one task occupies only one."""
    devices = jax.local_devices()

    def run_share(index: int) -> list[tuple[str, Any]]:
        with jax.default_device(devices[index]):
            return [(name, run(name)) for name in names[index :: len(devices)]]

    with ThreadPoolExecutor(len(devices)) as pool:
        return dict(pair for share in pool.map(run_share, range(len(devices))) for pair in share)


def table(results: dict[str, Any]) -> str:
    """The ends of the curves as text."""
    r, rotated = results, results["dataset"] == "omniglot"
    source = "split reptile, classes rotated in training only, ink 0" if rotated else "not rotated"
    about = (
        f"{r['dataset']} {r['ways']}-way {r['shots']}-shot, {source}; {r['meta_steps']} meta-steps "
        f"of 1 task, inner SGD {r['inner_rate']:g}, outer SGD {r['outer_rate']:g} times that, to 0 "
        f"linearly, {'means' if r['average'] else 'sums'}; accuracy ± 95% CI over "
        f"{r['test_tasks']} tasks of unseen classes, {QUERIES} queries a class, batch norm by "
        f"support, {EVAL_STEPS} SGD steps; gradients of {NUM_BATCHES} mini-batches of each of "
        f"{r['product_tasks']} training tasks"
    )
    columns = {"": "", "weight of AvgGradInner": ".1f", "meta-steps": "", "accuracy, %": ""}
    columns |= {f"{kind}, {of}": ".4f" for kind in ("product", "cosine") for of in PAIRS.values()}
    rows = [("untrained", None, r["combinations"]["g1"]["curve"][0])]
    rows += [(name, row["taylor"], row["curve"][-1]) for name, row in r["combinations"].items()]
    cells = []
    for name, weight, row in rows:
        accuracy = f"{100 * row['accuracy']:.2f} ± {100 * row['ci95']:5.2f}"
        products = [row[pairs + kind] for kind in ("", "_cosine") for pairs in PAIRS]
        cells.append([name, weight, row["step"], accuracy, *products])
    return f"{about}\n{reports.text_table(columns, cells)}"


def draw(results: dict[str, Any], path: Path) -> None:
    """Accuracy, inner products and cosines over meta-steps."""
    with reports.panels(path, 3, (15, 4.5), xlabel="meta-step") as (accuracy, *others):
        for index, (name, row) in enumerate(results["combinations"].items()):
            curve = {field: np.array([r[field] for r in row["curve"]]) for field in row["curve"][0]}
            steps, middle, half = curve["step"], curve["accuracy"], curve["ci95"]
            accuracy.plot(steps, middle, "o-", ms=3, color=f"C{index}", label=name)
            accuracy.fill_between(steps, middle - half, middle + half, color=f"C{index}", alpha=0.1)
            for axes, kind in zip(others, ("", "_cosine"), strict=True):
                for (pairs, label), style in zip(PAIRS.items(), ("-", ":"), strict=True):
                    shown = None if index else label
                    axes.plot(steps, curve[pairs + kind], style, color=f"C{index}", label=shown)
        accuracy.set(ylabel=f"test accuracy, {results['ways']}-way {results['shots']}-shot")
        others[0].set(ylabel="inner product of two mini-batch gradients")
        others[0].set_yscale("symlog", linthresh=0.1)
        others[1].set(ylabel="their cosine")


if __name__ == "__main__":
    common.run_cli(main, Config, __doc__)
