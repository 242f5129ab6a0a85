"""The fonts of class names: chosen by their letters, and a warning where none has them."""

import logging
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from PIL import Image
from PIL.ImageFont import FreeTypeFont

from ssd_fast.evaluation import fonts
from ssd_fast.evaluation.draw import GridCell, draw_detections, draw_grid
from ssd_fast.evaluation.fonts import font_families, font_for, warn_of_missing_letters
from ssd_fast.training.curves import plot_precision_recall

DEFAULT = "DejaVu Sans"
STIX = Path(matplotlib.get_data_path(), "fonts", "ttf", "STIXGeneral.ttf")
STIX_ONLY = "\N{LATIN SMALL LETTER S WITH PALATAL HOOK}"  # DejaVu lacks it
IN_NO_FONT = "\U000e0fff"


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """STIX is the only font besides the default one."""
    for cached in (fonts._file_for, fonts._warn):
        cached.cache_clear()
    monkeypatch.setattr(fonts, "_installed", lambda: ["/nowhere/lost.ttf", str(STIX)])


def family(font: FreeTypeFont) -> str | None:
    return font.getname()[0]


@pytest.mark.usefixtures("installed")
def test_the_default_font_gives_way_to_one_that_has_the_letters() -> None:
    assert family(font_for("кошка, chat, قط", 12)) == DEFAULT
    assert family(font_for(f"a {STIX_ONLY}", 12)) == "STIXGeneral"
    assert family(font_for(IN_NO_FONT, 12)) == DEFAULT
    assert font_families(["cat", STIX_ONLY, "dog"]) == [DEFAULT, "STIXGeneral"]


@pytest.mark.usefixtures("installed")
def test_a_label_shows_the_letter_instead_of_a_box() -> None:
    def label(name: str) -> np.ndarray:
        drawn = draw_detections(Image.new("RGB", (200, 100)), np.array([[10, 40, 190, 90]]), [name], class_names=[name])
        return np.asarray(drawn)[:40]

    assert not np.array_equal(label(STIX_ONLY), label(IN_NO_FONT))


@pytest.mark.usefixtures("installed")
def test_classes_that_no_font_can_draw_are_named_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, recwarn: pytest.WarningsRecorder
) -> None:
    names = ["cat", STIX_ONLY, f"x{IN_NO_FONT}", "with\N{VARIATION SELECTOR-16}style"]
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            draw_detections(Image.new("RGB", (50, 50)), np.zeros((0, 4)), [], class_names=names)
            plot_precision_recall(np.full((101, 4), 0.5), names, tmp_path / "curve.png")
        warn_of_missing_letters(names)
    (record,) = caplog.records
    assert repr(names[2]) in record.getMessage()
    assert not any(repr(name) in record.getMessage() for name in (names[0], names[1], names[3]))
    assert [str(warning.message) for warning in recwarn if "Glyph" in str(warning.message)] == []


def test_a_caption_that_is_not_utf8_can_be_drawn(tmp_path: Path) -> None:
    nothing = np.zeros((0, 4))
    cell = GridCell(Image.new("RGB", (9, 9)), nothing, [], nothing, [], np.zeros(0), caption="caf\udce9.jpg")
    draw_grid([cell], tmp_path / "grid.png")
    assert (tmp_path / "grid.png").is_file()
