import subprocess
import sys

import jax
import numpy as np
import pytest

from imaml_jax.data import episodes, glyphs


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """A cache with a small rendering: the full set takes some ten seconds."""
    patch = pytest.MonkeyPatch()
    patch.setattr(glyphs, "_RANGES", glyphs._RANGES[:6])
    folder = tmp_path_factory.mktemp("cache")
    yield folder
    patch.undo()


@pytest.fixture(scope="module")
def splits(cache):
    return glyphs.load(cache_dir=cache)


def test_shapes_and_polarity(splits):
    for dataset in splits:
        classes = episodes.num_classes(dataset)
        assert dataset.images.shape == (classes * 20, 28, 28, 1)
        assert dataset.images.dtype == np.uint8
        np.testing.assert_array_equal(np.diff(dataset.offsets), 20)
        ink = np.asarray(dataset.images) < 128
        share = ink.mean(axis=(1, 2, 3))
        assert 0.005 < share.min() and share.max() < 0.6  # dark on white, nothing blank
        border = np.concatenate([ink[:, [0, -1]].reshape(-1), ink[:, :, [0, -1]].reshape(-1)])
        assert border.mean() < 0.01  # nothing cut off


def test_classes_are_disjoint_and_examples_differ(splits, cache):
    groups = glyphs.characters(cache_dir=cache)
    assert [len(group) for group in groups] == [episodes.num_classes(d) for d in splits]
    assert len(set("".join(groups))) == len("".join(groups))
    for dataset in splits:
        flat = np.asarray(dataset.images).reshape(-1, 28 * 28)
        assert len(np.unique(flat, axis=0)) == len(flat)


def test_look_alikes_are_one_class(cache):
    kept = set("".join(glyphs.characters(cache_dir=cache)))
    assert set("ABDEGKQRabdegkΓΔΣψДЖЮ") <= kept
    assert not kept & set("ΑАоО")  # Greek Alpha, Cyrillic A, Cyrillic o and O; Latin A and O stay


def test_deterministic_and_the_split_does_not_depend_on_the_set(cache, splits, tmp_path):
    again = glyphs.load(cache_dir=tmp_path)
    jax.tree.map(np.testing.assert_array_equal, splits, again)
    parts = [glyphs._split_of(code) for code in range(0x20, 0x3000)]
    shares = np.bincount(parts) / len(parts)
    np.testing.assert_allclose(shares, [0.7, 0.15, 0.15], atol=0.02)


def test_every_font_face_is_there_and_enough_characters_remain():
    faces = glyphs._load_faces(glyphs._FACES + glyphs._LATIN_FACES)
    assert len(faces) == 21
    assert all(set(map(ord, "AZaz")) <= face.codes for face in faces)
    first, _, _ = glyphs._RANGES[0]
    assert first == ord("0")


@pytest.mark.slow
def test_the_full_set(tmp_path):
    splits = glyphs.load(cache_dir=tmp_path)
    sizes = [episodes.num_classes(dataset) for dataset in splits]
    assert sum(sizes) >= 600
    np.testing.assert_allclose(np.array(sizes) / sum(sizes), [0.7, 0.15, 0.15], atol=0.03)


def test_loading_imports_neither_pyplot_nor_tensorflow(cache, splits):
    code = (
        "import sys; from imaml_jax.data import glyphs, omniglot, sinusoid; "
        "assert 'matplotlib' not in sys.modules; glyphs._load_faces(glyphs._FACES); "
        "bad = {'matplotlib.pyplot', 'tensorflow', 'tensorflow_datasets'} & set(sys.modules); "
        "sys.exit(str(bad) if bad else 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
