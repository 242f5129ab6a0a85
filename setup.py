"""Compiles kernels/csrc: C++ always, CUDA where a toolkit is (whether or not a GPU is). Metadata: pyproject.toml.

Environment: SSD_FAST_CUDA=1 makes a missing toolkit an error, 0 leaves CUDA out. CUDA_HOME names the toolkit, CXX the
compiler, TORCH_CUDA_ARCH_LIST the GPUs ("8.0;9.0+PTX"), MAX_JOBS the compilers at work.
SSD_FAST_SANITIZE=address,undefined builds the CPU operators for these sanitizers.
"""

import os
import re
import runpy
import shutil
import subprocess
from pathlib import Path

from setuptools import setup

SOURCES = Path("kernels", "csrc")
CONSTANTS = Path("kernels", "constants.py")  # read as a file: the package cannot be imported before it is built
# Volta left the toolkit with CUDA 13. Binaries for 8.0 run on 8.6 and 8.9 too; PTX serves what comes after 9.0.
ARCHITECTURES = {"12": "7.0;8.0;9.0+PTX", "13": "7.5;8.0;9.0+PTX"}


def find_toolkit(wanted: str | None) -> tuple[Path | None, str]:
    """The CUDA toolkit to build with, if any, and which it is or why there is none; wanted: PyTorch's version."""
    if os.environ.get("SSD_FAST_CUDA") == "0":
        return None, "CUDA not built: SSD_FAST_CUDA=0"
    if wanted is None:
        return None, "CUDA not built: this PyTorch was built without CUDA"
    on_path = shutil.which("nvcc")
    places = [os.environ.get("CUDA_HOME"), "/usr/local/cuda", on_path and Path(on_path).resolve().parents[1]]
    for place in filter(None, places):
        home = Path(place)
        if (home / "bin" / "nvcc").is_file() and (home / "include" / "cuda_runtime.h").is_file():
            found = subprocess.run([home / "bin" / "nvcc", "--version"], capture_output=True, text=True, check=True)
            version = re.search(r"release (\d+\.\d+)", found.stdout)
            if version and version[1].split(".")[0] == wanted.split(".")[0]:
                return home, f"CUDA {version[1]} ({home})"
            version_found = version[1] if version else "unknown"
            reason = f"{home} is CUDA {version_found}, PyTorch was built with {wanted}; set CUDA_HOME"
            return None, f"CUDA not built: {reason}"
    return None, f"CUDA not built: no CUDA {wanted} toolkit found; install one, or set CUDA_HOME"


def extension():
    import torch

    toolkit, reason = find_toolkit(torch.version.cuda)
    if toolkit is None and os.environ.get("SSD_FAST_CUDA") == "1":
        raise SystemExit(f"kernels: SSD_FAST_CUDA=1, but {reason}")
    compiler = os.environ.get("CXX", "g++").split()[-1]
    if shutil.which(compiler) is None:
        raise SystemExit(
            f"kernels: no C++ compiler {compiler!r}: install g++ 9 or newer (Debian: apt-get install g++), or set CXX"
        )
    # OpenMP is at::parallel_for's; the loader finds the runtime that PyTorch has brought along
    cxx_flags = ["-std=c++17", "-O3", "-fopenmp", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"]
    cxx_flags += ["-Wall", "-Wno-psabi"]
    link_flags = ["-fopenmp"]
    if sanitizers := os.environ.get("SSD_FAST_SANITIZE"):
        toolkit, reason = None, "CUDA not built: SSD_FAST_SANITIZE"
        cxx_flags += [f"-fsanitize={sanitizers}", "-fno-sanitize-recover=undefined", "-g", "-O1"]
        cxx_flags += ["-DSSD_FAST_ONE_TARGET"]  # which function to take would be decided before the sanitizers start
        link_flags += [f"-fsanitize={sanitizers}"]
    if toolkit is not None:
        os.environ["CUDA_HOME"] = str(toolkit)  # torch would take the parent of any nvcc on the path
        default = ARCHITECTURES.get(torch.version.cuda.split(".")[0], "9.0+PTX")
        architectures = os.environ.setdefault("TORCH_CUDA_ARCH_LIST", default)
        reason += f" for compute capability {architectures.replace(';', ', ')}"

    from torch.utils.cpp_extension import CppExtension, CUDAExtension

    options = {
        "name": "kernels._C",
        "sources": [str(path) for path in sorted(SOURCES.glob("*.cpp")) + sorted(SOURCES.glob("cpu/*.cpp"))],
        "depends": [str(path) for pattern in ("*.h", "cpu/*.h", "cuda/*.cuh") for path in SOURCES.glob(pattern)]
        + [str(CONSTANTS)],
        "include_dirs": [str(SOURCES.resolve())],
        "define_macros": [
            ("SSD_FAST_CUDA_BUILD", f'"{reason}"'),
            *((f"SSD_FAST_{k}", repr(v)) for k, v in runpy.run_path(str(CONSTANTS)).items() if k.isupper()),
        ],
        "extra_compile_args": {"cxx": cxx_flags, "nvcc": ["-std=c++17", "-O3"]},
        "extra_link_args": link_flags,
    }
    print(f"kernels: C++ with {compiler}; {reason}")
    if toolkit is None:
        return CppExtension(**options)
    options["sources"] += [str(path) for path in sorted(SOURCES.glob("cuda/*.cu"))]
    return CUDAExtension(**options)


def build_command():
    from torch.utils.cpp_extension import BuildExtension

    return BuildExtension


setup(ext_modules=[extension()], cmdclass={"build_ext": build_command()})
