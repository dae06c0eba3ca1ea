"""Records of settings: ranges, flat names, conditions, words; and the registry."""

import dataclasses
import math
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import pytest

from imaml_jax.learners import registry
from imaml_jax.learners.maml import MamlSettings
from imaml_jax.learners.settings import (
    Count,
    Fixed,
    NotNegative,
    Positive,
    Range,
    Record,
    Seed,
    When,
    check_arguments,
    field_docs,
    made_of,
    plain,
    range_of,
    settings_of,
    values_of,
    words,
)


@dataclasses.dataclass(frozen=True)
class Inner(Record):
    """Part of a record."""

    title: ClassVar[str] = "no setting"

    kind: Literal["sgd", "newton"] = "sgd"
    """Kind."""
    rate: Annotated[Positive, When(lambda own: own.kind == "sgd", "kind=newton")] = 0.1
    """Rate of
    descent."""


@dataclasses.dataclass(frozen=True)
class Whole(Record):
    """A record with another one in it."""

    name: Annotated[str, Fixed()]
    inner: Inner
    steps: Count = 5
    """Steps."""
    only: Literal["this"] = "this"
    """One value."""
    sizes: tuple[Count, ...] = (1, 2)
    """Sizes."""
    bound: NotNegative | None = None
    """Bound."""
    place: Path | None = None
    """Place."""

    def check_together(self) -> None:
        """Raises ValueError for a bound below the steps."""
        if self.bound is not None and self.bound < self.steps:
            raise ValueError(f"bound={self.bound} must be at least steps={self.steps}")


WHOLE = Whole("it", Inner())


@pytest.mark.parametrize(
    ("bounds", "inside", "outside", "said"),
    [
        (Range(least=1), (1, 2, 10**400), (0, -1, math.nan, math.inf), "at least 1"),
        (Range(above=0), (1e-300, 1), (0, -1, math.nan, math.inf), "above 0"),
        (Range(least=0, below=1), (0, 0.5), (-0.1, 1), "at least 0 and below 1"),
        (Range(most=3), (3, -5), (4, -math.inf), "at most 3"),
    ],
)
def test_ranges(bounds, inside, outside, said):
    assert all(value in bounds for value in inside)
    assert not any(value in bounds for value in outside)
    assert str(bounds) == said


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, r"steps=0 must be an integer, at least 1$"),
        ({"steps": 1.0}, r"steps=1\.0 must be an integer"),
        ({"steps": True}, "steps=True must be an integer"),
        ({"steps": None}, "steps=None must be an integer"),
        ({"rate": -1}, "rate=-1 must be a finite number, above 0"),
        ({"rate": 10**400}, "rate=10* must be a finite number"),
        ({"rate": "fast"}, "rate='fast' must be a finite number"),
        ({"rate": math.inf}, "rate=inf must be a finite number, above 0"),
        ({"kind": "newtn"}, "kind='newtn' must be one of sgd, newton; did you mean newton?"),
        ({"kind": "newton", "rate": 0.2}, "rate=0.2 has no effect on kind=newton; leave it out"),
        ({"sizes": (1, 0)}, r"sizes=\(1, 0\) must be a list, each an integer, at least 1"),
        ({"sizes": [1]}, r"sizes=\[1\] must be a list"),
        ({"bound": -1}, "bound=-1 must be a finite number, at least 0 or None"),
        ({"bound": 2}, "bound=2 must be at least steps=5"),
        ({"place": "here"}, "place='here' must be a path or None"),
        ({"stepz": 3}, "stepz=3 is not a setting here; did you mean steps?"),
        ({"name": "other"}, "name=other is not a setting here"),
        ({"only": "that"}, "only=that is not a setting here"),
        ({"title": "x"}, "title=x is not a setting here"),
    ],
)
def test_what_a_record_refuses(changes, message):
    with pytest.raises(ValueError, match=message):
        WHOLE.with_settings(changes)


def test_flat_names_reach_the_records_within():
    changed = WHOLE.with_settings({"rate": 0.5, "steps": 2, "bound": 2, "place": Path("x")})
    assert changed == Whole("it", Inner(rate=0.5), steps=2, bound=2, place=Path("x"))
    assert WHOLE == Whole("it", Inner())
    assert WHOLE.with_settings({"steps": 9, "bound": 9}).bound == 9  # checked together


def test_what_has_no_effect_is_not_listed():
    assert list(settings_of(WHOLE)) == ["kind", "rate", "steps", "sizes", "bound", "place"]
    newton = WHOLE.with_settings({"kind": "newton"})
    assert "rate" not in settings_of(newton) and "rate" in settings_of(newton, all_of_them=True)
    assert values_of(newton) == {
        "name": "it",
        "kind": "newton",
        "steps": 5,
        "only": "this",
        "sizes": (1, 2),
        "bound": None,
        "place": None,
    }
    assert words(newton) == "name it, kind newton, steps 5, only this, sizes (1, 2)"


def test_documentation_and_hints():
    assert field_docs(Inner) == {"kind": "Kind.", "rate": "Rate of descent."}
    hint = settings_of(WHOLE)["bound"].hint
    assert plain(hint) == float | None and range_of(hint) == "at least 0"
    assert plain(tuple[Seed, ...]) == tuple[int, ...]
    assert range_of(settings_of(WHOLE)["sizes"].hint) == "at least 1" and range_of(Any) == ""


def test_records_from_files():
    assert made_of(Inner, {"rate": 2}) == Inner(rate=2)
    with pytest.raises(ValueError, match=r"unknown field rat; did you mean rate\?"):
        made_of(Inner, {"rat": 2})
    with pytest.raises(ValueError, match="the field name is missing"):
        made_of(Whole, {"inner": Inner()})


def test_a_factory_checks_by_the_record():
    check_arguments("factory", Whole, {"steps": 1, "only": "whatever", "others": -1})
    check_arguments("factory", Inner, {"rate": jnp.float32(0.1)})
    jax.jit(lambda rate: check_arguments("factory", Inner, {"rate": rate}))(-1.0)  # not known
    with pytest.raises(ValueError, match="factory: steps=0 must be an integer, at least 1"):
        check_arguments("factory", Whole, {"steps": 0})


def test_names_are_not_used_twice():
    @dataclasses.dataclass(frozen=True)
    class Twice(Record):
        rate: Positive = 1.0
        inner: Inner = Inner()

    with pytest.raises(ValueError, match="two settings are named rate"):
        settings_of(Twice())


def test_a_name_belongs_to_one_algorithm():
    again = dataclasses.dataclass(frozen=True)(type("MamlSettings", (MamlSettings,), {}))
    again.__module__, again.__qualname__ = MamlSettings.__module__, MamlSettings.__qualname__
    assert registry.register(again) is registry.ALGORITHMS["maml"] is again  # a cell ran again
    assert registry.register(MamlSettings) is registry.ALGORITHMS["maml"] is MamlSettings
    taken = dataclasses.dataclass(frozen=True)(type("Other", (MamlSettings,), {}))
    with pytest.raises(ValueError, match="algorithm='maml' is registered already"):
        registry.register(taken)
    with pytest.raises(
        ValueError, match=r"algorithm='mamal' must be one of .* did you mean maml\?"
    ):
        registry.settings_class("mamal")


@pytest.mark.parametrize("kind", registry.ALGORITHMS.values(), ids=list(registry.ALGORITHMS))
def test_every_setting_of_an_algorithm_is_explained(kind):
    for name, setting in settings_of(kind(), all_of_them=True).items():
        assert setting.doc.endswith("."), name
    assert kind.title and kind.__doc__
