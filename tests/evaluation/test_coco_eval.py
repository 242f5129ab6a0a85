"""The oracle is pycocotools, reading the annotation file and the result file from disk."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from repository import REPOSITORY

from ssd_fast.data.policy import DataError
from ssd_fast.evaluation.coco_eval import CocoScores, DetectionTable, format_scores, read_results, score, write_results

NUMBERS = CocoScores._fields[:12]
EDGES = (0.0, 1.0, 16.0, 31.9, 32.0, 32.0001, 95.9, 96.0, 96.1, 200.0)


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
    """What a detector might find: boxes moved, doubled, missed, mislabelled, invented; half of the scores rounded."""
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


def test_summary_is_worded_as_pycocotools(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    case = more_than_100_detections()
    annotation_file, results = tmp_path / "instances.json", tmp_path / "results.json"
    annotation_file.write_text(json.dumps(case.instances))
    write_results(make_table(case.rows), results)
    oracle(annotation_file, results)
    expected = [line for line in capsys.readouterr().out.splitlines() if "@[" in line]
    assert format_scores(score(annotation_file, read_results(results))).splitlines() == expected


def test_per_class_table_lists_every_class(tmp_path: Path) -> None:
    annotation_file = tmp_path / "instances.json"
    case = empty_categories()
    annotation_file.write_text(json.dumps(case.instances))
    lines = format_scores(score(annotation_file, make_table(case.rows)), per_class=True).splitlines()[-4:]
    assert [line.split(maxsplit=2) for line in lines] == [
        ["class", "1", "no ground truth"],
        ["class", "3", "1.000"],
        ["class", "5", "no ground truth"],
        ["class", "7", "0.000"],
    ]


def test_results_keep_every_bit_and_their_order(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    table = DetectionTable(
        image_ids=rng.integers(0, 2**53, 1000) + 2**53,
        boxes_xywh=rng.random((1000, 4)) * 10.0 ** rng.integers(-8, 8, (1000, 1)),
        scores=rng.random(1000).astype(np.float32).astype(np.float64),
        category_ids=rng.integers(1, 91, 1000),
    )
    write_results(table, tmp_path / "results.json")
    for read, written in zip(read_results(tmp_path / "results.json"), table, strict=True):
        assert np.array_equal(read, written)


def test_results_are_plain_json_in_cocos_format(tmp_path: Path) -> None:
    write_results(make_table([[10, 1.5, 2, 30, 40.25, 0.125, 3]]), tmp_path / "results.json")
    assert json.loads((tmp_path / "results.json").read_text()) == [
        {"image_id": 10, "category_id": 3, "bbox": [1.5, 2, 30, 40.25], "score": 0.125}
    ]


def test_float32_tables_score_as_the_file_written_from_them(tmp_path: Path) -> None:
    case = crowds()
    annotation_file, results = tmp_path / "instances.json", tmp_path / "results.json"
    annotation_file.write_text(json.dumps(case.instances))
    table = make_table(case.rows)
    table = table._replace(
        boxes_xywh=(table.boxes_xywh + 0.1).astype(np.float32), scores=table.scores.astype(np.float32)
    )
    write_results(table, results)
    assert score(annotation_file, table)[:13] == score(annotation_file, read_results(results))[:13]


def test_failed_write_keeps_the_old_file_and_leaves_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "results.json"
    path.write_text("old")

    def full_disk(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match=r"No space left on device: '.*results\.json'"):
        write_results(make_table([[10, 1, 2, 3, 4, 0.5, 1]]), path)
    assert [file.name for file in tmp_path.iterdir()] == ["results.json"]
    assert path.read_text() == "old"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[", "not JSON, expected COCO results"),
        ('{"annotations": []}', "expected COCO results"),
        ('[{"image_id": 1, "category_id": 1, "bbox": [0, 0, 1], "score": 1}]', r"\[0\]\.bbox"),
        ('[{"image_id": 1, "category_id": 1, "bbox": [0, 0, 1, 1]}]', "score"),
        ('[{"image_id": "a", "category_id": 1, "bbox": [0, 0, 1, 1], "score": 1}]', r"\[0\]\.image_id"),
        ('[{"image_id": 1, "category_id": 1, "bbox": [0, 0, -1, 1], "score": 1}]', "detection 0 .* not negative"),
    ],
)
def test_bad_results_are_refused(content: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    path.write_text(content)
    with pytest.raises(DataError, match=f"results.json: .*{message}"):
        read_results(path)


def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"gone\.json: no such file: expected COCO"):
        read_results(tmp_path / "gone.json")
    with pytest.raises(DataError, match=r"gone\.json: no such file: expected COCO"):
        score(tmp_path / "gone.json", make_table([]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": None}, r"images"),
        ({"images": []}, "images is empty: expected at least one"),
        ({"categories": []}, "categories is empty: expected at least one"),
        ({"categories": [{"id": 1, "name": "dog"}, {"id": 2, "name": "dog"}]}, "every name once"),
        ({"categories": [{"id": 1, "name": "dog"}, {"id": 1, "name": "cat"}]}, "every id .* once"),
        ({"annotations": [{"id": 1, "image_id": 10, "category_id": 1}]}, "bbox"),
    ],
)
def test_annotation_files_that_cannot_be_scored_are_refused(
    change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    annotation_file = tmp_path / "instances.json"
    annotation_file.write_text(json.dumps({**crowds().instances, **change}))
    with pytest.raises(DataError, match=f"instances.json: .*{message}"):
        score(annotation_file, make_table([]))


@pytest.mark.parametrize(
    ("row", "subset", "message"),
    [
        ([11, 1, 1, 5, 5, 0.5, 1], {}, r"detections\.image_ids: 11 and 0 others: expected ids of"),
        ([10, 1, 1, 5, 5, 0.5, 2], {}, r"detections\.category_ids: 2 and 0 others: expected ids of"),
        ([10, 1, 1, 5, 5, 0.5, 1], {"image_ids": [10, 11, 12]}, "image_ids: 11 and 1 others: expected ids of"),
        ([10, 1, 1, 5, 5, 0.5, 1], {"image_ids": []}, "image_ids or category_ids is empty"),
        ([10, 1, 1, 5, 5, 0.5, 1], {"category_ids": [0]}, "category_ids: 0 and 0 others: expected ids of"),
        ([10, 1, 1, 5, 5, float("nan"), 1], {}, "score nan: expected finite"),
        ([10, 1, 1, float("inf"), 5, 0.5, 1], {}, "inf.*: expected finite"),
        ([10, 1, 1, -1, 5, 0.5, 1], {}, "width and height not negative"),
    ],
)
def test_detections_that_cannot_be_scored_are_refused(
    row: list[float], subset: dict[str, Any], message: str, tmp_path: Path
) -> None:
    annotation_file = tmp_path / "instances.json"
    annotation_file.write_text(json.dumps(crowds().instances))
    with pytest.raises(ValueError, match=message):
        score(annotation_file, make_table([row]), **subset)


def test_tables_whose_columns_disagree_are_refused(tmp_path: Path) -> None:
    table = make_table([[10, 1, 1, 5, 5, 0.5, 1]])._replace(boxes_xywh=np.zeros((2, 4)))
    with pytest.raises(ValueError, match=r"boxes_xywh has shape \(2, 4\): expected \(1, 4\)"):
        write_results(table, tmp_path / "results.json")
