"""The GPU check, rehearsed: all of it that is not CUDA itself runs on the CPU, in small, and keeps what it measured."""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import gpu_check
import gpu_results
import pytest
import torch
from gpu_support import FAILED, Results, Row, bounded_row, choice_row
from repository import REPOSITORY

COMMAND = [sys.executable, str(REPOSITORY / "tools" / "gpu_check.py")]
SECTIONS = [section.name for section in gpu_check.SECTIONS]
GPU = {"device": "NVIDIA H100", "torch": "2.11.0", "CUDA": "13.0"}

Rehearse = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def rehearse(synthetic_set: Path, tmp_path: Path) -> Rehearse:
    def run(*options: str) -> subprocess.CompletedProcess[str]:
        paths = ["--data", str(synthetic_set), "--results", str(tmp_path / "results.jsonl")]
        return subprocess.run([*COMMAND, "--rehearse", *paths, *options], capture_output=True, text=True, timeout=600)

    return run


@pytest.mark.parametrize("section", SECTIONS)
def test_a_section_runs_to_its_end(rehearse: Rehearse, tmp_path: Path, section: str) -> None:
    ended = rehearse("--section", section)

    assert ended.returncode == 0, ended.stdout + ended.stderr
    results = Results(tmp_path / "results.jsonl")
    rows = results.sections[section]
    assert list(results.sections) == [section]
    assert rows
    assert not [row for row in rows if row.verdict.startswith(("FAILED", "skipped"))]
    assert all(row.measured or row.verdict for row in rows)
    assert all(row.what.strip() in ended.stdout for row in rows)


