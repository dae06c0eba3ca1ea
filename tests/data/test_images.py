"""Photographs from csv files, zips, folders, pickles and arrays, through one decoder."""

import io
import json
import os
import pickle
import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
from PIL import Image

from experiments import mini_imagenet as experiment
from imaml_jax.data import (
    cache,
    class_splits,
    episodes,
    images,
    listings,
    mini_imagenet,
    own,
    tiered_imagenet,
)
from imaml_jax.data.archives import DataError

ROOT = Path(__file__).resolve().parents[2]
SIDE = 8
# The red value of each image, by split and class; classes differ in size.
CLASSES = {
    "train": {"ant": [10, 11, 12], "bee": [20]},
    "val": {"cat": [30, 31]},
    "test": {"dog": [40], "eel": [50, 51, 52, 53]},
}


def pixels(value, side=SIDE):
    return np.full((side, side, 3), (value, 100, 0), np.uint8)


def png(value, side=SIDE):
    buffer = io.BytesIO()
    Image.fromarray(pixels(value, side)).save(buffer, "PNG")
    return buffer.getvalue()


def rows(split):
    """Label, value and file name of each image, the classes interleaved, the last one first."""
    found = [(i, label, v) for label, vs in CLASSES[split].items() for i, v in enumerate(vs)]
    return [(label, v, f"{label}{i}.png") for i, label, v in sorted(found, reverse=True)]


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def write_zip(path, files):
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)


def write_csvs(folder):
    for split in CLASSES:
        lines = ["filename,label", *(f"{name},{label}" for label, _, name in rows(split))]
        write(folder / f"{split}.csv", "\r\n".join(lines).encode() + b"\n")


def csv_and_folder(folder, place="images/{name}"):
    write_csvs(folder)
    for split in CLASSES:
        for label, value, name in rows(split):
            write(folder / place.format(split=split, label=label, name=name), png(value))


def csv_and_zip(folder):
    write_csvs(folder)
    names = {f"images/{n}": png(v) for split in CLASSES for _, v, n in rows(split)}
    write_zip(folder / "all.zip", {**names, "../../evil.png": b"x", "/images/evil.png": b"x"})


def csv_and_zips(folder):
    write_csvs(folder)
    for split in CLASSES:
        write_zip(folder / f"images_{split}.zip", {n: png(v) for _, v, n in rows(split)})


def split_folders(folder):
    csv_and_folder(folder, "{split}/{label}/deeper/{name}")
    for split in CLASSES:
        (folder / f"{split}.csv").unlink()
        write(folder / split / "stray.png", b"in no class")
        write(folder / split / "notes" / "README.txt", b"no image")
        write(folder / split / ".hidden" / "x.png", b"")


def mini_pickles(folder, protocol=pickle.DEFAULT_PROTOCOL):
    for split in CLASSES:
        labels = [label for label, _, _ in rows(split)]
        content = {
            "image_data": np.stack([pixels(value) for _, value, _ in rows(split)]),
            "class_dict": {
                name: [i for i, label in reversed(list(enumerate(labels))) if label == name]
                for name in dict.fromkeys(labels)
            },
        }
        path = folder / f"mini-imagenet-cache-{split}.pkl"
        write(path, pickle.dumps(content, protocol))


def tiered_pickles(folder):
    for split in CLASSES:
        names = list(CLASSES[split])
        labels = np.array([names.index(label) for label, _, _ in rows(split)], np.int32)
        pngs = [np.frombuffer(png(value), np.uint8)[:, None] for _, value, _ in rows(split)]
        write(folder / f"{split}_images_png.pkl", pickle.dumps(pngs, 2))
        content = {"label_specific": labels, "label_specific_str": names}
        write(folder / f"{split}_labels.pkl", pickle.dumps(content, 2))


def npz(path, splits=CLASSES):
    arrays = {}
    for split in splits:
        arrays[f"{split}_images"] = np.stack([pixels(value) for _, value, _ in rows(split)])
        arrays[f"{split}_labels"] = np.array([label for label, _, _ in rows(split)])
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path, **arrays)


def load_mini(folder, **options):
    return mini_imagenet.load(folder, image_size=SIDE, **options)


def load_tiered(folder, **options):
    return tiered_imagenet.load(folder, image_size=SIDE, **options)


def load_own(folder, **options):
    return own.load_folder(folder, image_size=SIDE, **options)


