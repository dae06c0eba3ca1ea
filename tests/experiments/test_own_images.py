"""Own images: what experiments.folder chooses, and classification by the shipped models."""

import csv
import dataclasses
import json
import os
import shutil
from pathlib import Path
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from experiments import classify, export, folder
from experiments.shared import common, few_shot, saved_model
from imaml_jax import protocols
from imaml_jax.data import class_splits, glyphs, images, omniglot, own
from imaml_jax.protocols import model_file

MODELS = Path(__file__).resolve().parents[2] / "experiments" / "models"
GLYPHS = MODELS / "glyphs_5way_1shot"
CHARACTERS = "R&Δ☂@"


def class_folders(path, sizes):
    for name, size in sizes.items():
        (path / name).mkdir(parents=True, exist_ok=True)
        for i in range(size):
            Image.new("L", (4, 4)).save(path / name / f"{i}.png")
    return path


@pytest.mark.parametrize(
    ("classes", "ways", "shares", "counts"),
    [
        (100, 5, None, (70, 15, 15)),
        (20, 5, None, (10, 5, 5)),
        (19, 5, None, (14, 0, 5)),
        (10, 5, None, (5, 0, 5)),
        (4, 2, None, (2, 0, 2)),
        (20, 5, (0.5, 0.25, 0.25), (10, 5, 5)),
        (20, 5, (0.75, 0, 0.25), (15, 0, 5)),
    ],
)
def test_counts_of_classes(tmp_path, classes, ways, shares, counts):
    config = folder.Config.of(data_dir=tmp_path, ways=ways, shares=shares)
    listed = own.Folder(tmp_path, {}, {f"c{i}": [] for i in range(classes)}, None)
    split = list(folder.split_classes(config, listed).values())
    assert tuple(split.count(name) for name in images.SPLITS) == counts


@pytest.mark.parametrize(
    ("sizes", "settings", "message"),
    [
        ({"a": 9, "b": 9, "c": 9}, {"ways": 2}, r"ways=2 needs at least 4 classes.*has 3\. Add"),
        ({c: 9 for c in "abcd"}, {"ways": 2, "shares": (0.5, 0.25, 0.25)}, "are split 2/1/1"),
        ({c: 9 for c in "abcd"}, {"ways": 2, "shares": (0.5, 0.5, 0.5)}, "add up to 1"),
        ({"a": 1, "b": 9, "c": 9, "d": 9}, {"ways": 2}, "class 'a' has 1 images, tasks take 1"),
        ({c: 9 for c in "abcd"}, {"ways": 2, "queries": 9}, "queries=9 query examples"),
        ({"train/a": 2, "train/b": 2, "test/c": 2}, {"ways": 2}, "are split 2/0/1"),
        ({"train/a": 2, "val/b": 2}, {}, r"found train/, val/, so that test/ is missing\. Add it"),
        ({".": 3}, {}, r"found 3 images directly in it\. Make .*/<class>/"),
    ],
)
def test_folders_that_are_refused(tmp_path, sizes, settings, message):
    path = class_folders(tmp_path / "data", sizes)
    with pytest.raises(ValueError, match=message):
        folder.prepare(folder.Config.of(data_dir=path, **settings))


def test_a_split_file_and_folders_of_splits(tmp_path):
    path = class_folders(tmp_path / "data", {c: 4 for c in "abcd"})
    chosen = {"a": "test", "b": "train", "c": "train", "d": "test"}
    (tmp_path / "split.json").write_text(json.dumps(chosen))
    config = folder.Config.of(data_dir=path, ways=2, split_file=tmp_path / "split.json")
    assert folder.split_classes(config, own.open_folder(path)) == chosen
    assert folder.choose_queries(config, own.open_folder(path)) == 3
    path = class_folders(tmp_path / "split", {f"{chosen[c]}/{c}": 1 for c in "abcd"})
    config = folder.Config.of(data_dir=path, ways=2)
    assert folder.split_classes(config, own.open_folder(path)) == chosen


def test_a_place_for_a_model_is_tried_before_the_training(tmp_path, capsys):
    images_of = jnp.zeros((1, 8, 8, 1), jnp.uint8)
    splits = mock.Mock(train=mock.Mock(images=images_of))
    saved_model.check(tmp_path / "some" / "model", splits)
    assert not any((tmp_path / "some" / "model").iterdir())
    (tmp_path / "picture.png").write_text("")
    with pytest.raises(ValueError, match=r"model=.*model cannot be written .*choose another"):
        saved_model.check(tmp_path / "picture.png" / "model", splits)
    assert capsys.readouterr().out == ""
    (tmp_path / "model.json").write_text("{}")
    saved_model.check(tmp_path, splits)
    assert "holds a model already, which this run replaces" in capsys.readouterr().out


