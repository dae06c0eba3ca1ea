"""Classifies images of new classes by a saved model, from a few examples of each class.

    python -m experiments.classify --model DIR --support FOLDER --query FOLDER

SUPPORT has one folder for each new class, with a few images in it. QUERY has images, or such class
folders too: then the accuracy is printed. Writes OUTPUT.csv, with the predicted class of every
image and the probability of each class, and OUTPUT.png, a picture of the first ones.
"""

import csv
import dataclasses
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.shared import common, reports
from experiments.shared.saved_model import percent
from imaml_jax.data import class_splits, images, listings, own
from imaml_jax.data.archives import DataError
from imaml_jax.data.episodes import to_unit
from imaml_jax.protocols import model_file
from imaml_jax.protocols.model_file import Description
from imaml_jax.training import plots
from imaml_jax.types import Batch

_BLOCK = 64  # query images of one compiled call
_SHOWN, _COLUMNS = 40, 10
_FAR = 0.3  # difference of mean brightness that tells an inversion


@dataclasses.dataclass(frozen=True)
class Config:
    """Few-shot classification of your own images by a saved model."""

    model: Path
    """Folder that --model of experiments.folder, or experiments.export, wrote."""
    support: Path
    """Folder with one folder of images for each new class."""
    query: Path
    """Folder of images to classify, flat or in class folders."""
    output: Path = Path("predictions")
    """The table goes to OUTPUT.csv, the picture to OUTPUT.png."""
    invert: Literal["none", "support", "query", "both"] = "none"
    """Images whose dark and light are to be turned round first."""
    together: bool = False
    """Normalise query images by all of them together, as the published protocols do: slightly
    better where all classes are equally frequent among them, far worse where they are not."""


class Images(NamedTuple):
    """Names, uint8 `[n, size, size, channels]`, classes or None, and what was passed over."""

    names: list[str]
    pixels: np.ndarray
    labels: list[str | None]
    passed_over: str = ""


def main(config: Config) -> dict[str, Any]:
    """Adapts the model to the support images and classifies the query images.

    Args:
      config: what to classify.

    Returns:
      `files`, `predicted` classes, `probabilities` `[n, ways]`, `classes`, and `accuracy` over
      the query images whose class is known, or None.

    Raises:
      ValueError: a model, folder or image that cannot be used.
    """
    reports.begin(config)
    model = model_file.load_model(config.model)
    found = model.description
    support = read_support(config.support, found)
    classes = sorted(set(filter(None, support.labels)))
    query = read_query(config.query, found, classes)
    repeated = seen(support, query)
    support = _inverted(support, config.invert in ("support", "both"))
    query = _inverted(query, config.invert in ("query", "both"))
    for warning in (look_inverted(found, support, query), uneven(support), repeated):
        if warning:
            print(f"warning: {warning}", file=sys.stderr, flush=True)
    probabilities = classify(model, support, query, classes, together=config.together)
    predicted = [classes[i] for i in probabilities.argmax(-1)]
    known = [label == p for label, p in zip(query.labels, predicted, strict=True) if label]
    results = {
        "files": query.names,
        "predicted": predicted,
        "probabilities": probabilities,
        "classes": classes,
        "accuracy": sum(known) / len(known) if known else None,
    }
    write_table(common.with_ending(config.output, "csv"), query, results)
    draw(common.with_ending(config.output, "png"), support, query, results)
    print(report(config, found, support, query, results), flush=True)
    return results


def read_support(path: Path, model: Description) -> Images:
    """The examples of each class.

    Raises:
      ValueError: another number of classes than the model has, or no class folders.
    """
    place = _existing("support", path, "with one folder of images for each new class")
    folder = own.open_folder(place, has_splits=False)
    classes = sorted(folder.classes)
    if len(classes) != model.ways:
        few = len(classes) < model.ways
        passed_over = f"; passed over {folder.passed_over}" if folder.passed_over else ""
        change = "Add classes, of any other images" if few else "Take classes away"
        other = f", or train a model with --ways {len(classes)}" if len(classes) > 1 else ""
        raise ValueError(
            f"support={path} has {len(classes)} classes ({class_splits.some(classes)}"
            f"{passed_over}), the model tells ways={model.ways} apart: its last layer has that "
            f"many outputs. {change}{other}"
        )
    sources = [(name, source) for name in classes for source in folder.classes[name]]
    return _read(folder.path, sources, model)._replace(passed_over=folder.passed_over)


