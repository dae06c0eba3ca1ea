"""What the table of a report says of each group of runs: ours, the published value, the status."""

import itertools
import json
import statistics
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from experiments.report.published import (
    Published,
    full_steps_of,
    own_protocol,
    protocol_of,
    published_of,
    shape_of,
)
from experiments.report.runs import Run, mapping, number, word
from imaml_jax import protocols
from imaml_jax.learners.registry import ALGORITHMS

# Of results that have no config beside them: what tells one experiment from another.
_IDENTITY = (
    *("dataset", "task", "algorithm", "protocol", "ways", "shots", "setting", "settings"),
    *("constants", "features", "outer", "estimator", "changes", "meta_steps", "test_tasks"),
)


class Score(NamedTuple):
    """A result in the unit of the published ones.

    Attributes:
      value: per cent, mean squared error or return.
      half_width: of its 95% interval over tasks, None where it has none.
      what: in words.
      is_test: whether it was taken on test tasks.
    """

    value: float
    half_width: float | None
    what: str
    is_test: bool = True


class Group(NamedTuple):
    """Runs that differ in their seed only, first the smallest.

    Attributes:
      name: in the legends of the charts.
      task: what was learned.
      runs: at least one.
      scores: one a run, None where it has none yet.
      published: None where nothing was.
      full_steps: the meta-steps of the whole budget, None where that is not known.
      status: ours beside the published value, in words.
      deviations: how the runs differ from what was published.
    """

    name: str
    task: str
    runs: tuple[Run, ...]
    scores: tuple[Score | None, ...]
    published: Published | None
    full_steps: int | None
    status: str
    deviations: tuple[str, ...]


def group(runs: Sequence[Run]) -> list[Group]:
    """The runs in groups, by task and algorithm."""
    found: dict[tuple[str, int], list[Run]] = {}
    for run in runs:
        key = _identity(run)
        for index in itertools.count():  # of two runs with one seed, each has a row of its own
            members = found.setdefault((key, index), [])
            if not members or run.results.get("seed") not in [
                m.results.get("seed") for m in members
            ]:
                members.append(run)
                break
    groups = [_group(members) for members in found.values()]
    order = list(ALGORITHMS)

    def place(each: Group) -> tuple[Any, ...]:
        algorithm = each.runs[0].results.get("algorithm")
        return each.task, order.index(algorithm) if algorithm in order else len(order), each.name

    return sorted(groups, key=place)


def mean(scores: Iterable[Score | None]) -> float | None:
    """Over the seeds that have one."""
    values = [score.value for score in scores if score is not None]
    return statistics.fmean(values) if values else None


def trained_steps(run: Run) -> int | None:
    """Meta-steps done so far."""
    steps = run.results.get("trained_meta_steps")
    if isinstance(steps, int) and run.state == "finished":
        return steps
    return run.history[-1]["step"] if run.history else None


def tasks_scored(group: Group) -> str:
    """How many tasks, and of which kind; empty where that is not known."""
    results, score = group.runs[0].results, group.scores[0]
    kind = "validation" if score is not None and not score.is_test else "test"
    for place in (results.get("settings"), results.get("test_tasks"), results):
        if isinstance(place, dict) and isinstance(place.get(f"{kind}_tasks"), int):
            return f"{place[f'{kind}_tasks']:,} {kind} tasks"
    return ""


def algorithm_name(results: dict[str, Any]) -> str:
    """As the tables print it."""
    algorithm = str(results.get("algorithm", ""))
    return ALGORITHMS[algorithm].title if algorithm in ALGORITHMS else algorithm


def _identity(run: Run) -> str:
    if run.config is not None:
        kept = {k: v for k, v in run.config.items() if k not in ("seed", "root_key")}
    else:
        kept = {name: run.results.get(name) for name in _IDENTITY}
    if "seed" not in run.results:
        kept["name"] = run.name
    kept["part"] = run.results.get("algorithm")
    return json.dumps(kept, sort_keys=True, default=str)


def _group(members: list[Run]) -> Group:
    runs = tuple(sorted(members, key=_seed))
    results = runs[0].results
    place, published = _task(results), published_of(results)
    scores = tuple(_score(run) for run in runs)
    full = full_steps_of(results)
    status = _status(runs, scores, published, full)
    protocol = word(mapping(results, "settings"), "name") or word(results, "protocol")
    name = " ".join(filter(None, (algorithm_name(results), protocol and f"({protocol})")))
    return Group(
        name or runs[0].name, place, runs, scores, published, full, status,
        tuple(_deviations(runs, full, published)),
    )  # fmt: skip


def _seed(run: Run) -> tuple[bool, float, str]:
    """Numbers in their order, then what is none."""
    seed = run.results.get("seed")
    value = number(seed)
    return value is None, value or 0.0, str(seed)


