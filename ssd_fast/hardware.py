"""Facts about the machine: its name, cores and number formats, its measured peak rates, the memory a process uses."""

import ctypes
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

_COPIED_BYTES = 2**28
_REPEATS, _WARM_UP = 12, 2
_LONG_S = 0.1


def device_name(device: torch.device, cores: int) -> str:
    """Name of a GPU, or of a CPU with the number of its cores that are used."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpu_info = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.partition(":")[2].strip() for line in cpu_info if line.startswith("model name")), None)
    return f"{model or platform.machine()}, {cores} cores"


def usable_cores(processes: int = 1) -> int:
    """CPU cores for this process: those it is bound to, or, if unbound, an equal share for each process of the node."""
    cores = len(os.sched_getaffinity(0))
    return cores if cores < (os.cpu_count() or 1) else max(1, cores // processes)


def input_threads(num_threads: int, cores: int) -> int:
    """Threads of an input pipeline for data.num_threads; 0 means one more than the cores.

    DALI runs one operator after another; without the extra thread a core would idle at the end of each operator.
    """
    return num_threads or cores + 1


def compute_dtype(precision: str, device: torch.device) -> torch.dtype:
    """The number format of the network on a device, for the key training.precision.

    A CPU that lacks instructions for bfloat16 would emulate it, slower than float32.
    """
    named = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
    if precision != "auto":
        return named[precision]
    if device.type == "cpu":
        has = torch.cpu.get_capabilities()
        return torch.bfloat16 if has.get("avx512_bf16") or has.get("amx_bf16") else torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


def synchronize(device: torch.device) -> None:
    """Wait until a GPU has done what it was told; a CPU has done it already."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def copy_rate(device: torch.device) -> float:
    """Rate of copying a buffer that no cache holds, bytes read plus bytes written, per second."""
    source, target = (torch.zeros(_COPIED_BYTES, dtype=torch.uint8, device=device) for _ in range(2))
    return 2 * _COPIED_BYTES / _median_seconds(lambda: target.copy_(source), device)


@torch.no_grad()
def matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Peak arithmetic rate, FLOP per second (2 for a multiply-add): a large matrix product or convolution.

    The faster of the two counts: on some CPUs the library of convolutions is better than that of matrices. Where a
    small one already takes long, because the device emulates the type, no larger one is tried.
    """
    on_cpu = device.type == "cpu"
    return max(
        _rate(_product, (256, 512, 1024, 2048) if on_cpu else (8192,), device, dtype),
        _rate(_convolution, (1, 8) if on_cpu else (256,), device, dtype),
    )


class _Work(NamedTuple):
    """A computation and its number of operations."""

    run: Callable[[], object]
    flop: int


def _product(size: int, device: torch.device, dtype: torch.dtype) -> _Work:
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return _Work(lambda: torch.mm(left, right), 2 * size**3)


def _convolution(batch_size: int, device: torch.device, dtype: torch.dtype) -> _Work:
    channels, side = 256, 38  # of the network's longest layers
    images, weights = (
        torch.randn(shape, device=device).to(dtype, memory_format=torch.channels_last)
        for shape in ((batch_size, channels, side, side), (channels, channels, 3, 3))
    )
    flop = 2 * batch_size * side**2 * channels**2 * 9
    return _Work(lambda: torch.nn.functional.conv2d(images, weights, padding=1), flop)


def _rate(
    make: Callable[[int, torch.device, torch.dtype], _Work],
    sizes: Sequence[int],
    device: torch.device,
    dtype: torch.dtype,
) -> float:
    """FLOP per second at the largest size, or at the first that takes long."""
    for size in sizes:
        work = make(size, device, dtype)
        seconds = _median_seconds(work.run, device)
        if seconds > _LONG_S:
            break
    return work.flop / seconds


def reset_peak_memory(device: torch.device) -> bool:
    """Reset the peak of memory use; return False where the system cannot do that."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return True
    clear = Path("/proc/self/clear_refs")
    if not os.access(clear, os.W_OK):
        return False
    ctypes.CDLL(None).malloc_trim(0)  # return freed memory to the system
    clear.write_text("5")  # the peak is now what is resident
    return True


def peak_memory(device: torch.device) -> int:
    """Peak memory since the last reset, bytes: of tensors on a GPU, else of the resident set of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))


def memory_kills() -> int:
    """Number of processes that this machine's kernel has killed for lack of memory, a cgroup's or its own."""
    try:
        lines = Path("/proc/vmstat").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("oom_kill ")), 0)


def _median_seconds(run: Callable[[], object], device: torch.device) -> float:
    seconds: list[float] = []
    while len(seconds) < _REPEATS and (len(seconds) < 3 or sum(seconds) < _REPEATS * _LONG_S):
        synchronize(device)
        begin = time.perf_counter()
        run()
        synchronize(device)
        seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds[_WARM_UP:])
