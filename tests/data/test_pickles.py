"""Pickles are read as data: what NumPy wrote comes back, what would run something is refused."""

import builtins
import importlib
import os
import pickle
from pathlib import Path

import numpy as np
import pytest

from imaml_jax.data import mini_imagenet, pickles, tiered_imagenet
from imaml_jax.data.archives import DataError

# np.array([1, 254, 255], np.uint8), as Python 2 and the NumPy of 2018 wrote it: bytes as text.
OLD = (
    b"\x80\x02}U\x01ncnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R"
    b"(K\x01K\x03\x85cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R(K\x03U\x01|NNNJ\xff\xff\xff\xff"
    b"J\xff\xff\xff\xffK\x00tb\x89U\x03\x01\xfe\xfftbs."
)


class Calls:
    """Pickles as the call of a function."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


def load(folder, content):
    path = folder / "x.pkl"
    path.write_bytes(content if isinstance(content, bytes) else pickle.dumps(content))
    return pickles.load(path)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("dtype", ["u1", "i4", ">i8", "f4", "?", "U3", "S2"])
def test_arrays_of_every_protocol(tmp_path, protocol, dtype):
    array = np.arange(24).reshape(2, 3, 4).astype(dtype)
    for value in (array, np.asfortranarray(array), array[:, ::2], array[:0]):
        loaded = np.asarray(load(tmp_path, pickle.dumps(value, protocol)))
        assert loaded.dtype == value.dtype
        np.testing.assert_array_equal(loaded, value)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_containers_text_and_numbers(tmp_path, protocol):
    value = {"a": [1, -2, 2**70, 0.5, None, True], b"b": (b"\x00\xff", "ü"), 3: {}}
    assert load(tmp_path, pickle.dumps(value, protocol)) == value
    assert load(tmp_path, pickle.dumps([np.int64(7), np.float32(0.5)], protocol)) == [7, 0.5]


def test_arrays_of_python_2(tmp_path):
    np.testing.assert_array_equal(load(tmp_path, OLD)["n"], np.array([1, 254, 255], np.uint8))


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda mark: Calls(os.system, f"touch {mark}"), "system"),
        (lambda mark: Calls(builtins.eval, f"open({str(mark)!r}, 'w')"), "builtins.eval"),
        (lambda mark: Calls(builtins.exec, f"open({str(mark)!r}, 'w')"), "builtins.exec"),
        (lambda mark: Calls(builtins.getattr, "x", "upper"), "builtins.getattr"),
        (lambda mark: Calls(importlib.import_module, "this"), "importlib.import_module"),
        (lambda mark: Calls(open, mark, "w"), "io.open"),
        (lambda mark: Calls(np.save, mark, 1), "numpy.save"),
        (lambda mark: Path("x"), "pathlib"),
        (lambda mark: np.array([Calls(os.system, f"touch {mark}")]), "dtype 'O8'"),
        (lambda mark: np.array([{}]), "dtype 'O8'"),
        (lambda mark: np.zeros(2, "u1,u1"), "dtype 'V2'"),
        (lambda mark: b"\x80\x04\x8c\x05numpy\x8c\x0fndarray.__mro__\x93.", r"ndarray\.__mro__"),
        (lambda mark: b"\x80\x02cnumpy\nndarray.__init__.__globals__\n.", "__globals__"),
        (lambda mark: b"\x80\x02cimaml_jax.data.pickles\nnp\n.", "imaml_jax.data.pickles.np"),
        (lambda mark: b"\x80\x02U\x01xQ.", "persistent"),
        (lambda mark: b"\x80\x02\x82\x01.", "extension"),
    ],
)
def test_whatever_would_run_is_refused(tmp_path, make, name):
    mark = tmp_path / "mark"
    for value in (make(mark), [1, make(mark)]):
        if isinstance(value, list) and isinstance(value[1], bytes):
            continue
        with pytest.raises(DataError, match=rf"(?s)x\.pkl: expected a pickle of.*{name}.*source"):
            load(tmp_path, value)
    assert not mark.exists()


@pytest.mark.parametrize("mark_by", [os.system, builtins.eval])
@pytest.mark.parametrize(
    ("module", "names"),
    [(mini_imagenet, mini_imagenet.PICKLES), (tiered_imagenet, tiered_imagenet.PICKLES)],
)
def test_a_hostile_data_set_runs_nothing(tmp_path, mark_by, module, names):
    mark = tmp_path / "mark"
    order = f"touch {mark}" if mark_by is os.system else f"open({str(mark)!r}, 'w')"
    for name in names:
        (tmp_path / name).write_bytes(pickle.dumps({"image_data": Calls(mark_by, order)}))
    with pytest.raises(DataError, match="Nothing in it was run"):
        module.load(tmp_path, cache_dir=tmp_path / "cache")
    assert not mark.exists() and not list((tmp_path / "cache").iterdir())


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_bytes_changed_or_cut_are_harmless_or_explained(tmp_path, protocol):
    content = pickle.dumps({"a": np.arange(9, dtype=np.uint8), "b": [1, "x"]}, protocol)
    rng = np.random.default_rng(0)
    for place in range(len(content)):
        changed = bytearray(content)
        changed[place] ^= int(rng.integers(1, 256))
        for damaged in (content[:place], bytes(changed)):
            try:
                load(tmp_path, damaged)
            except DataError as error:
                assert "x.pkl" in str(error)


def test_a_file_that_numbers_its_memory_high_takes_none(tmp_path):
    assert load(tmp_path, b"\x80\x02K\x01r\xff\xff\xff\x7f.") == 1


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(DataError, match=r"Cannot read .*x\.pkl"):
        pickles.load(tmp_path / "x.pkl")


IMAGES = np.zeros((4, 2, 2, 3), np.uint8)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([], "'image_data'"),
        ({"image_data": IMAGES}, "'class_dict'"),
        ({"image_data": IMAGES, "class_dict": [1]}, "'class_dict'"),
        ({"image_data": IMAGES / 1.0, "class_dict": {"a": [0]}}, "'image_data' is float64"),
        ({"image_data": IMAGES[0], "class_dict": {"a": [0]}}, r"'image_data' is uint8\(2, 2, 3\)"),
        ({"image_data": IMAGES, "class_dict": {"a": []}}, "class 'a' is no list of indices"),
        ({"image_data": IMAGES, "class_dict": {"a": [0.5]}}, "class 'a' is no list of indices"),
        ({"image_data": IMAGES, "class_dict": {"a": [[0], [1, 2]]}}, "inhomogeneous"),
        ({"image_data": IMAGES, "class_dict": {"a": [4]}}, "'a' has indices outside 0 to 3"),
        ({"image_data": IMAGES, "class_dict": {"a": [-1]}}, "'a' has indices outside 0 to 3"),
    ],
)
def test_mini_imagenet_pickles_of_another_form(tmp_path, content, message):
    for name in mini_imagenet.PICKLES:
        (tmp_path / name).write_bytes(pickle.dumps(content))
    with pytest.raises(DataError, match=rf"cache-train\.pkl: expected a dict of .*{message}"):
        mini_imagenet.load(tmp_path, cache_dir=tmp_path / "cache")


@pytest.mark.parametrize(
    ("labels", "pngs", "message"),
    [
        ([], [b""], r"train_labels\.pkl: expected a dict with 'label_specific'"),
        ({"label_specific": [0.5]}, [b""], "'label_specific' is float64"),
        ({"label_specific": [0, 1]}, [b""], r"images_png\.pkl: expected a list of 2 .* found 1"),
        ({"label_specific": [0]}, {}, r"images_png\.pkl: expected a list of 1 .* found dict"),
        ({"label_specific": [0]}, [b"x"], r"images_png\.pkl: image 0: expected an image"),
        ({"label_specific": [0]}, [{}], r"images_png\.pkl: image 0: expected an image"),
        ({"label_specific": [0]}, [[300]], r"images_png\.pkl: image 0: expected an image"),
    ],
)
def test_tiered_imagenet_pickles_of_another_form(tmp_path, labels, pngs, message):
    for name in tiered_imagenet.PICKLES:
        content = labels if "labels" in name else pngs
        (tmp_path / name).write_bytes(pickle.dumps(content))
    with pytest.raises(DataError, match=message):
        tiered_imagenet.load(tmp_path, cache_dir=tmp_path / "cache")
