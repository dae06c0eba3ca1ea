"""Packs arrays as text and writes the page: template, style, script and data in one file."""

import base64
import io
import json
from pathlib import Path
from typing import Any

import numpy as np

from experiments.shared import common
from imaml_jax.training.workdir import write_whole

_FOLDER = Path(__file__).parent
_SCRIPTS = ("state.js", "plot.js", "plane.js", "implicit.js", "figures.js")


def pack(array: Any, scale: float | None = None) -> dict[str, Any]:
    """An array as base64 text.

    Args:
      array: numbers, all finite.
      scale: None for floats of three bytes, the upper ones of little-endian float32 (relative error
        at most 2e-5); else they are kept as multiples of it in two bytes, at most 32767 of them.

    Returns:
      `shape`, `data` and, where it is given, `scale`; `unpack` is the inverse.

    Raises:
      ValueError: a number that is not finite.
    """
    array = np.asarray(array)
    if not np.isfinite(array).all():
        raise ValueError("the page cannot show numbers that are not finite; choose another seed")
    packed: dict[str, Any] = {"shape": list(array.shape)}
    if scale is None:
        largest = np.finfo(np.float32).max / 2
        bits = np.clip(array, -largest, largest).astype("<f4").ravel().view("<u4")
        raw = (bits + 0x80 >> 8).astype("<u4").view(np.uint8).reshape(-1, 4)[:, :3]
    else:
        raw = np.clip(np.rint(array / scale), -32767, 32767).astype("<i2")
        packed["scale"] = scale
    return packed | {"data": base64.b64encode(raw.tobytes()).decode()}


def unpack(packed: dict[str, Any]) -> np.ndarray:
    """The array that `pack` was given, as the page's script has it."""
    raw = base64.b64decode(packed["data"])
    if "scale" in packed:
        flat = np.frombuffer(raw, "<i2") * packed["scale"]
    else:
        whole = np.zeros((len(raw) // 3, 4), np.uint8)
        whole[:, 1:] = np.frombuffer(raw, np.uint8).reshape(-1, 3)
        flat = whole.view("<f4").ravel().astype(np.float64)
    return flat.reshape(packed["shape"])


def sprite(images: np.ndarray) -> str:
    """Grey images `[rows, columns, height, width]` as one PNG in a data address."""
    from PIL import Image

    rows, columns, height, width = images.shape
    sheet = images.transpose(0, 2, 1, 3).reshape(rows * height, columns * width)
    file = io.BytesIO()
    Image.fromarray(sheet).save(file, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def read(name: str) -> str:
    """One of the texts that stand beside this module."""
    return (_FOLDER / name).read_text(encoding="utf-8")


def render(data: dict[str, Any]) -> str:
    """The page as text."""
    parts = {
        "{{style}}": read("page.css"),
        "{{script}}": "\n".join(read(name) for name in _SCRIPTS),
        "{{data}}": common.json_for_html(data),
    }
    page = read("page.html")
    for mark, part in parts.items():
        page = page.replace(mark, part)
    return page


def data_of(page: str) -> dict[str, Any]:
    """The data inside a page."""
    _, _, rest = page.partition('<script type="application/json" id="data">')
    return json.loads(rest.partition("</script>")[0])


def write(path: Path, data: dict[str, Any]) -> int:
    """Writes the page whole; returns its bytes."""
    text = render(data)
    write_whole(path, text)
    return len(text.encode())