def test_pictures_are_turned_laid_on_white_and_made_grey(tmp_path):
    picture = Image.fromarray(np.arange(16, dtype=np.uint8).reshape(4, 4) * 16)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned by a quarter
    picture.save(tmp_path / "turned.png", exif=exif)
    Image.new("RGBA", (4, 4), (0, 0, 0, 0)).save(tmp_path / "clear.png")

    def decode(name):
        return images.decode(images.Source(name, (tmp_path / name).read_bytes), 4, 1)

    np.testing.assert_array_equal(decode("turned.png")[..., 0], np.rot90(picture, -1))
    np.testing.assert_array_equal(decode("clear.png"), np.full((4, 4, 1), 255))


# --- the shipped models


def drawings(path, characters, numbers, invert=False):
    """Drawings of characters in class folders, larger than the model's images and coloured."""
    faces = glyphs._load_faces(glyphs._FACES)
    for character in characters:
        usable = [face for face in faces if ord(character) in face.codes]
        place = path / f"U+{ord(character):04X}"
        place.mkdir(parents=True)
        for i in numbers:
            rng = np.random.RandomState(i)
            pixels = glyphs._example(usable[i % len(usable)], ord(character), rng)
            picture = Image.fromarray(255 - pixels if invert else pixels).convert("RGB")
            picture.resize((90, 80)).save(place / f"{i}.jpg")
    return path


@pytest.fixture
def classified(tmp_path, capsys):
    def call(model, support, query, **settings):
        config = classify.Config(model, support, query, tmp_path / "out.put", **settings)
        with mock.patch.object(common, "cache_compilations"):
            results = classify.main(config)
        return results, capsys.readouterr()

    return call


def test_the_shipped_model_of_glyphs_classifies_new_characters(tmp_path, classified):
    assert all(glyphs._split_of(ord(c)) == 2 for c in CHARACTERS)  # of the test split
    support = drawings(tmp_path / "support", CHARACTERS, range(1))
    query = drawings(tmp_path / "query", CHARACTERS, range(1, 5))
    results, printed = classified(GLYPHS, support, query)
    assert results["accuracy"] >= 0.8 and "accuracy on 20 query images" in printed.out
    assert "warning" not in printed.err
    with (tmp_path / "out.put.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["predicted"] for row in rows] == results["predicted"]
    for row in rows:
        assert row["file"].startswith(row["class"])
        assert abs(sum(float(v) for k, v in row.items() if k.startswith("p(")) - 1) < 1e-3
    with Image.open(tmp_path / "out.put.png") as picture:
        assert picture.width > 500


def test_images_that_are_turned_round_are_noticed(tmp_path):
    model = model_file.load_model(GLYPHS).description
    dark = drawings(tmp_path / "dark", CHARACTERS, range(1), invert=True)
    light = drawings(tmp_path / "light", CHARACTERS, range(1))
    dark, light = (classify.read_support(path, model) for path in (dark, light))
    for support, query, remedy in ((light, dark, "query"), (dark, light, "support")):
        warning = classify.look_inverted(model, support, query)
        assert warning.startswith(f"{remedy} images look inverted")
        assert f"--invert {remedy} turns" in warning
    assert "--invert both" in classify.look_inverted(model, dark, dark)
    assert classify.look_inverted(model, light, light) is None
    unsure = dataclasses.replace(model, brightness=0.5)
    assert "--invert query" in classify.look_inverted(unsure, light, dark)
    assert classify.look_inverted(unsure, dark, dark) is None


def test_a_prediction_depends_on_no_other_query_image():
    protocol = protocols.get("common", algorithm="fomaml", ways=2, shots=1)
    protocol = protocol.with_settings({"filters": 2, "num_blocks": 1, "num_steps": 1})
    rng, shape = np.random.default_rng(0), (1, 8, 8, 1)
    learner = protocol.build(2)
    like = jax.eval_shape(learner.init, jax.random.key(0), jax.ShapeDtypeStruct(shape, "float32"))
    params = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape) / 9, "float32"), like)
    description = model_file.load_model(GLYPHS).description
    description = dataclasses.replace(description, protocol=protocol, ways=2)
    model = model_file.Model(learner, params, description)

    def pictures(labels):
        pixels = rng.integers(0, 256, (len(labels), *shape[1:]), np.uint8)
        return classify.Images([""] * len(labels), pixels, labels)

    support, query = pictures(["a", "b"]), pictures([None] * 3)
    first = query._replace(pixels=query.pixels[:1])
    for together in (False, True):
        all_three, alone = (
            classify.classify(model, support, q, ["a", "b"], together=together)
            for q in (query, first)
        )
        assert np.allclose(all_three[0], alone[0], atol=1e-5) is not together


