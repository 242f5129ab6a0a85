"""Build, check and measure what only an NVIDIA GPU can run; print a table at the end.

Run `make gpu-check`. A section that needs a package which is missing is skipped, and its row names it. Each section is
a process of its own, so that an error of the GPU in one does not end the others. Every row goes to RESULTS as soon as
it is measured; `tools/gpu_results.py` puts them into the documents.

Exit status: 0 if every check that ran holds, 1 if one does not, 2 without a GPU.
"""

import argparse
import importlib.util
import math
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

import torch
from gpu_measurements import compare_with_peer, measure_inference, measure_kernels, measure_step, profile
from gpu_pipelines import check_training
from gpu_support import FAILED, REHEARSAL, REPOSITORY, Bench, Results, Row, gpu_bench, rehearsal_bench, run_command

sys.path.insert(0, str(REPOSITORY))

OPERATOR_TESTS = tuple(
    f"tests/kernels/test_{name}.py" for name in ("operators", "edges", "encode_boxes", "multibox_loss", "decode_nms")
)
RECIPES = ("pydantic", "tomli_w")
PIPELINES = (*RECIPES, "nvidia.dali", "msgspec", "pycocotools", "hotcoco")


class Section(NamedTuple):
    """A part of the table: the time that it may take at most on a GPU, and the modules that it needs."""

    name: str
    rows: Callable[[Bench, Path], Iterator[Row]]
    limit_s: float
    modules: tuple[str, ...] = ()


def build_kernels(bench: Bench, _scratch: Path) -> Iterator[Row]:
    """Build the kernels in place if they are missing."""
    start = time.perf_counter()
    if not list((REPOSITORY / "kernels").glob("_C*.so")):
        run_command(sys.executable, "setup.py", "build_ext", "--inplace")
        yield Row("kernels built", f"{time.perf_counter() - start:.0f} s")
    import kernels

    build = kernels.cuda_build()
    yield Row("kernels", build, "CUDA", "holds" if build.startswith("CUDA 1") or bench.rehearsal else FAILED)


def test_kernels(bench: Bench, scratch: Path) -> Iterator[Row]:
    """Run the operators' tests on the device."""
    report, device = scratch / "report.xml", bench.device.type
    start = time.perf_counter()
    files = OPERATOR_TESTS[: 1 if bench.rehearsal else None]
    run = run_command(sys.executable, "-m", "pytest", *files, "-k", device, f"--junit-xml={report}")
    took = f"{time.perf_counter() - start:.0f} s"
    what, target = "tests of the operators", "no failure"
    if not report.is_file():
        yield Row(what, took, target, f"{FAILED}: pytest ended with status {run.returncode}")
        return
    cases = [
        (case.get("name", ""), {child.tag for child in case}) for case in ElementTree.parse(report).iter("testcase")
    ]
    failed = [name for name, marks in cases if marks & {"failure", "error"}]
    num_passed = sum(not marks for _, marks in cases)
    verdict = f"{FAILED}: {failed[0]}" if failed else "holds" if num_passed else f"{FAILED}: none on {device}"
    yield Row(what, f"{num_passed} passed, {len(failed)} failed, {took}", target, verdict)


