"""Fonts for class names: matplotlib's own, or one that is installed where that lacks their letters."""

import logging
import unicodedata
import warnings
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path

import matplotlib
from matplotlib.font_manager import FontProperties, findSystemFonts, fontManager
from matplotlib.ft2font import FT2Font
from PIL import ImageFont

logger = logging.getLogger(__name__)

_DEFAULT = str(Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf"))
_INVISIBLE = {"Cc", "Cf", "Cs", "Zs", "Zl", "Zp"}  # categories of characters that need no glyph, or can have none
_EMOJI_STYLE = "\N{VARIATION SELECTOR-16}"


def font_for(text: str, size: int) -> ImageFont.FreeTypeFont:
    """Return the font that draws a text, size in pixels; the default one, with boxes in it, if none is installed."""
    return _load(_file_for(text) or _DEFAULT, size)


def font_families(texts: Iterable[str]) -> list[str]:
    """Return the names of the fonts that draw some texts, for matplotlib, the default one first."""
    files = dict.fromkeys([_DEFAULT, *(_file_for(text) or _DEFAULT for text in texts)])
    for file in files:
        fontManager.addfont(file)
    return [FontProperties(fname=file).get_name() for file in files]


def warn_of_missing_letters(class_names: Sequence[str]) -> None:
    """Log the classes that no installed font can draw, once for each list of classes."""
    _warn(tuple(class_names))


@cache
def _warn(class_names: tuple[str, ...]) -> None:
    missing = [name for name in class_names if _file_for(name) is None]
    if missing:
        logger.warning("no installed font has all letters of these class names, which show boxes instead: %s", missing)


@cache
def _file_for(text: str) -> str | None:
    needed = {ord(c) for c in text if unicodedata.category(c) not in _INVISIBLE and c != _EMOJI_STYLE}
    if needed <= _letters(_DEFAULT):
        return _DEFAULT
    return next((file for file in _installed() if needed <= _letters(file)), None)


@cache
def _installed() -> list[str]:
    return sorted(findSystemFonts())


@cache
def _letters(file: str) -> frozenset[int]:
    """Code points that a font has glyphs for; none for a font of fixed sizes, or one that cannot be read."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            font = FT2Font(file)
        return frozenset(font.get_charmap() if font.scalable else ())
    except (OSError, RuntimeError):
        return frozenset()


@cache
def _load(file: str, size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(file, size)
