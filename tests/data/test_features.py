"""Features in the layout of LEO's release: from Python 2, from here, and what is refused."""

import os
import pickle

import jax
import numpy as np
import pytest

from imaml_jax.data import episodes, features
from imaml_jax.data.archives import DataError

WIDTH = 6
CLASSES = {"train": ["n01", "n02", "n03"], "val": ["n04", "n05"], "test": ["n06", "n07"]}


def draw(split, per_class=4):
    """Rows of the classes in turn, as no file of ours has them."""
    rng = np.random.default_rng(len(split))
    names = CLASSES[split] * per_class
    keys = [f"{i:05}-{name}-{name}_{i}.JPEG" for i, name in enumerate(names)]
    return rng.normal(size=(len(names), WIDTH)).astype(np.float32) + 3, keys, names


def by_python_2(embeddings, keys, labels):
    """The bytes of `cPickle.dumps(dict, 2)` by Python 2 and the NumPy of 2018."""

    def text(content):
        return b"T" + len(content).to_bytes(4, "little") + content

    def array(dtype, shape, content):
        return (
            b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R(K\x01("
            + b"".join(b"J" + n.to_bytes(4, "little") for n in shape)
            + b"tcnumpy\ndtype\n"
            + text(dtype.encode())
            + b"K\x00K\x01\x87R(K\x03U\x01"
            + (b"<" if dtype[0] == "f" else b"|")
            + b"NNN"
            + (
                b"J\xff\xff\xff\xff" * 2
                if dtype[0] == "f"
                else b"K" + bytes([int(dtype[1:])]) + b"K\x01"
            )
            + b"K\x00tb\x89"
            + text(content)
            + b"tb"
        )

    def of_text(values):
        values = np.array(values, "S")
        return array(f"S{values.dtype.itemsize}", values.shape, values.tobytes())

    return (
        b"\x80\x02}("
        + (text(b"embeddings") + array("f4", embeddings.shape, embeddings.tobytes()))
        + (text(b"keys") + of_text(keys))
        + (text(b"labels") + of_text(labels))
        + b"u."
    )


def write(folder, splits=("train", "val", "test"), dump=by_python_2):
    folder.mkdir(parents=True, exist_ok=True)
    for split in splits:
        (folder / f"{split}_embeddings.pkl").write_bytes(dump(*draw(split)))
    return folder


def dump_now(embeddings, keys, labels):
    return pickle.dumps({"embeddings": embeddings, "keys": np.array(keys), "labels": labels})


@pytest.mark.parametrize("dump", [by_python_2, dump_now])
@pytest.mark.parametrize("place", ["", "miniImageNet/center", "embeddings/miniImageNet/center"])
def test_the_released_layout(tmp_path, dump, place):
    write(tmp_path / place, dump=dump)
    splits = features.load(tmp_path)
    for split, dataset in zip(CLASSES, splits, strict=True):
        embeddings, _, names = draw(split)
        np.testing.assert_array_equal(dataset.offsets, 4 * np.arange(len(CLASSES[split]) + 1))
        expected = np.concatenate([embeddings[np.array(names) == c] for c in CLASSES[split]])
        expected /= np.linalg.norm(expected, axis=1, keepdims=True)
        assert dataset.images.shape == (len(expected), 1, 1, WIDTH)
        np.testing.assert_allclose(dataset.images[:, 0, 0], expected, rtol=1e-6)


def test_centred_by_the_training_classes(tmp_path):
    write(tmp_path)
    mean = draw("train")[0].mean(0)
    embeddings, _, names = draw("test")
    expected = embeddings[np.array(names) == "n06"] - mean
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    found = features.load(tmp_path, centred=True).test.images[:4, 0, 0]
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_what_is_saved_is_loaded_and_sampled(tmp_path):
    rng = np.random.default_rng(0)
    saved = {}
    for split, sizes in (("train", (3, 5)), ("test", (4, 4, 6))):
        saved[split] = rng.normal(size=(sum(sizes), WIDTH)).astype(np.float32)
        features.save(tmp_path / "new", split, saved[split], np.cumsum([0, *sizes]))
    splits = features.load(tmp_path / "new")
    assert splits.val is None
    np.testing.assert_array_equal(splits.test.offsets, [0, 4, 8, 14])
    norms = np.linalg.norm(saved["test"], axis=1, keepdims=True)
    np.testing.assert_allclose(splits.test.images[:, 0, 0], saved["test"] / norms, rtol=1e-6)
    task = episodes.sample_tasks(
        jax.random.key(0), splits.test, num_tasks=2, ways=3, shots=1, queries=2
    )
    assert task.query.inputs.shape == (2, 6, 1, 1, WIDTH)
    np.testing.assert_allclose(np.linalg.norm(task.query.inputs, axis=-1), 1, rtol=1e-6)
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == [
        "test_embeddings.pkl",
        "train_embeddings.pkl",
    ]


def test_features_of_nothing_stay_finite(tmp_path):
    for split in CLASSES:
        features.save(tmp_path, split, np.zeros((4, WIDTH)), np.array([0, 2, 4]))
    assert not np.any(features.load(tmp_path).test.images)


class Calls:
    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        return self.call[0], self.call[1:]


def test_a_hostile_file_runs_nothing(tmp_path):
    write(tmp_path)
    mark = tmp_path / "mark"
    content = pickle.dumps({"embeddings": Calls(os.system, f"touch {mark}")}, 2)
    (tmp_path / "val_embeddings.pkl").write_bytes(content)
    with pytest.raises(DataError, match=r"val_embeddings\.pkl: .*Nothing in it was run"):
        features.load(tmp_path)
    assert not mark.exists()


EMBEDDINGS, KEYS = np.ones((2, WIDTH), np.float32), np.array(["a-b-b_0", "a-b-b_1"])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([], "TypeError"),
        ({"keys": KEYS}, "'embeddings'"),
        ({"embeddings": EMBEDDINGS}, "'keys'"),
        ({"embeddings": EMBEDDINGS.astype(int), "keys": KEYS}, "'embeddings' is int64"),
        ({"embeddings": EMBEDDINGS[0], "keys": KEYS}, r"'embeddings' is float32\(6,\)"),
        ({"embeddings": EMBEDDINGS * np.nan, "keys": KEYS}, "not finite"),
        ({"embeddings": EMBEDDINGS, "keys": KEYS[:1]}, "'keys' are not 2"),
        ({"embeddings": EMBEDDINGS, "keys": np.arange(2)}, "'keys' has a int"),
        ({"embeddings": EMBEDDINGS, "keys": np.array(["a-b", "a-b"])}, "not enough values"),
    ],
)
def test_files_of_another_form(tmp_path, content, message):
    write(tmp_path)
    (tmp_path / "train_embeddings.pkl").write_bytes(pickle.dumps(content))
    with pytest.raises(DataError, match=rf"train_embeddings\.pkl: expected a dict of .*{message}"):
        features.load(tmp_path)