def read_query(path: Path, model: Description, classes: Sequence[str]) -> Images:
    """The images to classify; those in a folder named as a class have that label.

    Raises:
      ValueError: no images, or folders that are no class.
    """
    folder = _existing("query", path, "of images")
    files = [f for f in listings.scan(folder) if f.lower().endswith(listings.IMAGES)]
    labels = [_printable(name.split("/")[0]) if "/" in name else None for name in files]
    odd = sorted({label for label in labels if label and label not in classes})
    if odd:
        raise DataError(
            f"query={folder} has folders that are no class of the support: {', '.join(odd[:3])} "
            f"(classes: {', '.join(classes)}). Name them as the support's folders, or put the "
            "images directly into the query folder."
        )
    passed_over = "; ".join(own.no_images(folder))
    if not files:
        raise DataError(
            f"query={folder}: expected images ({', '.join(listings.IMAGES)}), found none"
            f"{f' ({passed_over})' if passed_over else ''}. Put images there."
        )
    sources = [images.Source(str(folder / f), (folder / f).read_bytes) for f in files]
    found = _read(folder, list(zip(labels, sources, strict=True)), model)
    return found._replace(passed_over=passed_over)


def classify(
    model: model_file.Model,
    support: Images,
    query: Images,
    classes: Sequence[str],
    *,
    together: bool = False,
) -> np.ndarray:
    """Probabilities `[n, ways]` of each query image; a row depends on no other one.

    With `together`, batch statistics are those of the protocol.
    """
    protocol = model.description.protocol
    if not together:
        protocol = model_file.independent(protocol)
    learner = protocol.build(model.description.ways)
    labels = jnp.array([classes.index(label) for label in support.labels if label], jnp.int32)
    batch = Batch(to_unit(jnp.asarray(support.pixels), protocol.tasks.invert), labels)
    adapted, _ = jax.jit(learner.adapt)(model.meta_params, batch, jax.random.key(0))
    inputs = to_unit(jnp.asarray(query.pixels), protocol.tasks.invert)
    block = len(inputs) if together else min(_BLOCK, len(inputs))
    predict = jax.jit(lambda adapted, x: jax.nn.softmax(learner.predict(adapted, x)))
    missing = -len(inputs) % block  # filled up, so that one program serves all blocks
    filled = jnp.concatenate([inputs, jnp.repeat(inputs[-1:], missing, axis=0)])
    parts = [predict(adapted, filled[i : i + block]) for i in range(0, len(filled), block)]
    return np.concatenate(parts)[: len(inputs)]


def look_inverted(model: Description, support: Images, query: Images) -> str | None:
    """A warning where dark and light look turned round against the training images."""
    invert, trained = model.protocol.tasks.invert, model.brightness
    shown, asked = (float(to_unit(jnp.asarray(x.pixels), invert).mean()) for x in (support, query))
    odd = [n for n, x in (("support", shown), ("query", asked)) if _are_opposite(x, trained)]
    if not odd and _are_opposite(shown, asked):
        odd = ["query"]
    if not odd:
        return None
    return (
        f"{' and '.join(odd)} images look inverted: mean brightness {shown:.2f} of the support, "
        f"{asked:.2f} of the query, {trained:.2f} of the images that the model was trained on. "
        f"--invert {'both' if len(odd) == 2 else odd[0]} turns them round; images of another kind "
        "than those of training need a model of their own"
    )


def uneven(support: Images) -> str | None:
    """A warning where some classes have far fewer examples than others."""
    counts = Counter(filter(None, support.labels))
    most = max(counts.values())
    fewer = [name for name, count in sorted(counts.items()) if 2 * count <= most]
    if not fewer:
        return None
    return (
        f"support classes with half of the others' {most} images or fewer are predicted less "
        f"often: {class_splits.some(fewer)}. Give each class as many"
    )


def seen(support: Images, query: Images) -> str | None:
    """A warning where query images are support images too."""
    known = {each.tobytes() for each in support.pixels}
    same = [n for n, x in zip(query.names, query.pixels, strict=True) if x.tobytes() in known]
    if not same:
        return None
    return (
        f"query images that look the same as support images: {class_splits.some(same)}. Their "
        "classes are known, and count in no honest accuracy"
    )


def write_table(path: Path, query: Images, results: dict[str, Any]) -> None:
    """One line for each query image: file, class where known, predicted class, probabilities."""
    labelled = any(query.labels)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        known = ["class"] if labelled else []
        writer.writerow(["file", *known, "predicted", *(f"p({c})" for c in results["classes"])])
        for i, name in enumerate(query.names):
            known = [query.labels[i] or ""] if labelled else []
            numbers = [f"{p:.4f}" for p in results["probabilities"][i]]
            writer.writerow([name, *known, results["predicted"][i], *numbers])