def test_folders_that_classify_refuses(tmp_path):
    model = model_file.load_model(GLYPHS).description
    support = class_folders(tmp_path / "support", {c: 1 for c in "abcdef"})
    message = (
        r"6 classes \('a', 'b', 'c' \(and 3 more\)\).*ways=5 apart.*Take classes away, or train"
    )
    with pytest.raises(ValueError, match=message):
        classify.read_support(support, model)
    with pytest.raises(ValueError, match=r"support=.*absent: expected a folder.*that is there\."):
        classify.read_support(tmp_path / "absent", model)
    few = class_folders(tmp_path / "few", {"a": 1, "b": 0})
    (few / "c.heic").touch()
    message = r"1 classes \('a'; passed over class folders without images: 'b'; files that are no "
    message += r"images: 'c.heic'\), .*Add classes, of any other images$"
    with pytest.raises(ValueError, match=message):
        classify.read_support(few, model)
    with pytest.raises(ValueError, match=r"no class of the support: f \(classes: a, b"):
        classify.read_query(support, model, list("abcde"))
    (tmp_path / "empty").mkdir()
    for name, message in (("empty", "found none"), ("absent", "expected a folder")):
        with pytest.raises(ValueError, match=message):
            classify.read_query(tmp_path / name, model, ["a"])


def test_support_that_misleads_is_warned_of():
    pixels = np.arange(4, dtype=np.uint8).reshape(4, 1, 1, 1)
    support = classify.Images(list("0123"), pixels, ["a", "a", "b", "b"])
    query = classify.Images(["x", "y"], pixels[:2] + 3, ["b", "a"])
    assert classify.uneven(support) is None
    assert "2 images or fewer are predicted less often: 'b', 'c'. " in classify.uneven(
        support._replace(labels=[*"aabc"])
    )
    assert "look the same as support images: 'x'. " in classify.seen(support, query)
    assert classify.seen(support, query._replace(pixels=pixels[:2] + 9)) is None


def test_what_is_passed_over_is_said(tmp_path, capsys):
    path = class_folders(tmp_path / "data", {**{c: 4 for c in "abcd"}, "e": 0})
    (path / "a" / "x.tif").touch()
    said = "class folders without images: 'e'; files that are no images: 'a/x.tif'"
    folder.prepare(folder.Config.of(data_dir=path, ways=2))
    assert f"queries a class; passed over {said}" in capsys.readouterr().out
    split = class_folders(tmp_path / "split", {"train/a": 1, "test/b": 1, "test/c": 0})
    assert own.open_folder(split).passed_over == "class folders without images: 'test/c'"


def test_the_split_that_is_kept_is_that_of_the_run(tmp_path):
    path = class_folders(tmp_path / "data", {c: 4 for c in "abcd"})
    config = folder.Config.of(data_dir=path, ways=2, model=None, workdir=tmp_path)
    with mock.patch.object(few_shot, "run", lambda *_: shutil.rmtree(path)):  # a drive is gone
        folder.main(config)
    assert sorted(class_splits.read_split(tmp_path / "split.json")) == list("abcd")


@pytest.mark.parametrize("text", ["[]", "[" * 10**5])
def test_runs_of_another_form_are_not_exported(tmp_path, text):
    for name in ("config", "results"):
        (tmp_path / f"{name}.json").write_text(text)
    with pytest.raises(ValueError, match=r"holds no run of experiments\.folder"):
        export.read_run(export.Config(tmp_path, tmp_path))
    assert export._of_run(tmp_path) == {}


def test_names_that_are_not_utf_8(tmp_path):
    model = model_file.load_model(GLYPHS).description
    path = class_folders(tmp_path, {"a": 1})
    (path / "a" / "0.png").rename(path / os.fsdecode(b"a/\xff.png"))
    query = classify.read_query(path, model, ["a"])
    results = {"classes": ["a"], "predicted": ["a"], "probabilities": [[1.0]]}
    classify.write_table(tmp_path / "table.csv", query, results)
    assert r"a/\udcff.png,a,a,1.0000" in (tmp_path / "table.csv").read_text(encoding="utf-8")


def test_shipped_models_are_small():
    for path in MODELS.iterdir():
        assert sum(file.stat().st_size for file in path.iterdir()) < 2**20
        assert model_file.load_model(path).description.run["command"].startswith("python -m")


@pytest.mark.slow
@pytest.mark.parametrize("path", sorted(MODELS.iterdir()), ids=lambda path: path.name)
def test_a_shipped_model_has_the_accuracy_that_it_states(path, request):
    """On the test tasks of its protocol, from the real data."""
    _, meta_params, found = model_file.load_model(path)
    if found.dataset == "glyphs":
        splits = glyphs.load()
    else:
        assert found.dataset == "Omniglot"
        data_dir = request.getfixturevalue("data_dir")
        splits = omniglot.load(data_dir, split=found.protocol.tasks.split)
    config = few_shot.Config.of(ways=found.ways, shots=found.shots)
    for protocol, mean, ci95 in (
        (found.protocol, found.test_accuracy, found.test_ci95),
        (model_file.independent(found.protocol), found.test_accuracy_alone, found.test_ci95_alone),
    ):
        measured = saved_model.measure(config, protocol, splits, meta_params)
        assert abs(measured.mean - mean) <= ci95, (protocol.learner, measured.mean)
        assert len(measured.per_task) == found.test_tasks
    assert abs(found.test_accuracy - found.test_accuracy_unrounded) < 0.5 * found.test_ci95
