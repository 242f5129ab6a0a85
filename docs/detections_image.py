"""Write docs/images/detections.jpg: the first images that `make demo` annotates, with their detections, in rows.

python docs/detections_image.py [output/demo/run/images/detections.json]
"""

import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

REPOSITORY = Path(__file__).resolve().parent.parent
DETECTIONS = REPOSITORY / "output" / "demo" / "run" / "images" / "detections.json"
TARGET = REPOSITORY / "docs" / "images" / "detections.jpg"
WIDTH, ROW_HEIGHT, NUM_ROWS, GAP = (
    1200,
    250,
    2,
    8,
)  # pixels; a row's height is changed so that its images fill the width
DRAWN_SCORE = 0.3
FINER = 2  # times the final size at which boxes and texts are drawn
QUALITY = 80

sys.path.insert(0, str(REPOSITORY))


class Tile(NamedTuple):
    """An image of detections.json, and its width in pixels when it is ROW_HEIGHT high."""

    entry: dict[str, Any]
    width: float


def draw_sheet(entries: list[dict[str, Any]]) -> Image.Image:
    """The first images, in their order, in NUM_ROWS rows that are WIDTH wide."""
    names = sorted({found["category"] for entry in entries for found in entry["detections"]})
    rows = [_draw_row(row, names) for row in _fill_rows(entries)]
    sheet = Image.new("RGB", (WIDTH, sum(row.height + GAP for row in rows) - GAP), "white")
    top = 0
    for row in rows:
        sheet.paste(row, (0, top))
        top += row.height + GAP
    return sheet


def _fill_rows(entries: list[dict[str, Any]]) -> list[list[Tile]]:
    rows: list[list[Tile]] = [[]]
    for entry in entries:
        if sum(tile.width + GAP for tile in rows[-1]) > WIDTH:
            if len(rows) == NUM_ROWS:
                break
            rows.append([])
        rows[-1].append(Tile(entry, entry["width"] * ROW_HEIGHT / entry["height"]))
    return rows


def _draw_row(row: list[Tile], names: list[str]) -> Image.Image:
    factor = (WIDTH - GAP * (len(row) - 1)) / sum(tile.width for tile in row)
    height = round(ROW_HEIGHT * factor)
    sheet = Image.new("RGB", (WIDTH, height), "white")
    left = 0.0
    for tile in row:
        size = (round(left + tile.width * factor) - round(left), height)
        sheet.paste(_draw_tile(tile.entry, size, names), (round(left), 0))
        left += tile.width * factor + GAP
    return sheet


def _draw_tile(entry: dict[str, Any], size: tuple[int, int], names: list[str]) -> Image.Image:
    from ssd_fast.evaluation.draw import draw_detections

    found = [found for found in entry["detections"] if found["score"] >= DRAWN_SCORE]
    boxes_xywh = np.array([detection["bbox"] for detection in found]).reshape(-1, 4)
    drawn_size = (FINER * size[0], FINER * size[1])
    scale = np.array([drawn_size[0] / entry["width"], drawn_size[1] / entry["height"]] * 2)
    with Image.open(entry["file"]) as image:
        pixels = image.convert("RGB").resize(drawn_size, Image.Resampling.LANCZOS)
    drawn = draw_detections(
        pixels,
        np.concatenate([boxes_xywh[:, :2], boxes_xywh[:, :2] + boxes_xywh[:, 2:]], axis=1) * scale,
        [detection["category"] for detection in found],
        np.array([detection["score"] for detection in found]),
        class_names=names,
        font_size=12 * FINER,
    )
    return drawn.resize(size, Image.Resampling.LANCZOS)


def main() -> None:
    """Read the detections, and write the image."""
    path = Path(sys.argv[1]) if len(sys.argv) > 1 else DETECTIONS
    if not path.is_file():
        sys.exit(f"{path}: no such file: expected the detections that `make demo` writes")
    draw_sheet(json.loads(path.read_text(encoding="utf-8"))).save(TARGET, quality=QUALITY, optimize=True)
    print(f"{TARGET}: {TARGET.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    main()
