"""One table of every algorithm on the tasks that it can serve, ours beside the published values.

    python -m experiments.family --budget 0.02
    python -m experiments.family --tasks omniglot --data-dir DIR --max-seconds 900
    python -m experiments.family --tasks leo --features features

One run for each row, in a folder of its own: runs resume, and finished ones are only tested again.
The table is written to OUTPUT.json and OUTPUT.md after each, and printed at the end.
"""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from experiments.shared import common
from experiments.shared.family_runs import RUNS, Run, TaskName
from imaml_jax.learners.registry import ALGORITHMS
from imaml_jax.learners.settings import Count, Positive, Range, Record, nearest
from imaml_jax.protocols import sinusoid as sinusoids
from imaml_jax.training.non_finite import NonFiniteError


@dataclasses.dataclass(frozen=True)
class Config(Record):
    """Which rows to make, and for how long."""

    tasks: tuple[TaskName, ...] = ("sinusoid", "glyphs", "navigation")
    """What is learned; omniglot and mini_imagenet need data, leo features."""
    algorithms: tuple[str, ...] = ()
    """Which algorithms, by the names that the tables print; default all."""
    budget: Positive = 1.0
    """Share of each run's meta-steps."""
    max_seconds: Positive | None = None
    """Stop a run after the first log point past this many seconds of training."""
    ways: Annotated[int, Range(least=2)] = 5
    """Classes of a classification task."""
    shots: Count = 1
    """Support examples a class of a classification task."""
    sinusoid_setting: sinusoids.Setting = "maml"
    """Whose sinusoids."""
    sinusoid_shots: Count = 10
    """Points of a sinusoid."""
    data_dir: Path | None = None
    """Directory of Omniglot's or mini-ImageNet's files; default the environment variable
    IMAML_DATA_DIR."""
    features: Path | None = None
    """What LEO learns from, see `python -m experiments.features`."""
    workdir: Path = Path("runs/family")
    """One folder a row."""
    output: Path = Path("runs/family/table")
    """Where to write the table, without an ending."""

    @classmethod
    def choices(cls) -> Mapping[str, tuple[str, ...]]:
        """The values of settings that are names."""
        return {"algorithms": (*sorted({"leo", "nearest_centroid", *ALGORITHMS}),)}

    def check_together(self) -> None:
        """Raises ValueError for an unknown algorithm, or LEO without features."""
        every = self.choices()["algorithms"]
        for name in self.algorithms:
            if name not in every:
                raise ValueError(
                    f"algorithms={name!r} must be of {', '.join(every)}{nearest(name, every)}"
                )
        if "leo" in self.tasks and self.features is None:
            raise ValueError(
                "features=None: tasks=leo needs the folder that python -m experiments.features "
                "writes"
            )


def main(config: Config) -> list[dict[str, Any]]:
    """Makes the rows, and writes the table after each.

    Returns:
      One row a run.

    Raises:
      ValueError: a setting out of its range, or no row.
    """
    runs = [
        run
        for task in config.tasks
        for run in RUNS[task](config)
        if not config.algorithms or run.algorithm in config.algorithms
    ]
    if not runs:
        raise ValueError("nothing to run: tasks and algorithms need values that go together")
    common.check_output(config.output)
    rows = []
    for run in runs:
        print(f"\n{run.workdir}", flush=True)
        rows.append(_row(run))
        common.write_json(common.with_ending(config.output, "json"), rows)
        text = markdown(rows)
        common.with_ending(config.output, "md").write_text(text, encoding="utf-8")
    print(f"\n{markdown(rows)}", flush=True)
    return rows


def markdown(rows: list[dict[str, Any]]) -> str:
    """The table in Markdown."""
    header = ["task", "algorithm", "protocol", "score", "NLL", "published"]
    header += ["meta-steps", "seconds", "MiB"]
    lines = [header, ["---"] * len(header)]
    for row in rows:
        named = [row["task"], row["algorithm"], row["protocol"]]
        if "diverged_at" in row:
            said = f"diverged at step {row['diverged_at']}"
            lines.append([*named, said, "", row["published"], "", "", ""])
            continue
        mean, half, nll = row["score"], row["ci95"], row["nll"]
        steps = f"{row.get('trained_meta_steps', 0)} of {row['full_meta_steps']}"
        lines.append(
            [
                *named,
                f"{mean:.4g} ± {half:.2g}",
                "" if nll is None else f"{nll:.3f}",
                row["published"],
                steps,
                f"{row.get('seconds', 0):.0f}",
                "" if row["memory_mib"] is None else f"{row['memory_mib']:.2f}",
            ]
        )
    note = (
        "Score: accuracy in per cent on unseen classes, mean squared error, or return after one "
        "update, with its 95% interval over test tasks. NLL of the averaged predictive. MiB: "
        "temporary memory of the meta-gradient of one task. Protocol: that of this row's run, by "
        "its name in imaml_jax.protocols or the experiment's own; its settings are in the JSON "
        "file. Published values were measured under the protocols of their papers."
    )
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + f"\n\n{note}\n"


def _row(run: Run) -> dict[str, Any]:
    named = {"task": run.task, "algorithm": run.algorithm, "protocol": run.protocol}
    named |= {"workdir": str(run.workdir)}
    try:
        run.main()  # goes on where it was, refuses another config, and trains no finished run again
    except NonFiniteError as error:
        return named | {"published": run.published, "diverged_at": error.step}
    results = json.loads((run.workdir / "results.json").read_text(encoding="utf-8"))
    results |= results.get("rows", {}).get(run.algorithm, {})  # several algorithms, one run
    mean, ci95, nll = run.score(results)
    memory = run.memory(results)
    names = ("trained_meta_steps", "seconds", "command", "date", "device", "versions", "settings")
    return named | {
        "score": mean,
        "ci95": ci95,
        "nll": nll,
        "published": run.published,
        "full_meta_steps": run.full_meta_steps,
        "memory_mib": None if memory is None else memory / 2**20,
        **{name: results[name] for name in names if name in results},
    }


if __name__ == "__main__":
    common.run_cli(main, Config, __doc__)
