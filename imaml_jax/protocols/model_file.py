"""A trained learner as a folder: its weights in float16, and a JSON file that says what it is.

`weights.npz` holds the meta-parameters by name as plain arrays, which NumPy alone can read;
`model.json` the architecture, the algorithm's settings, what was measured, and the checksum of the
weights. Reading either runs nothing that is in it: no pickles, no names of code, and the shape and
type of an array are checked before its data are read.
"""

import hashlib
import io
import json
import math
import os
import zipfile
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, NamedTuple, get_args, get_origin, get_type_hints

import jax
import jax.numpy as jnp
import numpy as np

from imaml_jax.data.cache import UNREADABLE
from imaml_jax.data.images import check_image
from imaml_jax.learners.base import path_string
from imaml_jax.protocols.build import build_learner
from imaml_jax.protocols.protocols import Protocol
from imaml_jax.training import workdir
from imaml_jax.types import MetaLearner, PyTree

FORMAT = 1
_DESCRIPTION, _WEIGHTS = "model.json", "weights.npz"
_MAX_DESCRIPTION, _MAX_HEADER = 1 << 20, 1024  # bytes
_SHARE, _COUNT = (0, 1), (1, 10_000)
_ALLOWED = {
    **dict.fromkeys(("brightness", "test_accuracy", "test_ci95"), _SHARE),
    **dict.fromkeys(("test_accuracy_unrounded", "test_accuracy_alone", "test_ci95_alone"), _SHARE),
    **dict.fromkeys(("ways", "shots", "num_steps", "eval_num_steps", "num_samples"), _COUNT),
    **dict.fromkeys(("batch_size", "eval_batch_size"), _COUNT),
    "cg_steps": (0, 10_000),
    "test_tasks": (1, 10**9),
    "num_blocks": (1, 100),
}


class Description(NamedTuple):
    """What a saved model is and what was measured of it; accuracies are shares in [0, 1].

    Attributes:
      dataset: name of the data set that it was trained on.
      ways: classes of a task; the width of its head.
      shots: support examples a class in training and at test.
      image_size: side of its images in pixels.
      channels: 3 for RGB, 1 for grey.
      brightness: mean of the training images as the network sees them, in [0, 1].
      protocol: architecture, algorithm and settings, all that `build_learner` needs.
      test_tasks: tasks of unseen classes that the accuracies are means over.
      test_accuracy: by the protocol, of the weights as stored.
      test_ci95: half-width of its 95% confidence interval over tasks.
      test_accuracy_unrounded: the same before the weights were rounded to float16.
      test_accuracy_alone: with batch statistics that do not depend on other query images, see
        `independent`; of the weights as stored.
      test_ci95_alone: half-width of its interval.
      run: how it was trained: command, seed, meta-steps, seconds, device, versions, date.
    """

    dataset: str
    ways: int
    shots: int
    image_size: int
    channels: int
    brightness: float
    protocol: Protocol
    test_tasks: int
    test_accuracy: float
    test_ci95: float | None
    test_accuracy_unrounded: float
    test_accuracy_alone: float
    test_ci95_alone: float | None
    run: dict


class Model(NamedTuple):
    """What `load_model` returns."""

    learner: MetaLearner
    meta_params: PyTree
    description: Description


def rounded(meta_params: PyTree) -> PyTree:
    """The meta-parameters as they come back from a file: rounded to float16, in their own type.

    Raises:
      ValueError: a value that is not finite, or past float16's largest, 65504.
    """
    for name, array in _named(meta_params).items():
        if not np.isfinite(np.asarray(array, np.float16)).all():
            raise ValueError(
                f"{name} holds values that float16 has not (beyond 65504, or not finite): the "
                "model cannot be saved. Train with a lower outer_rate."
            )
    return jax.tree.map(lambda x: jnp.asarray(x).astype(jnp.float16).astype(x.dtype), meta_params)


def independent(protocol: Protocol) -> Protocol:
    """The protocol with batch statistics by which a prediction depends on no other query image.

    Those of the support set take the place of those that query images share, with which
    predictions are right only for queries like a test task's: all classes, in equal numbers.
    """
    shared = protocol.statistics in ("batch", "joint")
    return protocol._replace(statistics="support") if shared else protocol


