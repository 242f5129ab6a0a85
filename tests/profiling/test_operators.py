"""The times of the operators: implementations take turns, and nothing wrong is timed."""

import json
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from repository import REPOSITORY
from torch import Tensor
from typer.testing import CliRunner

from ssd_fast.__main__ import app
from ssd_fast.config.recipe import load_config
from ssd_fast.model.anchors import model_anchors
from ssd_fast.profiling import operators
from ssd_fast.profiling.operator_cases import ORACLE, OURS, Case, Implementation
from ssd_fast.profiling.operators import ResultError, measure

CPU = torch.device("cpu")
SSD1200, DEMO = (REPOSITORY / "configs" / f"{name}.toml" for name in ("ssd1200", "demo"))


def case_of(**runs: Callable[[], Any]) -> Case:
    """A case whose implementations give numbers; they may differ by 0.1."""
    implementations = tuple(
        Implementation(name, run, lambda result, expected: abs(result - expected), 0.1) for name, run in runs.items()
    )
    return Case("decode_nms", "input", batch_size=1, num_anchors=10, num_bytes=1000, implementations=implementations)


def test_implementations_take_turns_and_slow_ones_have_fewer(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    def called(name: str) -> int:
        calls.append(name)
        return 1

    case = case_of(**{name: partial(called, name) for name in (OURS, ORACLE, "other")})
    rows = measure(case, CPU, repeats=5, copy_rate=1e9)
    assert calls[-15:] == [OURS, ORACLE, "other"] * 5
    assert [len(row.times.samples_s) for row in rows if row.times] == [5, 5, 5]
    monkeypatch.setattr(operators, "_SECONDS_EACH", 0.0)
    rows = measure(case, CPU, repeats=5, copy_rate=1e9)
    assert [len(row.times.samples_s) for row in rows if row.times] == [3, 3, 3]


def test_a_wrong_result_is_not_timed() -> None:
    case = case_of(**{OURS: lambda: 1, ORACLE: lambda: 1, "other": lambda: 1.5})
    with pytest.raises(ResultError, match=r"decode_nms, input, 1 x 10 anchors: the result of other differs .* by 0\.5"):
        measure(case, CPU, repeats=1, copy_rate=1e9)
    with pytest.raises(ResultError, match="nan"):
        measure(case_of(**{OURS: lambda: torch.nan, ORACLE: lambda: 1}), CPU, repeats=1, copy_rate=1e9)


def test_memory_is_the_peak_not_what_remains() -> None:
    def run() -> int:
        torch.ones(64 * 2**20)  # 256 MiB, which malloc gives back before the next
        return int(torch.ones(96 * 2**20)[0])

    case = case_of(**{OURS: run, ORACLE: lambda: 1})._replace(measure_memory=True)
    ours, oracle = measure(case, CPU, repeats=1, copy_rate=1e9)
    assert ours.peak_bytes == pytest.approx(384 * 2**20, rel=0.1)
    assert oracle.peak_bytes is not None
    assert oracle.peak_bytes < 2**20


def test_the_command_measures_everything_and_says_what_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_compiler(function: Any, **_: Any) -> Any:
        def run(*_: Tensor) -> None:
            raise RuntimeError("no C++ compiler\nat all")

        return run

    monkeypatch.setattr(torch, "compile", no_compiler)
    recipes = ["--config", str(DEMO), "--config", str(SSD1200)]
    arguments = ["operators", *recipes, "--batch-size", "1", "--repeats", "1"]
    result = CliRunner().invoke(app, [*arguments, "--output", str(tmp_path / "times")])
    assert result.exit_code == 0, result.output
    content = json.loads((tmp_path / "times" / "operators.json").read_text())
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
        for num_anchors in (len(model_anchors(load_config(DEMO).model)), 15_130)
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
    assert sum(bool(re.match(r"  \S", line)) for line in lines) == len(rows)


def test_the_command_refuses_before_it_measures(tmp_path: Path) -> None:
    arguments = ["operators", "--config", str(DEMO)]
    (tmp_path / "file").write_bytes(b"")
    result = CliRunner().invoke(app, [*arguments, "--output", str(tmp_path / "file")])
    assert "file is a file: expected a folder" in str(result.exception)
    assert "Missing option '--config'" in CliRunner().invoke(app, arguments[:1]).output
