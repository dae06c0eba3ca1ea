"""What the tables of published accuracies share: one resumable run a cell, and the table."""

import dataclasses
import html
import itertools
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

from experiments.shared import common, few_shot
from imaml_jax.learners.registry import ALGORITHMS, settings_class
from imaml_jax.learners.settings import Count, Positive, Record, Seed
from imaml_jax.protocols import PROTOCOLS
from imaml_jax.protocols.published import OWN_PROTOCOL, PUBLISHED, Values
from imaml_jax.training.non_finite import NonFiniteError


class Cell(NamedTuple):
    """One run."""

    protocol: str
    algorithm: str
    ways: int
    shots: int
    seed: int


class Table(NamedTuple):
    """A published table.

    Attributes:
      dataset: of `imaml_jax.protocols.DATASETS`.
      run: `few_shot.Config -> results`, the experiment.
      make: `(settings) -> Config` of that experiment.
    """

    dataset: str
    run: Callable[[Any], dict[str, Any]]
    make: Callable[..., few_shot.Config]


@dataclasses.dataclass(frozen=True)
class Config(Record):
    """Which cells to run, and for how long."""

    algorithms: tuple[str, ...] = ()
    """Rows of the table; default all."""
    protocols: tuple[Literal["published", "common", "imaml_dev"], ...] = ("published", "common")
    """Each algorithm's own protocol where it has one, the common one, or that of iMAML's published
    code, which only imaml has."""
    seeds: tuple[Seed, ...] = (0,)
    """Seeds of the initialisation and of the training tasks; one run for each."""
    budget: Positive = 1.0
    """Share of the protocol's meta-steps."""
    max_seconds: Positive | None = None
    """Stop a run after the first log point past this many seconds of training."""
    test_tasks: Count | None = None
    """Test tasks; default the protocol's."""
    log_every: Count = 100
    """Meta-steps between two log points."""
    data_dir: Path | None = None
    """Directory of the data; default the environment variable IMAML_DATA_DIR."""

    @classmethod
    def choices(cls) -> Mapping[str, tuple[str, ...]]:
        """The values of settings that are names."""
        return {"algorithms": (*ALGORITHMS,)}

    def check_together(self) -> None:
        """Raises ValueError for an unknown algorithm."""
        for algorithm in self.algorithms:
            settings_class(algorithm)


def main(config: Any, table: Table) -> list[dict[str, Any]]:
    """Runs the cells that are not finished, and writes the table after each.

    Args:
      config: a `Config` with `ways`, `shots`, `workdir` and `output`.
      table: what is in print, and how to run a cell.

    Returns:
      One row a cell.

    Raises:
      ValueError: a setting out of its range.
    """
    runs = [(cell, settings(config, cell, table)) for cell in cells(config)]
    if not runs:
        raise ValueError(
            "nothing to run: ways, shots, algorithms, protocols and seeds need values that go "
            "together"
        )
    common.check_output(config.output)
    published, rows = PUBLISHED[table.dataset], []
    for cell, own in runs:
        print(f"\n{own.workdir}", flush=True)
        full = {"full_meta_steps": table.make(**_selectors(cell)).settings.outer.meta_steps}
        rows.append(cell._asdict() | full | _result(own, table.run))
        common.write_json(common.with_ending(config.output, "json"), rows)
        for ending, text in (("md", markdown), ("html", as_html)):
            path = common.with_ending(config.output, ending)
            path.write_text(text(rows, published), encoding="utf-8")
    print(f"\n{markdown(rows, published)}", flush=True)
    return rows


def cells(config: Any) -> Iterator[Cell]:
    """All cells, column by column, so that comparable ones are finished first."""
    for seed, ways, shots in itertools.product(config.seeds, config.ways, config.shots):
        for kind in config.protocols:
            for algorithm in config.algorithms or ALGORITHMS:
                protocol = OWN_PROTOCOL.get(algorithm) if kind == "published" else kind
                if protocol and algorithm in PROTOCOLS[protocol].covers:
                    yield Cell(protocol, algorithm, ways, shots, seed)


def settings(config: Any, cell: Cell, table: Table) -> few_shot.Config:
    """The run of a cell."""
    own = table.make(**_selectors(cell))
    chunks = max(1, round(config.budget * own.settings.outer.meta_steps / config.log_every))
    meta_steps = chunks * config.log_every
    folder = "{}_{}_{}way_{}shot_seed{}".format(*cell) + f"_{meta_steps}steps"
    test_tasks = {} if config.test_tasks is None else {"test_tasks": config.test_tasks}
    return table.make(
        **_selectors(cell),
        **test_tasks,
        seed=cell.seed,
        meta_steps=meta_steps,
        log_every=config.log_every,
        validate_every=max(1, chunks // 10) * config.log_every,
        max_seconds=config.max_seconds,
        data_dir=config.data_dir,
        workdir=config.workdir / folder,
    )


def _selectors(cell: Cell) -> dict[str, Any]:
    return {name: getattr(cell, name) for name in few_shot.Config.SELECTORS}


def _result(own: few_shot.Config, run: Callable[[Any], dict[str, Any]]) -> dict[str, Any]:
    """What the run gave, from its folder where it is finished."""
    assert own.workdir is not None
    finished = own.workdir / "results.json"
    try:
        results = json.loads(finished.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        try:
            results = run(own)
        except NonFiniteError as error:
            return {"workdir": str(own.workdir), "diverged_at": error.step}
    names = ("test_accuracy", "test_ci95", "trained_meta_steps", "seconds", "command", "date")
    return {
        "workdir": str(own.workdir),
        "inner_residual": results["test_info"].get("inner_residual"),
        **{name: results[name] for name in (*names, "device", "versions")},
    }


def _lines(rows: list[dict[str, Any]], published: Mapping[str, Values]) -> Iterator[list[str]]:
    """The cells of the table as text, header first."""
    columns = sorted({(row["ways"], row["shots"]) for row in rows})
    heads = [f"{ways}-way {shots}-shot" for ways, shots in columns]
    yield ["algorithm", "protocol", *heads]
    for algorithm, kind in ALGORITHMS.items():
        own = [row for row in rows if row["algorithm"] == algorithm]
        if own:
            values = [published.get(algorithm, {}).get(column, ("", None)) for column in columns]
            yield [
                kind.title,
                "in print",
                *(printed(*value) for value in values),
            ]
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


def printed(mean: float | str, half_width: float | None) -> str:
    """A published value in words."""
    return f"{mean}" if half_width is None else f"{mean:g} ± {half_width:g}"


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


def markdown(rows: list[dict[str, Any]], published: Mapping[str, Values]) -> str:
    """The table in Markdown."""
    header, *body = _lines(rows, published)
    lines = [header, ["---"] * len(header), *body]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + f"\n\n{_NOTE}\n"


def as_html(rows: list[dict[str, Any]], published: Mapping[str, Values]) -> str:
    """The table in HTML."""
    header, *body = ([html.escape(text) for text in line] for line in _lines(rows, published))
    head = "".join(f"<th>{text}</th>" for text in header)
    lines = ["".join(f"<td>{text}</td>" for text in line) for line in body]
    table = "\n".join(f"<tr>{line}</tr>" for line in (head, *lines))
    return f'<meta charset="utf-8">\n<table>\n{table}\n</table>\n<p>{html.escape(_NOTE)}</p>\n'
