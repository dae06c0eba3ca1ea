import functools
import hashlib
import http.server
import io
import os
import shutil
import socket
import subprocess
import sys
import threading
import warnings
import zipfile

import numpy as np
import pytest
from PIL import Image

from imaml_jax.data import archives, cache, episodes, omniglot, omniglot_splits
from imaml_jax.data.archives import DataError

SIZES = {
    "mamlpp": (1150, 50, 423),
    "finn": (1100, 100, 423),
    "vinyals": (1028, 172, 423),
    "lake": (964, None, 659),
    "reptile": (1200, None, 423),
}


@pytest.fixture(scope="module")
def shared_cache(tmp_path_factory):
    return tmp_path_factory.mktemp("omniglot_cache")


# --- the splits


@pytest.mark.parametrize("split", omniglot_splits.SPLITS)
def test_splits_are_disjoint_and_complete(split):
    parts = [part for part in omniglot_splits.split_indices(split) if part is not None]
    assert tuple(len(part) for part in parts) == tuple(n for n in SIZES[split] if n is not None)
    np.testing.assert_array_equal(np.sort(np.concatenate(parts)), np.arange(1623))


def test_the_random_split_is_frozen():
    train, val, test = omniglot_splits.split_indices("finn")
    digest = hashlib.sha256(np.concatenate([train, val, test]).astype("<u2").tobytes())
    assert digest.hexdigest()[:16] == "52d68f7677d56d8a"
    reptile_train, _, reptile_test = omniglot_splits.split_indices("reptile")
    np.testing.assert_array_equal(reptile_test, test)
    np.testing.assert_array_equal(reptile_train, np.sort(np.concatenate([train, val])))


def test_vinyals_equals_the_published_lists(data_dir):
    names = np.array(omniglot_splits.class_names())
    for part, indices in zip(
        ("train", "val", "test"), omniglot_splits.split_indices("vinyals"), strict=True
    ):
        path = data_dir / "omniglot" / f"vinyals_{part}.txt"
        if not path.is_file():
            pytest.skip(f"needs the published list {path.name} beside the archives")
        lines = path.read_text().split()
        assert {line.rsplit("/", 1)[0] for line in lines} == set(names[indices])
        assert len(lines) == 4 * len(indices)


def test_rejects_unknown_options(tmp_path):
    with pytest.raises(ValueError, match="split='miniimagenet'; allowed: 'finn'"):
        omniglot.load(tmp_path, split="miniimagenet")
    with pytest.raises(ValueError, match="image_size=0; allowed: 1 to 105"):
        omniglot.load(tmp_path, image_size=0)


# --- the real archives


@pytest.mark.slow
@pytest.mark.parametrize("split", omniglot_splits.SPLITS)
def test_real_data(data_dir, shared_cache, split):
    splits = omniglot.load(data_dir, split=split, cache_dir=shared_cache)
    drawings = []
    for dataset, size in zip(splits, SIZES[split], strict=True):
        if size is None:
            assert dataset is None
            continue
        assert episodes.num_classes(dataset) == size
        assert dataset.images.shape == (size * 20, 28, 28, 1)
        np.testing.assert_array_equal(np.diff(dataset.offsets), 20)
        images = np.asarray(dataset.images)
        assert images.dtype == np.uint8 and 0.8 < images.mean() / 255 < 0.98  # dark on white
        assert images.min(axis=(1, 2, 3)).max() < 200  # no blank drawing
        drawings.append({image.tobytes() for image in images})
    for i in range(len(drawings)):
        for j in range(i):
            assert not drawings[i] & drawings[j]
    episodes.check_task_shape(splits.train, ways=20, shots=5, queries=15)


