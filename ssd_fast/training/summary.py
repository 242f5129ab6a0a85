"""What a run leaves for people to look at: curves, detections against ground truth, precision over recall."""

from pathlib import Path

import numpy as np
from PIL import Image

from ssd_fast.data.coco import Category, CocoSet
from ssd_fast.evaluation.coco_eval import DetectionTable, read_results, score
from ssd_fast.evaluation.draw import GridCell, draw_grid
from ssd_fast.training.curves import plot_curves, plot_precision_recall

NUM_IMAGES = 12
DRAWN_SCORE = 0.3


def draw_report(output: Path, val_set: CocoSet, categories: tuple[Category, ...], detections_file: Path) -> None:
    """Writes curves.png, precision_recall.png and detections.png to a run's folder, from the files in it.

    val_set: what was evaluated. categories: what the network detects, by the names of which the set has its own ids.
    detections_file: of the run's best evaluation.
    """
    plot_curves(output / "metrics.jsonl", output / "curves.png")
    table = read_results(detections_file)
    names = [category.name for category in categories]
    category_ids = [category.id for category in val_set.categories if category.name in names]
    scores = score(val_set.annotation_file, table, category_ids=category_ids)
    plot_precision_recall(scores.precision_50, list(scores.per_class), output / "precision_recall.png")
    draw_grid(_choose_cells(val_set, table), output / "detections.png", class_names=names)


def _choose_cells(val_set: CocoSet, table: DetectionTable) -> list[GridCell]:
    """Images spread over the whole set, each with its ground truth and its confident detections."""
    images = val_set.images
    names = {category.id: category.name for category in val_set.categories}
    num_images = len(images.file_names)
    cells = []
    for index in np.unique(np.linspace(0, num_images - 1, min(NUM_IMAGES, num_images)).round().astype(int)).tolist():
        truths = slice(images.offsets[index], images.offsets[index + 1])
        found = (table.image_ids == images.image_ids[index]) & (table.scores >= DRAWN_SCORE)
        boxes_xywh = table.boxes_xywh[found]
        with Image.open(images.image_dir / images.file_names[index]) as image:
            pixels = image.convert("RGB")
        cells.append(
            GridCell(
                image=pixels,
                truth_boxes_ltrb=images.boxes_ltrb[truths],
                truth_labels=[val_set.categories[label - 1].name for label in images.labels[truths]],
                boxes_ltrb=np.concatenate([boxes_xywh[:, :2], boxes_xywh[:, :2] + boxes_xywh[:, 2:]], axis=1),
                labels=[names[category_id] for category_id in table.category_ids[found].tolist()],
                scores=table.scores[found],
                caption=images.file_names[index],
            )
        )
    return cells