def test_what_was_measured_stays_when_the_check_is_killed(synthetic_set: Path, tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    options = ["--rehearse", "--data", str(synthetic_set), "--results", str(path), "--section", "inference at 1200"]
    process = subprocess.Popen([*COMMAND, *options], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not (path.exists() and path.read_text().count("\n") > 2):
        time.sleep(0.05)
    process.kill()
    process.wait()

    assert Results(path).sections["inference at 1200"]


def test_no_time_left_is_said(rehearse: Rehearse, tmp_path: Path) -> None:
    ended = rehearse("--minutes", "0")

    assert ended.returncode == 0
    sections = Results(tmp_path / "results.jsonl").sections
    assert list(sections) == SECTIONS
    assert all(rows[0].verdict == "skipped: no time left (--minutes)" for rows in sections.values())


@pytest.mark.parametrize(
    ("name", "limit_s", "verdict"),
    [("no such section", 60.0, "FAILED: ended with status 2"), (SECTIONS[0], 0.01, "FAILED: no end within 0 s")],
)
def test_a_section_that_ends_badly_is_a_failure(tmp_path: Path, name: str, limit_s: float, verdict: str) -> None:
    section = gpu_check.SECTIONS[0]._replace(name=name, limit_s=limit_s)
    given = argparse.Namespace(data=tmp_path, results=tmp_path / "results.jsonl", batch_size=2, rehearse=False)

    gpu_check.run_section(section, given, tmp_path, time.monotonic() + 100)

    assert Results(given.results).sections[name] == [Row(name, "", "", verdict)]


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from gpu_support import rehearsal_bench

    results = Results(tmp_path / "results.jsonl")
    section = gpu_check.SECTIONS[0]._replace(modules=("torch", "nvidia.no_such", "no_such.part"))

    assert gpu_check.run_here(section, rehearsal_bench(tmp_path), tmp_path, results) == 0
    (row,) = results.sections[section.name]
    assert row.verdict == "skipped: nvidia.no_such, no_such.part not installed"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_nothing_is_checked(tmp_path: Path) -> None:
    command = [*COMMAND, "--results", str(tmp_path / "results.jsonl")]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120)

    assert ended.returncode == 2
    assert "no CUDA device" in ended.stderr
    assert not (tmp_path / "results.jsonl").exists()


@pytest.mark.parametrize("content", ["notes\n", '{"a": 1}\n', '{"what": "a", "measured": "b"}\n', "[]\n", "\0\n"])
def test_a_file_of_something_else_is_refused_and_kept(rehearse: Rehearse, tmp_path: Path, content: str) -> None:
    path = tmp_path / "results.jsonl"
    path.write_text(content)
    ended = rehearse("--minutes", "0")

    assert ended.returncode == 2
    assert f"{path}, line 1: expected a line of gpu-check's results" in ended.stderr
    assert path.read_text() == content


def test_a_section_that_runs_again_replaces_its_rows(tmp_path: Path) -> None:
    results = Results(tmp_path / "results.jsonl")
    for section, row in (("a", Row("x", "1")), ("b", Row("y", "2")), ("a", Row("x", "3"))):
        results.begin(section, GPU)
        results.add(row)

    assert Results(results.path).sections == {"b": [Row("y", "2")], "a": [Row("x", "3")]}
    assert Results(results.path).environment == GPU


def test_verdicts_follow_from_targets() -> None:
    assert bounded_row("a", 2.0, "{:.1f} ms", at_most=2) == Row("a", "2.0 ms", "at most 2.0 ms", "holds")
    assert bounded_row("a", 2.1, "{:.1f} ms", at_most=2).verdict == FAILED
    assert bounded_row("a", 0.5, "{:.0%}", at_least=0.55) == Row("a", "50%", "at least 55%", FAILED)
    assert bounded_row("a", float("nan"), "{:.1f}", at_least=1).verdict == FAILED
    assert bounded_row("a", None, "{:.1f}", at_least=1).verdict == "not counted on this device"
    assert choice_row("a", "9 images/s", 1.1).verdict == "faster"
    assert choice_row("a", "9 images/s", 1.01).verdict == "no gain"


class TestPage:
    """The results go into docs/performance.md, in place of those of an earlier check."""

    @pytest.fixture
    def page(self, tmp_path: Path) -> Path:
        page = tmp_path / "performance.md"
        page.write_bytes((REPOSITORY / "docs" / "performance.md").read_bytes())
        return page

    @staticmethod
    def fill(page: Path, results: Path) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(REPOSITORY / "tools" / "gpu_results.py"), str(results), "--page", str(page)]
        return subprocess.run(command, capture_output=True, text=True, timeout=60)

    def test_a_table_for_each_section(self, page: Path, tmp_path: Path) -> None:
        before = page.read_text()
        for measured in ("1.0 ms", "2.0 ms"):
            results = Results(tmp_path / "results.jsonl")
            results.begin("kernels, times", GPU)
            results.add(Row("loss", measured, "at most 1.5 ms", "FAILED" if measured == "2.0 ms" else "holds"))
            ended = self.fill(page, results.path)
            assert ended.returncode == 0, ended.stderr

        after = page.read_text()
        assert "NVIDIA H100, torch 2.11.0, CUDA 13.0" in after
        assert "| loss | 2.0 ms | at most 1.5 ms | missed |\n" in after
        assert "1.0 ms | at most 1.5" not in after
        assert after.partition(gpu_results.BEGIN)[0] == before.partition(gpu_results.BEGIN)[0]
        assert after.count("## Measured on a GPU") == 1
        assert after.endswith(gpu_results.END)

    def test_a_rehearsal_does_not_get_there(self, page: Path, rehearse: Rehearse, tmp_path: Path) -> None:
        before = page.read_bytes()
        rehearse("--section", SECTIONS[0])
        ended = self.fill(page, tmp_path / "results.jsonl")

        assert ended.returncode == 1
        assert "expected measurements of a GPU" in ended.stderr
        assert page.read_bytes() == before

    @pytest.mark.parametrize("content", [None, "", "notes", json.dumps({"section": "a", "environment": GPU}) + "\n"])
    def test_a_file_without_results_is_refused(self, page: Path, tmp_path: Path, content: str | None) -> None:
        before, path = page.read_bytes(), tmp_path / "results.jsonl"
        if content is not None:
            path.write_text(content)
        ended = self.fill(page, path)

        assert ended.returncode == 1
        assert str(path) in ended.stderr
        assert page.read_bytes() == before
