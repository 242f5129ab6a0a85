"""The benchmark of the operators: its inputs are what they are called, and nothing wrong is timed."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from repository import REPOSITORY
from torch import Tensor
from typer.testing import CliRunner

from kernels import reference
from ssd_fast.__main__ import app
from ssd_fast.model.anchors import model_anchors
from ssd_fast.profiling import operator_cases as kernel_cases
from ssd_fast.profiling import operators as kernel_profile
from ssd_fast.profiling.operator_cases import ORACLE, OURS, Case, Implementation
from ssd_fast.profiling.operators import ProfileError, measure
from ssd_fast.recipe import load_config

CPU = torch.device("cpu")
SSD300, SSD1200, DEMO = (REPOSITORY / "configs" / f"{name}.toml" for name in ("ssd300", "ssd1200", "demo"))
PREDICTIONS = (
    kernel_cases.network_like,
    kernel_cases.every_anchor,
    kernel_cases.identical_boxes,
    kernel_cases.no_candidates,
)


def anchors_of(recipe: Path) -> Tensor:
    return model_anchors(load_config(recipe).model)


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(3)


def above_threshold(logits: Tensor) -> Tensor:
    """[B, A, C - 1] bool, the candidates."""
    return logits.softmax(dim=-1)[..., 1:] > 0.05


def case_of(**runs: Callable[[], Any]) -> Case:
    """A case whose implementations give numbers; they may differ by 0.1."""
    implementations = tuple(
        Implementation(name, run, lambda result, expected: abs(result - expected), 0.1) for name, run in runs.items()
    )
    return Case("decode_nms", "input", batch_size=1, num_anchors=10, num_bytes=1000, implementations=implementations)


# ---- inputs ----


def test_network_like_predictions_have_350_candidates_in_clusters_of_many_classes() -> None:
    anchors = anchors_of(SSD300)
    deltas, logits = kernel_cases.network_like(anchors, 4, generator())
    candidates = above_threshold(logits)
    assert all(300 < count <= 350 for count in candidates.sum(dim=(1, 2)).tolist())
    assert all(count > 30 for count in candidates.any(dim=1).sum(dim=1).tolist())
    kept = reference.decode_nms(deltas, logits, anchors).counts
    assert all(60 < count < 200 for count in kept.tolist())  # suppression has something to do
    assert logits[~candidates.any(dim=2)].argmax(dim=-1).eq(0).all()


@pytest.mark.parametrize("make_input", [kernel_cases.every_anchor, kernel_cases.identical_boxes])
def test_every_anchor_has_as_many_candidates_as_can_be_in_half_precision_too(make_input: Any) -> None:
    anchors = anchors_of(DEMO)
    deltas, logits = make_input(anchors, 2, generator())
    for values in (logits, logits.half().float()):
        assert above_threshold(values).sum(dim=2).eq(19).all()
    boxes = reference.decode_deltas(deltas, anchors)
    assert (make_input is kernel_cases.identical_boxes) == torch.allclose(boxes, boxes[:1, :1], atol=1e-5)


def test_no_candidates_are_none() -> None:
    assert not above_threshold(kernel_cases.no_candidates(anchors_of(SSD300), 2, generator())[1]).any()


def test_anchors_that_rounding_decides_are_those_of_equal_overlap() -> None:
    anchors = torch.tensor([[0, 0, 2, 2], [0, 0, 2, 1], [0, 0, 1, 2], [4, 4, 6, 6], [4, 4, 6, 5], [8, 8, 9, 9]]).float()
    boxes = torch.tensor([[0, 0, 1, 1], [4, 4, 6, 6]]).float()  # overlap anchors 1 and 2 equally; 3 best, 4 by a half
    decided = kernel_cases.decided_by_rounding(reference.iou_matrix(boxes, anchors))
    assert decided.tolist() == [False, True, True, False, True, False]
    twins = torch.tensor([[4, 4, 6, 6], [4, 4, 6, 6]]).float()
    assert kernel_cases.decided_by_rounding(reference.iou_matrix(twins, anchors)).tolist()[3:5] == [True, True]


# ---- implementations ----


@pytest.mark.parametrize("make_input", PREDICTIONS, ids=lambda make_input: make_input.__name__)
def test_torchvisions_ways_find_what_the_oracle_finds(make_input: Any) -> None:
    anchors = anchors_of(DEMO)
    predictions = make_input(anchors, 2, generator())
    expected = reference.decode_nms(*predictions, anchors)
    for decode in (kernel_cases.decode_per_class, kernel_cases.decode_batched):
        found = decode(*predictions, anchors)
        assert torch.equal(found.counts, expected.counts)
        torch.testing.assert_close(found.scores, expected.scores)
        assert kernel_cases.unmatched(found, expected) <= 0.005


def test_detections_that_are_missing_or_moved_are_counted() -> None:
    anchors = anchors_of(DEMO)
    found = reference.decode_nms(*kernel_cases.network_like(anchors, 2, generator()), anchors)
    total = int(found.counts.sum())
    assert kernel_cases.unmatched(found, found) == 0
    fewer = found._replace(counts=found.counts - 3)
    assert kernel_cases.unmatched(fewer, found) == pytest.approx(6 / (2 * total - 6))
    moved = found._replace(boxes_ltrb=found.boxes_ltrb.index_fill(1, torch.tensor([0]), 5.0))
    assert kernel_cases.unmatched(moved, found) == pytest.approx(4 / (2 * total))
    relabelled = found._replace(labels=found.labels + 1)
    assert kernel_cases.unmatched(relabelled, found) == 1


# ---- measuring ----


def test_implementations_take_turns_and_slow_ones_have_fewer(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    case = case_of(**{name: lambda name=name: calls.append(name) or 1 for name in (OURS, ORACLE, "other")})
    rows = measure(case, CPU, repeats=5, copy_rate=1e9)
    assert calls[-15:] == [OURS, ORACLE, "other"] * 5
    assert [len(row.times.samples_s) for row in rows if row.times] == [5, 5, 5]
    monkeypatch.setattr(kernel_profile, "_SECONDS_EACH", 0.0)
    rows = measure(case, CPU, repeats=5, copy_rate=1e9)
    assert [len(row.times.samples_s) for row in rows if row.times] == [3, 3, 3]


def test_a_wrong_result_is_not_timed() -> None:
    case = case_of(**{OURS: lambda: 1, ORACLE: lambda: 1, "other": lambda: 1.5})
    with pytest.raises(ProfileError, match=r"decode_nms, input, 10 anchors: the result of other differs .* by 0\.5"):
        measure(case, CPU, repeats=1, copy_rate=1e9)
    with pytest.raises(ProfileError, match="nan"):
        measure(case_of(**{OURS: lambda: torch.nan, ORACLE: lambda: 1}), CPU, repeats=1, copy_rate=1e9)


def test_a_gradient_that_is_not_a_number_is_a_difference() -> None:
    good, bad = torch.tensor([1.0, 4.0]), torch.tensor([1.0, torch.nan])
    assert kernel_cases.loss_difference((good, good), (good, good)) == 0
    assert kernel_cases.loss_difference((good, good - 1), (good, good)) == 0.25
    assert not kernel_cases.loss_difference((good, bad), (good, good)) <= 1
    assert not kernel_cases.loss_difference((bad, good), (good, good)) <= 1


def test_memory_is_the_peak_not_what_remains() -> None:
    def run() -> int:
        torch.ones(64 * 2**20)  # 256 MiB, which malloc gives back before the next
        return int(torch.ones(96 * 2**20)[0])

    case = case_of(**{OURS: run, ORACLE: lambda: 1})._replace(measure_memory=True)
    ours, oracle = measure(case, CPU, repeats=1, copy_rate=1e9)
    assert ours.peak_bytes == pytest.approx(384 * 2**20, rel=0.1)
    assert oracle.peak_bytes is not None
    assert oracle.peak_bytes < 2**20


# ---- the command ----


def test_the_command_measures_everything_and_says_what_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_compiler(function: Any, **_: Any) -> Any:
        def run(*_: Tensor) -> None:
            raise RuntimeError("no C++ compiler\nat all")

        return run

    monkeypatch.setattr(torch, "compile", no_compiler)
    recipes = ["--config", str(DEMO), "--config", str(SSD1200)]
    arguments = ["profile", "--stage", "kernels", *recipes, "--batch-size", "1", "--repeats", "1"]
    result = CliRunner().invoke(app, [*arguments, "--output", str(tmp_path / "times")])
    assert result.exit_code == 0, result.output
    content = json.loads((tmp_path / "times" / "kernels.json").read_text())
    assert content["environment"]["copy_bytes_per_s"] > 0
    rows = content["rows"]
    peers = {
        "encode_boxes": ["DALI"],
        "multibox_loss": ["torch.compile"],
        "decode_nms": ["nms per class", "batched_nms"],
    }
    inputs = {
        "encode_boxes": ["8 boxes an image", "60 boxes an image"],
        "multibox_loss": ["forward and backward"],
        "decode_nms": ["network like", "every anchor", "identical boxes", "no candidates"],
    }
    assert [(row["num_anchors"], row["operator"], row["input"], row["implementation"]) for row in rows] == [
        (num_anchors, operator, input_, name)
        for num_anchors in (len(anchors_of(DEMO)), 15_130)
        for operator in peers
        for input_ in inputs[operator]
        for name in (OURS, ORACLE, *peers[operator])
    ]
    failed = [row for row in rows if row["implementation"] == "torch.compile"]
    assert [row["failure"] for row in failed] == ["RuntimeError: no C++ compiler"] * 2
    assert all(len(row["times"]["samples_s"]) == 1 for row in rows if row not in failed)
    assert all(row["times"]["ratio"] == 1 for row in rows if row["implementation"] == OURS)
    lines = result.stdout.splitlines()
    assert sum("no C++ compiler" in line for line in lines) == 2
    assert sum(line.startswith(tuple(peers)) for line in lines) == len(rows)


def test_the_command_refuses_before_it_measures(tmp_path: Path) -> None:
    arguments = ["profile", "--stage", "kernels", "--config", str(DEMO)]
    result = CliRunner().invoke(app, [*arguments, "--output", str(tmp_path / "none" / "times")])
    assert "expected a folder, or a new one in a folder that exists" in str(result.exception)
    assert "expected --config" in str(CliRunner().invoke(app, arguments[:3]).exception)
