"""Annotation files as other programs write them: the same set as from COCO's own notation, or one clear error."""

import json
import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_set import load, make_set

from ssd_fast.data.annotations import Category, read_categories, read_instances
from ssd_fast.data.policy import DataError
from ssd_fast.evaluation.coco_eval import DetectionTable, score

Edit = Callable[[dict[str, Any]], object]


def each(key: str, **values: Any) -> Edit:
    return lambda instances: [entry.update(values) for entry in instances[key]]


def as_floats(instances: dict[str, Any]) -> None:
    for entry in [*instances["images"], *instances["annotations"], *instances["categories"]]:
        entry.update({key: float(value) for key, value in entry.items() if isinstance(value, int)})


def with_root(instances: dict[str, Any]) -> None:
    instances["categories"].insert(0, {"id": 0, "name": "kite", "supercategory": "none"})


SAME: dict[str, Edit] = {
    "whole numbers as floats": as_floats,
    "iscrowd as bool": lambda d: [entry.update(iscrowd=bool(entry["iscrowd"])) for entry in d["annotations"]],
    "iscrowd null or missing": lambda d: (d["annotations"][0].update(iscrowd=None), d["annotations"][1].pop("iscrowd")),
    "iscrowd as text": lambda d: [entry.update(iscrowd=str(entry["iscrowd"])) for entry in d["annotations"]],
    "iscrowd NaN": lambda d: [entry.update(iscrowd=entry["iscrowd"] or math.nan) for entry in d["annotations"]],
    "area as text": lambda d: [entry.update(area=str(entry["area"])) for entry in d["annotations"]],
    "NaN where nobody looks": each("annotations", segmentation=[math.nan], score=math.inf),
    "null where nobody looks": lambda d: d.update(info=None, licenses=None),
    "root category of the same name": with_root,
    "nothing": lambda d: None,
}


@pytest.mark.parametrize("start", ["", "\ufeff"], ids=["", "byte order mark"])
@pytest.mark.parametrize("dialect", SAME)
def test_training_and_scoring_read_the_same_as_in_cocos_own_notation(tmp_path: Path, dialect: str, start: str) -> None:
    def everything() -> list[Any]:
        read = load(tmp_path, start + json.dumps(instances), with_crowds=True)
        found = DetectionTable(
            np.array([5, 7]), np.array([[1.0, 2, 10, 20], [0, 0, 5, 5]]), np.ones(2), np.array([90, 3])
        )
        scores = score(read.annotation_file, found)
        assert read_categories(read.annotation_file) == read.categories
        return [read.categories, *(np.asarray(part).tolist() for part in read.images[1:]), str(scores)]

    instances = make_set(tmp_path)
    expected = everything()
    SAME[dialect](instances)
    assert everything() == expected
    assert expected[0] == (Category(3, "car"), Category(90, "kite"))


def test_areas_that_are_no_numbers_are_those_of_the_boxes(tmp_path: Path) -> None:
    instances = make_set(tmp_path)
    for entry, area in zip(instances["annotations"], (None, math.nan, math.inf), strict=True):
        entry["area"] = area
    read = read_instances(load(tmp_path, instances).annotation_file)
    assert [annotation.area for annotation in read.annotations] == [None] * 3


def test_a_negative_area_is_that_of_the_box(tmp_path: Path) -> None:
    instances = make_set(tmp_path)
    path = load(tmp_path, instances).annotation_file
    found = DetectionTable(np.array([5]), np.array([[1.0, 2, 10, 20]]), np.ones(1), np.array([90]))
    expected = score(path, found)
    instances["annotations"][0]["area"] = -1
    path.write_text(json.dumps(instances))
    assert score(path, found)[:12] == expected[:12]
    assert expected.map_small == pytest.approx(0.5)


def test_a_category_that_is_left_out_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    instances = make_set(tmp_path)
    with_root(instances)
    with caplog.at_level(logging.WARNING):
        load(tmp_path, instances)
    assert "categories that repeat the name of another are left out: 'kite' (id 0)" in caplog.text
    instances["annotations"].append(instances["annotations"][0] | {"category_id": 0})
    with pytest.raises(DataError, match="expected unique names, annotations use 2 ids of 'kite'"):
        load(tmp_path, instances)


def test_a_test_set_has_images_and_names_but_no_annotations(tmp_path: Path) -> None:
    edits: tuple[Edit, ...] = (
        lambda d: d.pop("annotations"),
        lambda d: d.update(annotations=None),
        lambda d: d.update(annotations=[]),
    )
    for edit in edits:
        instances = make_set(tmp_path)
        edit(instances)
        read = load(tmp_path, instances)
        assert read.images.offsets.tolist() == [0, 0, 0]
        assert read_categories(read.annotation_file) == (Category(3, "car"), Category(90, "kite"))


