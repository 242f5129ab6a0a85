"""COCO's twelve numbers for a table of detections, and COCO's result files.

hotcoco computes them: its precision and recall are pycocotools' bit for bit
(tests/evaluation/test_coco_eval.py), some fifty times faster. pycocotools itself is available as a check.

Both get the same problem, in which images, categories and annotations are numbered from 1 in the order of their ids.
Otherwise pycocotools would count a match with an annotation of id 0 as none, and hotcoco would keep ids in the order
given, which decides between equal scores.
"""

import contextlib
import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import hotcoco
import msgspec
import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from ssd_fast.data.annotations import Annotation, decode_json, read_instances, usable_categories
from ssd_fast.data.policy import DataError
from ssd_fast.files import write_atomically

_AREAS = ("all", "small", "medium", "large")
_MAX_DETECTIONS = (1, 10, 100)
# Field, precision or recall, IoU threshold (None: mean over all ten), area range, detections per image.
_NUMBERS = (
    ("map", "precision", None, "all", 100),
    ("map_50", "precision", 0.50, "all", 100),
    ("map_75", "precision", 0.75, "all", 100),
    ("map_small", "precision", None, "small", 100),
    ("map_medium", "precision", None, "medium", 100),
    ("map_large", "precision", None, "large", 100),
    ("mar_1", "recall", None, "all", 1),
    ("mar_10", "recall", None, "all", 10),
    ("mar_100", "recall", None, "all", 100),
    ("mar_small", "recall", None, "small", 100),
    ("mar_medium", "recall", None, "medium", 100),
    ("mar_large", "recall", None, "large", 100),
)
_FIRST_LINE = b"[\n"
_FIRST_RESULT = b'[\n{"image_id":'
_IOU_INDEX = {None: slice(None), 0.50: slice(0, 1), 0.75: slice(5, 6)}


class DetectionTable(NamedTuple):
    """Detections of any number of images, in any order; between equal scores in an image the earlier row ranks first.

    image_ids: [D] int64, ids of the annotation file.
    boxes_xywh: [D, 4] float64, left, top, width and height in pixels of the original image.
    scores: [D] float64.
    category_ids: [D] int64, ids of the annotation file.
    """

    image_ids: np.ndarray
    boxes_xywh: np.ndarray
    scores: np.ndarray
    category_ids: np.ndarray


class CocoScores(NamedTuple):
    """COCO's numbers, each from 0 to 1, or -1 without ground truth.

    map: average precision, mean over classes and IoU thresholds 0.50, 0.55 ... 0.95, 100 detections per image.
    map_50, map_75: the same at one IoU threshold.
    map_small, map_medium, map_large: the same for objects under 32x32, up to 96x96, and over 96x96 pixels of area.
    mar_1, mar_10, mar_100: average recall with so many detections per image.
    mar_small, mar_medium, mar_large: average recall by area, 100 detections per image.
    per_class: map of each category by name, in the order of the category ids.
    precision_50: [101, K] float64, precision at IoU 0.50 and recall 0, 0.01 ... 1; K in the order of per_class.
    """

    map: float
    map_50: float
    map_75: float
    map_small: float
    map_medium: float
    map_large: float
    mar_1: float
    mar_10: float
    mar_100: float
    mar_small: float
    mar_medium: float
    mar_large: float
    per_class: dict[str, float]
    precision_50: np.ndarray


class _Result(msgspec.Struct):
    image_id: int
    category_id: int
    bbox: tuple[float, float, float, float]
    score: float


class _Problem(NamedTuple):
    """The input of an evaluator: N images and K categories numbered from 1, T ground truths and D detections.

    truth_images, truth_categories: [T] int64.
    truth_boxes_xywh: [T, 4] float64, pixels. truth_areas: [T] float64, square pixels. truth_crowds: [T] int64, 0 or 1.
    detections: [D, 7] float64, rows of image, left, top, width, height, score, category (pycocotools' array format).
    """

    num_images: int
    num_categories: int
    truth_images: np.ndarray
    truth_categories: np.ndarray
    truth_boxes_xywh: np.ndarray
    truth_areas: np.ndarray
    truth_crowds: np.ndarray
    detections: np.ndarray


