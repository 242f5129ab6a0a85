"""Build, check and measure what only an NVIDIA GPU can run; print a table at the end.

Run `make gpu-check`, or `python tools/gpu_check.py [--data DIR]` where only PyTorch is installed: a section that needs
more is skipped, and its row names what is missing. DIR is a COCO-format folder with 64 photographs in its validation
part; without it, synthetic images take their place. Exit status: 0 if every check that ran holds, 1 if one does not, 2
without a GPU.
"""

import argparse
import importlib.util
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

import torch
from gpu_measurements import compare_with_peer, measure_inference, measure_kernels, measure_step, profile
from gpu_pipelines import check_training
from gpu_support import GPU, REPOSITORY, Row, run_command

sys.path.insert(0, str(REPOSITORY))

OPERATOR_TESTS = tuple(
    f"tests/kernels/test_{name}.py" for name in ("encode_boxes", "multibox_loss", "decode_nms", "operators", "edges")
)


class Section(NamedTuple):
    """A part of the table, and the modules that it needs."""

    name: str
    rows: Callable[[argparse.Namespace, Path], Iterator[Row]]
    modules: tuple[str, ...] = ()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = Path(os.environ.get("SSD_FAST_COCO_CCBY", REPOSITORY.parent / "shared" / "data" / "coco_ccby"))
    parser.add_argument("--data", type=Path, default=default)
    parser.add_argument("--batch-size", type=int, default=128)
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("gpu-check: no CUDA device here: nothing was checked", file=sys.stderr)
        return 2
    recipes = ("pydantic", "tomli_w")
    sections = (
        Section("kernels, build", _build_kernels),
        Section("kernels, tests", _test_kernels, ("pytest", "hypothesis")),
        Section("kernels, compute-sanitizer", _sanitize_kernels),
        Section("kernels, times", measure_kernels, (*recipes, "typer")),
        Section("step alone", measure_step, recipes),
        Section(
            "profile",
            profile,
            (*recipes, "nvidia.dali", "msgspec", "pycocotools", "hotcoco", "typer", "rich", "jinja2", "matplotlib"),
        ),
        Section(
            "beside torchvision",
            compare_with_peer,
            (*recipes, "nvidia.dali", "msgspec", "pycocotools", "hotcoco", "typer", "rich"),
        ),
        Section(
            "inference at 1200",
            measure_inference,
            (*recipes, "nvidia.dali", "msgspec", "pycocotools", "hotcoco"),
        ),
        Section(
            "pipelines, training",
            check_training,
            (*recipes, "nvidia.dali", "msgspec", "pycocotools", "hotcoco", "mlperf_logging", "rich"),
        ),
    )
    rows = [("device", torch.cuda.get_device_name(GPU), f"torch {torch.__version__}")]
    try:
        with tempfile.TemporaryDirectory() as scratch:
            for section in sections:
                print(f"==== {section.name}", flush=True)
                for row in _rows(section, arguments, Path(scratch)):
                    print("  ".join(row), flush=True)
                    rows.append(row)
    finally:  # a section that breaks off does not lose the rows before it
        width = max(len(what) for what, *_ in rows)
        print()
        for what, measured, verdict in rows:
            print(f"{what:<{width}}  {measured:<28}  {verdict}")
    return 1 if any(verdict.startswith("FAILED") for *_, verdict in rows) else 0


def _rows(section: Section, arguments: argparse.Namespace, scratch: Path) -> Iterator[Row]:
    missing = [name for name in section.modules if not _is_installed(name)]
    if missing:
        yield section.name, "", f"skipped: {', '.join(missing)} not installed"
    else:
        yield from section.rows(arguments, scratch)


def _is_installed(module: str) -> bool:
    packages = accumulate(module.split("."), "{}.{}".format)  # a package can be looked up only if its parent exists
    return all(importlib.util.find_spec(name) is not None for name in packages)


def _build_kernels(_arguments: argparse.Namespace, _scratch: Path) -> Iterator[Row]:
    """Build the kernels in place if they are missing."""
    start = time.perf_counter()
    if not list((REPOSITORY / "kernels").glob("_C*.so")):
        run_command(sys.executable, "setup.py", "build_ext", "--inplace")
        yield "kernels built", f"{time.perf_counter() - start:.0f} s", ""
    import kernels

    build = kernels.cuda_build()
    yield "kernels", "CUDA", f"FAILED: {build}" if build.startswith("CUDA not built") else build


def _test_kernels(_arguments: argparse.Namespace, scratch: Path) -> Iterator[Row]:
    """Test the operators on this GPU and on the CPU."""
    report = scratch / "report.xml"
    start = time.perf_counter()
    run = run_command(sys.executable, "-m", "pytest", *OPERATOR_TESTS, f"--junit-xml={report}")
    seconds = f"{time.perf_counter() - start:.0f} s"
    if not report.is_file():
        yield "tests of the operators", seconds, f"FAILED: pytest ended with status {run.returncode}"
        return
    cases = [
        (case.get("name", ""), {child.tag for child in case}) for case in ElementTree.parse(report).iter("testcase")
    ]
    failed = [name for name, marks in cases if marks & {"failure", "error"}]
    num_passed = sum(not marks for _, marks in cases)
    num_on_gpu = sum(not marks for name, marks in cases if "cuda" in name)
    counts = f"{num_passed} passed, {len(failed)} failed"
    if failed:
        yield "tests of the operators", counts, f"FAILED: {failed[0]}"
    else:
        yield "tests of the operators", counts, f"{'holds' if num_on_gpu else 'FAILED'}: {num_on_gpu} on the GPU"
    yield "  which took", seconds, ""


def _sanitize_kernels(_arguments: argparse.Namespace, _scratch: Path) -> Iterator[Row]:
    """Run a call of every operator under NVIDIA's sanitizers."""
    places = [os.environ.get("CUDA_HOME", ""), "/usr/local/cuda"]
    tool = shutil.which("compute-sanitizer") or shutil.which(
        "compute-sanitizer", path=os.pathsep.join(f"{place}/bin" for place in places if place)
    )
    if tool is None:
        yield "compute-sanitizer", "", "skipped: compute-sanitizer not installed"
        return
    for check in ("memcheck", "racecheck", "synccheck"):
        # without PyTorch's cache each tensor is an allocation of its own, so accesses beyond its end are seen
        run = run_command(
            tool, "--tool", check, "--error-exitcode", "9", sys.executable, "tools/gpu_exercise.py",
            PYTORCH_NO_CUDA_MEMORY_CACHING="1",
        )  # fmt: skip
        summary = [line.strip("= ") for line in run.stdout.splitlines() if "SUMMARY" in line]
        if "Device not supported" in run.stdout:
            verdict = "skipped: this machine refuses compute-sanitizer (Device not supported)"
        else:
            verdict = "holds" if run.returncode == 0 and summary else f"FAILED: status {run.returncode}"
        yield f"compute-sanitizer, {check}", summary[-1] if summary else "", verdict


if __name__ == "__main__":
    sys.exit(main())
