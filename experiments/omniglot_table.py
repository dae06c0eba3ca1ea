"""The published table of Omniglot accuracies, beside what this library gives.

    python -m experiments.omniglot_table --data-dir DIR --budget 0.01
    python -m experiments.omniglot_table --data-dir DIR --ways 5 --protocols recommended

One run for each cell, under the protocol that the published value belongs to and under
`recommended`, whose data and test tasks are the same for all. Runs resume, and finished ones are
skipped. The table is printed, and written to OUTPUT.json, OUTPUT.md and OUTPUT.html.
"""

import dataclasses
import html
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

from experiments import common, few_shot, omniglot
from imaml_jax import protocols
from imaml_jax.training import NonFiniteError

NAMES: dict[few_shot.Algorithm, str] = {
    "maml": "MAML",
    "fomaml": "first-order MAML",
    "reptile": "Reptile",
    "reptile_transductive": "Reptile + transduction",
    "imaml": "iMAML, gradient descent",
    "imaml_hf": "iMAML, Hessian-free",
}
TASKS = ((5, 1), (5, 5), (20, 1), (20, 5))
# Rajeswaran et al., NeurIPS 2019, table 2, which takes the first four rows from their own papers:
# per cent and half-width of the interval, in the order of TASKS.
PUBLISHED: dict[few_shot.Algorithm, tuple[tuple[float, float], ...]] = {
    "maml": ((98.7, 0.4), (99.9, 0.1), (95.8, 0.3), (98.9, 0.2)),
    "fomaml": ((98.3, 0.5), (99.2, 0.2), (89.4, 0.5), (97.9, 0.1)),
    "reptile": ((95.39, 0.09), (98.90, 0.10), (88.14, 0.15), (96.65, 0.33)),
    "reptile_transductive": ((97.68, 0.04), (99.48, 0.06), (89.43, 0.14), (97.12, 0.32)),
    "imaml": ((99.16, 0.35), (99.67, 0.12), (94.46, 0.42), (98.69, 0.1)),
    "imaml_hf": ((99.50, 0.26), (99.74, 0.11), (96.18, 0.36), (99.14, 0.1)),
}
_OWN_PROTOCOL: dict[few_shot.Algorithm, few_shot.ProtocolName] = {
    "maml": "finn",
    "fomaml": "finn",
    "reptile": "reptile",
    "reptile_transductive": "reptile",
    "imaml": "imaml",
    "imaml_hf": "imaml",
}


class Cell(NamedTuple):
    """One run."""

    protocol: few_shot.ProtocolName
    algorithm: few_shot.Algorithm
    ways: int
    shots: int
    seed: int


@dataclasses.dataclass(frozen=True)
class Config:
    """Which cells to run, and for how long."""

    ways: tuple[Literal[5, 20], ...] = (5, 20)
    """Classes a task."""
    shots: tuple[Literal[1, 5], ...] = (1, 5)
    """Support examples a class."""
    algorithms: tuple[few_shot.Algorithm, ...] = (*NAMES,)
    """Rows of the table."""
    protocols: tuple[Literal["published", "recommended"], ...] = ("published", "recommended")
    """Each algorithm's own protocol, or the common one."""
    seeds: tuple[int, ...] = (0,)
    """Seeds of the initialisation and of the training tasks; one run for each."""
    budget: float = 1.0
    """Share of the protocol's meta-steps, above 0."""
    max_seconds: float | None = None
    """Stop a run after the first log point past this many seconds of training."""
    test_tasks: int | None = None
    """Test tasks; default the protocol's."""
    log_every: int = 100
    """Meta-steps between two log points."""
    data_dir: Path | None = None
    """Directory of the public zips; default the environment variable IMAML_DATA_DIR."""
    download: bool = False
    """Fetch the zips through tensorflow-datasets where they are absent."""
    workdir: Path = Path("runs/omniglot_table")
    """One folder a cell."""
    output: Path = Path("runs/omniglot_table/table")
    """Where to write the table, without an ending."""


def main(config: Config) -> list[dict[str, Any]]:
    """Runs the cells that are not finished, and writes the table after each.

    Returns:
      One row a cell.

    Raises:
      ValueError: a setting out of its range.
    """
    if not config.budget > 0:
        raise ValueError(f"budget={config.budget} must be above 0")
    if config.log_every < 1:
        raise ValueError(f"log_every={config.log_every} must be at least 1")
    runs = [(cell, settings(config, cell)) for cell in cells(config)]
    if not runs:
        raise ValueError("nothing to run: ways, shots, algorithms, protocols and seeds need values")
    for _, own in runs:
        few_shot.resolve(own)
    common.check_output(config.output)
    rows = []
    for cell, own in runs:
        print(f"\n{own.workdir}", flush=True)
        rows.append(cell._asdict() | {"full_meta_steps": _full_steps(cell)} | _result(own))
        common.write_json(common.with_ending(config.output, "json"), rows)
        for ending, text in (("md", markdown(rows)), ("html", as_html(rows))):
            common.with_ending(config.output, ending).write_text(text, encoding="utf-8")
    print(f"\n{markdown(rows)}", flush=True)
    return rows