@pytest.mark.slow
def test_real_images_are_the_files_resized(data_dir, shared_cache):
    splits = omniglot.load(data_dir, split="lake", cache_dir=shared_cache)
    names = omniglot_splits.class_names()
    background, _, evaluation = omniglot_splits.split_indices("lake")
    cases = [("background", splits.train, background), ("evaluation", splits.test, evaluation)]
    for kind, dataset, indices in cases:
        with zipfile.ZipFile(data_dir / "omniglot" / f"images_{kind}.zip") as archive:
            for row in (0, len(indices) // 2, len(indices) - 1):
                prefix = f"images_{kind}/{names[indices[row]]}/"
                members = sorted(n for n in archive.namelist() if n.startswith(prefix))
                members = [n for n in members if n.endswith(".png")]
                assert len(members) == 20
                image = Image.open(io.BytesIO(archive.read(members[7]))).convert("L")
                image = image.resize((28, 28), Image.Resampling.LANCZOS)
                np.testing.assert_array_equal(dataset.images[20 * row + 7, ..., 0], image)


# --- miniature archives: two alphabets, three characters, two drawers


def png(value, size=(105, 105)):
    buffer = io.BytesIO()
    Image.new("L", size, value).save(buffer, "PNG")
    return buffer.getvalue()


def members(kind, alphabets, drawers=2):
    return {
        f"images_{kind}/{alphabet}/character{number:02d}/{number:04d}_{drawer:02d}.png": png(
            10 * number + drawer
        )
        for alphabet, count in alphabets.items()
        for number in range(1, count + 1)
        for drawer in range(1, drawers + 1)
    }


def write_zip(path, files):
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)


@pytest.fixture
def miniature(monkeypatch, tmp_path):
    """A tiny Omniglot on disk, and a module that believes in it; gives its folder."""
    background, evaluation = {"Ape": 2}, {"Bee": 1}
    for module in (omniglot, omniglot_splits):
        monkeypatch.setattr(module, "BACKGROUND", background)
        monkeypatch.setattr(module, "EVALUATION", evaluation)
        monkeypatch.setattr(module, "DRAWERS", 2)
    folder = tmp_path / "data" / "omniglot"
    write_zip(folder / omniglot.ARCHIVES[0], members("background", background))
    write_zip(folder / omniglot.ARCHIVES[1], members("evaluation", evaluation))
    return folder


def load(folder, **options):
    return omniglot.load(folder, split="lake", **options)


