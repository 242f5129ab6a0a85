"""The build: which GPUs the library holds code for, and what is said where it cannot be built or loaded."""

import os
import re
import runpy
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from repository import REPOSITORY

import kernels

SOURCES = REPOSITORY / "kernels"


def setup(**environment: str) -> subprocess.CompletedProcess[str]:
    """setup.py as far as it goes without compiling."""
    return subprocess.run(
        [sys.executable, "setup.py", "--version"],
        cwd=REPOSITORY,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=60,
    )


def fake_toolkit(directory: Path, version: str) -> Path:
    """A folder that looks like a CUDA toolkit; it can say its version and nothing else."""
    nvcc = directory / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text(f"#!/bin/sh\necho 'Cuda compilation tools, release {version}, V{version}.0'\n")
    nvcc.chmod(0o755)
    (directory / "include").mkdir()
    (directory / "include" / "cuda_runtime.h").touch()
    return directory


def test_the_library_holds_code_for_the_gpus_that_it_names() -> None:
    triton = pytest.importorskip("triton")
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    if kernels.cuda_build().startswith("CUDA not built") or not tool.is_file():
        pytest.skip(kernels.cuda_build())
    (library,) = SOURCES.glob("_C*.so")
    named = re.findall(r"(\d+)\.(\d+)(\+PTX)?", kernels.cuda_build().split("compute capability")[1])
    num_sources = len(list(SOURCES.glob("csrc/cuda/*.cu")))
    assert num_sources > 0
    for option, wanted in (
        ("--list-elf", {f"{major}{minor}" for major, minor, _ in named}),
        ("--list-ptx", {f"{major}{minor}" for major, minor, ptx in named if ptx}),
    ):
        listed = subprocess.run([tool, option, library], capture_output=True, text=True, check=True).stdout
        assert Counter(re.findall(r"\.sm_(\d+)\.", listed)) == dict.fromkeys(wanted, num_sources)


def test_a_toolkit_of_the_version_of_pytorch_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_HOME", str(fake_toolkit(tmp_path, "13.9")))
    monkeypatch.delenv("SSD_FAST_CUDA", raising=False)
    find_toolkit = load_find_toolkit(monkeypatch)
    assert find_toolkit("13.0") == (tmp_path, f"CUDA 13.9 ({tmp_path})")
    assert find_toolkit(None) == (None, "CUDA not built: this PyTorch was built without CUDA")
    monkeypatch.setenv("SSD_FAST_CUDA", "0")
    assert find_toolkit("13.0") == (None, "CUDA not built: SSD_FAST_CUDA=0")


def test_without_a_toolkit_cuda_is_left_out_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SSD_FAST_CUDA", raising=False)
    find_toolkit = load_find_toolkit(monkeypatch)
    is_file = Path.is_file
    monkeypatch.setattr(Path, "is_file", lambda path: path.name != "nvcc" and is_file(path))
    toolkit, reason = find_toolkit("13.0")
    assert toolkit is None
    assert reason == "CUDA not built: no CUDA 13.0 toolkit found; install one, or set CUDA_HOME"


def test_a_toolkit_of_another_major_version_is_left_out_with_the_reason(tmp_path: Path) -> None:
    home = fake_toolkit(tmp_path, "11.8")
    reason = f"CUDA not built: {home} is CUDA 11.8, PyTorch was built with {torch.version.cuda}; set CUDA_HOME"
    without = setup(CUDA_HOME=str(home), SSD_FAST_CUDA="")
    assert without.returncode == 0
    assert f"; {reason}\n" in without.stdout
    refused = setup(CUDA_HOME=str(home), SSD_FAST_CUDA="1")
    assert refused.returncode != 0
    assert last_line(refused) == f"kernels: SSD_FAST_CUDA=1, but {reason}"


def test_a_missing_compiler_is_one_clear_line() -> None:
    refused = setup(CXX="/nonexistent/g++", SSD_FAST_CUDA="0")
    assert refused.returncode != 0
    assert "Traceback" not in refused.stderr
    assert re.fullmatch(r"kernels: no C\+\+ compiler '/nonexistent/g\+\+': install .*", last_line(refused))


def test_kernels_that_are_not_built_or_built_for_another_pytorch_say_what_to_do(tmp_path: Path) -> None:
    package = tmp_path / "kernels"
    shutil.copytree(SOURCES, package, ignore=shutil.ignore_patterns("_C*", "csrc", "__pycache__"))
    missing = import_kernels(tmp_path)
    assert missing.startswith(f"ImportError: {package}/_C.")
    assert "make install" in missing
    (library,) = SOURCES.glob("_C*.so")
    (package / library.name).write_bytes(b"of another PyTorch")
    assert f"not built for PyTorch {torch.__version__}: build it again" in import_kernels(tmp_path)


def load_find_toolkit(monkeypatch: pytest.MonkeyPatch) -> Callable[[str | None], tuple[Path | None, str]]:
    monkeypatch.chdir(REPOSITORY)
    monkeypatch.setattr(sys, "argv", ["setup.py", "--version"])
    return runpy.run_path("setup.py")["find_toolkit"]


def import_kernels(directory: Path) -> str:
    """The error of `import kernels` from a directory."""
    run = subprocess.run([sys.executable, "-c", "import kernels"], cwd=directory, capture_output=True, text=True)
    assert run.returncode != 0
    return last_line(run)


def last_line(run: subprocess.CompletedProcess[str]) -> str:
    return run.stderr.strip().splitlines()[-1]
