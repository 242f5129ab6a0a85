"""A folder that looks like a CUDA toolkit."""

from pathlib import Path


def fake_toolkit(directory: Path, version: str) -> Path:
    """Make a folder with an nvcc that prints its version and can do nothing else; return the folder."""
    for file, content in {
        "bin/nvcc": f"#!/bin/sh\necho 'Cuda compilation tools, release {version}, V{version}.0'\n",
        "include/cuda_runtime.h": "",
    }.items():
        (directory / file).parent.mkdir(parents=True)
        (directory / file).write_text(content)
        (directory / file).chmod(0o755)
    return directory
