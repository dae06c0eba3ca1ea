"""Printed characters of many scripts, rendered from fonts that are installed anyway.

The data set that needs no download: for tutorials, tests and a first look. Its numbers compare with
no publication.
"""

import os
import unicodedata
from typing import Any, NamedTuple

import numpy as np

from imaml_jax.data.cache import cached_arrays
from imaml_jax.data.class_splits import split_of
from imaml_jax.data.episodes import Splits, from_class_arrays
from imaml_jax.data.images import SPLITS

SIDE = 28
EXAMPLES = 20
_SEED = 2019
_CANVAS = 3 * SIDE  # drawn three times as large, then averaged
_FONT_SIZE = 72
_INK_SIDE = 58.0  # longer side of an untransformed glyph on the canvas
_SAME = 0.87  # two characters whose normalised rasters correlate more are one class

# Where characters are taken from; where two look alike the earlier one stays.
_RANGES = (
    (0x0030, 0x0039, "digits"),
    (0x0041, 0x005A, "Latin capitals"),
    (0x0061, 0x007A, "Latin small letters"),
    (0x0391, 0x03C9, "Greek"),
    (0x0410, 0x044F, "Cyrillic"),
    (0x0531, 0x0587, "Armenian"),
    (0x10A0, 0x10FC, "Georgian"),
    (0x05D0, 0x05EA, "Hebrew"),
    (0x0621, 0x064A, "Arabic"),
    (0x07CA, 0x07EA, "N'Ko"),
    (0x0E81, 0x0EAE, "Lao"),
    (0x2D30, 0x2D65, "Tifinagh"),
    (0x1681, 0x169A, "Ogham"),
    (0x10300, 0x10323, "Old Italic"),
    (0xA4D0, 0xA4F7, "Lisu"),
    (0x1401, 0x1676, "Canadian syllabics"),
    (0x0180, 0x02AF, "Latin extensions and IPA"),
    (0x0370, 0x03FF, "archaic Greek and Coptic"),
    (0x0400, 0x052F, "Cyrillic extensions"),
    (0x0671, 0x06D3, "Arabic extensions"),
    (0x1D00, 0x1D2B, "phonetic small capitals"),
    (0x2C60, 0x2C7F, "Latin extended C"),
    (0xA722, 0xA7FF, "Latin extended D"),
    (0x0023, 0x0040, "signs"),
    (0x00A2, 0x00DF, "signs"),
    (0x20A0, 0x20BF, "currencies"),
    (0x2100, 0x214F, "letterlike signs"),
    (0x2190, 0x21FF, "arrows"),
    (0x2200, 0x22FF, "mathematical operators"),
    (0x2300, 0x23CE, "technical signs"),
    (0x2600, 0x26B8, "miscellaneous signs"),
    (0x2701, 0x27BE, "dingbats"),
)
_FACES = (
    *(f"DejaVuSans{style}" for style in ("", "-Bold", "-Oblique", "-BoldOblique")),
    *(f"DejaVuSerif{style}" for style in ("", "-Bold", "-Italic", "-BoldItalic")),
    *(f"DejaVuSansMono{style}" for style in ("", "-Bold", "-Oblique", "-BoldOblique")),
    *(f"STIXGeneral{style}" for style in ("", "Bol", "Italic", "BolIta")),
)
_LATIN_FACES = ("cmr10", "cmb10", "cmti10", "cmss10", "cmtt10")  # letters only: odd encodings


class _Face(NamedTuple):
    font: Any  # PIL.ImageFont.FreeTypeFont
    codes: frozenset[int]


def load(*, cache_dir: str | os.PathLike | None = None) -> Splits:
    """Loads, or renders at the first call, the glyph data set.

    Each class is one Unicode character, each of its 20 images one drawing of it: a font face (sans,
    serif, monospaced, mathematical; regular, bold, slanted) of those that have it, scaled to a
    common size, then a small random rotation, shear, stretch, shift and thickening. Characters that
    look the same, such as Latin A, Greek Alpha and Cyrillic A, or o and O, are one class. The split
    is by class, about 70/15/15, from a hash of the character, so that it does not change with the
    fonts' version.

    Polarity as in Omniglot: ink is 0, paper 255. Many characters are quarter turns of one another
    or symmetric, so sample with `rotations=None`.

    Args:
      cache_dir: default: the environment variable `IMAML_CACHE_DIR`, else `~/.cache/imaml_jax`.

    Returns:
      `Splits` with images uint8 `[classes * 20, 28, 28, 1]`, grouped by class.
    """
    arrays = _arrays(cache_dir)
    parts = np.array([_split_of(int(code)) for code in arrays["codes"]])
    return Splits(*(from_class_arrays(arrays["images"][parts == part]) for part in range(3)))


def characters(*, cache_dir: str | os.PathLike | None = None) -> tuple[str, str, str]:
    """Returns the characters of the three splits, in the order of their classes in `load`."""
    parts = ["", "", ""]
    for code in _arrays(cache_dir)["codes"]:
        parts[_split_of(int(code))] += chr(code)
    return parts[0], parts[1], parts[2]