@pytest.mark.parametrize(
    "bbox",
    [
        None,
        "1 2 3 4",
        [],
        [1, 2, 3],
        [1, 2, 3, 4, 5],
        [1, 2, None, 4],
        [1, 2, math.nan, 4],
        [1, 2, math.inf, 4],
        [1e308, 2, 1e308, 4],
        {},
        [[1], 2, 3, 4],
    ],
)
def test_what_is_no_box_follows_the_policy_and_does_not_count_in_the_score(
    tmp_path: Path, bbox: Any, caplog: pytest.LogCaptureFixture
) -> None:
    instances = make_set(tmp_path)
    instances["annotations"][1]["bbox"] = bbox
    with pytest.raises(DataError, match=r"annotations\[1\] of image 7: bbox: expected four finite numbers.*bad_boxes"):
        load(tmp_path, instances, bad_boxes="error")
    with caplog.at_level(logging.WARNING):
        read = load(tmp_path, instances, bad_boxes="skip")
    assert read.images.offsets.tolist() == [0, 0, 1]
    assert read.num_left_out_boxes == 1
    found = DetectionTable(np.array([5]), np.array([[1.0, 2, 10, 20]]), np.ones(1), np.array([90]))
    scores = score(read.annotation_file, found)
    assert scores.per_class == {"car": -1, "kite": pytest.approx(1)}


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (
            each("images", id=2**63),
            r"images\[0\]\.id = 9223372036854775808: expected a whole number",
        ),
        (each("annotations", image_id="7"), r"annotations\[0\]\.image_id = '7': expected a whole number"),
        (each("annotations", category_id=3.5), r"annotations\[0\]\.category_id = 3\.5: expected a whole number"),
        (each("annotations", category_id=True), r"annotations\[0\]\.category_id = True: expected a whole number"),
        (each("annotations", area="large"), r"annotations\[0\]\.area = 'large': expected a number"),
        (each("annotations", iscrowd="no"), r"annotations\[0\]\.iscrowd = 'no': expected 0 or 1"),
        (each("images", file_name="\ud800.jpg"), r"images\[0\]\.file_name = .*: expected a text"),
        (each("images", file_name="a\0.jpg"), r"images\[0\]: .*expected the name of a file"),
        (each("images", width=-60), r"images\[0\]: .*-60 x 40 pixels: expected"),
        (each("images", width=2**40), r"images\[0\]: .* pixels: expected"),
        (each("categories", name=7), r"categories\[0\]\.name = 7: expected a text"),
        (lambda d: d["categories"][0].pop("id"), r"categories\[0\]\.id is missing: expected a whole number"),
        (lambda d: d.update(images={}), r"images is dict: expected COCO instances"),
        (lambda d: d["images"].append("8.jpg"), r"images\[2\] = '8\.jpg': expected an object"),
    ],
)
def test_what_cannot_be_meant_is_refused_with_its_place(tmp_path: Path, edit: Edit, message: str) -> None:
    instances = make_set(tmp_path)
    edit(instances)
    with pytest.raises(DataError, match=r"instances\.json: " + message):
        load(tmp_path, instances)


@pytest.mark.parametrize(
    "content", [b"\xff\xfe{}", b'{"images": "\xff"}', b"[" * 100_000, b'{"images": [' + b"[" * 5000]
)
def test_bytes_that_are_no_json_are_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "instances.json"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"instances\.json: not JSON, expected COCO instances"):
        read_instances(path)


@pytest.mark.parametrize(
    ("factor", "corners", "message"),
    [(1 / 60, False, "looks like fractions of the image"), (1, True, "looks like two corners"), (1, False, "")],
)
def test_boxes_in_another_notation_are_doubted(
    tmp_path: Path, factor: float, corners: bool, message: str, caplog: pytest.LogCaptureFixture
) -> None:
    instances = make_set(tmp_path)
    starts = np.random.default_rng(0).uniform(0, (45, 30), (50, 2))
    ends = starts + np.array([12, 9])
    boxes = factor * np.hstack([starts, ends if corners else ends - starts])
    instances["annotations"] = [{"image_id": 7, "category_id": 3, "bbox": box} for box in boxes.tolist()]
    with caplog.at_level(logging.WARNING):
        load(tmp_path, instances)
    assert ("looks like" in caplog.text) == bool(message)
    assert message in caplog.text
