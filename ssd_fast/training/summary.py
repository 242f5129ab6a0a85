"""Images that a run leaves: its curves, detections against ground truth, precision over recall."""

import numpy as np

from ssd_fast.data.annotations import Category
from ssd_fast.data.boxes import xywh_to_ltrb
from ssd_fast.data.coco import CocoSet
from ssd_fast.data.images import read_image
from ssd_fast.evaluation.coco_eval import DetectionTable, read_results, score
from ssd_fast.evaluation.draw import GridCell, draw_grid
from ssd_fast.training.curves import plot_curves, plot_precision_recall
from ssd_fast.training.folder import RunFolder
from ssd_fast.training.scores import Scores

NUM_IMAGES = 12
DRAWN_SCORE = 0.3


def draw_summary(folder: RunFolder, val_set: CocoSet, categories: tuple[Category, ...], scores: Scores) -> None:
    """Write the curves of a run, the precision over recall of its best evaluation, and detections of it.

    val_set: the validation set. categories: classes of the network. scores: of the run.
    """
    plot_curves(folder.metrics, folder.curves_image)
    names = [category.name for category in categories]
    table = read_results(folder.detections)
    if scores.curves:
        per_class = scores.curves.precision_50
        plot_precision_recall(np.array([*per_class.values()]).T, list(per_class), folder.precision_recall_image)
    else:  # the best evaluation was made by an earlier version, which did not keep its curves
        category_ids = [category.id for category in val_set.categories if category.name in names]
        best = score(val_set.annotation_file, table, category_ids=category_ids)
        plot_precision_recall(best.precision_50, list(best.per_class), folder.precision_recall_image)
    draw_grid(_choose_cells(val_set, table), folder.detections_image, class_names=names)


def _choose_cells(val_set: CocoSet, table: DetectionTable) -> list[GridCell]:
    """A dozen images spread over the set, each with its ground truth and its confident detections."""
    images = val_set.images
    names = {category.id: category.name for category in val_set.categories}
    num_images = len(images.file_names)
    cells = []
    for index in np.unique(np.linspace(0, num_images - 1, min(NUM_IMAGES, num_images)).round().astype(int)).tolist():
        truths = slice(images.offsets[index], images.offsets[index + 1])
        found = (table.image_ids == images.image_ids[index]) & (table.scores >= DRAWN_SCORE)
        boxes_xywh = table.boxes_xywh[found]
        cells.append(
            GridCell(
                image=read_image(str(images.image_dir / images.file_names[index])),
                truth_boxes_ltrb=images.boxes_ltrb[truths],
                truth_labels=[val_set.categories[label - 1].name for label in images.labels[truths]],
                boxes_ltrb=xywh_to_ltrb(boxes_xywh),
                labels=[names[category_id] for category_id in table.category_ids[found].tolist()],
                scores=table.scores[found],
                caption=images.file_names[index],
            )
        )
    return cells