def score(
    annotation_file: Path,
    detections: DetectionTable,
    image_ids: Sequence[int] | np.ndarray | None = None,
    category_ids: Sequence[int] | np.ndarray | None = None,
    *,
    evaluator: Literal["fast", "pycocotools"] = "fast",
) -> CocoScores:
    """COCO's numbers of detections against an annotation file.

    annotation_file: COCO instances JSON. `area` defaults to the area of the box, also where it is negative, and
    `iscrowd` to no crowd. A box that is no list of four finite numbers is left out.
    image_ids, category_ids: those that count; by default all images (also those without boxes) and categories of the
    file.
    evaluator: both give the same bits; pycocotools takes about a minute for 500,000 detections.
    Raises DataError for a file that cannot be used, ValueError for ids that it does not have and for detections that
    are not finite or have a negative size.
    """
    instances = read_instances(annotation_file)
    names = {category.id: category.name for category in usable_categories(instances, annotation_file)}
    all_images = np.unique(np.array([image.id for image in instances.images], np.int64))
    all_categories = np.unique(np.array(list(names), np.int64))
    for key, ids in (("images", all_images), ("categories", all_categories)):
        if len(ids) == 0:
            raise DataError(f"{annotation_file}: {key} is empty: expected at least one")
    _check_table(detections)
    images = all_images if image_ids is None else np.unique(np.asarray(image_ids, np.int64))
    categories = all_categories if category_ids is None else np.unique(np.asarray(category_ids, np.int64))
    if len(images) == 0 or len(categories) == 0:
        raise ValueError("image_ids or category_ids is empty: expected at least one, or None for all")
    for key, ids, known in (
        ("image_ids", images, all_images),
        ("category_ids", categories, all_categories),
        ("detections.image_ids", detections.image_ids, all_images),
        ("detections.category_ids", detections.category_ids, all_categories),
    ):
        unknown = np.setdiff1d(ids, known)
        if len(unknown):
            raise ValueError(f"{key}: {unknown[0]} and {len(unknown) - 1} others: expected ids of {annotation_file}")
    problem = _normalise(instances.annotations, detections, images=images, categories=categories)
    curves = {"fast": _curves_of_hotcoco, "pycocotools": _curves_of_pycocotools}[evaluator](problem)

    precision = curves["precision"]
    return CocoScores(
        **{
            field: _mean(curves[kind][_IOU_INDEX[iou], ..., _AREAS.index(area), _MAX_DETECTIONS.index(most)])
            for field, kind, iou, area, most in _NUMBERS
        },
        per_class={names[id_]: _mean(precision[:, :, k, 0, -1]) for k, id_ in enumerate(categories.tolist())},
        precision_50=precision[0, :, :, 0, -1].copy(),
    )


def twelve_numbers(scores: CocoScores) -> dict[str, float]:
    """COCO's twelve numbers alone, by field."""
    return {field: getattr(scores, field) for field, *_ in _NUMBERS}


def format_scores(scores: CocoScores, *, per_class: bool = False) -> str:
    """COCO's twelve summary lines, in pycocotools' own layout; per_class adds the AP of each class."""
    lines = []
    for field, kind, iou, area, most in _NUMBERS:
        title = "Average Precision  (AP)" if kind == "precision" else "Average Recall     (AR)"
        ious = "0.50:0.95" if iou is None else f"{iou:.2f}"
        lines.append(f" {title} @[ IoU={ious:<9} | area={area:>6} | maxDets={most:>3} ] = {getattr(scores, field):.3f}")
    if per_class:
        width = max(len("class"), *(len(name) for name in scores.per_class))
        lines += ["", f" {'class':<{width}}  AP @[ IoU=0.50:0.95 ]"]
        for name, ap in scores.per_class.items():
            lines.append(f" {name:<{width}}  {f'{ap:.3f}' if ap > -1 else 'no ground truth'}")
    return "\n".join(lines)


def write_results(detections: DetectionTable, path: Path) -> None:
    """Write COCO's result format, one line per detection; the file appears as a whole or not at all.

    Numbers keep every bit: scoring the file gives the same bits as scoring the table.
    """
    _check_table(detections)
    rows = zip(
        detections.image_ids.tolist(),
        detections.category_ids.tolist(),
        detections.boxes_xywh.tolist(),
        detections.scores.tolist(),
        strict=True,
    )
    lines = msgspec.json.Encoder().encode_lines(_Result(*row) for row in rows)
    write_atomically(path, _FIRST_LINE + lines[:-1].replace(b"\n", b",\n") + b"\n]\n")


def is_results_file(path: Path) -> bool:
    """Whether write_results has written a file: other programs do not break the lines as it does."""
    with path.open("rb") as file:
        return file.read(len(_FIRST_RESULT)).startswith((_FIRST_RESULT, _FIRST_LINE + b"\n]"))


def read_results(path: Path) -> DetectionTable:
    """Detections of a COCO result file, in its order. Raises DataError for any other file."""
    rows = decode_json(path, list[_Result], "COCO results, a list of {image_id, category_id, bbox, score}")
    table = DetectionTable(
        image_ids=np.array([row.image_id for row in rows], np.int64),
        boxes_xywh=np.array([row.bbox for row in rows], np.float64).reshape(-1, 4),
        scores=np.array([row.score for row in rows], np.float64),
        category_ids=np.array([row.category_id for row in rows], np.int64),
    )
    try:
        _check_table(table)
    except ValueError as error:
        raise DataError(f"{path}: {error}") from None
    return table