def _task(results: dict[str, Any]) -> str:
    dataset, ways, shots = shape_of(results)
    if results.get("constants"):
        dataset = f"{results['constants']} features"
    elif not dataset:
        return str(results.get("task") or "not told")
    dataset = {"navigation": "2D navigation", "omniglot": "Omniglot"}.get(dataset, dataset)
    said = [dataset, ways and f"{ways}-way", shots and f"{shots}-shot"]
    if results.get("setting"):
        said.append(f"setting {results['setting']}")
    return " ".join(str(part) for part in said if part)


def _score(run: Run) -> Score | None:
    results = run.results
    if run.state != "finished":
        return _validation(run)
    if (value := number(results.get("test_accuracy"))) is not None:
        return Score(100 * value, _half(results.get("test_ci95"), 100), "test accuracy, %")
    if (value := number(results.get("test_mse"))) is not None:
        return Score(value, _half(results.get("test_ci95")), "test mean squared error")
    returns, halves = results.get("test_return"), results.get("test_ci95")
    if (
        isinstance(returns, list)
        and isinstance(halves, list)
        and min(len(returns), len(halves)) > 1
    ):
        value, half = number(returns[1]), _half(halves[1])
        return None if value is None else Score(value, half, "test return after one update")
    if (value := number(results.get("score"))) is not None:
        is_error = str(results.get("task", "")).startswith("sinusoid")
        what = "test mean squared error" if is_error else "test score"
        what = "test accuracy, %" if shape_of(results)[1] else what
        return Score(value, _half(results.get("ci95")), what)
    if (value := number(results.get("validation"))) is not None:
        half = _half(results.get("validation_ci95"), 100)
        return Score(100 * value, half, "validation accuracy, %", is_test=False)
    return None


def _validation(run: Run) -> Score | None:
    """The last one of a run that has not been tested."""
    for row in reversed(run.history):
        value, half = number(row.get("validation")), row.get("validation_ci95")
        if value is not None and "query_accuracy" in row:
            return Score(100 * value, _half(half, 100), "validation accuracy, %", is_test=False)
        if value is not None:
            return Score(value, _half(half), "validation score", is_test=False)
    return None


def _half(value: Any, scale: float = 1) -> float | None:
    """A half-width; None where it is none."""
    half = number(value)
    return None if half is None or half < 0 else scale * half


def _flat(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings as this version records them, where earlier ones had a form of their own."""
    try:
        return protocols.from_settings(settings).recorded()
    except ValueError:
        return settings


def _status(
    runs: Sequence[Run],
    scores: Sequence[Score | None],
    published: Published | None,
    full: int | None,
) -> str:
    diverged = [run.results["diverged_at"] for run in runs if "diverged_at" in run.results]
    if diverged:
        return f"diverged at step {diverged[0]}"
    if any(run.state != "finished" for run in runs):
        return next(run.state for run in runs if run.state != "finished")
    tested = [score for score in scores if score is not None and score.is_test]
    if len(tested) < len(scores):
        return "no test"
    if published is None:
        return "no published value"
    difference = statistics.fmean(score.value for score in tested) - published.value
    reach = max(score.half_width or 0.0 for score in tested) + (published.half_width or 0.0)
    if abs(difference) <= reach:
        return "within the interval"
    if difference > 0:
        return "above"
    trained = [trained_steps(run) for run in runs]
    if full is not None and any(steps is not None and steps < full for steps in trained):
        return "budget too small"
    return "below, budget not known" if full is not None and None in trained else "below"


def _deviations(
    runs: Sequence[Run], full: int | None, published: Published | None
) -> Iterable[str]:
    results = runs[0].results
    trained = [trained_steps(run) for run in runs]
    if full is not None and any(steps is not None and steps < full for steps in trained):
        said = ", ".join(f"{steps:,}" for steps in trained if steps is not None)
        yield f"{said} of {full:,} meta-steps"
    if len(runs) == 1:
        yield "one seed"
    own = own_protocol(results)
    theirs = protocol_of(own, results)
    if published is not None and theirs is not None:
        ours = _flat(mapping(results, "settings"))
        for name, value in theirs.recorded().items():
            skipped = name in ("name", "source", "meta_steps") or name not in ours
            if not skipped and ours[name] != value:
                yield f"{name}: {ours[name]}, in protocol {own} {value}"
    elif published is not None and not own:
        yield "no published protocol of it is followed"
    for run in runs:
        skips = [row["skipped_tasks"] for row in run.history if number(row.get("skipped_tasks"))]
        if skips:
            yield f"{run.name}: tasks skipped as not finite at {len(skips)} log points"
        if run.state != "finished":
            yield f"{run.name} is not finished"
        yield from run.notes