def check_place(path: str | os.PathLike) -> bool:
    """Whether `save_model` would replace an older model.

    Raises:
      ValueError: it would overwrite something else.
    """
    path = Path(path).expanduser()
    if path.is_file() or (path.is_dir() and not _is_free(path)):
        raise ValueError(
            f"model={path} is there and holds no model: name a new or empty folder, or one with "
            "an older model to replace"
        )
    return (path / _DESCRIPTION).is_file()


def save_model(path: str | os.PathLike, meta_params: PyTree, description: Description) -> None:
    """Writes a model; an older one in the same folder is replaced.

    Args:
      path: the folder; made if missing.
      meta_params: of the learner that `build_learner` makes of the description's protocol.
      description: what the model is.

    Raises:
      ValueError: values that float16 has not, a folder that holds something else, or
        counts and shares that `load_model` refuses.
      OSError: it cannot be written.
    """
    check_place(path)
    folder = Path(path).expanduser()
    _check_values(folder, description, "load_model would refuse it; change the description.")
    folder.mkdir(parents=True, exist_ok=True)
    arrays = {n: np.asarray(x, np.float16) for n, x in _named(rounded(meta_params)).items()}
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)  # pyright: ignore[reportArgumentType]
    content = buffer.getvalue()
    temporary = folder / f".tmp_{_WEIGHTS}"
    temporary.write_bytes(content)
    workdir.flush(temporary)
    os.replace(temporary, folder / _WEIGHTS)
    text = {
        "format": FORMAT,
        **description._asdict(),
        "protocol": description.protocol._asdict(),
        "weights_sha256": hashlib.sha256(content).hexdigest(),
    }
    workdir.write_whole(folder / _DESCRIPTION, json.dumps(text, indent=1, allow_nan=False) + "\n")


