"""Splits of one's own classes."""

import pytest

from imaml_jax.data import class_splits
from imaml_jax.data.archives import DataError

NAMES = [f"class{i}" for i in range(10)]


def test_a_seeded_split_has_the_counts_and_follows_the_seed_alone():
    split = class_splits.seeded_split(NAMES, (6, 1, 3))
    assert [list(split.values()).count(s) for s in ("train", "val", "test")] == [6, 1, 3]
    assert split == class_splits.seeded_split(reversed(NAMES), (6, 1, 3))
    assert split != class_splits.seeded_split(NAMES, (6, 1, 3), seed=1)
    assert [n for n in NAMES if split[n] != "train"] == ["class0", "class1", "class3", "class7"]
    for counts in ((6, 1, 2), (11, 0, -1), (5, 5)):
        with pytest.raises(ValueError, match="add up to the 10 classes"):
            class_splits.seeded_split(NAMES, counts)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.json", '{"ant": "train", "bee, red": "validation", "cät": "TEST"}'),
        ("a.csv", 'Class,split\r\nant,train\r\n\r\n"bee, red",val\r\ncät, test\r\n'),
        ("a.csv", "class;split\nant;train\nbee, red;val\ncät;test\n"),
        ("a.csv", "\ufeffclass,split\nant,train\n'bee, red',val\ncät,test".replace("'", '"')),
    ],
)
def test_files_of_splits(tmp_path, name, text):
    (tmp_path / name).write_text(text, encoding="utf-8")
    split = {"ant": "train", "bee, red": "val", "cät": "test"}
    assert class_splits.read_split(tmp_path / name) == split
    class_splits.write_split(tmp_path / "again.json", split)
    assert class_splits.read_split(tmp_path / "again.json") == split


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.json", "", "found none"),
        ("a.json", "[]", "found none"),
        ("a.json", '["ant"]', "found none"),
        ("a.json", '{"ant": "train"', "found none"),
        ("a.json", "[" * 10**5, "found none"),
        ("a.json", '{"ant": "training"}', "class 'ant' has split 'training'"),
        ("a.json", '{"train": ["ant"]}', "class 'train' has split "),
        ("a.json", '{"ant": "train", "ant": "test"}', "names class 'ant' twice"),
        ("a.csv", "ant,train\n", "found none"),
        ("a.csv", "class,split\nant\n", "class 'ant' has split ''"),
        ("a.csv", "class,split\n,train\n", "class '' has split 'train'"),
    ],
)
def test_files_of_another_form(tmp_path, name, text, message):
    (tmp_path / name).write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match=message):
        class_splits.read_split(tmp_path / name)


def test_files_that_cannot_be_read(tmp_path):
    (tmp_path / "a.csv").write_bytes(b"\xff\xfe\xff")
    for path in (tmp_path / "a.csv", tmp_path / "b.csv", tmp_path):
        with pytest.raises(DataError, match=r"Cannot read the split file .*Write a JSON object"):
            class_splits.read_split(path)


def test_a_split_is_of_the_classes_that_are_there():
    class_splits.check_split({"a": "train", "b": "test"}, ["b", "a"], "here")
    with pytest.raises(DataError, match="here: class 'b' has no split"):
        class_splits.check_split({"a": "train"}, ["a", "b"], "here")
    with pytest.raises(DataError, match=r"names class 'b', 'c', 'd' \(and 1 more\), which has no"):
        class_splits.check_split(dict.fromkeys("abcde", "test"), ["a"], "here")
