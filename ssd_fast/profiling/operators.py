"""Times of the operators, beside their plain versions and beside what one would use in their place.

All implementations of an operator get the same tensors in one process, and their calls take turns (A B C A B C …), so
that a machine that becomes slower does so for all of them. Each result is first compared with the oracle's: a wrong one
ends the command. `operator_cases` makes the inputs and the implementations.

On the CPU, times are the host's. On a GPU they are those of CUDA events, with the inputs out of the L2 cache and with
work queued ahead of the host. DALI is the exception: the host waits for its own stream, hence its times are the host's.
"""

import json
import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median, quantiles
from typing import Any, NamedTuple

import torch

import kernels
from ssd_fast import hardware
from ssd_fast.config.sections import Config
from ssd_fast.distributed.world import World
from ssd_fast.files import write_atomically
from ssd_fast.model.anchors import model_anchors
from ssd_fast.profiling.operator_cases import DIFFERENCE_UNITS, ORACLE, OURS, Case, Implementation, make_cases
from ssd_fast.tables import Row, Table, format_pairs, format_table

logger = logging.getLogger(__name__)

OPERATORS_FILE = "operators.json"
_MIN_REPEATS, _SECONDS_EACH = 3, 1.0
_FLUSHED_BYTES = 2**30


class ResultError(ValueError):
    """A result that differs from the oracle's. The message names the implementation and the difference."""


class Times(NamedTuple):
    """Times of one implementation.

    samples_s: all repeats. ratio: median_s in units of our operator's.
    copy_share: time to copy as many bytes, as a share of median_s.
    """

    samples_s: list[float]
    median_s: float
    quartiles_s: tuple[float, float]
    ratio: float
    copy_share: float


class Measurement(NamedTuple):
    """One implementation on one input.

    bytes: of arguments and results, each counted once.
    times: None if the implementation cannot run here; then failure says why.
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
    """The machine and the versions. copy_bytes_per_s: rate of a large copy, bytes read and written together."""

    device: str
    threads: int
    torch: str
    kernels_cuda: str
    dtype: str
    copy_bytes_per_s: float


class OperatorProfile(NamedTuple):
    """Measurements of all operators, those of one input after another."""

    environment: Environment
    rows: list[Measurement]


def is_result(folder: Path) -> bool:
    """Whether write_operators has written the file in a folder."""
    try:
        return json.loads((folder / OPERATORS_FILE).read_bytes()).keys() == {"environment", "rows"}
    except (OSError, ValueError, AttributeError):
        return False


def write_operators(folder: Path, measured: OperatorProfile) -> None:
    """Write everything that was measured, all samples included, to operators.json in a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [row._asdict() | {"times": row.times and row.times._asdict()} for row in measured.rows]
    content = json.dumps({"environment": measured.environment._asdict(), "rows": rows}, indent=1)
    write_atomically(folder / OPERATORS_FILE, content.encode())


def profile_operators(configs: Sequence[Config], *, batch_size: int | None, repeats: int) -> OperatorProfile:
    """Measure all operators with the anchors of each configuration, on the GPU or on the CPU where there is none.

    batch_size: None for 8 on the CPU; on a GPU 128, and 32 for more than 10,000 anchors.
    repeats: calls of every implementation; fewer, but at least three, where they would take longer than a second.
    Raises ResultError when a result differs from the oracle's.
    """
    device = World().device()
    environment = Environment(
        device=hardware.device_name(device, hardware.usable_cores()),
        threads=torch.get_num_threads(),
        torch=torch.__version__,
        kernels_cuda=kernels.cuda_build(),
        dtype="float32" if device.type == "cpu" else "float16",
        copy_bytes_per_s=hardware.copy_rate(device),
    )
    rows = []
    for config in configs:
        anchors_cxcywh = model_anchors(config.model).to(device)
        usual = 8 if device.type == "cpu" else 32 if len(anchors_cxcywh) > 10_000 else 128
        for case in make_cases(anchors_cxcywh, batch_size=batch_size or usual):
            logger.info("%s", _name(case))
            rows += measure(case, device, repeats=repeats, copy_rate=environment.copy_bytes_per_s)
    return OperatorProfile(environment, rows)


