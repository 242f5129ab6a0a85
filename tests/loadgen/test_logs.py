"""The accuracy log: it holds what `evaluate` finds, in the published format."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from pycocotools.coco import COCO
from short_benchmark import DEMO, MANY, load_set, sets

from ssd_fast.__main__ import main
from ssd_fast.data.policy import DataError
from ssd_fast.evaluation.coco_eval import read_results, score, twelve_numbers
from ssd_fast.loadgen.logs import read_accuracy_log

Run = Callable[..., tuple[int, str, str]]


def read_published_format(log: Path, annotations: Path) -> list[dict]:
    """COCO results from an accuracy log, as MLPerf's own script reads it: numbers are positions in the file."""
    truth = COCO(annotations)
    category_ids = [0, *truth.getCatIds()]
    results, seen = [], set()
    for entry in json.loads(log.read_text()):
        if entry["qsl_idx"] in seen:
            continue
        seen.add(entry["qsl_idx"])
        image = truth.dataset["images"][entry["qsl_idx"]]
        rows = np.frombuffer(bytes.fromhex(entry["data"]), "<f4").reshape(-1, 7).astype(np.float64)
        for position, top, left, bottom, right, confidence, label in rows.tolist():
            assert position == entry["qsl_idx"]
            left, right = left * image["width"], right * image["width"]
            top, bottom = top * image["height"], bottom * image["height"]
            box = [left, top, right - left, bottom - top]
            category_id = category_ids[int(label)]
            results.append({"image_id": image["id"], "category_id": category_id, "bbox": box, "score": confidence})
    assert len(seen) == len(truth.dataset["images"])
    return results


@pytest.mark.parametrize("scenario", ["Offline", "MultiStream"])
def test_accuracy_log_holds_what_evaluate_finds(
    run: Run,
    monkeypatch: pytest.MonkeyPatch,
    shuffled_set: Path,
    weights: Path,
    tmp_path: Path,
    scenario: str,
) -> None:
    pytest.importorskip("mlperf_loadgen")
    options = ["--config", DEMO, "--checkpoint", weights, "--data", shuffled_set]
    changes = sets(MANY)
    status, out, _ = run(*options, "--scenario", scenario, "--accuracy", "--output", tmp_path, *changes)
    assert status == 0, out

    results = tmp_path / "evaluated.json"
    monkeypatch.setattr(sys, "argv", ["ssd-fast", "evaluate", *map(str, [*options, "--output", results, *changes])])
    with pytest.raises(SystemExit) as exit_info:
        main()
    assert not exit_info.value.code
    annotations = shuffled_set / "annotations" / "instances_val2017.json"
    evaluated = read_results(results)
    (tmp_path / "logged.json").write_text(
        json.dumps(read_published_format(tmp_path / "mlperf_log_accuracy.json", annotations))
    )
    logged = read_results(tmp_path / "logged.json")
    assert len(evaluated.scores) > 200
    assert len(set(evaluated.category_ids.tolist())) > 1
    order = np.argsort([evaluated.image_ids.tolist().index(image_id) for image_id in logged.image_ids], kind="stable")
    for found, expected in zip(logged, evaluated, strict=True):
        np.testing.assert_allclose(found[order], expected, rtol=1e-4, atol=1e-4)
    own = read_accuracy_log(tmp_path / "mlperf_log_accuracy.json", load_set(shuffled_set))
    assert twelve_numbers(score(annotations, own)) == twelve_numbers(score(annotations, logged))
    expected_map = score(annotations, evaluated).map
    assert expected_map > 0.1
    assert score(annotations, own).map == pytest.approx(expected_map, abs=1e-6)
    assert f"all | maxDets=100 ] = {expected_map:.3f}" in out


def test_a_log_that_is_not_whole_or_mixed_up_is_refused(synthetic_set: Path, tmp_path: Path) -> None:
    coco_set = load_set(synthetic_set)
    log = tmp_path / "log.json"
    entries = [{"seq_id": n, "qsl_idx": n, "data": ""} for n in range(16)]
    log.write_text(json.dumps(entries))
    assert len(read_accuracy_log(log, coco_set).scores) == 0
    log.write_text(json.dumps(entries[1:]))
    with pytest.raises(DataError, match=r"log\.json: holds 15 images: expected each of the 16"):
        read_accuracy_log(log, coco_set)
    entries[3]["data"] = np.array([5, 0, 0, 1, 1, 0.5, 1], np.float32).tobytes().hex()
    log.write_text(json.dumps(entries))
    with pytest.raises(DataError, match="qsl_idx 3 has rows of another image"):
        read_accuracy_log(log, coco_set)