def assert_complete(splits):
    for split, dataset in zip(CLASSES, splits, strict=True):
        groups = CLASSES[split].values()
        assert dataset.images.dtype == np.uint8
        assert dataset.images.shape == (sum(map(len, groups)), SIDE, SIDE, 3)
        np.testing.assert_array_equal(dataset.offsets, np.cumsum([0, *map(len, groups)]))
        for start, group in zip(dataset.offsets, groups, strict=False):
            found = np.asarray(dataset.images[start : start + len(group)])
            expected = np.stack([pixels(value) for value in group])
            order = np.argsort(found[:, 0, 0, 0])
            np.testing.assert_array_equal(found[order], expected)


# --- every form


@pytest.mark.parametrize(
    ("write_data", "load"),
    [
        (csv_and_folder, load_mini),
        (csv_and_zip, load_mini),
        (csv_and_zips, load_mini),
        (mini_pickles, load_mini),
        (csv_and_folder, load_tiered),
        (lambda folder: csv_and_folder(folder, "{label}/{name}"), load_tiered),
        (lambda folder: csv_and_folder(folder, "images/{split}/{label}/{name}"), load_tiered),
        (tiered_pickles, load_tiered),
        (split_folders, load_tiered),
        (split_folders, load_own),
        (lambda folder: npz(folder / "my.npz"), lambda folder: own.load_arrays(folder / "my.npz")),
    ],
)
def test_every_form_gives_the_same_classes(tmp_path, write_data, load):
    write_data(tmp_path / "data")
    assert_complete(load(tmp_path / "data"))
    assert not list(tmp_path.rglob("evil*"))


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_pickles_of_every_protocol(tmp_path, protocol):
    mini_pickles(tmp_path, protocol)
    assert_complete(load_mini(tmp_path))


@pytest.mark.parametrize(
    ("name", "load"),
    [
        *((name, load_mini) for name in ("miniimagenet", "mini_imagenet", "mini-imagenet")),
        *((name, load_tiered) for name in ("tiered_imagenet", "tiered-imagenet")),
    ],
)
def test_found_one_level_down_and_by_the_environment(tmp_path, monkeypatch, name, load):
    csv_and_zip(tmp_path / "data" / name)
    assert_complete(load(tmp_path / "data"))
    monkeypatch.setenv("IMAML_DATA_DIR", str(tmp_path / "data"))
    assert_complete(load(None))


def test_a_folder_of_classes_is_split_by_name(tmp_path):
    names = [f"class{i}" for i in range(40)]
    for value, name in enumerate(names):
        write(tmp_path / "data" / name / "a.png", png(value))
    splits = load_own(tmp_path / "data")
    for split, dataset in zip(CLASSES, splits, strict=True):
        expected = [v for v, name in enumerate(names) if class_splits.split_of(name) == split]
        np.testing.assert_array_equal(np.sort(dataset.images[:, 0, 0, 0]), expected)
    sizes = [episodes.num_classes(dataset) for dataset in splits]
    assert sizes == [20, 8, 12]  # frozen
    labels = np.array([name for name in names for _ in range(2)])
    arrays = np.stack([pixels(value) for value in range(40) for _ in range(2)])
    np.savez(tmp_path / "my.npz", images=arrays, labels=labels)
    for of_arrays, of_folder in zip(own.load_arrays(tmp_path / "my.npz"), splits, strict=True):
        np.testing.assert_array_equal(of_arrays.images[::2], of_folder.images)
        np.testing.assert_array_equal(np.diff(of_arrays.offsets), 2)


def test_validation_classes_may_be_absent(tmp_path):
    split_folders(tmp_path / "data")
    (tmp_path / "data" / "val").rename(tmp_path / "elsewhere")
    assert load_own(tmp_path / "data").val is None
    npz(tmp_path / "my.npz", ("train", "test"))
    splits = own.load_arrays(tmp_path / "my.npz")
    assert splits.val is None and episodes.num_classes(splits.test) == 2