def sanitize_kernels(bench: Bench, _scratch: Path) -> Iterator[Row]:
    """Run a call of every operator under NVIDIA's sanitizers; in a rehearsal, without one."""
    places = [os.environ.get("CUDA_HOME", ""), "/usr/local/cuda"]
    tool = shutil.which("compute-sanitizer") or shutil.which(
        "compute-sanitizer", path=os.pathsep.join(f"{place}/bin" for place in places if place)
    )
    if tool is None and not bench.rehearsal:
        yield Row("compute-sanitizer", "", "no finding", "skipped: compute-sanitizer not installed")
        return
    exercise = (sys.executable, "tools/gpu_exercise.py", bench.device)
    for check in ("memcheck", "racecheck", "synccheck")[: 1 if bench.rehearsal else None]:
        sanitizer = () if bench.rehearsal else (tool, "--tool", check, "--error-exitcode", "9")
        # without PyTorch's cache each tensor is an allocation of its own, so accesses beyond its end are seen
        run = run_command(*sanitizer, *exercise, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
        summary = [line.strip("= ") for line in run.stdout.splitlines() if "SUMMARY" in line]
        if "Device not supported" in run.stdout:
            verdict = "skipped: this machine refuses compute-sanitizer (Device not supported)"
        else:
            holds = run.returncode == 0 and (summary or bench.rehearsal)
            verdict = "holds" if holds else f"{FAILED}: status {run.returncode}"
        yield Row(f"compute-sanitizer, {check}", summary[-1] if summary else "", "no finding", verdict)


# what decides most comes first; the sum of the limits is more than a check takes, and --minutes bounds it
SECTIONS = (
    Section("kernels, build", build_kernels, 300),
    Section("kernels, tests", test_kernels, 150, ("pytest", "hypothesis")),
    Section("kernels, times", measure_kernels, 90, (*RECIPES, "typer")),
    Section("step alone", measure_step, 120, RECIPES),
    Section("inference at 1200", measure_inference, 60, PIPELINES),
    Section("profile", profile, 150, (*PIPELINES, "typer", "rich", "jinja2", "matplotlib")),
    Section("pipelines, training", check_training, 120, (*PIPELINES, "mlperf_logging", "rich")),
    Section("beside torchvision", compare_with_peer, 120, (*PIPELINES, "typer", "rich", "torchvision")),
    Section("kernels, compute-sanitizer", sanitize_kernels, 120),
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = Path(os.environ.get("SSD_FAST_COCO_CCBY", REPOSITORY.parent / "shared" / "data" / "coco_ccby"))
    parser.add_argument(
        "--data", type=Path, default=default, metavar="DIR",
        help="COCO-format folder with 64 photographs in its validation part; else synthetic images are used",
    )  # fmt: skip
    parser.add_argument("--batch-size", type=int, default=128, help="images of a training step")
    parser.add_argument("--minutes", type=float, default=8, help="time for all sections; later ones are skipped")
    parser.add_argument("--results", type=Path, default=REPOSITORY / "output" / "gpu-check" / "results.jsonl")
    names = [section.name for section in SECTIONS]
    parser.add_argument("--section", action="append", choices=names, help="only this section; repeatable")
    parser.add_argument("--rehearse", action="store_true", help="small sizes, on the CPU: shows that all of it runs")
    parser.add_argument("--inside", type=Path, help=argparse.SUPPRESS)  # scratch folder of a section's own process
    given = parser.parse_args()
    if not (given.rehearse or torch.cuda.is_available()):
        print("gpu-check: no CUDA device here: nothing was checked", file=sys.stderr)
        return 2
    try:
        results = Results(given.results)
    except (ValueError, OSError) as error:
        parser.error(f"--results: {error}")
    sections = [section for section in SECTIONS if section.name in (given.section or names)]
    if given.inside:
        bench = rehearsal_bench(given.data) if given.rehearse else gpu_bench(given.data, given.batch_size)
        return run_here(sections[0], bench, given.inside, results)
    from ssd_fast.openmp import wait_briefly

    wait_briefly()  # as `ssd-fast` does; it counts in the sections' processes
    deadline = time.monotonic() + 60 * given.minutes
    try:
        with tempfile.TemporaryDirectory() as scratch:
            for section in sections:
                run_section(section, given, Path(scratch), deadline)
    finally:  # what a check that is cut off has measured is shown too
        results = Results(given.results)
        print_table(results, [section.name for section in sections])
    shown = [row for section in sections for row in results.sections.get(section.name, [])]
    return 1 if any(row.verdict.startswith(FAILED) for row in shown) else 0


def run_section(section: Section, given: argparse.Namespace, scratch: Path, deadline: float) -> None:
    """Run a section in a process of its own, within its limit; its rows go to the file of results."""
    print(f"==== {section.name}", flush=True)
    Results(given.results).begin(section.name, {})
    limit_s = min(math.inf if given.rehearse else section.limit_s, deadline - time.monotonic())
    verdict = "skipped: no time left (--minutes)" if limit_s <= 0 else _run(section, given, scratch, limit_s)
    if verdict:
        Results(given.results).add(Row(section.name, "", "", verdict))


def _run(section: Section, given: argparse.Namespace, scratch: Path, limit_s: float) -> str:
    """Run the process of a section; return what it failed by, if it did."""
    options = ["--section", section.name, "--inside", scratch, "--data", given.data, "--results", given.results]
    options += ["--batch-size", given.batch_size, *(["--rehearse"] if given.rehearse else [])]
    child = subprocess.Popen([sys.executable, __file__, *map(str, options)], start_new_session=True)
    try:
        status = child.wait(limit_s)
    except subprocess.TimeoutExpired:
        return f"{FAILED}: no end within {limit_s:.0f} s"
    finally:
        if child.poll() is None:
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()
    return f"{FAILED}: ended with status {status}" if status else ""


def run_here(section: Section, bench: Bench, scratch: Path, results: Results) -> int:
    """Run a section in this process. Exit status: 0 if all rows came, whatever they say."""
    device = REHEARSAL if bench.rehearsal else torch.cuda.get_device_name(bench.device)
    results.begin(section.name, {"device": device, "torch": torch.__version__, "CUDA": str(torch.version.cuda)})
    missing = [name for name in section.modules if not _is_installed(name)]
    if missing:
        results.add(Row(section.name, "", "", f"skipped: {', '.join(missing)} not installed"))
        return 0
    try:
        for row in section.rows(bench, scratch):
            if bench.rehearsal and row.verdict == FAILED:  # of a target, which is meant for a GPU
                row = row._replace(verdict="missed, as a CPU may")
            print("  ".join(row), flush=True)
            results.add(row)
    except Exception as error:
        traceback.print_exc()
        reason = (str(error).splitlines() or [""])[0]
        results.add(Row(section.name, "", "", f"{FAILED}: {type(error).__name__}: {reason}"))
    return 0


def _is_installed(module: str) -> bool:
    packages = accumulate(module.split("."), "{}.{}".format)  # a package can be looked up only if its parent exists
    return all(importlib.util.find_spec(name) is not None for name in packages)


def print_table(results: Results, sections: list[str]) -> None:
    print(f"\n{', '.join(f'{name} {value}' for name, value in results.environment.items())}")
    rows = [row for name in sections for row in results.sections.get(name, [])]
    widths = [max((len(row[column]) for row in rows), default=0) for column in range(3)]
    for row in rows:
        print("  ".join(f"{cell:<{width}}" for cell, width in zip(row, (*widths, 0), strict=True)).rstrip())
    print(f"kept in {results.path}")


if __name__ == "__main__":
    sys.exit(main())
