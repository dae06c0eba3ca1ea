"""A fixture that the tests of policies share with those of learners."""

from tests.learners.conftest import finite_differences

__all__ = ["finite_differences"]