def test_other_sizes_and_modes_become_rgb_of_one_size(tmp_path):
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (20, 30, 3), np.uint8)
    pictures = {
        "noise": Image.fromarray(noise),
        "grey": Image.new("L", (5, 40), 77),
        "bits": Image.new("1", (SIDE, SIDE), 1),
        "alpha": Image.new("RGBA", (SIDE, SIDE), (1, 2, 3, 0)),
        "palette": Image.new("RGB", (9, 9), (9, 8, 7)).quantize(),
    }
    for split in ("train", "test"):
        for name, picture in pictures.items():
            folder = tmp_path / "data" / split / f"{split} {name}"
            folder.mkdir(parents=True)
            picture.save(folder / "X.PNG")
    found = np.asarray(load_own(tmp_path / "data").train.images)
    resized = Image.fromarray(noise).resize((SIDE, SIDE), Image.Resampling.LANCZOS)
    np.testing.assert_array_equal(found[:3, 0, 0], [[255] * 3, [255] * 3, [77] * 3])
    np.testing.assert_array_equal(found[3], resized)
    np.testing.assert_array_equal(found[4, 0, 0], [9, 8, 7])


@pytest.mark.parametrize("image_size", [0, 1025])
def test_image_size_out_of_range(tmp_path, image_size):
    csv_and_folder(tmp_path)
    with pytest.raises(ValueError, match=rf"image_size={image_size}; allowed: 1 to 1024"):
        mini_imagenet.load(tmp_path, image_size=image_size)


# --- the cache


def copies(splits):
    return [np.array(dataset.images) for dataset in splits]


def test_the_second_load_decodes_nothing(tmp_path, monkeypatch):
    csv_and_zips(tmp_path / "data")
    load_mini(tmp_path / "data")
    monkeypatch.setattr(images, "_build", None)
    assert_complete(load_mini(tmp_path / "data"))
    monkeypatch.setattr(listings, "from_csv", None)
    assert_complete(load_mini(tmp_path / "data"))


@pytest.mark.parametrize("name", ["offsets.npz", "train.npy", "test.npy"])
@pytest.mark.parametrize("keep", [None, 0.0, 0.5, 0.99])
def test_a_cache_that_was_cut_is_rebuilt(tmp_path, name, keep):
    csv_and_folder(tmp_path / "data")
    load_mini(tmp_path / "data")
    (folder,) = (tmp_path / "cache").iterdir()
    content = (folder / name).read_bytes()
    (folder / name).unlink()  # never cut a file that is mapped
    if keep is not None:
        (folder / name).write_bytes(content[: int(keep * len(content))])
    assert_complete(load_mini(tmp_path / "data"))
    assert list((tmp_path / "cache").iterdir()) == [folder]
    assert (folder / name).read_bytes()[:100] == content[:100]


def test_the_cache_follows_the_sources_and_the_size(tmp_path):
    csv_and_folder(tmp_path / "data")
    load_mini(tmp_path / "data")
    name = rows("test")[0][2]
    write(tmp_path / "data" / "images" / name, png(99, SIDE + 1))
    assert 99 in np.asarray(load_mini(tmp_path / "data").test.images)
    assert mini_imagenet.load(tmp_path / "data").test.images.shape == (5, 84, 84, 3)
    assert len(list((tmp_path / "cache").iterdir())) == 3


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
def test_an_interrupted_build_leaves_nothing(tmp_path, monkeypatch, error):
    csv_and_folder(tmp_path / "data")
    calls = []

    def interrupted(*_, **__):
        calls.append(1)
        if len(calls) == 6:
            raise error
        return pixels(0)

    with monkeypatch.context() as patch:
        patch.setattr(images, "decode", interrupted)
        with pytest.raises(error):
            load_mini(tmp_path / "data")
    assert list((tmp_path / "cache").iterdir()) == []
    assert_complete(load_mini(tmp_path / "data"))


def test_a_cache_that_cannot_be_written(tmp_path, monkeypatch):
    csv_and_folder(tmp_path / "data")
    write(tmp_path / "file", b"")
    with pytest.raises(DataError, match=r"Cannot write .*file.*cache_dir or \$IMAML_CACHE_DIR"):
        load_mini(tmp_path / "data", cache_dir=tmp_path / "file")
    full = SimpleNamespace(free=7)
    monkeypatch.setattr(images.shutil, "disk_usage", lambda _: full)
    with pytest.raises(DataError, match=r"train images take .* GB left\. Name another place"):
        load_mini(tmp_path / "data")
    assert list((tmp_path / "cache").iterdir()) == []


# --- hostile and damaged sources


