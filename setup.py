"""Compile kernels/csrc: C++ always, CUDA where a CUDA toolkit is installed; no GPU is needed. Metadata: pyproject.toml.

Environment: SSD_FAST_CUDA=1 makes a missing toolkit an error, 0 leaves CUDA out. CUDA_HOME names the toolkit, CXX the
compiler, TORCH_CUDA_ARCH_LIST the GPUs ("8.0;9.0+PTX"), MAX_JOBS the number of compilers at a time.
SSD_FAST_SANITIZE=address,undefined builds the CPU operators with these sanitizers.
"""

import os
import runpy
import shutil
import sys
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

sys.path.insert(0, str(Path(__file__).parent))  # pip runs this file without its folder on the path
import cuda_toolkit

SOURCES = Path("kernels", "csrc")
CONSTANTS = Path("kernels", "constants.py")  # read as a file: the package cannot be imported before it is built


def find_toolkit(wanted: str | None) -> tuple[Path | None, str]:
    """Return the home of the CUDA toolkit with its description, or None with the reason.

    wanted: the CUDA version that PyTorch was built with, if any.
    """
    try:
        found = cuda_toolkit.find_toolkit(wanted)
    except cuda_toolkit.ToolkitError as error:
        return None, f"CUDA not built: {error}"
    return found.home, f"CUDA {found.version} ({found.home})"


def extension():
    import torch

    toolkit, reason = find_toolkit(torch.version.cuda)
    if toolkit is None and os.environ.get("SSD_FAST_CUDA") == "1":
        raise SystemExit(f"kernels: SSD_FAST_CUDA=1, but {reason}")
    compiler = os.environ.get("CXX", "g++").split()[-1]
    if shutil.which(compiler) is None:
        raise SystemExit(
            f"kernels: no C++ compiler {compiler!r}: install g++ 11 or newer (Debian: apt-get install g++), or set CXX"
        )
    # at::parallel_for needs OpenMP; at run time the loader uses the OpenMP library that PyTorch brings.
    cxx_flags = ["-std=c++20", "-O3", "-fopenmp", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"]
    cxx_flags += ["-Wall", "-Wno-psabi"]
    link_flags = ["-fopenmp"]
    if sanitizers := os.environ.get("SSD_FAST_SANITIZE"):
        toolkit, reason = None, "CUDA not built: SSD_FAST_SANITIZE"
        cxx_flags += [f"-fsanitize={sanitizers}", "-fno-sanitize-recover=undefined", "-g", "-O1"]
        cxx_flags += ["-DSSD_FAST_ONE_TARGET"]  # target_clones would choose before the sanitizers start
        link_flags += [f"-fsanitize={sanitizers}"]
    if toolkit is not None:
        os.environ["CUDA_HOME"] = str(toolkit)  # torch would use the parent of any nvcc on the path
        architectures = os.environ.setdefault("TORCH_CUDA_ARCH_LIST", cuda_toolkit.architectures(torch.version.cuda))
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
        "extra_compile_args": {"cxx": cxx_flags, "nvcc": ["-std=c++20", "-O3"]},
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


class BuildPackages(build_py):
    """Also puts the recipes into the package; in a checkout they are found beside it."""

    def run(self):
        super().run()
        if not self.editable_mode:
            shutil.copytree("configs", Path(self.build_lib, "ssd_fast", "recipes"), dirs_exist_ok=True)


setup(ext_modules=[extension()], cmdclass={"build_ext": build_command(), "build_py": BuildPackages})
