"""Drawings of detections: boxes, labels, colours and grids."""

import itertools
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from ssd_fast.evaluation import draw as drawing
from ssd_fast.evaluation.draw import GridCell, draw_detections, draw_grid
from ssd_fast.evaluation.fonts import font_for

GREY = (100, 100, 100)
CLASSES = tuple(f"class {k}" for k in range(12))


def plain(width: int, height: int) -> Image.Image:
    return Image.new("RGB", (width, height), GREY)


def boxes(*rows: Sequence[float]) -> np.ndarray:
    return np.array(rows, np.float64).reshape(-1, 4)


def draw(image: Image.Image, rows: np.ndarray, labels: list[str], scores: list[float] | None = None) -> np.ndarray:
    drawn = draw_detections(image, rows, labels, None if scores is None else np.array(scores), class_names=CLASSES)
    return np.array(drawn)


def colour(name: str) -> list[int]:
    return list(drawing._colour_of(name, CLASSES))


def test_a_box_is_drawn_on_its_edge_and_nowhere_else() -> None:
    pixels = draw(plain(640, 480), boxes([100, 200, 300, 400]), ["class 1"], [0.5])
    for edge in (pixels[200:400, 100], pixels[200:400, 299], pixels[200, 100:300], pixels[399, 100:300]):
        assert (edge == colour("class 1")).all()
    changed = (pixels != GREY).any(axis=2)
    assert not changed[206:394, 106:294].any()
    assert not changed[:, :100].any()
    assert not changed[400:].any()
    assert not changed[200:, 300:].any()
    label_rows, label_columns = np.nonzero(changed[:200])
    assert label_rows.min() > 170
    assert label_columns.max() < 250


def test_the_image_given_stays_as_it_was() -> None:
    image = plain(100, 100)
    draw(image, boxes([10, 10, 50, 50]), ["class 1"])
    assert (np.array(image) == GREY).all()


def test_no_detections_give_the_image_itself() -> None:
    assert (draw(plain(100, 80), boxes(), [], []) == GREY).all()


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "1", "CMYK"])
def test_any_mode_gives_rgb(mode: str) -> None:
    drawn = draw_detections(plain(100, 100).convert(mode), boxes([10, 40, 50, 90]), ["class 1"], class_names=CLASSES)
    assert (drawn.mode, drawn.size) == ("RGB", (100, 100))
    assert drawn.getpixel((10, 70)) == tuple(colour("class 1"))


def test_a_box_partly_outside_is_closed_at_the_border() -> None:
    pixels = draw(plain(640, 480), boxes([-50, 100, 100, 700]), ["class 2"])
    assert (pixels[100:, 0] == colour("class 2")).all()
    assert (pixels[479, :100] == colour("class 2")).all()
    assert (pixels[100:, 99] == colour("class 2")).all()


@pytest.mark.parametrize("box", [[-50, 10, -1, 50], [10, -50, 50, 0], [640, 10, 700, 50], [10, 480, 50, 500]])
def test_a_box_wholly_outside_leaves_no_trace(box: list[float]) -> None:
    assert (draw(plain(640, 480), boxes(box), ["class 1"]) == GREY).all()


def test_the_better_of_two_equal_boxes_is_on_top() -> None:
    box = [100, 200, 300, 400]
    for scores, top in (([0.4, 0.9], "class 2"), ([0.9, 0.4], "class 1")):
        pixels = draw(plain(640, 480), boxes(box, box), ["class 1", "class 2"], scores)
        assert (pixels[300, 100] == colour(top)).all()


def test_lines_and_letters_grow_with_the_image() -> None:
    def covered(side: int) -> float:
        box = [side * 0.3, side * 0.3, side * 0.7, side * 0.7]
        return float((draw(plain(side, side), boxes(box), ["class 1"], [0.5]) != GREY).any(axis=2).mean())

    assert covered(2400) == pytest.approx(covered(600), rel=0.15)


def test_the_colour_of_a_class_depends_on_nothing_else() -> None:
    alone = draw(plain(200, 200), boxes([20, 60, 90, 190]), ["class 3"])
    among = draw(plain(200, 200), boxes([100, 60, 190, 190], [20, 60, 90, 190]), ["class 5", "class 3"])
    assert alone[120, 20].tolist() == among[120, 20].tolist() == colour("class 3")
    assert drawing._colour_of("zebra", ()) == drawing._colour_of("zebra", CLASSES) == (0, 109, 204)


