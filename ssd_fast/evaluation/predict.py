"""Detection on a user's own images: annotated copies and one JSON file."""

import io
import json
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

from dali_pipelines.batch import LabelledImages
from ssd_fast.config import Config
from ssd_fast.data.loaders import make_eval_loader
from ssd_fast.evaluation.detector import Detector
from ssd_fast.evaluation.draw import draw_detections
from ssd_fast.files import write_atomically
from ssd_fast.progress import track
from ssd_fast.timing import Timeline

RESULTS = "detections.json"


def detect_images(
    detector: Detector,
    config: Config,
    images: LabelledImages,
    output: Path,
    *,
    device: torch.device,
    drawn_score: float,
) -> Timeline:
    """Writes an annotated copy of every image to a folder, and all detections to detections.json in it.

    The JSON is a list with an object per image: file, annotated (its copy), width and height (pixels, after EXIF
    rotation) and detections, best first: category_id, category, score, bbox [x, y, width, height] in pixels.

    images: as find_images gives them.
    drawn_score: detections under this probability are in the JSON only.
    Returns where the time went.
    """
    timeline = Timeline(device, time.perf_counter())
    output.mkdir(parents=True, exist_ok=True)
    loader = make_eval_loader(config, images, device, apply_orientation=True)
    timeline.settle("preparing")
    table = detector.detect_all(track(loader, "detecting", total=len(loader)), timeline=timeline)
    loader.close()
    timeline.settle("collecting")
    names = {category.id: category.name for category in detector.categories}
    results = []
    for index, copy_name in enumerate(track(_copy_names(images.file_names), "drawing")):
        file_name, (height, width) = images.file_names[index], images.sizes_hw[index].tolist()
        rows = np.flatnonzero(table.image_ids == index)
        found = [
            {"category_id": category_id, "category": names[category_id], "score": score, "bbox": box}
            for category_id, score, box in zip(
                table.category_ids[rows].tolist(),
                table.scores[rows].tolist(),
                table.boxes_xywh[rows].tolist(),
                strict=True,
            )
        ]
        image = {"file": file_name, "annotated": copy_name, "width": width, "height": height}
        results.append(image | {"detections": found})
        drawn = rows[table.scores[rows] >= drawn_score]
        boxes_xywh = table.boxes_xywh[drawn]
        _write_annotated(
            Path(file_name),
            output / copy_name,
            boxes_ltrb=np.concatenate([boxes_xywh[:, :2], boxes_xywh[:, :2] + boxes_xywh[:, 2:]], axis=1),
            labels=[names[category_id] for category_id in table.category_ids[drawn].tolist()],
            scores=table.scores[drawn],
            class_names=list(names.values()),
        )
    write_atomically(output / RESULTS, json.dumps(results, indent=1).encode())
    timeline.settle("drawing")
    return timeline


def _write_annotated(
    source: Path,
    target: Path,
    *,
    boxes_ltrb: np.ndarray,
    labels: Sequence[str],
    scores: np.ndarray,
    class_names: Sequence[str],
) -> None:
    with Image.open(source) as image:
        upright = ImageOps.exif_transpose(image).convert("RGB")
    buffer = io.BytesIO()
    drawn = draw_detections(upright, boxes_ltrb, labels, scores, class_names=class_names)
    drawn.save(buffer, format="JPEG", quality=90)
    write_atomically(target, buffer.getvalue())


def _copy_names(file_names: Sequence[str]) -> list[str]:
    """A name for each annotated copy: the image's own, numbered where two folders hold the same."""
    names: list[str] = []
    for file_name in file_names:
        stem, number = Path(file_name).stem, 1
        name = f"{stem}.jpg"
        while name in names:
            number += 1
            name = f"{stem}_{number}.jpg"
        names.append(name)
    return names
