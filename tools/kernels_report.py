"""What the compiler made of each CUDA kernel, without a GPU: `make kernels-report` prints it as a table.

    python tools/kernels_report.py [--write]    --write keeps registers, memory and occupancy in kernel_resources.json

Registers, stack, spills and shared memory are the compiler's own figures. Occupancy is the share of an SM's threads
that its registers, shared memory and blocks leave room for, with COCO's 81 classes and the recipe's limits.
Instructions are those of the kernel and of its loops, from the shortest to the longest.
"""

import argparse
import json
import math
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).resolve().parent
TABLE = HERE / "kernel_resources.json"
SOURCES = HERE.parent / "kernels" / "csrc" / "cuda"
NUM_CLASSES, MAX_PER_CLASS, MAX_DETECTIONS = 81, 200, 200

_VALUE_BYTES = {"half": 2, "bfloat16": 2, "float": 4, "double": 8}
_MANGLED_TYPES = {"N3c104HalfE": "half", "N3c108BFloat16E": "bfloat16", "f": "float", "d": "double"}
_KERNEL = re.compile(r"\d([a-z]+(?:_[a-z]+)*)(?:I(N3c104HalfE|N3c108BFloat16E|f|d)\w*)?E(?:v|N|P)")


class SM(NamedTuple):
    """Limits of a multiprocessor: threads, blocks, bytes of shared memory, and those that each block needs besides."""

    threads: int
    blocks: int
    shared_bytes: int
    reserved_bytes: int


_SMS = {
    "sm_75": SM(1024, 16, 64 * 1024, 0),
    "sm_80": SM(2048, 32, 164 * 1024, 1024),
    "sm_90": SM(2048, 32, 228 * 1024, 1024),
}
_REGISTERS, _PARTITIONS = 65536, 4


class Kernel(NamedTuple):
    """Figures of one kernel for one architecture. Bytes: of a thread (stack, local) or of a block (shared)."""

    name: str
    architecture: str
    threads: int
    registers: int
    stack_bytes: int
    local_bytes: int
    static_bytes: int
    dynamic_bytes: int
    occupancy_percent: int
    limited_by: str


def measure(library: Path) -> list[Kernel]:
    """The kernels of a compiled library, for each architecture it was built for. Raises FileNotFoundError."""
    text = _cuobjdump(library, "--dump-resource-usage")
    kernels, architecture, mangled = [], "", ""
    for line in text.splitlines():
        if found := re.match(r"arch = (\w+)", line):
            architecture = found[1]
        elif found := re.match(r"\s*Function (\S+):", line):
            mangled = found[1]
        elif (found := re.match(r"\s*REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", line)) and architecture in _SMS:
            name, value_type = _names(mangled)
            registers, stack, shared, local = map(int, found.groups())
            kernels.append(_kernel(name, value_type, architecture, registers, stack, shared, local))
    return sorted(kernels)


def count_instructions(library: Path, architecture: str) -> dict[str, tuple[int, list[int]]]:
    """Instructions of each kernel, and of each of its loops (the stretch from a backward branch's target to it)."""
    counts: dict[str, tuple[int, list[int]]] = {}
    text = _cuobjdump(library, "-sass", "-arch", architecture)
    for part in re.split(r"Function : ", text)[1:]:
        mangled, _, body = part.partition("\n")
        name, value_type = _names(mangled.strip())
        lines = re.findall(r"/\*([0-9a-f]{4,5})\*/\s+(.*?);", body)
        places = {int(address, 16): number for number, (address, _) in enumerate(lines)}
        loops = []
        for address, instruction in lines:
            branch = re.search(r"\bBRA\b.*?0x([0-9a-f]+)", instruction)
            target = int(branch[1], 16) if branch else None
            if target in places and target is not None and target < int(address, 16):
                loops.append(places[int(address, 16)] - places[target] + 1)
        used = sum(not instruction.startswith("NOP") for _, instruction in lines)
        counts[_title(name, value_type)] = (used, sorted(loops))
    return counts


