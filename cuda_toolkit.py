"""Find the CUDA toolkit to build with, and name the GPUs to build for, for setup.py and the shell scripts.

`python cuda_toolkit.py find VERSION` looks for a toolkit that goes with a PyTorch built with CUDA VERSION.
`python cuda_toolkit.py in FOLDER` describes the toolkit in a folder.
Both print four lines: home, version, architectures, and the reason where there is no toolkit. Lines that do not apply
are empty.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

# Compute capabilities by the major version of CUDA, as TORCH_CUDA_ARCH_LIST names them. CUDA 13 dropped Volta (7.0).
# Code for 8.0 runs on 8.6 and 8.9, too; PTX serves what comes after 9.0.
_ARCHITECTURES = {"12": "7.0;8.0;9.0+PTX", "13": "7.5;8.0;9.0+PTX"}


class ToolkitError(Exception):
    """There is no toolkit to build with; the message is the reason."""


class Toolkit(NamedTuple):
    """A CUDA toolkit."""

    home: Path
    version: str
    """Such as 13.0."""


def architectures(cuda: str) -> str:
    """Return the compute capabilities to build for with a version of CUDA, as TORCH_CUDA_ARCH_LIST names them."""
    return _ARCHITECTURES.get(_major(cuda), "9.0+PTX")


def toolkit_in(home: Path) -> Toolkit | None:
    """Return the toolkit in a folder, or None where there is none."""
    nvcc = home / "bin" / "nvcc"
    if not (nvcc.is_file() and (home / "include" / "cuda_runtime.h").is_file()):
        return None
    answer = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    version = re.search(r"release (\d+\.\d+)", answer)
    return Toolkit(home, version[1] if version else "unknown")


def find_toolkit(wanted: str | None) -> Toolkit:
    """Return the toolkit for a PyTorch that was built with CUDA `wanted` (None: without CUDA).

    It is the first one among CUDA_HOME, /usr/local/cuda and the one of the nvcc on the path.
    Raises ToolkitError where there is none, where its major version differs, and where SSD_FAST_CUDA=0 leaves CUDA out.
    """
    if os.environ.get("SSD_FAST_CUDA") == "0":
        raise ToolkitError("SSD_FAST_CUDA=0")
    if wanted is None:
        raise ToolkitError("this PyTorch was built without CUDA")
    on_path = shutil.which("nvcc")
    places = [os.environ.get("CUDA_HOME"), "/usr/local/cuda", on_path and Path(on_path).resolve().parents[1]]
    for place in places:
        found = toolkit_in(Path(place)) if place else None
        if found is None:
            continue
        if _major(found.version) != _major(wanted):
            raise ToolkitError(f"{found.home} is CUDA {found.version}, PyTorch was built with {wanted}; set CUDA_HOME")
        return found
    raise ToolkitError(f"no CUDA {wanted} toolkit found; install one, or set CUDA_HOME")


def _major(version: str) -> str:
    return version.split(".")[0]


def main(arguments: list[str]) -> None:
    """Print the four lines."""
    found, reason = None, ""
    match arguments:
        case ["find", version]:
            try:
                found = find_toolkit(version or None)
            except ToolkitError as error:
                reason = str(error)
        case ["in", folder]:
            found = toolkit_in(Path(folder))
            reason = "" if found else f"no CUDA toolkit in {folder}"
        case _:
            raise SystemExit("usage: cuda_toolkit.py find VERSION | in FOLDER")
    lines = [str(found.home), found.version, architectures(found.version)] if found else ["", "", ""]
    print(*lines, reason, sep="\n")


if __name__ == "__main__":
    main(sys.argv[1:])