def test_missing_files_name_every_form_and_the_remedy(tmp_path):
    for load, form in ((load_mini, "mini-imagenet-cache-train.pkl"), (load_tiered, "train/")):
        with pytest.raises(DataError, match=rf"expected .*train\.csv.*{form}.*nothing.*data_dir"):
            load(tmp_path / "nowhere")
        with pytest.raises(DataError, match="IMAML_DATA_DIR"):
            load(None)
    csv_and_folder(tmp_path / "data")
    with pytest.raises(DataError, match=r"found a file\. Give its parent directory"):
        load_mini(tmp_path / "data" / "train.csv")
    (tmp_path / "data" / "val.csv").unlink()
    with pytest.raises(DataError, match=r"missing: val\.csv\."):
        load_mini(tmp_path / "data")
    with pytest.raises(DataError, match=r"expected a folder .* found nothing there"):
        load_own(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"expected a folder .* found a file"):
        load_own(tmp_path / "data" / "train.csv")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "found '' and no image"),
        (b"filename,label\n", "found 'filename,label' and no image"),
        (b"name,class\nant0.png,ant\n", "found 'name,class'"),
        (b"filename,label\nant0.png\n", "found 'ant0.png'"),
        (b"filename,label\nant0.png,\n", "found 'ant0.png,'"),
        (b"\xff\xfe\0\0", "expected the line 'filename,label'"),
        (b"filename,label\nnone.png,ant\n", r"names none\.png of class ant: expected it in"),
        (b"filename,label\n../secret.png,ant\n", r"names \.\./secret\.png of class ant"),
        (b"filename,label\ndog0.png,dog\n", "'dog' is in both train and test"),
    ],
)
def test_csv_of_another_form(tmp_path, content, message):
    csv_and_folder(tmp_path / "data")
    write(tmp_path / "secret.png", png(1))
    write(tmp_path / "data" / "train.csv", content)
    with pytest.raises(DataError, match=message) as error:
        load_mini(tmp_path / "data")
    assert str(tmp_path / "data") in str(error.value)


def test_csv_with_a_byte_order_mark(tmp_path):
    csv_and_folder(tmp_path)
    write(tmp_path / "val.csv", b"\xef\xbb\xbf" + (tmp_path / "val.csv").read_bytes())
    assert_complete(load_mini(tmp_path))


def test_a_class_in_two_splits(tmp_path):
    split_folders(tmp_path / "folders")
    write(tmp_path / "folders" / "val" / "ant" / "1.png", png(1))
    with pytest.raises(DataError, match="'ant' is in both train and val"):
        load_own(tmp_path / "folders")
    mini_pickles(tmp_path / "mini")
    name = "mini-imagenet-cache-{}.pkl"
    content = (tmp_path / "mini" / name.format("val")).read_bytes()
    write(tmp_path / "mini" / name.format("test"), content)
    with pytest.raises(DataError, match="'cat' is in both val and test"):
        load_mini(tmp_path / "mini")
    arrays = {"images": np.stack([pixels(0)] * 3), "labels": np.arange(3)}
    named = {f"{s}_{k}": v for s in ("train", "test") for k, v in arrays.items()}
    np.savez(tmp_path / "my.npz", **named)
    with pytest.raises(DataError, match="'0' is in both train and test"):
        own.load_arrays(tmp_path / "my.npz")


@pytest.mark.parametrize("share", [0.0, 0.5, 0.95])
def test_truncated_zip(tmp_path, share):
    csv_and_zip(tmp_path)
    content = (tmp_path / "all.zip").read_bytes()
    write(tmp_path / "all.zip", content[: int(share * len(content))])
    with pytest.raises(DataError, match=r"all\.zip is not a complete zip.*Delete it"):
        load_mini(tmp_path)


@pytest.mark.parametrize(
    "content",
    [b"", b"no image", png(3)[:50], b"\xff\xd8\xff\xe0"],
    ids=["empty", "text", "cut", "head"],
)
@pytest.mark.parametrize("write_data", [csv_and_folder, csv_and_zip])
def test_unreadable_image(tmp_path, write_data, content):
    write_data(tmp_path)
    name = rows("test")[1][2]
    if (tmp_path / "all.zip").is_file():
        with pytest.warns(UserWarning, match="Duplicate name"):
            with zipfile.ZipFile(tmp_path / "all.zip", "a") as archive:
                archive.writestr(f"images/{name}", content)
    else:
        write(tmp_path / "images" / name, content)
    message = rf"images/{name}: expected an image [^<>]*Get a fresh copy"  # no <_io.BytesIO ...>
    with pytest.raises(DataError, match=message):
        load_mini(tmp_path)
    assert list((tmp_path / "cache").iterdir()) == []


