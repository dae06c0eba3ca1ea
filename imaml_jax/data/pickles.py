"""Pickles read as data: arrays, containers, text and numbers. Nothing in them is ever run."""

import pickle
import re
from pathlib import Path
from typing import Any

import numpy as np

from imaml_jax.data.archives import explained, readable

_SAFE_DTYPE = r"[biuf]\d{1,2}|[SU]\d{1,6}"  # numbers and text; no objects, no records


def load(path: Path) -> Any:
    """Loads a pickle that holds nothing but data, also one that Python 2 wrote.

    A pickle is a program. Here its calls reach only the functions below, which stand in for those
    by which NumPy rebuilds arrays; NumPy's own are not exposed to what a file claims.

    Args:
      path: of the file.

    Returns:
      What was pickled; in place of each NumPy array an object that `np.asarray` takes.

    Raises:
      DataError: the file cannot be read, is damaged, or asks for anything else.
    """
    with (
        explained(
            f"{path}: expected a pickle of NumPy arrays, lists, dicts, text and numbers",
            "Nothing in it was run. Get a fresh copy from a source that you trust, or use the "
            "image files instead.",
            Exception,  # bytes that are no pickle raise nearly anything
        ),
        readable(path),
        open(path, "rb") as file,
    ):
        return _Unpickler(file, encoding="latin1").load()


class _Unpickler(pickle._Unpickler):  # in Python: the one in C lets a file claim all memory
    def find_class(self, module: str, name: str) -> Any:
        stand_in = _STAND_INS.get((module.replace("numpy.core.", "numpy._core."), name))
        if stand_in is None:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which is not data")
        return stand_in


class _Dtype:
    def __init__(self, code: str, *_):
        if not re.fullmatch(_SAFE_DTYPE, code):
            raise pickle.UnpicklingError(f"an array has dtype {code!r}, which is not plain data")
        self.value = np.dtype(code)

    def __setstate__(self, state):
        self.value = self.value.newbyteorder(state[1])


class _Array:
    def __init__(self, *_):
        self.values = np.zeros(0, np.uint8)

    def __setstate__(self, state):
        _, shape, dtype, is_fortran, content = state
        self.values = _frombuffer(content, dtype, shape, "F" if is_fortran else "C").values

    def __array__(self, dtype=None, copy=None):
        return np.array(self.values, dtype=dtype, copy=copy)


def is_array(x: Any) -> bool:
    """Whether `load` read it as an array."""
    return isinstance(x, _Array)


def _frombuffer(content, dtype: _Dtype, shape, order) -> _Array:
    array = _Array()
    array.values = np.frombuffer(_encode(content), dtype.value).reshape(shape, order=order)
    return array


def _scalar(dtype: _Dtype, content):
    return np.frombuffer(_encode(content), dtype.value)[0].item()


def _encode(content=b"", encoding="latin1"):
    """Bytes as they are; text, which is how old protocols write bytes, as the bytes it stands for.

    Always by Latin-1: a file does not choose a codec.
    """
    return content.encode("latin1") if isinstance(content, str) else content


_STAND_INS = {
    ("numpy", "dtype"): _Dtype,
    ("numpy", "ndarray"): _Array,
    ("numpy._core.multiarray", "_reconstruct"): _Array,
    ("numpy._core.numeric", "_frombuffer"): _frombuffer,
    ("numpy._core.multiarray", "scalar"): _scalar,
    ("_codecs", "encode"): _encode,
    ("__builtin__", "bytes"): _encode,  # of nothing
}
