"""Evaluations of sets that are not complete: what counts in the score, and what is refused before detection."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_set import make_set
from tiny import tiny_config

from ssd_fast.config.sections import Config
from ssd_fast.data.boxes import ltrb_to_xywh
from ssd_fast.data.coco import CocoSet
from ssd_fast.data.policy import DataError
from ssd_fast.evaluation.coco_eval import DetectionTable, read_results, twelve_numbers
from ssd_fast.evaluation.detector import Detector
from ssd_fast.evaluation.evaluate import Evaluation, evaluate, format_evaluation
from ssd_fast.evaluation.scoring import ScoringRequest, score_and_write
from ssd_fast.model.ssd import SSD

PLACES = ('data.val_annotations="val.json"', 'data.val_images="."')


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights of a network of two classes."""
    path = tmp_path_factory.mktemp("weights") / "weights.pt"
    torch.save(SSD(tiny_config().model, num_classes=2).state_dict(), path)
    return path


@pytest.fixture
def perfect(monkeypatch: pytest.MonkeyPatch) -> None:
    """A detector that finds the ground truths of the images it is given, and only them."""
    monkeypatch.setattr(Detector, "detect_set", lambda self, batches, coco_set, world, timeline: truths_of(coco_set))


def truths_of(coco_set: CocoSet) -> DetectionTable:
    images = coco_set.images
    ids = np.array([0, *(category.id for category in coco_set.categories)])
    owners = np.repeat(images.image_ids, np.diff(images.offsets))
    boxes_xywh = ltrb_to_xywh(images.boxes_ltrb.astype(np.float64))
    return DetectionTable(owners, boxes_xywh, np.ones(len(owners)), ids[images.labels])


def config_of(*changes: str) -> Config:
    return tiny_config((*PLACES, *changes))


def run(folder: Path, weights: Path, instances: dict[str, Any], *changes: str, **options: Any) -> Evaluation:
    (folder / "val.json").write_text(json.dumps(instances))
    found = evaluate(weights, folder, config=config_of(*changes), **options)
    assert found
    return found


def make_fitting_set(folder: Path) -> dict[str, Any]:
    """The small set, whose boxes lie within their images."""
    instances = make_set(folder)
    instances["annotations"][1]["bbox"] = [50, 30, 10, 10]
    return instances


def without_image(instances: dict[str, Any], image_id: int) -> dict[str, Any]:
    return instances | {
        "images": [image for image in instances["images"] if image["id"] != image_id],
        "annotations": [item for item in instances["annotations"] if item["image_id"] != image_id],
    }


@pytest.mark.usefixtures("perfect")
def test_a_skipped_image_leaves_the_score_with_its_boxes_and_is_counted(tmp_path: Path, weights: Path) -> None:
    instances = make_fitting_set(tmp_path)
    (tmp_path / "5.jpg").write_bytes(b"no image")
    found = run(tmp_path, weights, instances, "data.bad_images=skip")
    taken_out = run(tmp_path, weights, without_image(instances, 5))
    assert found.scores
    assert taken_out.scores
    assert found.num_left_out == 1
    assert found.scores.per_class == {"car": pytest.approx(1), "kite": -1}
    assert twelve_numbers(found.scores) == twelve_numbers(taken_out.scores)
    assert "1 bad images are left out, with their boxes" in format_evaluation(found)
    assert "left out" not in format_evaluation(taken_out)


def test_an_evaluation_while_training_counts_only_the_images_it_names(tmp_path: Path) -> None:
    path = tmp_path / "val.json"
    path.write_text(json.dumps(make_fitting_set(tmp_path)))
    table = DetectionTable(np.array([7]), np.array([[50.0, 30, 10, 10]]), np.ones(1), np.array([3]))
    request = ScoringRequest(path, table, [7], [3, 90], tmp_path / "results.json")
    assert score_and_write(request).per_class == {"car": pytest.approx(1.0), "kite": -1}
    assert score_and_write(request._replace(image_ids=[5, 7])).per_class["kite"] == 0
    assert read_results(tmp_path / "results.json").image_ids.tolist() == [7]


@pytest.mark.usefixtures("perfect")
def test_a_box_that_nothing_can_read_leaves_the_score_and_one_without_area_counts(
    tmp_path: Path, weights: Path
) -> None:
    instances = make_fitting_set(tmp_path)
    instances["annotations"].append({"image_id": 7, "category_id": 3, "bbox": [1, 2, None, 4]})
    found = run(tmp_path, weights, instances)
    assert found.scores
    assert found.scores.mar_100 == pytest.approx(1)
    instances["annotations"][-1]["bbox"] = [10, 10, 0, 5]
    found = run(tmp_path, weights, instances)
    assert found.scores
    assert found.scores.mar_100 == pytest.approx(0.75)  # pycocotools, too, counts it as an object that is not found


def test_a_test_set_is_detected_on_without_scores(tmp_path: Path, weights: Path) -> None:
    instances = make_set(tmp_path)
    del instances["annotations"]
    found = run(tmp_path, weights, instances, "detection.score_threshold=0.01", needs_scores=False)
    assert found.scores is None
    assert (found.num_images, found.num_left_out) == (2, 0)
    assert set(found.table.image_ids.tolist()) == {5, 7}
    assert format_evaluation(found) == "no boxes of the network's classes: nothing to score"


NO_BOXES = r"val\.json: no image has a box of the network's classes: expected some to score detections by, or --output"


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda val: val.pop("annotations"), NO_BOXES),
        (lambda val: val.update(categories=[*val["categories"], {"id": 0, "name": "kite"}], annotations=[]), NO_BOXES),
        (lambda val: [item.update(bbox="text") for item in val["annotations"]], NO_BOXES),
    ],
    ids=["no annotations", "repeated category", "boxes are text"],
)
def test_what_cannot_be_scored_is_refused_before_detection(
    tmp_path: Path, weights: Path, monkeypatch: pytest.MonkeyPatch, edit: Callable[[dict[str, Any]], None], message: str
) -> None:
    monkeypatch.setattr(Detector, "detect_set", None)  # not called
    instances = make_set(tmp_path)
    edit(instances)
    with pytest.raises(DataError, match=message):
        run(tmp_path, weights, instances)


def test_only_annotated_images_of_a_set_without_annotations_are_none(tmp_path: Path, weights: Path) -> None:
    instances = make_set(tmp_path) | {"annotations": []}
    with pytest.raises(DataError, match=r"val\.json: no image has an annotation"):
        run(tmp_path, weights, instances, only_annotated=True)
