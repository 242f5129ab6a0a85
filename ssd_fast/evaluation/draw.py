"""Drawings of detections on one image, or of many images in a grid."""

import colorsys
import io
import itertools
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ssd_fast.evaluation.fonts import font_for, warn_of_missing_letters
from ssd_fast.files import write_atomically

Colour = tuple[int, int, int]
Area = tuple[int, int, int, int]  # left, top, right, bottom: first and last column and row of pixels, inclusive

_BLACK: Colour = (0, 0, 0)
_WHITE: Colour = (255, 255, 255)


class GridCell(NamedTuple):
    """One image of a grid, with its ground truths and detections.

    image: of any size.
    truth_boxes_ltrb, boxes_ltrb: [G, 4] and [D, 4], pixels of image.
    truth_labels, labels: G and D class names.
    scores: [D].
    caption: a line of text, cut if it is too long.
    """

    image: Image.Image
    truth_boxes_ltrb: np.ndarray
    truth_labels: Sequence[str]
    boxes_ltrb: np.ndarray
    labels: Sequence[str]
    scores: np.ndarray
    caption: str


def draw_detections(
    image: Image.Image,
    boxes_ltrb: np.ndarray,
    labels: Sequence[str],
    scores: np.ndarray | None = None,
    *,
    class_names: Sequence[str] = (),
    font_size: int | None = None,
) -> Image.Image:
    """Return an RGB copy of an image with boxes, class names and scores.

    boxes_ltrb: [D, 4], pixels, finite. Boxes are cut to the image; a box outside it is left out.
    labels: D class names.
    scores: [D]; the best box is on top. None draws no scores, and the first box is on top.
    class_names: classes that get colours far apart. The colour of any other class follows from its name alone.
    font_size: pixels; None derives it from the image's size, like the width of the lines.
    """
    canvas = image.convert("RGB")
    boxes = _checked_boxes(boxes_ltrb, labels)
    if scores is not None and np.shape(scores) != (len(boxes),):
        raise ValueError(f"scores has shape {np.shape(scores)}: expected ({len(boxes)},), one per box")
    scale = (canvas.width * canvas.height) ** 0.5
    line_width = max(1, round(scale / 180))
    font_size = font_size or max(10, round(scale / 36))
    warn_of_missing_letters(class_names)
    draw = ImageDraw.Draw(canvas)

    order = range(len(boxes)) if scores is None else np.argsort(-np.asarray(scores), kind="stable").tolist()
    drawn = [(row, pixels) for row in order if (pixels := _visible_pixels(boxes[row], canvas.size)) is not None]
    for row, pixels in reversed(drawn):
        _draw_outline(draw, pixels, _colour_of(labels[row], class_names), line_width)
    placed: list[tuple[Area, str, Colour, ImageFont.FreeTypeFont]] = []
    for row, pixels in drawn:
        text = labels[row] if scores is None else f"{labels[row]} {scores[row]:.2f}"
        font = font_for(text, font_size)
        text, size = _fitting_text(text, font, canvas.size)
        area = _place_label(pixels, size, canvas.size, [area for area, *_ in placed]) if text else None
        if area is not None:
            placed.append((area, text, _colour_of(labels[row], class_names), font))
    for area, text, colour, font in reversed(placed):
        _draw_label(draw, area, text, colour, font)
    return canvas