def test_unreadable_images_are_named_together():
    sources = [images.Source(f"{i}.png", lambda: b"") for i in range(7)]
    with pytest.raises(DataError, match=r"(?s)0\.png: .*\n4\.png: .*\n2 more images") as e:
        images.decode_all(sources, np.empty((7, 1, 1, 3), np.uint8), progress=False, title="")
    assert "5.png" not in str(e.value)


def test_images_of_more_than_8_bits_are_refused(tmp_path):
    split_folders(tmp_path)
    wide = Image.fromarray(np.full((SIDE, SIDE), 40_000, np.uint16))
    wide.save(tmp_path / "train" / "ant" / "x.png")
    with pytest.raises(DataError, match=r"x\.png.*convert it to 8 bits"):
        load_own(tmp_path)


def test_too_few_classes_for_a_split_by_name(tmp_path):
    write(tmp_path / "data" / "class0" / "a.png", png(1))
    with pytest.raises(DataError, match=r"found 1 with images.*train/<class>/"):
        load_own(tmp_path / "data")
    (tmp_path / "data" / "class0" / "a.png").unlink()
    with pytest.raises(DataError, match="in one folder for each class, found none"):
        load_own(tmp_path / "data")
    split_folders(tmp_path / "splits")
    for path in (tmp_path / "splits" / "test").rglob("*.png"):
        path.unlink()
    with pytest.raises(DataError, match=r"splits/test: expected images .* found none"):
        load_own(tmp_path / "splits")


def test_links_that_lead_in_circles(tmp_path):
    csv_and_folder(tmp_path / "data")
    (tmp_path / "data" / "images" / "loop").symlink_to(tmp_path / "data")
    (tmp_path / "data" / "also").symlink_to(tmp_path / "data" / "images")
    (tmp_path / "data" / "images").rename(tmp_path / "elsewhere")
    (tmp_path / "data" / "images").symlink_to(tmp_path / "elsewhere")
    assert_complete(load_mini(tmp_path / "data"))


GOOD = {"images": np.zeros((40, 2, 2, 1), np.uint8), "labels": np.arange(40)}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"labels": np.arange(39)}, r"labels is int64\(39,\), expected integers or text \[40\]"),
        ({"labels": np.zeros(40)}, "labels is float64"),
        ({"images": GOOD["images"][..., 0]}, r"images is uint8\(40, 2, 2\).*channel axis"),
        ({"images": GOOD["images"] / 255}, r"images is float64.*scale"),
        ({"images": GOOD["images"][:0], "labels": np.arange(0)}, r"images is uint8\(0, 2"),
        ({"labels": np.zeros(40, int)}, "found 1 with images"),
        ({"labels": np.array([{}] * 40)}, "without objects"),
    ],
)
def test_arrays_of_another_form(tmp_path, changes, message):
    np.savez(tmp_path / "my.npz", **{**GOOD, **changes})
    with pytest.raises(DataError, match=message) as error:
        own.load_arrays(tmp_path / "my.npz")
    assert "my.npz" in str(error.value)


@pytest.mark.parametrize("content", [None, b"", b"no zip", b"PK\x03\x04"])
def test_arrays_that_cannot_be_read(tmp_path, content):
    if content is not None:
        write(tmp_path / "my.npz", content)
    with pytest.raises(DataError, match=r"my\.npz: expected an \.npz file"):
        own.load_arrays(tmp_path / "my.npz")
    np.save(tmp_path / "one.npy", GOOD["images"])
    with pytest.raises(DataError, match=r"one\.npy: expected an \.npz file"):
        own.load_arrays(tmp_path / "one.npy")


HEADERS = (
    "{'descr': (",
    "-" * 9000,
    "{'descr': '|u1', 'fortran_order': False, 'shape': (1000000, 1000000, 1000, 3)}",
    "{'descr': '|u1', 'fortran_order': False, 'shape': (1" + "0" * 30 + ",)}",
)


