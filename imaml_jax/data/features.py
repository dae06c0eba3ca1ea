"""Features in place of images: what a frozen network says of them, one file a split."""

import os
import pickle
from pathlib import Path

import numpy as np

from imaml_jax.data import archives, listings, pickles
from imaml_jax.data.archives import DataError
from imaml_jax.data.episodes import Dataset, Splits, from_grouped
from imaml_jax.data.images import SPLITS

FILES = tuple(f"{split}_embeddings.pkl" for split in SPLITS)
_SUBDIRS = ("miniImageNet/center", "embeddings/miniImageNet/center")
_HELP = (
    "Make them from images by python -m experiments.features, or unpack the release of LEO's "
    "authors (http://storage.googleapis.com/leo-embeddings/embeddings.zip) and name one of its "
    "folders, such as embeddings/tieredImageNet/center."
)


def load(data_dir: str | os.PathLike | None = None, *, centred: bool = False) -> Splits:
    """Loads features in the layout that LEO's authors released.

    Of each split one pickle, `{train,val,test}_embeddings.pkl`: a dict of `embeddings`, floats
    `[N, D]`, and `keys`, text "prefix-class-image" of each row, none of which has another hyphen.
    Pickles are read as data, those of Python 2 as well: nothing in them is run. Every feature is
    scaled to Euclidean norm 1, as LEO has it.

    Args:
      data_dir: directory of these files, or of the release, where miniImageNet/center is taken;
        default: the environment variable `IMAML_DATA_DIR`.
      centred: whether to subtract the mean feature of the training classes before the scaling.

    Returns:
      `Splits` with "images" float32 `[N, 1, 1, D]`, grouped by class in the order of the files;
      `val` is None where there is no such file.

    Raises:
      DataError: files missing, damaged or of another form, or a class in two splits; a ValueError
        too.

    References:
      Rusu et al., Meta-Learning with Latent Embedding Optimization, ICLR 2019,
      https://github.com/google-deepmind/leo (data.py)
    """
    folder, names = archives.find_layout(
        [FILES, (FILES[0], FILES[2])], subdirs=_SUBDIRS, help_text=_HELP, data_dir=data_dir
    )
    found = {name: _read(folder / name) for name in names}
    listings.require_disjoint([found[n][1] if n in found else [] for n in FILES], str(folder))
    widths = {name: embeddings.shape[1] for name, (embeddings, _) in found.items()}
    if len(set(widths.values())) > 1:
        raise DataError(f"{folder}: features of one width in all splits expected, found {widths}.")
    origin = found[FILES[0]][0].mean(0) if centred else np.zeros(1, np.float32)
    datasets = [_dataset(*found[name], origin) if name in found else None for name in FILES]
    return Splits(*datasets)  # pyright: ignore[reportArgumentType]


def save(
    folder: str | os.PathLike, split: str, embeddings: np.ndarray, offsets: np.ndarray
) -> None:
    """Writes the features of one split as `load` reads them.

    Args:
      folder: made where it is missing.
      split: "train", "val" or "test".
      embeddings: `[N, D]`, grouped by class.
      offsets: integers `[num_classes + 1]`, as in `episodes.Dataset`.

    Raises:
      ValueError: an unknown split, or shapes that do not fit.
    """
    if split not in SPLITS:
        raise ValueError(f"split={split!r} must be one of {SPLITS}")
    embeddings, sizes = np.asarray(embeddings, np.float32), np.diff(offsets)
    run = offsets[0], offsets[-1]
    if embeddings.ndim != 2 or run != (0, len(embeddings)) or np.any(sizes < 1):
        raise ValueError(
            f"embeddings are {embeddings.shape}, offsets run from {run[0]} to {run[1]}: expected "
            "[N, D] features and offsets that increase from 0 to N"
        )
    labels = np.repeat(np.arange(len(sizes)), sizes)
    keys = [f"{split}-{split}{c:05}-{split}{c:05}_{i:08}" for i, c in enumerate(labels)]
    content = {"embeddings": embeddings, "keys": np.array(keys, "S"), "labels": labels}
    path = Path(folder) / f"{split}_embeddings.pkl"
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".tmp_{path.name}")
    temporary.write_bytes(pickle.dumps(content, protocol=2))
    os.replace(temporary, path)


def _read(path: Path) -> tuple[np.ndarray, dict[str, list[int]]]:
    """The features of a file, and the rows of each class."""
    content = pickles.load(path)
    with archives.explained(
        f"{path}: expected a dict of 'embeddings', floats [N, D], and 'keys', N texts "
        "prefix-class-image",
        "Get the file again.",
    ):
        if not pickles.is_array(content["embeddings"]):
            raise ValueError(f"'embeddings' is a {type(content['embeddings']).__name__}")
        embeddings = np.asarray(content["embeddings"])
        if embeddings.dtype.kind != "f" or embeddings.ndim != 2 or not embeddings.size:
            raise ValueError(f"'embeddings' is {embeddings.dtype}{embeddings.shape}")
        keys = content["keys"]
        keys = keys if isinstance(keys, list) else np.asarray(keys).tolist()
        if not isinstance(keys, list) or len(keys) != len(embeddings):
            raise ValueError(f"'keys' are not {len(embeddings)}")
        rows = {}
        for row, key in enumerate(keys):
            if not isinstance(key, str | bytes):
                raise ValueError(f"'keys' has a {type(key).__name__}")
            _, label, _ = (key.decode("latin1") if isinstance(key, bytes) else key).split("-")
            rows.setdefault(label, []).append(row)
        norms = np.linalg.norm(embeddings.astype(np.float64), axis=1)
        lost = ~((norms == 0) | (norms > 1e-30) & (norms < 1e30))
        if lost.any():
            row = lost.argmax()
            raise ValueError(
                f"row {row} of 'embeddings' has norm {norms[row]}, not finite or past float32"
            )
    return embeddings.astype(np.float32), rows


def _dataset(embeddings: np.ndarray, rows: dict[str, list[int]], origin: np.ndarray) -> Dataset:
    embeddings = embeddings[np.concatenate(list(rows.values()))] - origin[None]
    norms = np.linalg.norm(embeddings.astype(np.float64), axis=1, keepdims=True)
    embeddings = (embeddings / np.maximum(norms, np.finfo(np.float32).tiny)).astype(np.float32)
    offsets = np.cumsum([0, *map(len, rows.values())])
    return from_grouped(embeddings[:, None, None, :], offsets)
