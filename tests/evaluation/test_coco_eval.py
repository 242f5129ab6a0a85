"""COCO's numbers: the oracle is pycocotools, which reads the annotation file and the result file from disk."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from coco_cases import (
    HAND_MADE,
    Case,
    crowds,
    empty_categories,
    equal_scores,
    images_without_detections,
    make_instances,
    make_table,
    no_detections,
    oracle,
    truth,
)
from repository import REPOSITORY

from ssd_fast.evaluation.coco_eval import CocoScores, DetectionTable, read_results, score, write_results

NUMBERS = CocoScores._fields[:12]
EDGES = (0.0, 1.0, 16.0, 31.9, 32.0, 32.0001, 95.9, 96.0, 96.1, 200.0)


def assert_same_bits(folder: Path, case: Case, **subset: Any) -> CocoScores:
    annotation_file, results = folder / "instances.json", folder / "results.json"
    annotation_file.write_text(json.dumps(case.instances))
    table = make_table(case.rows)
    write_results(table, results)
    expected = oracle(annotation_file, results, **subset)
    for found in (table, read_results(results)):
        scores = score(annotation_file, found, **subset)
        assert [getattr(scores, name) for name in NUMBERS] == expected.stats.tolist()
        assert np.array_equal(scores.precision_50, expected.eval["precision"][0, :, :, 0, -1])
        for k, ap in enumerate(scores.per_class.values()):
            values = expected.eval["precision"][:, :, k, 0, -1]
            assert ap == (values[values > -1].mean() if (values > -1).any() else -1)
    return scores


@pytest.mark.parametrize("make_case", HAND_MADE, ids=lambda make_case: make_case.__name__)
def test_bits_equal_pycocotools(make_case: Any, tmp_path: Path) -> None:
    assert_same_bits(tmp_path, make_case())


def make_random_case(rng: np.random.Generator) -> Case:
    """Few images and classes, with boxes on a coarse grid, so that ties of IoU, score and area are frequent."""
    image_ids = rng.permutation(100)[: rng.integers(1, 6)]
    category_ids = rng.permutation(20)[: rng.integers(1, 5)]

    def boxes(num: int) -> np.ndarray:
        sides = np.where(rng.random((num, 2)) < 0.5, rng.choice(EDGES, (num, 2)), 10.0 * rng.integers(0, 12, (num, 2)))
        return np.concatenate([10.0 * rng.integers(0, 10, (num, 2)), sides], axis=1)

    truths = boxes(int(rng.integers(0, 12)))
    annotations = []
    for id_, box in zip(rng.permutation(len(truths)) + 1, truths, strict=True):
        annotations.append(
            {
                "id": int(id_),
                "image_id": int(rng.choice(image_ids)),
                "category_id": int(rng.choice(category_ids)),
                "bbox": box.tolist(),
                "area": float(rng.choice([box[2] * box[3], box[2] * box[3] / 2, 1024.0, 9216.0])),
                "iscrowd": int(rng.random() < 0.2),
            }
        )
    num = int(rng.choice([0, 1, 5, 30, 250]))
    found = boxes(num)
    if len(truths):
        near = truths[rng.integers(0, len(truths), num)] + rng.choice([0.0, 0, 0, 1, 2, 5, 10], (num, 4))
        found = np.where(rng.random((num, 1)) < 0.6, near, found)
    scores = rng.choice([0.0, 0.1, 0.5, 0.5, 0.9, 1.0], num) if rng.random() < 0.6 else rng.random(num)
    rows = np.column_stack([rng.choice(image_ids, num), found, scores, rng.choice(category_ids, num)])
    instances = make_instances(0, category_ids.tolist(), [])
    instances["images"] = [{"id": id_, "width": 640, "height": 480} for id_ in image_ids.tolist()]
    return Case({**instances, "annotations": annotations}, rows.tolist())


@pytest.mark.parametrize("seed", range(120))
def test_bits_equal_pycocotools_on_random_cases(seed: int, tmp_path: Path) -> None:
    assert_same_bits(tmp_path, make_random_case(np.random.default_rng(seed)))


@pytest.mark.parametrize("seed", range(40))
def test_bits_equal_pycocotools_on_some_images_and_categories(seed: int, tmp_path: Path) -> None:
    rng = np.random.default_rng(1000 + seed)
    case = make_random_case(rng)
    image_ids, category_ids = (
        [item["id"] for item in case.instances[key] if rng.random() < 0.6] or None for key in ("images", "categories")
    )
    assert_same_bits(tmp_path, case, image_ids=image_ids, category_ids=category_ids)


def make_detections(instances: dict[str, Any], rng: np.random.Generator, false_per_image: float) -> DetectionTable:
    """Plausible detections: boxes moved, doubled, missed, mislabelled, invented; half of the scores rounded."""
    annotations = instances["annotations"]
    category_ids = np.array([category["id"] for category in instances["categories"]])
    sources = np.repeat(np.arange(len(annotations)), rng.integers(0, 5, len(annotations)))
    boxes = np.array([item["bbox"] for item in annotations])[sources]
    noise = rng.choice([0, 0.05, 0.1, 0.3], len(sources))[:, None]
    boxes[:, :2] += noise * boxes[:, 2:] * rng.normal(size=(len(sources), 2))
    boxes[:, 2:] *= np.exp(noise * rng.normal(size=(len(sources), 2)))
    scores = np.clip(1 - 2 * noise[:, 0] + 0.3 * rng.normal(size=len(sources)), 0.01, 1)
    images = np.array([item["image_id"] for item in annotations])[sources]
    categories = np.array([item["category_id"] for item in annotations])[sources]
    categories = np.where(rng.random(len(sources)) < 0.1, rng.choice(category_ids, len(sources)), categories)

    num = int(false_per_image * len(instances["images"]))
    other = rng.integers(0, len(instances["images"]), num)
    sizes = np.array([[image["width"], image["height"]] for image in instances["images"]])[other]
    images = np.concatenate([images, np.array([image["id"] for image in instances["images"]])[other]])
    boxes = np.concatenate(
        [boxes, np.concatenate([rng.random((num, 2)) * sizes, np.exp(rng.uniform(1, 6, (num, 2)))], 1)]
    )
    scores = np.concatenate([scores, rng.beta(1, 6, num)])
    categories = np.concatenate([categories, rng.choice(category_ids[:20], num)])
    order = rng.permutation(len(images))
    scores = np.where(rng.random(len(images)) < 0.5, scores.round(2), scores)
    # A detector computes in float32.
    return DetectionTable(
        image_ids=images[order],
        boxes_xywh=boxes[order].astype(np.float32).astype(np.float64),
        scores=scores[order].astype(np.float32).astype(np.float64),
        category_ids=categories[order],
    )


def test_bits_equal_pycocotools_on_every_eighth_image_of_coco(tmp_path: Path) -> None:
    default = REPOSITORY.parent / "shared" / "data" / "coco_annotations" / "instances_val2017_rebuilt.json"
    source = Path(os.environ.get("SSD_FAST_COCO_ANNOTATIONS", default))
    if not source.is_file():
        pytest.skip(f"no COCO annotations at {source}; SSD_FAST_COCO_ANNOTATIONS names an instances file")
    instances = json.loads(source.read_text())
    instances["images"] = instances["images"][::8]
    ids = {image["id"] for image in instances["images"]}
    instances["annotations"] = [item for item in instances["annotations"] if item["image_id"] in ids]
    table = make_detections(instances, np.random.default_rng(0), false_per_image=60)
    rows = np.column_stack([table.image_ids, table.boxes_xywh, table.scores, table.category_ids])
    scores = assert_same_bits(tmp_path, Case(instances, rows.tolist()))
    assert min(scores[:12]) > 0.1  # every number is at stake


def test_both_evaluators_give_the_same_scores(tmp_path: Path) -> None:
    annotation_file = tmp_path / "instances.json"
    for make_case in (crowds, no_detections, equal_scores):
        case = make_case()
        annotation_file.write_text(json.dumps(case.instances))
        fast, slow = (score(annotation_file, make_table(case.rows), evaluator=name) for name in ("fast", "pycocotools"))
        assert fast[:13] == slow[:13]
        assert np.array_equal(fast.precision_50, slow.precision_50)


def test_evaluators_print_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    case = crowds()
    annotation_file = tmp_path / "instances.json"
    annotation_file.write_text(json.dumps(case.instances))
    for name in ("fast", "pycocotools"):
        score(annotation_file, make_table(case.rows), evaluator=name)
    assert capfd.readouterr() == ("", "")


def test_a_match_with_annotation_0_counts(tmp_path: Path) -> None:
    """pycocotools itself takes it for no match."""
    case = images_without_detections()
    annotation_file = tmp_path / "instances.json"
    annotation_file.write_text(json.dumps(case.instances))
    expected = score(annotation_file, make_table(case.rows))
    for item in case.instances["annotations"]:
        item["id"] = (item["id"] + 1) % 3
    annotation_file.write_text(json.dumps(case.instances))
    for name in ("fast", "pycocotools"):
        assert score(annotation_file, make_table(case.rows), evaluator=name).map == expected.map > 0


def test_precision_falls_with_a_better_scored_false_detection(tmp_path: Path) -> None:
    annotation_file = tmp_path / "instances.json"
    annotation_file.write_text(json.dumps(make_instances(1, [4], [truth(10, 4, [10, 10, 60, 60])])))
    right, wrong = [10, 10, 10, 60, 60, 0.8, 4], [10, 300, 10, 60, 60, 0.9, 4]
    scores = score(annotation_file, make_table([right]))
    assert scores.map == pytest.approx(1)
    assert (scores.map_small, scores.map_large, scores.mar_1) == (-1, -1, 1)
    scores = score(annotation_file, make_table([right, wrong]))
    assert scores.map == pytest.approx(0.5)
    assert scores.per_class == {"class 4": scores.map}
    assert scores.precision_50[:, 0] == pytest.approx(np.full(101, 0.5))


def test_per_class_names_follow_the_order_of_ids(tmp_path: Path) -> None:
    annotation_file = tmp_path / "instances.json"
    case = empty_categories()
    annotation_file.write_text(json.dumps(case.instances))
    per_class = score(annotation_file, make_table(case.rows)).per_class
    assert list(per_class) == ["class 1", "class 3", "class 5", "class 7"]
    assert list(per_class.values()) == [-1, pytest.approx(1), -1, 0]


def test_missing_area_and_iscrowd_have_defaults(tmp_path: Path) -> None:
    case = crowds()
    for item in case.instances["annotations"]:
        item["iscrowd"] = 0
    annotation_file = tmp_path / "instances.json"
    annotation_file.write_text(json.dumps(case.instances))
    expected = score(annotation_file, make_table(case.rows))
    for item in case.instances["annotations"]:
        del item["area"], item["iscrowd"]
    annotation_file.write_text(json.dumps(case.instances))
    assert score(annotation_file, make_table(case.rows))[:13] == expected[:13]