def test_colours_of_the_first_classes_are_told_apart() -> None:
    for one, other in itertools.combinations([np.array(colour(name)) for name in CLASSES], 2):
        assert np.abs(one - other).max() >= 50


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_labels_lie_inside_the_image(data: st.DataObject) -> None:
    width, height = (data.draw(st.integers(1, 300)) for _ in "wh")
    left, top = data.draw(st.integers(0, width - 1)), data.draw(st.integers(0, height - 1))
    box = left, top, data.draw(st.integers(left, width - 1)), data.draw(st.integers(top, height - 1))
    font = font_for("", data.draw(st.integers(8, 40)))
    text, size = drawing._fitting_text(data.draw(st.text("aW…é \n", max_size=30)), font, (width, height))
    if text:
        place = drawing._place_label(box, size, (width, height), [])
        assert place is not None
        assert place[0] >= 0
        assert place[1] >= 0
        assert place[2] < width
        assert place[3] < height
        assert font.getlength(text) <= place[2] - place[0]


def test_a_label_avoids_those_of_better_detections_and_gives_way_in_a_crowd() -> None:
    size = (60, 20)
    free = drawing._place_label((100, 100, 200, 200), size, (640, 480), [])
    assert free == (100, 80, 159, 99)
    moved = drawing._place_label((100, 100, 200, 200), size, (640, 480), [free])
    assert moved is not None
    assert drawing._overlap(free, moved) == 0
    assert drawing._place_label((100, 100, 200, 200), size, (640, 480), [(0, 0, 639, 479)]) is None


@pytest.mark.parametrize("size", [(1, 1), (3, 200), (200, 3), (24, 24)])
def test_tiny_images_can_be_drawn_on(size: tuple[int, int]) -> None:
    pixels = draw(plain(*size), boxes([0, 0, *size]), ["a class of a very long name"], [0.5])
    assert pixels.shape == (size[1], size[0], 3)
    assert (pixels != GREY).any()


@pytest.mark.parametrize(
    ("rows", "labels", "scores", "message"),
    [
        (boxes([0, 0, 9, 9]), ["a", "b"], None, r"boxes_ltrb has shape \(1, 4\): expected \(2, 4\)"),
        (boxes([0, 0, 9, 9]), ["a"], [0.5, 0.6], r"scores has shape \(2,\): expected \(1,\)"),
        (boxes([0, 0, 9, float("nan")]), ["a"], None, "not finite"),
    ],
)
def test_bad_detections_are_refused(
    rows: np.ndarray, labels: list[str], scores: list[float] | None, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        draw(plain(20, 20), rows, labels, scores)


def make_cell(size: tuple[int, int] = (100, 50), caption: str = "one") -> GridCell:
    return GridCell(
        image=plain(*size),
        truth_boxes_ltrb=boxes([10, 10, 40, 40]),
        truth_labels=["class 1"],
        boxes_ltrb=boxes([60, 10, 90, 40]),
        labels=["class 2"],
        scores=np.array([0.5]),
        caption=caption,
    )


def test_a_grid_shows_truths_dashed_and_detections_solid_at_their_scaled_places(tmp_path: Path) -> None:
    path = tmp_path / "grid.png"
    draw_grid([make_cell()], path, cell_size=(400, 200), class_names=CLASSES)
    sheet = np.array(Image.open(path))
    (left,) = {int(column) for column in np.flatnonzero((sheet == GREY).all(axis=2).any(axis=0))[:1]}
    (top,) = {int(row) for row in np.flatnonzero((sheet[:, left] == GREY).all(axis=1))[:1]}
    truth_edge = sheet[top + 40 : top + 160, left + 40]
    assert {tuple(pixel) for pixel in truth_edge.tolist()} == {(255, 255, 255), tuple(colour("class 1"))}
    assert (sheet[top + 40 : top + 160, left + 240] == colour("class 2")).all()


def test_grids_of_any_number_and_shape_of_images_have_room(tmp_path: Path) -> None:
    sizes = []
    for num in (1, 4, 5):
        cells = [make_cell(((30, 200), (200, 30))[n % 2], caption="a long caption " * 20) for n in range(num)]
        draw_grid(cells, tmp_path / "grid.png", columns=4, cell_size=(160, 120))
        with Image.open(tmp_path / "grid.png") as sheet:
            assert sheet.format == "PNG"
            sizes.append(sheet.size)
    assert [width for width, _ in sizes] == [12 + 172, 12 + 4 * 172, 12 + 4 * 172]
    assert sizes[0][1] == sizes[1][1] < sizes[2][1]


def test_a_grid_becomes_a_jpeg_where_the_name_says_so(tmp_path: Path) -> None:
    draw_grid([make_cell()], tmp_path / "grid.jpg")
    with Image.open(tmp_path / "grid.jpg") as sheet:
        assert sheet.format == "JPEG"


def test_a_grid_of_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cells is empty"):
        draw_grid([], tmp_path / "grid.png")


def test_failed_write_keeps_the_old_image_and_leaves_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "grid.png"
    path.write_bytes(b"old")

    def full_disk(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match=r"No space left on device: '.*grid\.png'"):
        draw_grid([make_cell()], path)
    assert [file.name for file in tmp_path.iterdir()] == ["grid.png"]
    assert path.read_bytes() == b"old"
