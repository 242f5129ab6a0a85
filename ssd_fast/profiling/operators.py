"""What the operators cost, beside their plain versions and beside what one would use in their place.

All implementations of an operator get the same tensors in one process, and their calls take turns (A B C A B C ...), so
that a machine that becomes slower does so for all of them. What is timed has been compared with the oracle first: a
result that is not the oracle's ends the command. The inputs and the implementations are in `kernel_cases`.

On the CPU, times are the host's. On a GPU they are those of CUDA events, with the inputs out of the L2 cache and with
work queued ahead of the host; except for DALI, whose own stream the host waits for: there they are the host's.
"""

import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch

import kernels
from ssd_fast import hardware
from ssd_fast.config import Config
from ssd_fast.hardware import device_name, usable_cores
from ssd_fast.model.anchors import model_anchors
from ssd_fast.profiling.operator_cases import DIFFERENCE_UNITS, ORACLE, OURS, Case, Implementation, make_cases

_MIN_REPEATS, _SECONDS_EACH = 3, 1.0
_FLUSHED_BYTES = 2**30


class ProfileError(ValueError):
    """An implementation whose result is not the oracle's; the message names it and the difference."""


class Times(NamedTuple):
    """How long an implementation takes.

    samples_s: of every repeat; median_s and quartiles_s of these.
    ratio: median_s / that of our operator. copy_share: the time to copy as many bytes / median_s.
    """

    samples_s: list[float]
    median_s: float
    quartiles_s: tuple[float, float]
    ratio: float
    copy_share: float


class Row(NamedTuple):
    """What was measured of one implementation on one input.

    bytes: of arguments and results, each counted once.
    times: None where there is a failure, which says why.
    difference: of the result from the oracle's, see DIFFERENCE_UNITS; None for the oracle itself.
    peak_bytes: most memory at one time beyond the arguments, results included; None where it was not measured.
    """

    operator: str
    input: str
    batch_size: int
    num_anchors: int
    bytes: int
    implementation: str
    times: Times | None
    difference: float | None
    peak_bytes: int | None
    failure: str


class Environment(NamedTuple):
    """Where and with what was measured. copy_bytes_per_s: bytes read and written by a large copy, per second."""

    device: str
    threads: int
    torch: str
    kernels_cuda: str
    dtype: str
    copy_bytes_per_s: float


def profile_kernels(
    configs: Sequence[Config], device: torch.device, *, batch_size: int | None, repeats: int
) -> tuple[Environment, Iterator[Row]]:
    """Rows as they are measured, with the anchors of each configuration.

    batch_size: left out, 8 on the CPU; on a GPU 128, and 32 for more than 10,000 anchors.
    repeats: of every implementation; fewer, but at least three, of what takes longer than a second in all.
    Raises ProfileError when a result is not the oracle's.
    """
    environment = Environment(
        device=device_name(device, usable_cores()),
        threads=torch.get_num_threads(),
        torch=torch.__version__,
        kernels_cuda=kernels.cuda_build(),
        dtype="float32" if device.type == "cpu" else "float16",
        copy_bytes_per_s=hardware.copy_rate(device),
    )
    return environment, _rows(configs, device, batch_size, repeats, environment.copy_bytes_per_s)


def _rows(
    configs: Sequence[Config], device: torch.device, batch_size: int | None, repeats: int, copy_rate: float
) -> Iterator[Row]:
    for anchors_cxcywh in (model_anchors(config.model) for config in configs):
        usual = 8 if device.type == "cpu" else 32 if len(anchors_cxcywh) > 10_000 else 128
        for case in make_cases(anchors_cxcywh.to(device), batch_size=batch_size or usual):
            yield from measure(case, device, repeats=repeats, copy_rate=copy_rate)


def measure(case: Case, device: torch.device, *, repeats: int, copy_rate: float) -> list[Row]:
    """A row for every implementation of a case; copy_rate in bytes per second."""
    oracle = next(item.run() for item in case.implementations if item.name == ORACLE)
    differences = {item.name: _checked_difference(case, item, oracle) for item in case.implementations}
    peaks = {item.name: _peak_bytes(item, device) if case.measure_memory else None for item in case.implementations}
    seconds: dict[str, list[float]] = {item.name: [] for item in case.implementations}
    for repeat in range(repeats):
        for item in case.implementations:
            if not item.failure and (repeat < _MIN_REPEATS or sum(seconds[item.name]) < _SECONDS_EACH):
                seconds[item.name].append(_seconds(item, device))
    ours_s, copy_s = statistics.median(seconds[OURS]), case.num_bytes / copy_rate
    return [
        Row(
            operator=case.operator,
            input=case.input,
            batch_size=case.batch_size,
            num_anchors=case.num_anchors,
            bytes=case.num_bytes,
            implementation=item.name,
            times=_times(seconds[item.name], ours_s=ours_s, copy_s=copy_s),
            difference=differences[item.name],
            peak_bytes=peaks[item.name],
            failure=item.failure,
        )
        for item in case.implementations
    ]