def load_model(path: str | os.PathLike) -> Model:
    """Reads a model that `save_model` wrote.

    Args:
      path: its folder.

    Returns:
      `(learner, meta_params, description)`. `learner.adapt(meta_params, support, key)` takes
      `description.ways` classes.

    Raises:
      ValueError: no model there, one of a newer format, or files that are damaged or of another
        form.

    Example:
      Adapts a model to new classes and classifies images of them::

          learner, meta_params, description = load_model("model")
          adapted, info = learner.adapt(meta_params, Batch(images, labels), jax.random.key(0))
          probabilities = jax.nn.softmax(learner.predict(adapted, new_images))
    """
    folder = Path(path).expanduser()
    description, checksum = _read_description(folder / _DESCRIPTION)
    try:
        learner = build_learner(description.protocol, description.ways)
        shape = (1, description.image_size, description.image_size, description.channels)
        example = jax.ShapeDtypeStruct(shape, jnp.float32)
        like = jax.eval_shape(learner.init, jax.random.key(0), example)
    except (ArithmeticError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{folder / _DESCRIPTION}: its settings make no learner ({type(error).__name__}: "
            f"{error}). {_REMEDY}"
        ) from error
    expected = _named(like)
    arrays = _read_weights(folder / _WEIGHTS, checksum, {n: x.shape for n, x in expected.items()})
    leaves = [jnp.asarray(arrays[name], x.dtype) for name, x in expected.items()]
    return Model(learner, jax.tree.unflatten(jax.tree.structure(like), leaves), description)


_REMEDY = "Get a fresh copy of the folder, or train the model again."


def _named(tree: PyTree) -> dict[str, Any]:
    return {path_string(path): x for path, x in jax.tree.leaves_with_path(tree)}


def _is_free(folder: Path) -> bool:
    return (folder / _DESCRIPTION).is_file() or not any(folder.iterdir())


def _read_description(path: Path) -> tuple[Description, str]:
    try:
        if path.stat().st_size > _MAX_DESCRIPTION:
            raise ValueError(f"{path} is too large for a model's description. {_REMEDY}")
        fields = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(
            f"{path.parent}: expected a model's folder with {_DESCRIPTION} and {_WEIGHTS} "
            f"({error}). Name one that --model or experiments.export wrote."
        ) from error
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{path} is no JSON file ({error}). {_REMEDY}") from error
    found = fields.pop("format", None) if isinstance(fields, dict) else None
    if type(found) is int and found > FORMAT:
        raise ValueError(
            f"{path} has format {found}, this version of imaml_jax reads {FORMAT} and older: "
            "install a newer one"
        )
    if type(found) is not int or found != FORMAT:
        raise ValueError(f"{path}: expected a model's description, format {FORMAT}. {_REMEDY}")
    checksum = fields.pop("weights_sha256", None)
    fields["protocol"] = _record(path, Protocol, fields.get("protocol"))
    description = _record(path, Description, fields)
    _check_values(path, description, _REMEDY)
    try:
        check_image(description.image_size, description.channels)
    except ValueError as error:
        raise ValueError(f"{path}: {error} {_REMEDY}") from None
    return description, str(checksum)


def _check_values(path: Path, description: Description, remedy: str) -> None:
    protocol = description.protocol
    values = {**protocol.network, **protocol._asdict(), **description._asdict()}
    for name, (least, most) in _ALLOWED.items():
        value = values.get(name)
        if isinstance(value, int | float) and not least <= value <= most:
            raise ValueError(f"{path}: {name}={value}; allowed: {least} to {most}. {remedy}")


def _record(path: Path, kind: Any, fields: Any) -> Any:
    """A NamedTuple of values that fit its annotations."""
    hints = get_type_hints(kind)
    if not isinstance(fields, dict):
        raise ValueError(f"{path}: expected the fields of a {kind.__name__}. {_REMEDY}")
    missing = [n for n in hints if n not in fields and n not in kind._field_defaults]
    unknown = [n for n in fields if n not in hints]
    wrong = [
        f"{n}={fields[n]!r:.60}" for n in hints if n in fields and not _fits(fields[n], hints[n])
    ]
    for problem, names in (("lacks", missing), ("has unknown", unknown), ("has wrong", wrong)):
        if names:
            raise ValueError(
                f"{path}: its {kind.__name__} {problem} {', '.join(names[:3])}. {_REMEDY}"
            )
    return kind(**fields)


def _fits(value: Any, hint: Any) -> bool:
    if hint is Any:
        return True
    if get_origin(hint) is Literal:
        return value in get_args(hint)
    if isinstance(hint, UnionType) or type(None) in get_args(hint):
        return any(_fits(value, option) for option in get_args(hint))
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and _is_finite(value)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if hint in (None, NoneType):
        return value is None
    return isinstance(value, get_origin(hint) or hint)


def _is_finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer past the floats
        return False


def _read_weights(
    path: Path, checksum: str, shapes: dict[str, tuple[int, ...]]
) -> dict[str, np.ndarray]:
    limit = sum(2 * math.prod(shape) + _MAX_HEADER for shape in shapes.values()) + _MAX_HEADER
    try:
        with path.open("rb") as file:
            if path.stat().st_size > limit:
                raise ValueError(f"it has more than the {limit} bytes that its settings allow")
            if hashlib.file_digest(file, "sha256").hexdigest() != checksum:
                raise ValueError(f"its checksum is not the one in {_DESCRIPTION}")
            with zipfile.ZipFile(file) as archive:
                names = {name.removesuffix(".npy") for name in archive.namelist()}
                if names != set(shapes):
                    odd = sorted(names ^ set(shapes))
                    raise ValueError(f"it has other arrays than its settings: {', '.join(odd[:3])}")
                return {n: _read_array(archive, n, shape) for n, shape in shapes.items()}
    except (*UNREADABLE, NotImplementedError) as error:
        raise ValueError(f"{path} cannot be used: {error}. {_REMEDY}") from error


def _read_array(archive: zipfile.ZipFile, name: str, shape: tuple[int, ...]) -> np.ndarray:
    with archive.open(f"{name}.npy") as file:
        if np.lib.format.read_magic(file) != (1, 0):
            raise ValueError(f"{name} is no .npy array of version 1.0")
        found, fortran, dtype = np.lib.format.read_array_header_1_0(file)
        if (found, fortran, dtype) != (shape, False, np.float16):
            raise ValueError(
                f"{name} is {dtype}{list(found)}, the settings make it float16{list(shape)}"
            )
        array = np.frombuffer(file.read(2 * math.prod(shape)), np.float16)
    if array.size != math.prod(shape):
        raise ValueError(f"{name} is cut short")
    if not np.isfinite(array).all():
        raise ValueError(f"{name} holds values that are not finite")
    return array.reshape(shape)