def test_a_class_in_two_splits_and_widths_that_differ(tmp_path):
    write(tmp_path)
    (tmp_path / "val_embeddings.pkl").write_bytes(by_python_2(*draw("train")))
    with pytest.raises(DataError, match="n01"):
        features.load(tmp_path)
    (tmp_path / "val_embeddings.pkl").unlink()
    features.save(tmp_path, "test", np.ones((2, 2)), np.array([0, 1, 2]))
    with pytest.raises(DataError, match="one width in all splits"):
        features.load(tmp_path)


def test_what_is_missing_is_named_with_its_remedy(tmp_path):
    write(tmp_path, ("val",))
    message = r"missing: train_embeddings\.pkl.*python -m experiments\.features.*embeddings\.zip"
    with pytest.raises(DataError, match=message):
        features.load(tmp_path)


def test_what_cannot_be_saved(tmp_path):
    with pytest.raises(ValueError, match="split='all' must be one of"):
        features.save(tmp_path, "all", EMBEDDINGS, np.array([0, 2]))
    for offsets in ([0, 3], [1, 3], [0, 3, 2]):
        with pytest.raises(ValueError, match=f"offsets run from {offsets[0]} to {offsets[-1]}"):
            features.save(tmp_path, "val", EMBEDDINGS, np.array(offsets))
