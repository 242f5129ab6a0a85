"""COCO's numbers of an evaluation, as the one call that another process makes while the training goes on."""

from pathlib import Path
from typing import NamedTuple

from ssd_fast.evaluation.coco_eval import CocoScores, DetectionTable, score, write_results


class ScoringRequest(NamedTuple):
    """Detections to be scored.

    image_ids, category_ids: the ids of the annotation file that count.
    results_file: written with the detections, in COCO's result format.
    """

    annotation_file: Path
    table: DetectionTable
    image_ids: list[int]
    category_ids: list[int]
    results_file: Path


def score_and_write(request: ScoringRequest) -> CocoScores:
    """Score detections, and write them to their file."""
    scores = score(
        request.annotation_file, request.table, image_ids=request.image_ids, category_ids=request.category_ids
    )
    write_results(request.table, request.results_file)
    return scores