def draw(path: Path, support: Images, query: Images, results: dict[str, Any]) -> None:
    """A picture: an example of each class, then query images under their predicted classes."""
    classes = results["classes"]
    first = [support.labels.index(name) for name in classes]
    shown = min(_SHOWN, len(query.names))
    columns = min(_COLUMNS, max(len(classes), shown))
    rows = [-(-len(classes) // columns), -(-shown // columns)]
    figure = plots.new_figure(1.15 * columns, 1.45 * sum(rows) + 0.9)
    top, bottom = figure.subfigures(2, 1, height_ratios=[rows[0] + 0.3, rows[1] + 0.3])
    top.suptitle("support, one example of each class", fontsize=9)
    accuracy, more = results["accuracy"], len(query.names) - shown
    bottom.suptitle(
        "query, predicted class and its probability"
        + (f"; accuracy {accuracy:.1%}, wrong ones framed" if accuracy is not None else "")
        + (f"; {more} more in the table" if more else ""),
        fontsize=9,
    )
    examples = [
        (support.pixels[i], _short(name), None) for i, name in zip(first, classes, strict=True)
    ]
    _pictures(top, rows[0], columns, examples)
    tiles = []
    for i in range(shown):
        title = f"{_short(results['predicted'][i])}\n{results['probabilities'][i].max():.0%}"
        wrong = query.labels[i] not in (None, results["predicted"][i])
        tiles.append((query.pixels[i], title, "tab:orange" if wrong else None))
    _pictures(bottom, rows[1], columns, tiles)
    figure.savefig(path, dpi=120)


def report(
    config: Config, model: Description, support: Images, query: Images, results: dict[str, Any]
) -> str:
    """The outcome in words."""
    counts = [support.labels.count(name) for name in results["classes"]]
    shots = f"{min(counts)}" if len(set(counts)) == 1 else f"{min(counts)} to {max(counts)}"
    trained = model.protocol.tasks.train_shots
    mean, ci95 = (model.test_accuracy, model.test_ci95)
    if not config.together:
        mean, ci95 = (model.test_accuracy_alone, model.test_ci95_alone)
    lines = [
        f"model: {model.ways}-way {model.shots}-shot {model.protocol.learner.algorithm} trained on "
        f"{model.dataset}; accuracy there on unseen classes {percent(mean, ci95)} (95% CI over "
        f"{model.test_tasks} tasks)",
        f"support: {len(counts)} classes of {shots} images ({', '.join(results['classes'])})"
        + (f"; the model learned with {trained} of each" if {*counts} != {trained} else ""),
    ]
    lines += [
        f"{name}: passed over {found.passed_over}"
        for name, found in (("support", support), ("query", query))
        if found.passed_over
    ]
    accuracy = results["accuracy"]
    if accuracy is not None:
        labelled = sum(label is not None for label in query.labels)
        lines.append(f"accuracy on {labelled} query images: {accuracy:.2%}")
    table, picture = (common.with_ending(config.output, ending) for ending in ("csv", "png"))
    count = f"{len(query.names)} prediction{'s' * (len(query.names) > 1)}"
    return "\n".join([*lines, f"{count} in {table}, picture in {picture}"])


def _existing(name: str, path: Path, holding: str) -> Path:
    folder = Path(path).expanduser()
    if not folder.is_dir():
        raise DataError(f"{name}={folder}: expected a folder {holding}. Name one that is there.")
    return folder


def _read(folder: Path, sources: Sequence[tuple[str | None, Any]], model: Description) -> Images:
    shape = (len(sources), model.image_size, model.image_size, model.channels)
    pixels = np.empty(shape, np.uint8)
    images.decode_all([s for _, s in sources], pixels, progress=True, title=folder.name)
    names = [_printable(str(Path(source.where).relative_to(folder))) for _, source in sources]
    return Images(names, pixels, [label and _printable(label) for label, _ in sources])


def _printable(name: str) -> str:
    """A file's name with the bytes that are not UTF-8 written out."""
    return name.encode(errors="backslashreplace").decode()


def _inverted(found: Images, invert: bool) -> Images:
    return found._replace(pixels=255 - found.pixels) if invert else found


def _are_opposite(first: float, second: float) -> bool:
    return (first - 0.5) * (second - 0.5) < 0 and abs(first - second) > _FAR


def _short(name: str) -> str:
    return name if len(name) <= 14 else f"{name[:6]}…{name[-7:]}"


def _pictures(figure: Any, rows: int, columns: int, tiles: Sequence[tuple]) -> None:
    grid = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes in grid:
        axes.set_axis_off()
    for axes, (pixels, title, frame) in zip(grid, tiles, strict=False):
        axes.set_axis_on()
        shown = pixels if pixels.shape[-1] == 3 else pixels[..., 0]
        axes.imshow(shown, cmap="gray", vmin=0, vmax=255)
        axes.set(xticks=[], yticks=[])
        axes.set_title(title, fontsize=8, parse_math=False)
        for spine in axes.spines.values():
            spine.set(color=frame or "lightgray", linewidth=3 if frame else 0.5)


if __name__ == "__main__":
    common.run_cli(main, Config, __doc__)
