"""A report of any runs, finished or not, as one HTML file: ours beside the published numbers.

    python -m experiments.report runs/imaml runs/maml
    python -m experiments.report experiments/results/*.json --output report.html
    python -m experiments.report runs --watch 30

RUNS are workdirs, folders of workdirs, and JSON files of results. Runs that differ in their seed
only share a row of the table and a colour. The file needs no network and no other file.
"""

import contextlib
import dataclasses
import sys
import time
from pathlib import Path

import tyro

from experiments.report.page import page
from experiments.report.rows import Group, group
from experiments.report.runs import read
from experiments.shared import common
from imaml_jax.learners.settings import Positive, Record
from imaml_jax.training.workdir import write_whole


@dataclasses.dataclass(frozen=True)
class Config(Record):
    """What is reported, and where to."""

    runs: tyro.conf.Positional[tuple[Path, ...]] = ()
    """Workdirs of runs, folders of such, or JSON files of results; at least one."""
    output: Path = Path("runs/report.html")
    """The file to write."""
    watch: Positive | None = None
    """Write it anew every so many seconds, above 0, until all runs are finished or Ctrl-C."""


def main(config: Config) -> list[Group]:
    """Writes the report; with `watch` again and again.

    Returns:
      What was written last.

    Raises:
      ValueError: no run, a path that is none, or a file that cannot be written.
    """
    if not config.runs:
        raise ValueError("runs: name at least one workdir or JSON file of results")
    common.check_output(config.output)
    groups = _write(config, config.watch)
    with contextlib.suppress(KeyboardInterrupt):
        while config.watch is not None and not _finished(groups):
            time.sleep(config.watch)
            groups = _write(config, config.watch)
    if config.watch is not None:
        groups = _write(config, None)  # which no browser loads again
    runs = sum(len(each.runs) for each in groups)
    print(f"{runs} run{'s' * (runs != 1)} in {config.output}", flush=True)
    return groups


def _write(config: Config, refresh: float | None) -> list[Group]:
    paths: dict[Path, None] = dict.fromkeys(config.runs)  # each once
    groups = group([run for path in paths for run in read(path)])
    command = " ".join(["python -m experiments.report", *sys.argv[1:]])
    write_whole(config.output, page(groups, command=command, refresh=refresh))
    return groups


def _finished(groups: list[Group]) -> bool:
    return all(run.state == "finished" for each in groups for run in each.runs)


if __name__ == "__main__":
    common.run_cli(main, Config, __doc__)
