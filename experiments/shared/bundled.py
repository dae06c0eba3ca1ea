"""The data sets that come with scikit-learn, for experiments that need no download."""

from collections.abc import Sequence
from typing import Literal

import numpy as np

from imaml_jax.types import Batch

Name = Literal["breast_cancer", "diabetes", "digits"]


def load(name: Name) -> Batch:
    """One of scikit-learn's bundled data sets, NumPy's arrays in float64; pixels lie in [0, 1].

    Raises:
      ValueError: scikit-learn is missing.
    """
    try:
        from sklearn import datasets
    except ImportError as error:
        raise ValueError(
            f"data set {name!r} comes with scikit-learn, which is missing: pip install scikit-learn"
        ) from error
    found = getattr(datasets, f"load_{name}")()
    inputs = found.data / 16 if name == "digits" else found.data
    return Batch(inputs, found.target)


def split(data: Batch, sizes: Sequence[int], rng: np.random.Generator) -> list[Batch]:
    """Random disjoint parts of the given sizes, and last a part of all other examples.

    Raises:
      ValueError: sizes that leave nothing for the last part.
    """
    total = len(data.targets)
    if min(sizes) < 1 or sum(sizes) >= total:
        raise ValueError(
            f"parts of {' + '.join(map(str, sizes))} examples must each have at least 1 and leave "
            f"some of the {total} for the test: lower the sizes"
        )
    order = np.split(rng.permutation(total), np.cumsum(sizes))
    return [Batch(data.inputs[rows], data.targets[rows]) for rows in order]
