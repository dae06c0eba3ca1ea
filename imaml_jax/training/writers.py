"""The rows of a log beside `metrics.jsonl`: TensorBoard and Weights & Biases, both optional."""

import contextlib
import importlib.util
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

WriterName = Literal["tensorboard", "wandb"]
# What writes `(numbers, step)`, and what closes it.
_Open = tuple[Callable[[Mapping[str, float], int], None], Callable[[], None]]


@contextlib.contextmanager
def open_writers(
    names: Sequence[WriterName], workdir: Path, config: Mapping[str, Any]
) -> Iterator[Callable[[Mapping[str, Any]], None]]:
    """What writes each row, for as long as the context lives; files are made at the first one.

    Args:
      names: which writers; none for none.
      workdir: its `tensorboard` or `wandb` folder holds the files; a resumed run goes on in them.
      config: settings that Weights & Biases shows with the run.

    Yields:
      What writes the finite numbers of a row at the meta-step of its field `step`: the argument
      `log` of `training.train`.

    Raises:
      ValueError: an unknown writer, a package that is missing, with the command that installs it,
        or, from the first row, what Weights & Biases refuses.
    """
    for name in names:
        if name not in _WRITERS:
            raise ValueError(f"log_to={name!r} must be one of {', '.join(_WRITERS)}")
        package = _WRITERS[name][0]
        spec = importlib.util.find_spec(package)
        if spec is None or spec.origin is None:  # without an origin, a folder of that name
            raise ValueError(
                f"log_to={name} needs {package}, which is missing: pip install {package}, or "
                f"pip install -e '.[{name}]' in a clone"
            )
    opened: list[_Open] = []
    with contextlib.ExitStack() as stack:

        def write(row: Mapping[str, Any]) -> None:
            if not opened:
                for name in names:
                    opened.append(_WRITERS[name][1](workdir, config, row["step"]))
                    stack.callback(opened[-1][1])
            numbers = {
                name: float(value)
                for name, value in row.items()
                if isinstance(value, int | float) and name != "step" and math.isfinite(value)
            }
            for writer, _ in opened:
                writer(numbers, row["step"])

        yield write


def _tensorboard(workdir: Path, config: Mapping[str, Any], step: int) -> _Open:
    del config
    from tensorboardX import SummaryWriter  # pyright: ignore[reportMissingImports]

    # What a resumed run repeats replaces what there was.
    writer = SummaryWriter(str(workdir / "tensorboard"), purge_step=step)

    def write(numbers: Mapping[str, float], step: int) -> None:
        for name, value in numbers.items():
            writer.add_scalar(name, value, step)
        writer.flush()

    return write, writer.close


def _wandb(workdir: Path, config: Mapping[str, Any], step: int) -> _Open:
    del step  # rows that a resumed run repeats are left out by Weights & Biases
    import wandb  # pyright: ignore[reportMissingImports]

    known = workdir / "wandb_id"
    try:
        run = wandb.init(
            project="imaml_jax",
            name=workdir.name,
            dir=str(workdir),
            config=dict(config),
            id=known.read_text(encoding="utf-8").strip() if known.exists() else None,
            resume="allow",
        )
    except wandb.errors.Error as error:
        raise ValueError(
            f"log_to=wandb: {error} Or set the environment variable WANDB_MODE=offline."
        ) from error
    known.write_text(f"{run.id}\n", encoding="utf-8")
    return lambda numbers, step: run.log(dict(numbers), step=step), run.finish


# Package that is needed, and what opens the writer at the first row.
_WRITERS = {"tensorboard": ("tensorboardX", _tensorboard), "wandb": ("wandb", _wandb)}
