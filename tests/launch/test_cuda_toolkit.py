"""The CUDA toolkit and the GPUs to build for, as the shell scripts are told."""

import os
import subprocess
import sys
from pathlib import Path

from fake_toolkit import fake_toolkit
from repository import REPOSITORY

from cuda_toolkit import architectures


def ask(*arguments: str, **environment: str) -> list[str]:
    """The lines that cuda_toolkit.py prints."""
    command = [sys.executable, str(REPOSITORY / "cuda_toolkit.py"), *arguments]
    done = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, check=True)
    return done.stdout.split("\n")[:-1]


def test_volta_is_among_the_gpus_as_long_as_cuda_serves_it() -> None:
    assert architectures("12.6") == "7.0;8.0;9.0+PTX"
    assert architectures("13.0") == "7.5;8.0;9.0+PTX"
    assert architectures("14.1") == "9.0+PTX"


def test_the_program_prints_home_version_architectures_and_the_reason(tmp_path: Path) -> None:
    home = str(fake_toolkit(tmp_path / "cuda", "12.6"))
    found = [home, "12.6", "7.0;8.0;9.0+PTX", ""]
    assert ask("in", home) == found
    assert ask("find", "12.8", CUDA_HOME=home, SSD_FAST_CUDA="") == found
    reason = f"{home} is CUDA 12.6, PyTorch was built with 13.0; set CUDA_HOME"
    assert ask("find", "13.0", CUDA_HOME=home, SSD_FAST_CUDA="") == ["", "", "", reason]
    assert ask("find", "12.6", CUDA_HOME=home, SSD_FAST_CUDA="0") == ["", "", "", "SSD_FAST_CUDA=0"]
    assert ask("find", "", SSD_FAST_CUDA="") == ["", "", "", "this PyTorch was built without CUDA"]
    assert ask("in", str(tmp_path)) == ["", "", "", f"no CUDA toolkit in {tmp_path}"]
