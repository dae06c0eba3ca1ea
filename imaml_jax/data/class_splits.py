"""Which of one's own classes are for training, validation and test."""

import csv
import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from imaml_jax.data.archives import DataError, explained
from imaml_jax.data.images import SPLITS

NAMES = {"train": "train", "val": "val", "validation": "val", "test": "test"}
_FORM = (
    'Write a JSON object {"class": "train", ...} or a CSV file with the line class,split and then '
    "one line for each class; a split is train, validation or test."
)


def split_of(name: str, kind: str = "class") -> str:
    """Returns the split of a class, about 70/15/15, from a hash of its name and of what it is.

    It depends on nothing else, so that a class stays where it is as others are added.
    """
    draw = hashlib.sha256(f"{kind} {name}".encode()).digest()[0] / 256
    return "train" if draw < 0.7 else "val" if draw < 0.85 else "test"


def seeded_split(classes: Iterable[str], counts: Sequence[int], seed: int = 0) -> dict[str, str]:
    """Splits classes at random.

    Args:
      classes: their names; the order has no effect.
      counts: how many are for training, validation and test; together as many as there are.
      seed: of the random order.

    Returns:
      The split of each class: "train", "val" or "test".

    Raises:
      ValueError: counts that are negative or do not add up.
    """

    def draw(name: str) -> str:
        return hashlib.sha256(f"{seed} {name}".encode()).hexdigest()

    order = sorted(set(classes), key=draw)
    if len(counts) != 3 or min(counts) < 0 or sum(counts) != len(order):
        raise ValueError(
            f"counts={tuple(counts)} must be three numbers of at least 0 that add up to the "
            f"{len(order)} classes"
        )
    splits = [split for split, count in zip(SPLITS, counts, strict=True) for _ in range(count)]
    return dict(sorted(zip(order, splits, strict=True)))


def read_split(path: str | os.PathLike) -> dict[str, str]:
    """Reads the split of each class from a file.

    Args:
      path: a JSON object of class to split, or a CSV file with the columns class and split, between
        commas or semicolons; a split is "train", "validation" (or "val") or "test".

    Returns:
      The split of each class: "train", "val" or "test".

    Raises:
      DataError: the file is not there or of another form, or names a class twice; a ValueError too.
    """
    path = Path(path).expanduser()
    with explained(f"Cannot read the split file {path}", _FORM, (OSError, UnicodeDecodeError)):
        text = path.read_text(encoding="utf-8-sig")
    pairs = _json_pairs(text) if path.suffix.lower() == ".json" else _csv_pairs(text)
    if not pairs:
        raise DataError(f"{path}: expected the split of each class, found none. {_FORM}")
    split = {}
    for pair in pairs:
        name, value = pair if len(pair) == 2 else (pair[0] if pair else "", "")
        if not isinstance(value, str) or value.strip().lower() not in NAMES or not name:
            raise DataError(f"{path}: class {name!r} has split {str(value)[:40]!r}. {_FORM}")
        if name in split:
            raise DataError(f"{path} names class {name!r} twice. Take one of the two out.")
        split[name] = NAMES[value.strip().lower()]
    return split


def write_split(path: str | os.PathLike, split: Mapping[str, str]) -> None:
    """Writes a JSON file that `read_split` reads."""
    Path(path).write_text(json.dumps(split, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def check_split(split: Mapping[str, str], classes: Iterable[str], where: str) -> None:
    """Raises DataError unless the split is of exactly these classes."""
    classes = set(classes)
    without = sorted(classes - set(split))
    absent = sorted(set(split) - classes)
    if without:
        raise DataError(
            f"{where}: class {some(without)} has no split. Name every class in the split, or take "
            "its folder away."
        )
    if absent:
        raise DataError(
            f"{where}: the split names class {some(absent)}, which has no images there. Take it "
            "out of the split, or add its folder."
        )


def _json_pairs(text: str) -> Sequence[Sequence]:
    try:
        pairs = json.loads(text, object_pairs_hook=list)  # which shows what is there twice
    except (ValueError, RecursionError):
        return []
    return pairs if isinstance(pairs, list) and all(isinstance(p, tuple) for p in pairs) else []


def _csv_pairs(text: str) -> Sequence[Sequence]:
    try:
        mark = ";" if ";" in text.partition("\n")[0] else ","  # by the spreadsheet's language
        table = csv.reader(text.splitlines(), delimiter=mark)
        rows = [[c.strip() for c in row] for row in table if any(row)]
    except csv.Error:
        return []
    return rows[1:] if rows and [c.lower() for c in rows[0]] == ["class", "split"] else []


def some(names: Sequence[str]) -> str:
    """The first of the names, and how many more there are."""
    more = f" (and {len(names) - 3} more)" if len(names) > 3 else ""
    return ", ".join(map(repr, names[:3])) + more