def format_environment(environment: Environment) -> str:
    """The lines above the table."""
    return (
        f"{environment.device}, {environment.threads} threads, torch {environment.torch}, {environment.dtype}\n"
        f"kernels: {environment.kernels_cuda}\n"
        f"copying: {environment.copy_bytes_per_s / 1e9:.1f} GB/s, read and written bytes together"
    )


_COLUMNS = (  # name and width
    ("operator", "<13"),
    ("input", "<20"),
    ("batch", ">5"),
    ("anchors", ">7"),
    ("by", "<13"),
    ("median ms", ">9"),
    ("quartiles ms", ">17"),
    ("x ours", ">6"),
    ("GB/s", ">7"),
    ("of copy", ">7"),
    ("peak MB", ">7"),
    ("differs by", ">10"),
)


def format_header() -> str:
    """The table's first line."""
    return _format_line([name for name, _ in _COLUMNS])


def format_row(row: Row) -> str:
    """A line of the table."""
    start = [row.operator, row.input, str(row.batch_size), f"{row.num_anchors:,}", row.implementation]
    if row.times is None:
        return _format_line(start) + f"  {row.failure}"
    low, high = row.times.quartiles_s
    return _format_line(
        [
            *start,
            f"{1e3 * row.times.median_s:.3f}",
            f"{1e3 * low:.3f}-{1e3 * high:.3f}",
            f"{row.times.ratio:.1f}",
            f"{row.bytes / row.times.median_s / 1e9:.2f}",
            f"{row.times.copy_share:.1%}",
            "" if row.peak_bytes is None else f"{row.peak_bytes / 1e6:.1f}",
            "" if row.difference is None else f"{row.difference:.1g}",
        ]
    )


def format_legend() -> str:
    """What the columns mean, below the table."""
    units = "\n".join(f"  {operator}: {unit}" for operator, unit in DIFFERENCE_UNITS.items())
    return (
        "GB/s: bytes of arguments and results, each counted once. of copy: the time to copy as many, of the median.\n"
        "peak MB: most memory at one time beyond the arguments, results included.\n"
        f"differs by: from plain torch (kernels.reference)\n{units}"
    )


def to_json(environment: Environment, rows: list[Row]) -> str:
    """Everything that was measured, all samples included."""
    listed = [row._asdict() | {"times": row.times and row.times._asdict()} for row in rows]
    return json.dumps({"environment": environment._asdict(), "rows": listed}, indent=1)


def _format_line(cells: list[str]) -> str:
    return " ".join(f"{cell:{width}}" for cell, (_, width) in zip(cells, _COLUMNS, strict=False)).rstrip()


def _checked_difference(case: Case, item: Implementation, oracle: Any) -> float | None:
    if item.failure or item.name == ORACLE:
        return None
    difference = item.difference(item.run(), oracle)
    if not difference <= item.tolerance:
        raise ProfileError(
            f"{case.operator}, {case.input}, {case.num_anchors} anchors: the result of {item.name} differs from that "
            f"of kernels.reference by {difference:g}: expected at most {item.tolerance:g} "
            f"({DIFFERENCE_UNITS[case.operator]})"
        )
    return difference


def _seconds(item: Implementation, device: torch.device) -> float:
    if item.overhead is None:
        return _timed(item.run, device, on_host=item.on_host)
    return _timed(item.run, device, on_host=item.on_host) - _timed(item.overhead, device, on_host=item.on_host)


def _timed(run: Callable[[], Any], device: torch.device, *, on_host: bool) -> float:
    """Seconds of one call."""
    if device.type == "cuda":
        # Evicts the inputs, and takes longer (a quarter of a millisecond) than the host needs to queue an operator.
        torch.empty(_FLUSHED_BYTES, dtype=torch.uint8, device=device).zero_()
        if not on_host:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            run()
            end.record()
            end.synchronize()
            return start.elapsed_time(end) / 1e3
        torch.cuda.synchronize()
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


def _peak_bytes(item: Implementation, device: torch.device) -> int | None:
    """Most memory that a call has at one time beyond what there was before; None where it cannot be known.

    On the CPU it is the growth of the process's resident set, whose peak Linux keeps: that counts what the C++ of an
    operator allocates behind PyTorch's back, too.
    """
    if item.failure or not hardware.reset_peak_memory(device):
        return None
    before = hardware.peak_memory(device)
    item.run()
    return hardware.peak_memory(device) - before


def _times(samples_s: list[float], *, ours_s: float, copy_s: float) -> Times | None:
    if not samples_s:
        return None
    low, median, high = statistics.quantiles(samples_s * (2 if len(samples_s) == 1 else 1), n=4, method="inclusive")
    return Times(
        samples_s=samples_s,
        median_s=median,
        quartiles_s=(low, high),
        ratio=median / ours_s,
        copy_share=copy_s / median,
    )
