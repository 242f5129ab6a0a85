"""Builds the CUDA sources for the CPU, as a package `kernels` in a folder of its own.

    python tests/cuda_on_cpu/build_emulation.py FOLDER [--sources FOLDER] [--objects FOLDER]

Needs g++ and PyTorch alone: no CUDA toolkit and no GPU. Objects are kept by what they are made from.
"""

import argparse
import hashlib
import os
import runpy
import shutil
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch
from cuda_translation import translate
from torch.utils.cpp_extension import include_paths

HERE = Path(__file__).resolve().parent
KERNELS = HERE.parents[1] / "kernels"
CSRC = KERNELS / "csrc"
EMULATED = "CUDA emulated on the CPU"  # how kernels.cuda_build() of such a package begins

_FLAGS = ["-std=c++20", "-O2", "-g1", "-fPIC", "-w", "-fno-strict-aliasing", "-fno-threadsafe-statics"]
_FLAGS += ["-ffp-contract=off", "-DTORCH_API_INCLUDE_EXTENSION_H", f'-DSSD_FAST_CUDA_BUILD="{EMULATED}"']
_WATCHED = ["-fsanitize=thread", "--param", "tsan-distinguish-volatile=1"]


class Unit(NamedTuple):
    """A source to compile. depends: the files that its object follows from, besides itself and PyTorch."""

    source: Path
    flags: list[str]
    depends: list[Path]


def build(folder: Path, cuda_sources: Path, objects: Path) -> None:
    """Make the package in a folder, in place of an earlier one.

    cuda_sources: folder of the .cu and .cuh files. objects: folder of compiled sources, made if missing.
    Raises TranslationError, and CalledProcessError where the compiler refuses a source.
    """
    package, translated = folder / "kernels", folder / "translated" / "cuda"
    shutil.rmtree(folder, ignore_errors=True)
    translated.mkdir(parents=True)
    shutil.copytree(KERNELS, package, ignore=shutil.ignore_patterns("csrc", "_C.*", "__pycache__"))
    for path in [*cuda_sources.glob("*.cu"), *cuda_sources.glob("*.cuh")]:
        name = path.name if path.suffix == ".cuh" else f"{path.stem}.cpp"
        (translated / name).write_text(translate(path.read_text(), str(path)))
    headers = [*translated.glob("*.cuh"), *CSRC.glob("*.h"), *HERE.glob("include/**/*.h"), HERE / "emulation.h"]
    units = [Unit(path, _WATCHED, headers) for path in sorted(translated.glob("*.cpp"))]
    units += [Unit(path, [], headers) for path in (CSRC / "operators.cpp", HERE / "threads.cpp", HERE / "memory.cpp")]
    constants = runpy.run_path(str(KERNELS / "constants.py"))
    macros = [f"-DSSD_FAST_{name}={value!r}" for name, value in constants.items() if name.isupper()]
    includes = [f"-I{path}" for path in (translated.parent, HERE / "include", CSRC)]
    includes += [f"-isystem{path}" for path in [*include_paths(), sysconfig.get_path("include")]]
    command = [os.environ.get("CXX", "g++"), *_FLAGS, *macros, *includes]
    objects.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS", "2"))) as pool:
        compiled = list(pool.map(lambda unit: _compile(unit, command, objects), units))
    library = package / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    torch_libraries = Path(torch.__file__).parent / "lib"
    link = [command[0], "-shared", "-Wl,-Bsymbolic", *map(str, compiled), "-o", str(library)]
    subprocess.run([*link, f"-L{torch_libraries}", "-ltorch_cpu", "-lc10", "-ldl"], check=True)


def _compile(unit: Unit, command: list[str], objects: Path) -> Path:
    """The object of a unit, from the folder of objects if it was compiled before."""
    flags = [flag for flag in (*command, *unit.flags) if not flag.startswith("-I")]  # where, not what
    parts = [repr((flags, torch.__version__)).encode()]
    parts += [path.read_bytes().partition(b"\n")[2] for path in (unit.source, *sorted(unit.depends))]  # without #line
    digest = hashlib.sha256(b"\0".join(parts)).hexdigest()[:24]
    target = objects / f"{unit.source.stem}-{digest}.o"
    if not target.exists():
        part = target.with_suffix(f".{os.getpid()}.part")
        subprocess.run([*command, *unit.flags, "-c", str(unit.source), "-o", str(part)], check=True)
        part.replace(target)
    return target


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--sources", type=Path, default=CSRC / "cuda")
    parser.add_argument("--objects", type=Path)
    given = parser.parse_args()
    target = given.folder.resolve()
    build(target, given.sources.resolve(), (given.objects or target.parent / "objects").resolve())