def measure(case: Case, device: torch.device, *, repeats: int, copy_rate: float) -> list[Measurement]:
    """Measure every implementation of a case; copy_rate in bytes per second."""
    oracle = next(item.run() for item in case.implementations if item.name == ORACLE)
    differences = {item.name: _checked_difference(case, item, oracle) for item in case.implementations}
    peaks = {item.name: _peak_bytes(item, device) if case.measure_memory else None for item in case.implementations}
    seconds: dict[str, list[float]] = {item.name: [] for item in case.implementations}
    for repeat in range(repeats):
        for item in case.implementations:
            if not item.failure and (repeat < _MIN_REPEATS or sum(seconds[item.name]) < _SECONDS_EACH):
                seconds[item.name].append(_seconds(item, device))
    ours_s, copy_s = median(seconds[OURS]), case.num_bytes / copy_rate
    return [
        Measurement(
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


def _checked_difference(case: Case, item: Implementation, oracle: Any) -> float | None:
    if item.failure or item.name == ORACLE:
        return None
    difference = item.difference(item.run(), oracle)
    if not difference <= item.tolerance:
        raise ResultError(
            f"{_name(case)}: the result of {item.name} differs from that of kernels.reference by {difference:g}: "
            f"expected at most {item.tolerance:g} ({DIFFERENCE_UNITS[case.operator]})"
        )
    return difference


def _peak_bytes(item: Implementation, device: torch.device) -> int | None:
    """Most memory that a call has at one time beyond what there was before; None where it cannot be known.

    On the CPU it is the growth of the process's resident set, whose peak Linux keeps. That includes what the C++ of an
    operator allocates without PyTorch.
    """
    if item.failure or not hardware.reset_peak_memory(device):
        return None
    before = hardware.peak_memory(device)
    item.run()
    return hardware.peak_memory(device) - before


def _seconds(item: Implementation, device: torch.device) -> float:
    """Time of one call, without its overhead."""
    seconds = _timed(item.run, device, on_host=item.on_host)
    return seconds - (_timed(item.overhead, device, on_host=item.on_host) if item.overhead else 0.0)


def _timed(run: Callable[[], Any], device: torch.device, *, on_host: bool) -> float:
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


def _times(samples_s: list[float], *, ours_s: float, copy_s: float) -> Times | None:
    if not samples_s:
        return None
    low, middle, high = quantiles(samples_s * (2 if len(samples_s) == 1 else 1), n=4, method="inclusive")
    return Times(samples_s, middle, (low, high), ratio=middle / ours_s, copy_share=copy_s / middle)


def _name(case: Case | Measurement) -> str:
    return f"{case.operator}, {case.input}, {case.batch_size} x {case.num_anchors:,} anchors"


# ---- text ----


def format_operators(profile: OperatorProfile) -> str:
    """Text for a terminal: the machine, a table, the failures, and the meaning of the columns."""
    environment = profile.environment
    machine = (
        f"{environment.device}, {environment.threads} threads, torch {environment.torch}, {environment.dtype}\n"
        f"kernels: {environment.kernels_cuda}\n"
        f"copying: {environment.copy_bytes_per_s / 1e9:.1f} GB/s, read and written bytes together"
    )
    rows: list[Row] = []
    for row in profile.rows:
        if row.implementation == profile.rows[0].implementation:  # begins the next input
            rows.append(Row([_name(row), *[""] * (len(_COLUMNS) - 1)]))
        rows.append(Row([row.implementation, *_figures(row)], depth=1))
    failures = [f"{_name(row)}, {row.implementation}: {row.failure}" for row in profile.rows if row.failure]
    blocks = [machine, format_table(Table("Operators", _COLUMNS, rows)), "\n".join(failures), format_pairs(_LEGEND)]
    return "\n\n".join(block for block in blocks if block)


_COLUMNS = ("", "median ms", "quartiles ms", "x ours", "GB/s", "of copy", "peak MB", "differs by")
_LEGEND = (
    ("GB/s", "bytes of arguments and results, each counted once"),
    ("of copy", "time to copy as many bytes, as a share of the median"),
    ("peak MB", "most memory at one time beyond the arguments, results included"),
    *((f"differs by, {operator}", f"from plain torch: {unit}") for operator, unit in DIFFERENCE_UNITS.items()),
)


def _figures(row: Measurement) -> list[str]:
    if row.times is None:
        return ["failed", *[""] * (len(_COLUMNS) - 2)]
    low, high = row.times.quartiles_s
    return [
        f"{1e3 * row.times.median_s:.3f}",
        f"{1e3 * low:.3f}-{1e3 * high:.3f}",
        f"{row.times.ratio:.1f}",
        f"{row.bytes / row.times.median_s / 1e9:.2f}",
        f"{row.times.copy_share:.1%}",
        "" if row.peak_bytes is None else f"{row.peak_bytes / 1e6:.1f}",
        "" if row.difference is None else f"{row.difference:.1g}",
    ]