def test_miniature_from_either_folder_or_the_environment(miniature, monkeypatch, tmp_path):
    for folder in (miniature, miniature.parent, None):
        splits = load(folder)
        np.testing.assert_array_equal(splits.train.images[:, 0, 0, 0], [11, 12, 21, 22])
        np.testing.assert_array_equal(splits.test.images[:, 0, 0, 0], [11, 12])
        assert splits.val is None
        monkeypatch.setenv("IMAML_DATA_DIR", str(miniature.parent))
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_the_cache_is_used_follows_the_content_and_survives_damage(
    miniature, monkeypatch, tmp_path
):
    first = load(miniature)
    with monkeypatch.context() as patch:
        patch.setattr(omniglot, "_read", None)  # not called: the cache serves
        np.testing.assert_array_equal(load(miniature).train.images, first.train.images)
    (stored,) = (tmp_path / "cache").iterdir()
    content = stored.read_bytes()
    for damaged in (b"", content[: len(content) // 2], b"x" * len(content), content[:-30]):
        stored.write_bytes(damaged)
        np.testing.assert_array_equal(load(miniature).train.images, first.train.images)
        assert stored.read_bytes()[:2] == b"PK"
    assert load(miniature, image_size=5).train.images.shape == (4, 5, 5, 1)
    files = members("evaluation", {"Bee": 1})
    files[next(iter(files))] = png(200)
    write_zip(miniature / omniglot.ARCHIVES[1], files)
    assert load(miniature).test.images[0, 0, 0, 0] == 200
    assert len(list((tmp_path / "cache").iterdir())) == 3


def test_a_stored_array_of_the_wrong_shape_is_rebuilt(miniature, tmp_path):
    first = load(miniature)
    (stored,) = (tmp_path / "cache").iterdir()
    for arrays in ({"images": np.zeros((3, 2, 9, 9, 1), np.uint8)}, {"other": np.zeros(3)}):
        np.savez(stored, **arrays)
        np.testing.assert_array_equal(load(miniature).train.images, first.train.images)


def test_a_read_only_data_folder_will_do(miniature):
    before = {path: path.stat().st_mtime_ns for path in miniature.rglob("*")}
    miniature.chmod(0o555)
    load(miniature)
    miniature.chmod(0o755)
    assert {path: path.stat().st_mtime_ns for path in miniature.rglob("*")} == before


def test_a_cache_that_cannot_be_written_costs_a_warning(miniature, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.warns(UserWarning, match="IMAML_CACHE_DIR"):
        splits = load(miniature, cache_dir=tmp_path / "file")
    assert splits.train.images.shape == (4, 28, 28, 1)


# --- hostile folders and archives


def test_missing_folder_or_file_names_both_remedies(miniature, tmp_path):
    with pytest.raises(DataError, match=r"nowhere: expected a directory .*download=True.*data_dir"):
        load(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"default data_dir .*download=True.*IMAML_DATA_DIR"):
        load(None)
    with pytest.raises(DataError, match="found a file"):
        load(miniature / omniglot.ARCHIVES[0])
    (miniature / omniglot.ARCHIVES[1]).unlink()
    with pytest.raises(DataError, match=r"missing: images_evaluation\.zip\. .*download=True"):
        load(miniature)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.7, 0.98])
def test_truncated_archive(miniature, share):
    path = miniature / omniglot.ARCHIVES[0]
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(DataError, match=r"images_background\.zip is not a complete zip.*Delete it"):
        load(miniature)


def test_bytes_changed_anywhere_are_either_harmless_or_explained(miniature):
    path = miniature / omniglot.ARCHIVES[1]
    content = path.read_bytes()
    expected = load(miniature).test.images
    rng, explained = np.random.RandomState(0), 0
    for place in rng.choice(len(content), 120, replace=False):
        changed = bytearray(content)
        changed[place] ^= int(rng.randint(1, 256))
        path.write_bytes(changed)
        try:
            np.testing.assert_array_equal(load(miniature).test.images, expected)
        except DataError as error:
            assert path.name in str(error)
            explained += 1
    assert explained > 60


def test_wrong_counts(miniature):
    path = miniature / omniglot.ARCHIVES[0]
    files = members("background", {"Ape": 2})
    for drawers, count in ((1, 2), (3, 6)):
        write_zip(path, members("background", {"Ape": 2}, drawers))
        message = rf"expected 1 alphabets, 2 characters.*4 images in all; found {count} images"
        with pytest.raises(DataError, match=message):
            load(miniature)
    write_zip(path, {name.replace("Ape", "Cat"): content for name, content in files.items()})
    with pytest.raises(DataError, match="'Cat/character01' that Omniglot has not there"):
        load(miniature)
    write_zip(path, {})
    with pytest.raises(DataError, match="found 0 images"):
        load(miniature)


def test_foreign_files_are_passed_over(miniature):
    path = miniature / omniglot.ARCHIVES[0]
    expected = load(miniature).train.images
    junk = {"__MACOSX/images_background/Ape/._x.png": b"", "images_background/.DS_Store": b"x"}
    write_zip(path, {**junk, **members("background", {"Ape": 2}), "../../evil.png": b"x"})
    np.testing.assert_array_equal(load(miniature).train.images, expected)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "0 bytes that Pillow cannot read"),
        (b"no image", "8 bytes that Pillow cannot read"),
        (png(3)[:80], "80 bytes that Pillow cannot read"),
        (png(3, (28, 28)), "expected 105x105 pixels, found 28x28"),
        (png(3, (3000, 3000)), "expected 105x105 pixels, found 3000x3000"),
        (b"\0" * (1 << 24) + b"\0", "expected a small image"),
    ],
)
def test_unreadable_image(miniature, content, message):
    files = members("evaluation", {"Bee": 1})
    name = next(iter(files))
    write_zip(miniature / omniglot.ARCHIVES[1], {**files, name: content})
    with pytest.raises(DataError, match=message) as error:
        load(miniature)
    assert name in str(error.value)


# --- the download, from a server on this machine


