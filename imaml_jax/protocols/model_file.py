"""A trained learner as a folder: its weights in float16, and a JSON file that says what it is.

`weights.npz` holds the meta-parameters by name as plain arrays, which NumPy alone can read;
`model.json` the architecture, the algorithm's settings, what was measured, and the checksum of the
weights. Reading either runs nothing that is in it: no pickles, no names of code, and the shape and
type of an array are checked before its data are read.
"""

import dataclasses
import hashlib
import io
import json
import math
import os
import zipfile
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from imaml_jax.data.cache import UNREADABLE
from imaml_jax.data.images import check_image
from imaml_jax.learners.base import path_string
from imaml_jax.learners.settings import Range, Record, Share, made_of, values_of
from imaml_jax.protocols.protocol import Protocol, from_settings
from imaml_jax.training import workdir
from imaml_jax.types import MetaLearner, PyTree

FORMAT = 2  # 1 recorded the settings of all algorithms
_OF_FORMAT_1 = ("name", "algorithm", "source", "split", "invert", "train_rotations")
_OF_FORMAT_1 += ("test_rotations", "network", "statistics", "adapts_norm", "meta_batch")
_OF_FORMAT_1 += ("train_shots", "train_queries", "test_queries", "test_tasks", "inner")
_OF_FORMAT_1 += ("inner_rate", "num_steps", "eval_num_steps", "outer", "outer_rate")
_OF_FORMAT_1 += ("outer_epsilon", "schedule", "meta_steps")
_DESCRIPTION, _WEIGHTS = "model.json", "weights.npz"
_MAX_DESCRIPTION, _MAX_HEADER = 1 << 20, 1024  # bytes
_Number = Annotated[int, Range(least=1, most=10_000)]


@dataclasses.dataclass(frozen=True)
class Description(Record):
    """What a saved model is and what was measured of it; accuracies are shares in [0, 1].

    Attributes:
      dataset: name of the data set that it was trained on.
      ways: classes of a task; the width of its head.
      shots: support examples a class in training and at test.
      image_size: side of its images in pixels.
      channels: 3 for RGB, 1 for grey.
      brightness: mean of the training images as the network sees them, in [0, 1].
      protocol: architecture, algorithm and settings, all that makes the learner.
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
    ways: _Number
    shots: _Number
    image_size: int
    channels: int
    brightness: Share
    protocol: Protocol
    test_tasks: Annotated[int, Range(least=1, most=10**9)]
    test_accuracy: Share
    test_ci95: Share | None
    test_accuracy_unrounded: Share
    test_accuracy_alone: Share
    test_ci95_alone: Share | None
    run: dict

    def check_together(self) -> None:
        """Raises ValueError for images of a size or kind that cannot be."""
        check_image(self.image_size, self.channels)

    def recorded(self) -> dict[str, Any]:
        """What `model.json` says of it."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return fields | {"protocol": self.protocol.recorded()}


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
    shared = values_of(protocol.learner)["statistics"] in ("batch", "joint")
    return protocol.with_settings({"statistics": "support"}) if shared else protocol


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
      meta_params: of the learner that the description's protocol builds.
      description: what the model is.

    Raises:
      ValueError: values that float16 has not, or a folder that holds something else.
      OSError: it cannot be written.
    """
    check_place(path)
    folder = Path(path).expanduser()
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
        **description.recorded(),
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
        learner = description.protocol.build(description.ways)
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
    if type(found) is not int or found < 1:
        raise ValueError(f"{path}: expected a model's description, format {FORMAT}. {_REMEDY}")
    checksum = fields.pop("weights_sha256", None)
    try:
        if not isinstance(fields.get("protocol"), dict):
            raise ValueError("expected the settings of a protocol")
        given = fields["protocol"]
        protocol = fields["protocol"] = from_settings(given)
        for name in _OF_FORMAT_1 if found == 1 else protocol.recorded():
            if name not in given:
                raise ValueError(f"the setting {name} of its protocol is missing")
        return made_of(Description, fields), str(checksum)
    except ValueError as error:
        raise ValueError(f"{path}: {str(error).rstrip('.')}. {_REMEDY}") from None


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
