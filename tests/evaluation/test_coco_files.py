"""Files of detections and tables of scores: their format, and what is refused."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from coco_cases import crowds, empty_categories, make_table, more_than_100_detections, oracle

from ssd_fast.data.policy import DataError
from ssd_fast.evaluation.coco_eval import DetectionTable, format_scores, read_results, score, write_results


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
        ({"categories": [{"id": 1, "name": "dog"}, {"id": 1, "name": "cat"}]}, "unique ids, 1 occurs more"),
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