@pytest.mark.parametrize("header", HEADERS, ids=["cut", "minus", "large", "past int64"])
def test_arrays_with_damaged_headers(tmp_path, header):
    magic = b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little")
    with zipfile.ZipFile(tmp_path / "my.npz", "w") as archive:
        archive.writestr("images.npy", magic + header.encode())
    with pytest.raises(DataError, match=r"my\.npz: expected an \.npz file"):
        own.load_arrays(tmp_path / "my.npz")
    path = tmp_path / f"name-{cache.recipe_key({})}.npz"
    (tmp_path / "my.npz").rename(path)
    made = {"images": np.ones(3)}
    keep = {"is_valid": lambda _: True, "cache_dir": tmp_path}
    assert cache.cached_arrays("name", {}, lambda: made, **keep) is made
    assert cache.cached_arrays("name", {}, pytest.fail, **keep)["images"].sum() == 3


def test_arrays_of_two_sizes(tmp_path):
    images_of = {"train_images": GOOD["images"], "test_images": GOOD["images"][:, :1]}
    labels = {"train_labels": np.arange(40), "test_labels": np.arange(40, 80)}
    np.savez(tmp_path / "my.npz", **images_of, **labels)
    with pytest.raises(DataError, match="images of one size in all splits expected"):
        own.load_arrays(tmp_path / "my.npz")


# --- the real data and the command


@pytest.mark.slow
def test_real_mini_imagenet(data_dir, tmp_path):
    try:
        splits = mini_imagenet.load(data_dir, cache_dir=tmp_path)
    except DataError as error:
        if "missing: " not in str(error):
            raise
        pytest.skip(f"needs mini-ImageNet: {error}")
    for dataset, classes in zip(splits, (64, 16, 20), strict=True):
        np.testing.assert_array_equal(dataset.offsets, 600 * np.arange(classes + 1))
        assert dataset.images.shape == (600 * classes, 84, 84, 3)
        assert dataset.images.dtype == np.uint8
        sample = np.asarray(dataset.images[::97])
        assert 0.3 < sample.mean() / 255 < 0.6 and sample.std(axis=(1, 2, 3)).mean() > 30


def test_the_protocol_of_the_command():
    with mock.patch.object(experiment, "load"):
        protocol = experiment.prepare(experiment.Config.of(dataset="folder:x"))[0].settings
    tasks = protocol.tasks
    assert tasks.split == "folder:x" and not tasks.invert and tasks.meta_batch == 4
    assert tasks.train_rotations is None and tasks.test_rotations is None
    assert (protocol.network.filters, protocol.network.downsample) == (32, "max_pool")
    assert tasks.train_queries == tasks.test_queries == 15
    assert experiment.Config.of(meta_batch=2).settings.tasks.meta_batch == 2
    published = experiment.Config.of(protocol="finn", algorithm="maml").settings
    assert published.tasks.split == "mini_imagenet" and published.outer.outer_clip == 10 / 75
    with pytest.raises(ValueError, match=r"'imaml_dev' covers Omniglot"):
        experiment.Config.of(protocol="imaml_dev")


@pytest.mark.parametrize("name", ["cifar", "folder:", "arrays", "http://x"])
def test_the_command_names_the_data_sets_that_it_has(name):
    message = f"dataset={name} must be mini_imagenet, tiered_imagenet, folder:PATH or arrays:FILE"
    with pytest.raises(ValueError, match=message):
        experiment.load(experiment.Config.of(dataset=name))


@pytest.mark.slow
def test_the_command(tmp_path):
    for split, count in (("train", 6), ("val", 5), ("test", 5)):
        for i in range(count):
            for j in range(17):
                write(tmp_path / "data" / split / f"{split}{i}" / f"{j}.png", png(10 * i + j))
    tiny = "--meta-steps 2 --log-every 2 --validate-every 2 --meta-batch 1 --num-steps 1"
    tiny += " --eval-num-steps 1 --validation-tasks 2 --test-tasks 2 --image-size 16"
    done = subprocess.run(
        [sys.executable, "-m", "experiments.mini_imagenet", *tiny.split()]
        + ["--dataset", f"folder:{tmp_path / 'data'}", "--workdir", str(tmp_path / "run")],
        cwd=ROOT,
        env={**os.environ, "PYTHONWARNINGS": "error"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["trained_meta_steps"] == 2
    assert results["settings"]["split"] == results["dataset"] == f"folder:{tmp_path / 'data'}"
