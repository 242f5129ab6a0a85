"""COCO evaluations small enough to be written by hand, and pycocotools reading them from disk."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from ssd_fast.evaluation.coco_eval import DetectionTable


class Case(NamedTuple):
    """An annotation file's content, the detections as rows [image, left, top, width, height, score, category]."""

    instances: dict[str, Any]
    rows: list[list[float]]


def make_instances(num_images: int, categories: Sequence[int], annotations: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "images": [
            {"id": 10 * (num_images - n), "file_name": f"{n}.jpg", "width": 640, "height": 480}
            for n in range(num_images)
        ],
        "categories": [{"id": id_, "name": f"class {id_}"} for id_ in categories],
        "annotations": [
            {"id": n + 1, "area": item["bbox"][2] * item["bbox"][3], "iscrowd": 0, **item}
            for n, item in enumerate(annotations)
        ],
    }


def truth(image: int, category: int, box: Sequence[float], **more: Any) -> dict[str, Any]:
    return {"image_id": image, "category_id": category, "bbox": list(box), **more}


def make_table(rows: Sequence[Sequence[float]]) -> DetectionTable:
    array = np.array(rows, np.float64).reshape(-1, 7)
    return DetectionTable(
        image_ids=array[:, 0].astype(np.int64),
        boxes_xywh=array[:, 1:5],
        scores=array[:, 5],
        category_ids=array[:, 6].astype(np.int64),
    )


def oracle(
    annotation_file: Path, results: Path, *, image_ids: list[int] | None = None, category_ids: list[int] | None = None
) -> COCOeval:
    ground_truth = COCO(str(annotation_file))
    if json.loads(results.read_text()):
        found = ground_truth.loadRes(str(results))
    else:  # loadRes cannot read an empty list
        found = COCO()
        found.dataset = {**ground_truth.dataset, "annotations": []}
        found.createIndex()
    evaluation = COCOeval(ground_truth, found, "bbox")
    if image_ids is not None:
        evaluation.params.imgIds = image_ids
    if category_ids is not None:
        evaluation.params.catIds = category_ids
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    return evaluation


def crowds() -> Case:
    crowd = truth(10, 1, [100, 100, 200, 100], iscrowd=1)
    return Case(
        make_instances(2, [1], [crowd, truth(10, 1, [120, 120, 40, 40]), truth(20, 1, [0, 0, 50, 50], iscrowd=1)]),
        [
            [10, 120, 120, 40, 40, 0.9, 1],
            [10, 200, 110, 30, 30, 0.95, 1],
            [10, 250, 150, 30, 30, 0.94, 1],
            [10, 500, 10, 30, 30, 0.5, 1],
            [20, 5, 5, 20, 20, 0.99, 1],
        ],
    )


def empty_categories() -> Case:
    """One category has neither ground truths nor detections, one only detections, one only ground truths."""
    return Case(
        make_instances(1, [7, 3, 5, 1], [truth(10, 3, [0, 0, 50, 50]), truth(10, 7, [0, 0, 50, 50])]),
        [[10, 0, 0, 50, 50, 0.9, 3], [10, 0, 0, 50, 50, 0.9, 5]],
    )


def images_without_ground_truth() -> Case:
    return Case(
        make_instances(4, [1], [truth(20, 1, [10, 10, 60, 60])]),
        [[10, 10, 10, 60, 60, 0.9, 1], [20, 12, 10, 60, 60, 0.8, 1], [40, 10, 10, 60, 60, 0.7, 1]],
    )


def images_without_detections() -> Case:
    return Case(
        make_instances(3, [1], [truth(image, 1, [10, 10, 60, 60]) for image in (10, 20, 30)]),
        [[20, 12, 10, 60, 60, 0.8, 1]],
    )


def no_detections() -> Case:
    return Case(make_instances(2, [1, 2], [truth(10, 1, [10, 10, 60, 60])]), [])


def no_annotations() -> Case:
    return Case(make_instances(2, [1, 2], []), [[10, 10, 10, 60, 60, 0.5, 1]])


def neither_annotations_nor_detections() -> Case:
    return Case(make_instances(2, [1, 2], []), [])


def detections_without_area() -> Case:
    return Case(
        make_instances(1, [1], [truth(10, 1, [10, 10, 60, 60]), truth(10, 1, [100, 100, 0, 0])]),
        [
            [10, 10, 10, 0, 0, 0.9, 1],
            [10, 10, 10, 60, 0, 0.8, 1],
            [10, 10, 10, 60, 60, 0.7, 1],
            [10, 100, 100, 0, 0, 0.6, 1],
        ],
    )


def more_than_100_detections() -> Case:
    """The best hundred of a class count; the right box is the 101st, or among the first ten, or the first."""
    rows = []
    for image, rank in ((10, 100), (20, 7), (30, 0)):
        rows += [[image, 300, 300, 20 + n, 20, 1 - n / 200, 1] for n in range(150)]
        rows[-150 + rank][1:5] = [10, 10, 60, 60]
    return Case(make_instances(3, [1], [truth(image, 1, [10, 10, 60, 60]) for image in (10, 20, 30)]), rows)


def area_edges() -> Case:
    """Areas at, and one bit to either side of, the limits between small, medium and large."""
    areas = [
        float(f(limit))
        for limit in (1024.0, 9216.0, 1e10)
        for f in (lambda a: np.nextafter(a, 0), float, lambda a: np.nextafter(a, np.inf))
    ]
    annotations = [truth(10, 1, [60 * n, 10, 50, 50], area=area) for n, area in enumerate(areas)]
    sides = [
        [32.0, 32.0],
        [np.nextafter(32.0, 0), 32.0],
        [np.nextafter(32.0, 33), 32.0],
        [96.0, 96.0],
        [96.0, np.nextafter(96.0, 97)],
    ]
    rows = [[10, 60 * n, 10, 50, 50 - n, 0.9 - n / 100, 1] for n in range(len(areas))]
    return Case(make_instances(1, [1], annotations), rows + [[10, 10, 300, *side, 0.5, 1] for side in sides])


def equal_scores() -> Case:
    """Order alone decides: within an image the rows', over images that of their ids, which the file lists backwards."""
    annotations = [truth(image, 1, [10, 10, 60, 60]) for image in (10, 20, 30)]
    rows = [
        [30, 10, 10, 60, 60, 0.5, 1],
        [30, 200, 10, 60, 60, 0.5, 1],
        [10, 200, 10, 60, 60, 0.5, 1],
        [10, 10, 10, 60, 60, 0.5, 1],
        [20, 12, 10, 60, 60, 0.5, 1],
        [20, 10, 10, 60, 60, 0.5, 1],
    ]
    return Case(make_instances(3, [1], annotations), rows)


def duplicates() -> Case:
    annotations = [truth(10, 1, [10, 10, 60, 60]), truth(10, 1, [14, 10, 60, 60]), truth(10, 1, [10, 10, 60, 60])]
    return Case(make_instances(1, [1], annotations), [[10, 10, 10, 60, 60, 0.9 - 0.1 * (n // 2), 1] for n in range(6)])


HAND_MADE = (
    crowds,
    empty_categories,
    images_without_ground_truth,
    images_without_detections,
    no_detections,
    no_annotations,
    neither_annotations_nor_detections,
    detections_without_area,
    more_than_100_detections,
    area_edges,
    equal_scores,
    duplicates,
)