def draw_grid(
    cells: Sequence[GridCell],
    path: Path,
    *,
    columns: int = 4,
    cell_size: tuple[int, int] = (400, 300),
    class_names: Sequence[str] = (),
) -> None:
    """Write images side by side, with detections as solid boxes and ground truths as dashed ones.

    cells: at least one. path: a JPEG file if it ends in .jpg or .jpeg, else a PNG file, six times as large.
    cell_size: width and height in pixels that each image is scaled to fit.
    class_names: as for draw_detections.
    """
    if not cells:
        raise ValueError("cells is empty: expected at least one image")
    gap, font = 12, font_for("", 13)
    line = sum(font.getmetrics())
    columns = min(columns, len(cells))
    rows = -(-len(cells) // columns)
    width, height = cell_size
    sheet = Image.new(
        "RGB", (gap + columns * (width + gap), gap + line + gap + rows * (height + 4 + line + gap)), _WHITE
    )
    draw = ImageDraw.Draw(sheet)
    _draw_grid_key(draw, (gap, gap), font)
    for n, cell in enumerate(cells):
        left, top = gap + n % columns * (width + gap), gap + line + gap + n // columns * (height + 4 + line + gap)
        draw.rectangle((left, top, left + width - 1, top + height - 1), fill=(240, 240, 240))
        image = _draw_cell(cell, cell_size, class_names)
        sheet.paste(image, (left + (width - image.width) // 2, top + (height - image.height) // 2))
        caption_font = font_for(cell.caption, 13)
        caption = _shortened(cell.caption, caption_font, width)
        draw.text((left + width // 2, top + height + 4), caption, fill=(60, 60, 60), font=caption_font, anchor="ma")
    buffer = io.BytesIO()
    sheet.save(buffer, format="JPEG" if path.suffix.lower() in (".jpg", ".jpeg") else "PNG", quality=90)
    write_atomically(path, buffer.getvalue())


def _checked_boxes(boxes_ltrb: np.ndarray, labels: Sequence[str]) -> np.ndarray:
    boxes = np.asarray(boxes_ltrb, np.float64)
    if boxes.shape != (len(labels), 4):
        raise ValueError(f"boxes_ltrb has shape {boxes.shape}: expected ({len(labels)}, 4), one row per label")
    if not np.isfinite(boxes).all():
        raise ValueError("boxes_ltrb holds numbers that are not finite")
    return boxes


def _visible_pixels(box_ltrb: np.ndarray, size: tuple[int, int]) -> Area | None:
    """Return the pixels of a box inside an image, or None if it lies outside."""
    width, height = size
    left, top, right, bottom = (float(side) for side in box_ltrb)
    if right < left or bottom < top or left >= width or top >= height or right <= 0 or bottom <= 0:
        return None
    left, top = min(max(round(left), 0), width - 1), min(max(round(top), 0), height - 1)
    return left, top, max(min(round(right), width) - 1, left), max(min(round(bottom), height) - 1, top)


def _draw_outline(draw: ImageDraw.ImageDraw, pixels: Area, colour: Colour, width: int) -> None:
    """Draw a line along the inside of the box and, if there is room, a thin dark line inside of it."""
    left, top, right, bottom = pixels
    draw.rectangle(pixels, outline=colour, width=width)
    if width > 1 and min(right - left, bottom - top) > 6 * width:
        draw.rectangle((left + width, top + width, right - width, bottom - width), outline=_BLACK)


def _place_label(box: Area, size: tuple[int, int], canvas: tuple[int, int], taken: Sequence[Area]) -> Area | None:
    """Return the place over, in or under its box where a label covers the least of other labels, inside the image.

    Return None if it would cover more than a third of its own size: in a crowd, fewer labels tell more.
    """
    left, top, right, bottom = box
    width, height = size
    places = []
    for x, y in itertools.product((left, right - width + 1), (top - height, top, bottom + 1, bottom - height + 1)):
        x, y = min(max(x, 0), canvas[0] - width), min(max(y, 0), canvas[1] - height)
        hidden = sum(_overlap((x, y, x + width - 1, y + height - 1), other) for other in taken)
        places.append((hidden, (x, y, x + width - 1, y + height - 1)))
    hidden, place = min(places, key=lambda item: item[0])
    return None if 3 * hidden > width * height else place


def _overlap(one: Area, other: Area) -> int:
    width = min(one[2], other[2]) - max(one[0], other[0]) + 1
    height = min(one[3], other[3]) - max(one[1], other[1]) + 1
    return max(width, 0) * max(height, 0)


def _draw_label(draw: ImageDraw.ImageDraw, area: Area, text: str, colour: Colour, font: ImageFont.FreeTypeFont) -> None:
    luminance = 0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2]
    draw.rectangle(area, fill=colour)
    draw.text((area[0] + _padding(font), area[1]), text, fill=_BLACK if luminance > 110 else _WHITE, font=font)


def _padding(font: ImageFont.FreeTypeFont) -> int:
    return max(1, round(font.size / 5))


def _fitting_text(text: str, font: ImageFont.FreeTypeFont, canvas: tuple[int, int]) -> tuple[str, tuple[int, int]]:
    """Return the text, cut to the image's width, and the size of its label. The text is empty if no line fits."""
    height = sum(font.getmetrics())
    if height > canvas[1]:
        return "", (0, 0)
    text = _shortened(text, font, canvas[0] - 2 * _padding(font))
    return text, (int(np.ceil(font.getlength(text))) + 2 * _padding(font), height)


def _shortened(text: str, font: ImageFont.FreeTypeFont, width: int) -> str:
    text = " ".join(text.split())  # getlength cannot measure line breaks
    text = text.encode(errors="replace").decode()  # a file name need not be UTF-8
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "…") > width:
        text = text[:-1]
    return text and text + "…"


def _colour_of(name: str, class_names: Sequence[str]) -> Colour:
    """Return the colour of a class. Hues are a golden section apart, so that the first n classes differ well."""
    index = class_names.index(name) if name in class_names else zlib.crc32(name.encode())
    hue = (0.33 + index * 0.618034) % 1
    red, green, blue = colorsys.hsv_to_rgb(hue, (0.85, 0.6, 1.0)[index % 3], (1.0, 1.0, 0.8)[index % 3])
    return round(255 * red), round(255 * green), round(255 * blue)


def _draw_cell(cell: GridCell, cell_size: tuple[int, int], class_names: Sequence[str]) -> Image.Image:
    factor = min(cell_size[0] / cell.image.width, cell_size[1] / cell.image.height)
    size = max(1, round(cell.image.width * factor)), max(1, round(cell.image.height * factor))
    image = cell.image.convert("RGB").resize(size, Image.Resampling.LANCZOS)
    draw = ImageDraw.Draw(image)
    for box, label in zip(
        _checked_boxes(cell.truth_boxes_ltrb, cell.truth_labels) * factor, cell.truth_labels, strict=True
    ):
        pixels = _visible_pixels(box, size)
        if pixels is not None:
            _draw_dashes(draw, pixels, _colour_of(label, class_names))
    boxes_ltrb = _checked_boxes(cell.boxes_ltrb, cell.labels) * factor
    return draw_detections(image, boxes_ltrb, cell.labels, cell.scores, class_names=class_names, font_size=11)


def _draw_dashes(draw: ImageDraw.ImageDraw, pixels: Area, colour: Colour) -> None:
    """Draw a rectangle of white and coloured dashes, which is visible on any background."""
    left, top, right, bottom = pixels
    draw.rectangle(pixels, outline=_WHITE, width=2)
    for start in range(left, right + 1, 10):
        for y in (top, max(bottom - 1, top)):
            draw.rectangle((start, y, min(start + 4, right), min(y + 1, bottom)), fill=colour)
    for start in range(top, bottom + 1, 10):
        for x in (left, max(right - 1, left)):
            draw.rectangle((x, start, min(x + 1, right), min(start + 4, bottom)), fill=colour)


def _draw_grid_key(draw: ImageDraw.ImageDraw, at: tuple[int, int], font: ImageFont.FreeTypeFont) -> None:
    x, y = at
    height = sum(font.getmetrics())
    colour = _colour_of("", ("",))
    truth_text = "ground truth, in the colour of its class"
    _draw_dashes(draw, (x, y + 2, x + 30, y + height - 2), colour)
    draw.text((x + 38, y), truth_text, fill=_BLACK, font=font)
    x += 38 + round(font.getlength(truth_text)) + 30
    draw.rectangle((x, y + 2, x + 30, y + height - 2), outline=colour, width=2)
    draw.text((x + 38, y), "detection, with its class and score", fill=_BLACK, font=font)