def _kernel(
    name: str, value_type: str, architecture: str, registers: int, stack: int, shared: int, local: int
) -> Kernel:
    sm, threads = _SMS[architecture], _threads(name)
    static = max(shared - sm.reserved_bytes, 0) if architecture == "sm_90" else shared  # there it counts the reserved
    dynamic = _dynamic_bytes(name, value_type)
    granularity = 256 if architecture == "sm_75" else 128
    block_bytes = math.ceil((static + dynamic + sm.reserved_bytes) / granularity) * granularity
    warp_registers = math.ceil(registers * 32 / 256) * 256
    limits = {
        "registers": _REGISTERS // _PARTITIONS // warp_registers * _PARTITIONS // (threads // 32),
        "shared memory": sm.shared_bytes // block_bytes if block_bytes else sm.blocks,
        "blocks": sm.blocks,
        "threads": sm.threads // threads,
    }
    blocks = min(limits.values())
    limited_by = "threads" if limits["threads"] == blocks else min(limits, key=lambda limit: limits[limit])
    occupancy = 100 * blocks * threads // sm.threads
    title = _title(name, value_type)
    return Kernel(title, architecture, threads, registers, stack, local, static, dynamic, occupancy, limited_by)


def _threads(kernel: str) -> int:
    """Threads of a block, from the source."""
    for path in SOURCES.glob("*.cu"):
        text = path.read_text()
        if found := re.search(rf"__global__ void __launch_bounds__\((\w+)(?:, \d+)?\)\s+{kernel}\(", text):
            return _constant(found[1], text)
    raise KeyError(f"{kernel}: no __launch_bounds__ in the sources")


def _constant(name: str, text: str = "") -> int:
    """An integer constant of a source, or of the header that all share."""
    text += (SOURCES / "primitives.cuh").read_text()
    found = re.search(rf"constexpr int {name} = ([\d* ]+);", text)
    if not found:
        raise KeyError(f"{name}: no such constant in the sources")
    return math.prod(int(factor) for factor in found[1].split("*"))


def _dynamic_bytes(kernel: str, value_type: str) -> int:
    """Dynamic shared memory of a block, as the host code asks for it."""
    if kernel in ("find_candidates", "normalise_rows"):
        row_bytes = NUM_CLASSES * _VALUE_BYTES[value_type]
        warps = _constant("kThreadsPerTile") // 32
        rows_per_warp = min(_constant("kTileBytes") // (row_bytes * warps) // 4 * 4, 32)
        return rows_per_warp * warps * row_bytes
    return {"suppress": MAX_PER_CLASS * 24, "write_detections": MAX_DETECTIONS * 8}.get(kernel, 0)


def _names(mangled: str) -> tuple[str, str]:
    """Name of a kernel and the type of its values; empty for a kernel that is no template."""
    found = _KERNEL.search(mangled.partition("_GLOBAL__N__")[2])
    if not found:
        raise ValueError(f"{mangled}: expected the name of a kernel of this project")
    return found[1], _MANGLED_TYPES.get(found[2] or "", "")


def _title(name: str, value_type: str) -> str:
    return f"{name} {value_type}".strip()


def _cuobjdump(library: Path, *options: str) -> str:
    import triton  # comes with PyTorch, and brings NVIDIA's tools

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return subprocess.run([tool, *options, library], capture_output=True, text=True, check=True).stdout


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true")
    given = parser.parse_args()
    library = next((HERE.parent / "kernels").glob("_C*.so"))
    kernels = measure(library)
    if not kernels:
        print(f"{library} holds no CUDA code: install a CUDA toolkit and build it again", file=sys.stderr)
        return 1
    if given.write:
        TABLE.write_text(json.dumps([kernel._asdict() for kernel in kernels], indent=1) + "\n")
    print(f"{'kernel':26} {'GPU':6} threads registers stack local  static dynamic occupancy limited by")
    for k in kernels:
        print(
            f"{k.name:26} {k.architecture:6} {k.threads:7} {k.registers:9} {k.stack_bytes:5} {k.local_bytes:5} "
            f"{k.static_bytes:7} {k.dynamic_bytes:7} {k.occupancy_percent:8}% {k.limited_by}"
        )
    architecture = kernels[-1].architecture if all(k.architecture != "sm_90" for k in kernels) else "sm_90"
    print(f"\ninstructions for {architecture}: of the kernel, and of its loops")
    for name, (total, loops) in sorted(count_instructions(library, architecture).items()):
        print(f"{name:26} {total:6}   {' '.join(map(str, loops))}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
