"""Published accuracies in per cent: mean, and half-width of the interval or None.

Those of LEO are in `leo.py`, the returns of navigation in `navigation.py`.
"""

from collections.abc import Mapping

Values = Mapping[tuple[int, int], tuple[float, float | None]]

OWN_PROTOCOL = {
    "maml": "finn",
    "fomaml": "finn",
    "reptile": "reptile",
    "reptile_transductive": "reptile",
    "imaml": "imaml_paper",
    "imaml_hf": "imaml_paper",
    "mamlpp": "mamlpp_paper",
    "anil": "finn",
}
"""The protocol that an algorithm's published values belong to."""
SPREADS = {
    "mamlpp": "standard deviation over 3 seeds",
    "anil": "spread over 3 seeds",
}
"""What the half-width is, where it is no 95% interval over test tasks."""

_SHAPES = ((5, 1), (5, 5), (20, 1), (20, 5))
# Rajeswaran et al., NeurIPS 2019, table 2, which takes the first four rows from their own papers.
_OMNIGLOT: dict[str, tuple[tuple[float, float], ...]] = {
    "maml": ((98.7, 0.4), (99.9, 0.1), (95.8, 0.3), (98.9, 0.2)),
    "fomaml": ((98.3, 0.5), (99.2, 0.2), (89.4, 0.5), (97.9, 0.1)),
    "reptile": ((95.39, 0.09), (98.90, 0.10), (88.14, 0.15), (96.65, 0.33)),
    "reptile_transductive": ((97.68, 0.04), (99.48, 0.06), (89.43, 0.14), (97.12, 0.32)),
    "imaml": ((99.16, 0.35), (99.67, 0.12), (94.46, 0.42), (98.69, 0.1)),
    "imaml_hf": ((99.50, 0.26), (99.74, 0.11), (96.18, 0.36), (99.14, 0.1)),
}
PUBLISHED: dict[str, dict[str, Values]] = {
    "omniglot": {
        **{name: dict(zip(_SHAPES, row, strict=True)) for name, row in _OMNIGLOT.items()},
        # Antoniou et al., ICLR 2019 (an ensemble), Raghu et al., ICLR 2020.
        "mamlpp": {(5, 1): (99.47, None), (20, 1): (97.65, 0.05), (20, 5): (99.33, 0.03)},
        "anil": {(20, 1): (96.2, 0.5), (20, 5): (98.0, 0.3)},
    },
    # Five ways: Rajeswaran et al., NeurIPS 2019, table 3, with the five-shot values from the papers
    # that it cites. Ten ways, printed without intervals: Reptile.
    "mini_imagenet": {
        "maml": {(5, 1): (48.70, 1.84), (5, 5): (63.11, 0.92)},
        "fomaml": {(5, 1): (48.07, 1.75), (5, 5): (63.15, 0.91)},
        "reptile": {
            (5, 1): (47.07, 0.26),
            (5, 5): (62.74, 0.37),
            (10, 1): (31.1, None),
            (10, 5): (44.7, None),
        },
        "reptile_transductive": {
            (5, 1): (49.97, 0.32),
            (5, 5): (65.99, 0.58),
            (10, 1): (32.0, None),
            (10, 5): (47.6, None),
        },
        "imaml": {(5, 1): (48.96, 1.84)},
        "imaml_hf": {(5, 1): (49.30, 1.88)},
        # Antoniou et al., ICLR 2019 (an ensemble), Raghu et al., ICLR 2020.
        "mamlpp": {(5, 1): (52.15, 0.26), (5, 5): (68.32, 0.44)},
        "anil": {(5, 1): (46.7, 0.4), (5, 5): (61.5, 0.5)},
        # Finn et al., NeurIPS 2018, and Yoon et al., NeurIPS 2018; a re-run of the latter gave
        # 44.46.
        "platipus": {(5, 1): (50.13, 1.86)},
        "bmaml": {(5, 1): (53.80, None)},
    },
}
"""By data set, algorithm, and `(ways, shots)`."""