def _arrays(cache_dir) -> dict[str, np.ndarray]:
    import matplotlib
    import PIL
    from PIL import features

    recipe = {
        "version": 1,
        "matplotlib": matplotlib.__version__,
        "pillow": PIL.__version__,
        "freetype": features.version("freetype2"),
    }

    def is_valid(stored: dict[str, np.ndarray]) -> bool:
        images, codes = stored["images"], stored["codes"]
        return images.dtype == np.uint8 and images.shape == (len(codes), EXAMPLES, SIDE, SIDE, 1)

    return cached_arrays("glyphs", recipe, _render_all, is_valid=is_valid, cache_dir=cache_dir)


def _split_of(code: int) -> int:
    """Returns 0, 1 or 2: training, validation or test."""
    return SPLITS.index(split_of(f"{code:06x}", "glyph"))


def _render_all() -> dict[str, np.ndarray]:
    faces, latin_faces = _load_faces(_FACES), _load_faces(_LATIN_FACES)
    codes = _distinct(_candidates(faces), faces)
    images = np.empty((len(codes), EXAMPLES, SIDE, SIDE, 1), np.uint8)
    for index, code in enumerate(codes):
        usable = [face for face in faces if code in face.codes]
        if chr(code).isascii() and chr(code).isalpha():
            usable += latin_faces
        rng = np.random.RandomState(_SEED + code)
        order = np.concatenate([rng.permutation(len(usable)) for _ in range(EXAMPLES)])[:EXAMPLES]
        for example, choice in enumerate(order):
            images[index, example, ..., 0] = _example(usable[choice], code, rng)
    return {"images": images, "codes": np.array(codes, np.int32)}


def _load_faces(names) -> list[_Face]:
    import matplotlib
    from matplotlib import ft2font
    from PIL import ImageFont

    folder = os.path.join(matplotlib.get_data_path(), "fonts", "ttf")
    faces = []
    for name in names:
        path = os.path.join(folder, f"{name}.ttf")
        font = ImageFont.truetype(path, _FONT_SIZE, layout_engine=ImageFont.Layout.BASIC)
        faces.append(_Face(font, frozenset(ft2font.FT2Font(path).get_charmap())))
    return faces


def _candidates(faces: list[_Face]) -> list[int]:
    """Letters, digits and signs that two faces have; no accents, no ligatures, no modifiers."""
    codes = {}
    for first, last, _ in _RANGES:
        for code in range(first, last + 1):
            kind = unicodedata.category(chr(code))
            wanted = kind in ("Lu", "Ll", "Lo", "Nd", "Sm", "Sc", "So") or (
                kind == "Po" and code < 0x100
            )
            accented = unicodedata.decomposition(chr(code))
            if wanted and not accented and code in faces[0].codes and code in faces[1].codes:
                codes[code] = None
    return list(codes)


def _distinct(codes: list[int], faces: list[_Face]) -> list[int]:
    """Leaves out blank characters and those that look like an earlier one."""
    shown, rasters = [], []
    for code in codes:
        ink = _ink(faces[0], code, 0)
        if ink is not None:
            raster = _place(ink, np.eye(2), (0.0, 0.0)).astype(np.float32).ravel()
            raster -= raster.mean()
            shown.append(code)
            rasters.append(raster / np.linalg.norm(raster))
    rasters = np.stack(rasters)
    same = rasters @ rasters.T >= _SAME
    kept = []
    for index in range(len(shown)):
        if not same[index, kept].any():
            kept.append(index)
    return [shown[index] for index in kept]


def _example(face: _Face, code: int, rng: np.random.RandomState) -> np.ndarray:
    angle, shear = np.deg2rad(rng.uniform(-9, 9)), rng.uniform(-0.15, 0.15)
    stretch = rng.uniform(0.82, 1.1, size=2)
    shift = rng.uniform(-5, 5, size=2)
    weight = rng.randint(0, 3)
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    linear = turn @ np.array([[1.0, shear], [0.0, 1.0]]) @ np.diag(stretch)
    return _place(_ink(face, code, weight), linear, shift)


def _ink(face: _Face, code: int, weight: int):
    """Returns a character as an image cropped to its ink (255), None where there is hardly any."""
    from PIL import Image, ImageDraw

    left, top, right, bottom = face.font.getbbox(chr(code), stroke_width=weight)
    if max(right - left, bottom - top) < _FONT_SIZE // 4:
        return None  # blank, or a dot
    image = Image.new("L", (right - left + 4, bottom - top + 4))
    position = (2 - left, 2 - top)
    ImageDraw.Draw(image).text(position, chr(code), 255, face.font, stroke_width=weight)
    box = image.getbbox()
    return image.crop(box) if box else None


def _place(ink, linear: np.ndarray, shift) -> np.ndarray:
    """Centres `ink` at a common size, applies `linear`, moves it by `shift`; dark on white."""
    from PIL import Image

    scale = _INK_SIDE / max(ink.size)
    inverse = np.linalg.inv(linear * scale)  # Pillow wants the map from the result to the source
    source_centre = np.array(ink.size) / 2
    offset = source_centre - inverse @ (np.array([_CANVAS / 2] * 2) + np.asarray(shift))
    data = (*inverse[0], offset[0], *inverse[1], offset[1])
    size = (_CANVAS, _CANVAS)
    placed = ink.transform(size, Image.Transform.AFFINE, data, Image.Resampling.BILINEAR)
    return 255 - np.asarray(placed.reduce(_CANVAS // SIDE))
