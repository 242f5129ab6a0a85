"""The drawings of the documents, as SVG: the way of a batch, and the rooms of the code."""

import itertools
from html import escape
from typing import NamedTuple

FONT = "font-family='system-ui, -apple-system, Segoe UI, Helvetica, Arial, sans-serif'"
INK, QUIET = "#1e293b", "#64748b"


class Paint(NamedTuple):
    """Fill and outline of a box."""

    fill: str
    line: str


FILES = Paint("#f1f5f9", "#94a3b8")
DALI = Paint("#dbeafe", "#3b82f6")
TORCH = Paint("#ede9fe", "#8b5cf6")
KERNELS = Paint("#ffedd5", "#f97316")
HOROVOD = Paint("#dcfce7", "#22c55e")


class Box(NamedTuple):
    """A box with a title and lines of small print; x, y is its upper left corner."""

    x: int
    y: int
    width: int
    height: int
    paint: Paint
    title: str
    lines: tuple[str, ...] = ()

    def svg(self) -> str:
        middle = self.x + self.width / 2
        top = self.y + self.height / 2 - 8 * len(self.lines)
        texts = [_text(middle, top + 5, self.title, size=13, weight=600)]
        texts += [_text(middle, top + 5 + 17 * (n + 1), line, size=12) for n, line in enumerate(self.lines)]
        return (
            f"<rect x='{self.x}' y='{self.y}' width='{self.width}' height='{self.height}' rx='7' "
            f"fill='{self.paint.fill}' stroke='{self.paint.line}' stroke-width='1.5'/>" + "".join(texts)
        )


def draw_data_flow() -> str:
    """The way of a batch: from images to an update of the weights, and from images to detections."""
    training = _row(
        62,
        (
            (FILES, "images, boxes", ("COCO folder",), 112),
            (DALI, "read", ("shard of", "the rank"), 82),
            (DALI, "SSD crop", ("of image", "and boxes"), 86),
            (DALI, "decode", ("only", "the crop"), 82),
            (DALI, "resize", ("to 300 x 300",), 96),
            (DALI, "colour, flip", ("normalise", "to NHWC"), 98),
            (KERNELS, "encode boxes", ("a target for", "each anchor"), 110),
            (FILES, "TrainBatch", ("images, deltas,", "labels"), 110),
        ),
    )
    step = _row(
        190,
        (
            (TORCH, "forward", ("SSD-ResNet34,", "channels_last"), 128),
            (KERNELS, "multibox loss", ("hard negatives", "without a sort"), 136),
            (TORCH, "backward", (), 110),
            (HOROVOD, "average gradients", ("Horovod,", "during backward"), 160),
            (TORCH, "SGD step", ("skipped if", "not finite"), 116),
        ),
        x=120,
    )
    detection = _row(
        352,
        (
            (FILES, "images", (), 84),
            (DALI, "decode", (), 84),
            (DALI, "resize", ("normalise",), 92),
            (TORCH, "forward", ("SSD-ResNet34",), 118),
            (KERNELS, "decode_nms", ("softmax, decoding,", "suppression"), 142),
            (FILES, "Detections", ("gathered", "over ranks"), 104),
            (FILES, "results", ("COCO's numbers, JSON,", "annotated images"), 168),
        ),
    )
    last, first = training[-1], step[0]
    turn = f"M{last.x + last.width / 2} {last.y + last.height} V162 H{first.x + first.width / 2} V{first.y - 2}"
    update, middle = step[-1], first.y + first.height
    back = f"M{update.x + update.width / 2} {middle} V{middle + 22} H{first.x + first.width / 2} V{middle + 2}"
    parts = [
        _text(20, 40, "Training", size=16, weight=600, anchor="start"),
        *_chain(training),
        _path(turn),
        *_chain(step),
        _path(back),
        _text(500, middle + 40, "new weights, next batch", size=12, colour=QUIET),
        _text(20, 334, "Evaluation, detection, LoadGen", size=16, weight=600, anchor="start"),
        *_chain(detection),
        *_legend(452),
    ]
    return _svg(940, 484, parts, "The way of a batch: from images to an update of the weights, and to detections")


