"""How algorithms are trained and judged, as data: one published source a file, and saved models.

Imports all wings but policies. Read `protocols.py` first.
"""

from imaml_jax.protocols.protocols import (
    ALGORITHMS,
    DATASETS,
    IMPLICIT,
    PROTOCOLS,
    Algorithm,
    Protocol,
    get,
)

__all__ = ["ALGORITHMS", "DATASETS", "IMPLICIT", "Algorithm", "PROTOCOLS", "Protocol", "get"]