def cells(config: Config) -> Iterator[Cell]:
    """All cells, column by column, so that comparable ones are finished first."""
    for seed in config.seeds:
        for ways in config.ways:
            for shots in config.shots:
                for kind in config.protocols:
                    for algorithm in config.algorithms:
                        own = _OWN_PROTOCOL[algorithm]
                        protocol = own if kind == "published" else "recommended"
                        yield Cell(protocol, algorithm, ways, shots, seed)


def settings(config: Config, cell: Cell) -> omniglot.Config:
    """The run of a cell."""
    chunks = max(1, round(config.budget * _full_steps(cell) / config.log_every))
    meta_steps = chunks * config.log_every
    folder = "{}_{}_{}way_{}shot_seed{}".format(*cell) + f"_{meta_steps}steps"
    return omniglot.Config(
        algorithm=cell.algorithm,
        protocol=cell.protocol,
        ways=cell.ways,
        shots=cell.shots,
        seed=cell.seed,
        meta_steps=meta_steps,
        log_every=config.log_every,
        validate_every=max(1, chunks // 10) * config.log_every,
        test_tasks=config.test_tasks,
        max_seconds=config.max_seconds,
        data_dir=config.data_dir,
        download=config.download,
        workdir=config.workdir / folder,
    )


def _full_steps(cell: Cell) -> int:
    task = {"algorithm": cell.algorithm, "ways": cell.ways, "shots": cell.shots}
    return protocols.get(cell.protocol, **task).meta_steps


def _result(own: omniglot.Config) -> dict[str, Any]:
    """What the run gave, from its folder where it is finished."""
    assert own.workdir is not None
    finished = own.workdir / "results.json"
    try:
        results = json.loads(finished.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        try:
            results = omniglot.main(own)
        except NonFiniteError as error:
            return {"workdir": str(own.workdir), "diverged_at": error.step}
    names = ("test_accuracy", "test_ci95", "trained_meta_steps", "seconds", "command", "date")
    return {
        "workdir": str(own.workdir),
        "inner_residual": results["test_info"].get("inner_residual"),
        **{name: results[name] for name in (*names, "device", "versions")},
    }


def _lines(rows: list[dict[str, Any]]) -> Iterator[list[str]]:
    """The cells of the table as text, header first."""
    columns = sorted({(row["ways"], row["shots"]) for row in rows})
    heads = [f"{ways}-way {shots}-shot" for ways, shots in columns]
    yield ["algorithm", "protocol", *heads]
    for algorithm, name in NAMES.items():
        own = [row for row in rows if row["algorithm"] == algorithm]
        if own:
            values = [PUBLISHED[algorithm][TASKS.index(column)] for column in columns]
            yield [name, "in print", *(f"{mean:g} ± {half:g}" for mean, half in values)]
        for protocol in dict.fromkeys(row["protocol"] for row in own):
            measured = [
                ", ".join(
                    _shown(row)
                    for row in own
                    if (row["protocol"], row["ways"], row["shots"]) == (protocol, *column)
                )
                for column in columns
            ]
            yield ["", protocol, *measured]


def _shown(row: dict[str, Any]) -> str:
    if "diverged_at" in row:
        return f"diverged at step {row['diverged_at']}"
    residual = row["inner_residual"]
    short = row["trained_meta_steps"] < row["full_meta_steps"]
    return (
        f"{100 * row['test_accuracy']:.2f} ± {100 * row['test_ci95']:.2f}"
        + ("" if residual is None else f" (r {residual:.2g})")
        + (f" *{row['trained_meta_steps']}" if short else "")
    )


_NOTE = (
    "Test accuracy in per cent with its 95% interval over test tasks. r: what is left of the inner "
    "gradient after adaptation, relative to its start. *n: only n meta-steps, fewer than the "
    "protocol has."
)


def markdown(rows: list[dict[str, Any]]) -> str:
    """The table in Markdown."""
    header, *body = _lines(rows)
    lines = [header, ["---"] * len(header), *body]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + f"\n\n{_NOTE}\n"


def as_html(rows: list[dict[str, Any]]) -> str:
    """The table in HTML."""
    header, *body = ([html.escape(text) for text in line] for line in _lines(rows))
    head = "".join(f"<th>{text}</th>" for text in header)
    lines = ["".join(f"<td>{text}</td>" for text in line) for line in body]
    table = "\n".join(f"<tr>{line}</tr>" for line in (head, *lines))
    return f'<meta charset="utf-8">\n<table>\n{table}\n</table>\n<p>{html.escape(_NOTE)}</p>\n'


if __name__ == "__main__":
    common.run_cli(main, Config, __doc__)