def draw_rooms() -> str:
    """The rooms of the code, each above those that it may import."""
    rows: tuple[tuple[tuple[Paint, str, str], ...], ...] = (
        ((FILES, "ssd_fast.__main__", "the command line"), (FILES, "ssd_fast", "the Python API")),
        ((TORCH, "profiling", "where the time goes"), (TORCH, "loadgen", "MLPerf LoadGen")),
        ((TORCH, "training", "a run: loop, step, optimizer, validation, records"),),
        ((TORCH, "evaluation", "detections, COCO's numbers, drawing, ONNX"),),
        ((TORCH, "checkpoints", "files of weights"),),
        ((TORCH, "data", "COCO sets and loaders"),),
        ((TORCH, "model", "network, anchors, loss"), (HOROVOD, "distributed", "ranks: Horovod, Slurm")),
        ((FILES, "config", "recipes and their sections"), (FILES, "files, progress, timing …", "leaves: single files")),
        ((DALI, "dali_pipelines", "images to batches"),),
        ((KERNELS, "kernels", "operators in C++ and CUDA"),),
    )
    boxes, gap, height, width = [], 12, 50, 640
    for number, row in enumerate(rows):
        each = (width - gap * (len(row) - 1)) // len(row)
        for column, (paint, title, line) in enumerate(row):
            boxes.append(
                Box(60 + column * (each + gap), 20 + number * (height + gap), each, height, paint, title, (line,))
            )
    bottom = 20 + len(rows) * (height + gap) - gap
    arrow = _path(f"M34 24 V{bottom - 4}")
    label = f"<g transform='rotate(-90 22 {bottom / 2})'>{_text(22, bottom / 2, 'imports', size=13, colour=QUIET)}</g>"
    return _svg(width + 80, bottom + 20, [arrow, label, *(box.svg() for box in boxes)], "The rooms of the code")


def _row(y: int, cells: tuple[tuple[Paint, str, tuple[str, ...], int], ...], *, x: int = 20) -> list[Box]:
    boxes = []
    for paint, title, lines, width in cells:
        boxes.append(Box(x, y, width, 72, paint, title, lines))
        x += width + 19
    return boxes


def _chain(boxes: list[Box]) -> list[str]:
    """The boxes, with an arrow from each to the next."""
    arrows = [
        _path(f"M{one.x + one.width} {one.y + one.height / 2} H{two.x - 2}") for one, two in itertools.pairwise(boxes)
    ]
    return [box.svg() for box in boxes] + arrows


def _legend(y: int) -> list[str]:
    parts, x = [], 20
    for paint, text, width in (
        (DALI, "NVIDIA DALI", 130),
        (KERNELS, "own operators in C++ and CUDA", 250),
        (TORCH, "PyTorch", 100),
        (HOROVOD, "Horovod", 110),
        (FILES, "data", 80),
    ):
        parts.append(f"<rect x='{x}' y='{y}' width='16' height='16' rx='4' fill='{paint.fill}' stroke='{paint.line}'/>")
        parts.append(_text(x + 23, y + 13, text, size=13, anchor="start", colour=QUIET))
        x += width
    return parts


def _text(
    x: float, y: float, text: str, *, size: int, weight: int = 400, anchor: str = "middle", colour: str = INK
) -> str:
    return (
        f"<text x='{x:g}' y='{y:g}' font-size='{size}' font-weight='{weight}' text-anchor='{anchor}' "
        f"fill='{colour}'>{escape(text)}</text>"
    )


def _path(way: str) -> str:
    return f"<path d='{way}' fill='none' stroke='{QUIET}' stroke-width='1.5' marker-end='url(#head)'/>"


def _svg(width: int, height: int, parts: list[str], title: str) -> str:
    head = (
        "<defs><marker id='head' viewBox='0 0 8 8' refX='7' refY='4' markerWidth='7' markerHeight='7' orient='auto'>"
        f"<path d='M0 0 L8 4 L0 8 z' fill='{QUIET}'/></marker></defs>"
    )
    return (
        f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {width} {height}' width='{width}' height='{height}' "
        f"role='img' {FONT}>\n<title>{escape(title)}</title>\n{head}\n"
        f"<rect width='{width}' height='{height}' rx='10' fill='#ffffff'/>\n" + "\n".join(parts) + "\n</svg>\n"
    )