@pytest.fixture
def server(miniature, tmp_path, monkeypatch):
    """Serves the miniature archives; gives their folder and points the module at the server."""
    for name in list(os.environ):
        if name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    folder = tmp_path / "served"
    shutil.move(miniature, folder)
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(folder))
    monkeypatch.setattr(http.server.SimpleHTTPRequestHandler, "log_message", lambda *_: None)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as httpd:
        thread = threading.Thread(target=httpd.serve_forever, daemon=True)
        thread.start()
        url = f"http://127.0.0.1:{httpd.server_port}/"
        monkeypatch.setattr(omniglot, "_URL", url)
        yield folder
        httpd.shutdown()
        thread.join()


def publish_checksums(monkeypatch, folder):
    """Makes the download expect the checksums of the files in `folder`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        checksums = pytest.importorskip("tensorflow_datasets.core.download.checksums")
    infos = {
        omniglot._URL + name: checksums.UrlInfo(
            size=(folder / name).stat().st_size,
            checksum=hashlib.sha256((folder / name).read_bytes()).hexdigest(),
            filename=name,
        )
        for name in omniglot.ARCHIVES
    }
    monkeypatch.setattr(checksums, "load_url_infos", lambda _: infos)


@pytest.mark.filterwarnings("ignore")  # what the download manager warns of is not ours
@pytest.mark.parametrize("place", ["data_dir", "cache"])
def test_download(server, monkeypatch, tmp_path, place):
    publish_checksums(monkeypatch, server)
    data_dir = tmp_path / "mine" if place == "data_dir" else None
    splits = load(data_dir, download=True)
    np.testing.assert_array_equal(splits.train.images[:, 0, 0, 0], [11, 12, 21, 22])
    folder = data_dir or tmp_path / "cache" / "downloads" / "omniglot"
    assert sorted(path.name for path in folder.iterdir()) == list(omniglot.ARCHIVES)
    monkeypatch.setattr(archives, "download", None)  # what is there is not fetched again
    load(data_dir, download=True)
    load(data_dir)


@pytest.mark.filterwarnings("ignore")
def test_download_with_a_wrong_checksum_leaves_nothing(server, monkeypatch, tmp_path):
    publish_checksums(monkeypatch, server)
    path = server / omniglot.ARCHIVES[1]
    path.write_bytes(path.read_bytes() + b"!")
    with pytest.raises(DataError, match=r"Could not download .*NonMatchingChecksumError"):
        load(tmp_path / "mine", download=True)
    assert list((tmp_path / "mine").iterdir()) == []


def test_download_without_a_network(monkeypatch, tmp_path):
    with socket.socket() as closed:  # bound, not listening: connections are refused
        closed.bind(("127.0.0.1", 0))
        monkeypatch.setattr(omniglot, "_URL", f"http://127.0.0.1:{closed.getsockname()[1]}/")
        monkeypatch.setattr(archives.urllib.request, "getproxies", dict)
        message = r"Cannot reach 127\.0\.0\.1 .*images_evaluation\.zip by any other means.*mine"
        with pytest.raises(DataError, match=message):
            load(tmp_path / "mine", download=True)
    assert not (tmp_path / "mine").exists()


@pytest.mark.filterwarnings("ignore")
def test_download_into_a_place_that_cannot_be_written(server, monkeypatch, tmp_path):
    publish_checksums(monkeypatch, server)
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="Cannot download into"):
        load(tmp_path / "file" / "data", download=True)


def test_the_published_checksums_name_our_addresses_and_need_no_tensorflow():
    code = (
        "import sys, tensorflow_datasets as tfds\n"
        "from tensorflow_datasets.core.download import checksums\n"
        "from imaml_jax.data import omniglot\n"
        "infos = checksums.load_url_infos(tfds.core.tfds_path('url_checksums/omniglot.txt'))\n"
        "assert all(omniglot._URL + name in infos for name in omniglot.ARCHIVES)\n"
        "assert 'tensorflow' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_cache_root(monkeypatch, tmp_path):
    assert cache.cache_root() == tmp_path / "cache"
    assert cache.cache_root(tmp_path / "other") == tmp_path / "other"
    monkeypatch.delenv("IMAML_CACHE_DIR")
    assert cache.cache_root().parts[-2:] == (".cache", "imaml_jax")
