"""The build: which GPUs the library holds code for, and what is said where it cannot be built or loaded."""

import re
import runpy
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from repository import REPOSITORY

import kernels

SOURCES = REPOSITORY / "kernels"


def setup(monkeypatch: pytest.MonkeyPatch, **environment: str) -> dict[str, Any]:
    """Run setup.py as far as it goes without compiling; return what it defines."""
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(REPOSITORY)
    monkeypatch.setattr(sys, "argv", ["setup.py", "--version"])
    return runpy.run_path("setup.py")


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
    find_toolkit = setup(monkeypatch)["find_toolkit"]
    assert find_toolkit("13.0") == (tmp_path, f"CUDA 13.9 ({tmp_path})")
    assert find_toolkit(None) == (None, "CUDA not built: this PyTorch was built without CUDA")
    monkeypatch.setenv("SSD_FAST_CUDA", "0")
    assert find_toolkit("13.0") == (None, "CUDA not built: SSD_FAST_CUDA=0")


def test_without_a_toolkit_cuda_is_left_out_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SSD_FAST_CUDA", raising=False)
    find_toolkit = setup(monkeypatch)["find_toolkit"]
    is_file = Path.is_file
    monkeypatch.setattr(Path, "is_file", lambda path: path.name != "nvcc" and is_file(path))
    toolkit, reason = find_toolkit("13.0")
    assert toolkit is None
    assert reason == "CUDA not built: no CUDA 13.0 toolkit found; install one, or set CUDA_HOME"


def test_a_toolkit_of_another_major_version_is_left_out_with_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    home = fake_toolkit(tmp_path, "11.8")
    reason = f"CUDA not built: {home} is CUDA 11.8, PyTorch was built with {torch.version.cuda}; set CUDA_HOME"
    setup(monkeypatch, CUDA_HOME=str(home), SSD_FAST_CUDA="")
    assert f"; {reason}\n" in capsys.readouterr().out
    with pytest.raises(SystemExit, match=f"^{re.escape(f'kernels: SSD_FAST_CUDA=1, but {reason}')}$"):
        setup(monkeypatch, CUDA_HOME=str(home), SSD_FAST_CUDA="1")


def test_a_missing_compiler_is_one_clear_line(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SystemExit, match=r"^kernels: no C\+\+ compiler '/nonexistent/g\+\+': install .*$"):
        setup(monkeypatch, CXX="/nonexistent/g++", SSD_FAST_CUDA="0")


def test_kernels_that_are_not_built_or_built_for_another_pytorch_say_what_to_do(tmp_path: Path) -> None:
    operators = str(shutil.copy(SOURCES / "ops.py", tmp_path))
    with pytest.raises(ImportError, match=rf"^{tmp_path}/_C\..*: expected after `make install`"):
        runpy.run_path(operators)
    (library,) = SOURCES.glob("_C*.so")
    (tmp_path / library.name).write_bytes(b"of another PyTorch")
    with pytest.raises(ImportError, match=f"not built for PyTorch {re.escape(torch.__version__)}: build it again"):
        runpy.run_path(operators)
