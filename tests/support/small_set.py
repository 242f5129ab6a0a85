"""A COCO set of two images and three boxes, to be changed by tests."""

import json
from pathlib import Path
from typing import Any

from PIL import Image

from ssd_fast.data.coco import CocoSet, load_coco


def make_set(folder: Path) -> dict[str, Any]:
    """Two images, 60 x 40 and 30 x 50, with three boxes; returns the annotations, which are not written yet."""
    for image_id, size in ((7, (60, 40)), (5, (30, 50))):
        Image.new("RGB", size, (90, 120, 150)).save(folder / f"{image_id}.jpg")
    return {
        "images": [
            {"id": 7, "file_name": "7.jpg", "width": 60, "height": 40},
            {"id": 5, "file_name": "5.jpg", "width": 30, "height": 50},
        ],
        "annotations": [
            {"id": 1, "image_id": 5, "category_id": 90, "bbox": [1, 2, 10, 20], "area": 200, "iscrowd": 0},
            {"id": 2, "image_id": 7, "category_id": 3, "bbox": [50, 30, 20, 20], "area": 100, "iscrowd": 0},
            {"id": 3, "image_id": 5, "category_id": 3, "bbox": [0, 0, 30, 50], "area": 100, "iscrowd": 1},
        ],
        "categories": [{"id": 90, "name": "kite"}, {"id": 3, "name": "car"}],
    }


def load(folder: Path, instances: Any, **options: Any) -> CocoSet:
    annotation_file = folder / "instances.json"
    annotation_file.write_text(instances if isinstance(instances, str) else json.dumps(instances))
    return load_coco(annotation_file, folder, **options)