def _check_table(table: DetectionTable) -> None:
    num = len(table.scores)
    for name, array, shape in (
        ("image_ids", table.image_ids, (num,)),
        ("boxes_xywh", table.boxes_xywh, (num, 4)),
        ("scores", table.scores, (num,)),
        ("category_ids", table.category_ids, (num,)),
    ):
        if array.shape != shape:
            raise ValueError(f"{name} has shape {array.shape}: expected {shape}")
    # A box that is not finite has an IoU that is not a number, which COCO's matching takes for a perfect one.
    finite = np.isfinite(table.scores) & np.isfinite(table.boxes_xywh).all(axis=1)
    bad = np.flatnonzero(~finite | (table.boxes_xywh[:, 2:] < 0).any(axis=1))
    if len(bad):
        raise ValueError(
            f"detection {bad[0]} has box {table.boxes_xywh[bad[0]].tolist()} and score {table.scores[bad[0]]}: "
            f"expected finite numbers, width and height not negative ({len(bad)} of {num} detections are like this)"
        )


def _normalise(
    annotations: list[Annotation], detections: DetectionTable, *, images: np.ndarray, categories: np.ndarray
) -> _Problem:
    """The problem of some images and categories (sorted ids). Detections keep their order, which decides ties."""
    truth_images = np.array([annotation.image_id for annotation in annotations], np.int64)
    truth_categories = np.array([annotation.category_id for annotation in annotations], np.int64)
    truths = np.flatnonzero(np.isin(truth_images, images) & np.isin(truth_categories, categories))
    truths = truths[[math.isfinite(sum(annotations[row].bbox)) for row in truths.tolist()]]
    kept = [annotations[row] for row in truths.tolist()]
    boxes_xywh = np.array([a.bbox for a in kept], np.float64).reshape(-1, 4)
    found = np.isin(detections.image_ids, images) & np.isin(detections.category_ids, categories)
    return _Problem(
        num_images=len(images),
        num_categories=len(categories),
        truth_images=np.searchsorted(images, truth_images[truths]) + 1,
        truth_categories=np.searchsorted(categories, truth_categories[truths]) + 1,
        truth_boxes_xywh=boxes_xywh,
        truth_areas=np.array([_area(annotation) for annotation in kept], np.float64),
        truth_crowds=np.array([bool(a.iscrowd) for a in kept], np.int64),
        detections=np.column_stack(
            [
                np.searchsorted(images, detections.image_ids[found]) + 1,
                detections.boxes_xywh[found],
                detections.scores[found],
                np.searchsorted(categories, detections.category_ids[found]) + 1,
            ]
        ).astype(np.float64),
    )


def _area(annotation: Annotation) -> float:
    """The area that the file states, square pixels, or that of the box where it states none or a negative one."""
    _, _, width, height = annotation.bbox
    return width * height if annotation.area is None or annotation.area < 0 else annotation.area


def _curves_of_hotcoco(problem: _Problem) -> dict[str, np.ndarray]:
    """precision [10, 101, K, 4, 3] and recall [10, K, 4, 3]: IoU, (recall,) category, area, detections per image."""
    truth = hotcoco.COCO.from_arrays(
        [{"id": image} for image in range(1, problem.num_images + 1)],
        [{"id": category, "name": str(category)} for category in range(1, problem.num_categories + 1)],
        problem.truth_images,
        problem.truth_categories,
        problem.truth_boxes_xywh,
        area=problem.truth_areas,
        iscrowd=problem.truth_crowds,
    )
    evaluation = hotcoco.COCOeval(truth, truth.load_res(problem.detections), "bbox")
    evaluation.evaluate()
    evaluation.accumulate()
    result = evaluation.eval
    assert result is not None
    return {"precision": result["precision"], "recall": result["recall"]}


def _curves_of_pycocotools(problem: _Problem) -> dict[str, np.ndarray]:
    """As _curves_of_hotcoco."""
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = {
            "images": [{"id": image} for image in range(1, problem.num_images + 1)],
            "categories": [{"id": category} for category in range(1, problem.num_categories + 1)],
            "annotations": [
                {"id": row + 1, "image_id": image, "category_id": category, "bbox": box, "area": area, "iscrowd": crowd}
                for row, (image, category, box, area, crowd) in enumerate(
                    zip(
                        problem.truth_images.tolist(),
                        problem.truth_categories.tolist(),
                        problem.truth_boxes_xywh.tolist(),
                        problem.truth_areas.tolist(),
                        problem.truth_crowds.tolist(),
                        strict=True,
                    )
                )
            ],
        }
        truth.createIndex()
        # loadRes raises on no detections at all.
        found = truth.loadRes(problem.detections) if len(problem.detections) else COCO()
        if not len(problem.detections):
            found.dataset = {**truth.dataset, "annotations": []}
            found.createIndex()
        evaluation = COCOeval(truth, found, "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
    return {"precision": evaluation.eval["precision"], "recall": evaluation.eval["recall"]}


def _mean(values: np.ndarray) -> float:
    """Mean of the values above -1, in pycocotools' order of summation, or -1."""
    values = values[values > -1]
    return float(values.mean()) if len(values) else -1.0
