"""The report of a profile: text for a terminal, and a page to open offline."""

import json
import textwrap
from collections.abc import Iterable, Iterator
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from ssd_fast.profiling import comparison
from ssd_fast.profiling.charts import draw_charts
from ssd_fast.profiling.profile import BOTH, INPUT_ALONE, STEP_ALONE, Part, Profile, Rank
from ssd_fast.profiling.quantities import (
    byte_rate,
    count,
    flop_rate,
    milliseconds,
    number,
    ratio,
    shortened,
)
from ssd_fast.tables import Row, Table, format_table

_COLUMNS = 110
_TERMINAL_RANKS = 16
_HOST_LENGTH, _OPERATOR_LENGTH = 36, 72  # characters; names of kernels are endless
_PAGE = Environment(
    loader=FileSystemLoader(Path(__file__).parent),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)


def format_profile(profile: Profile) -> str:
    """Text of 110 columns: machine, stages with their parts, achieved rates, ranks, operators, findings."""
    blocks = [_wrapped(_machine_lines(profile))]
    blocks += [format_table(table) for table in _tables(profile, most_ranks=_TERMINAL_RANKS)]
    blocks.append(_wrapped(f"{name}: {text}" for name, text in _facts(profile)))
    blocks.append(_wrapped(finding.sentence for finding in profile.findings))
    return "\n\n".join(block for block in blocks if block)


def format_comparison(before: Profile, after: Profile) -> str:
    """Text of 110 columns: stages, parts and rates of two profiles with their ratios, differing settings, findings."""
    settings = [f"  {name}: {old} -> {new}" for name, old, new in comparison.differing_settings(before, after)]
    findings = [f"{name}: {_headline(profile)}" for name, profile in (("before", before), ("after", after))]
    return "\n\n".join(
        [
            *map(format_table, comparison.tables(before, after)),
            "settings that differ:\n" + _wrapped(settings or ["  none"], indent="      "),
            _wrapped(findings),
        ]
    )


def to_html(profile: Profile, before: Profile | None = None) -> str:
    """A page that needs no other file. before: another profile to compare this one with."""
    compared = None
    if before is not None:
        settings = [Row(differing) for differing in comparison.differing_settings(before, profile)]
        compared = {
            "before": _headline(before),
            "after": _headline(profile),
            "tables": comparison.tables(before, profile),
            "settings": Table("Settings that differ", ("", "before", "after"), settings) if settings else None,
        }
    return _PAGE.get_template("report.html.jinja").render(
        recipe=profile.recipe,
        sentences=[finding.sentence for finding in profile.findings],
        machine=_machine_lines(profile),
        tiles=list(_tiles(profile)),
        comparison=compared,
        tables=_tables(profile, most_ranks=len(profile.ranks)),
        facts=list(_facts(profile)),
        charts=draw_charts(profile),
        config={
            section: {key: json.dumps(value, ensure_ascii=False) for key, value in keys.items()}
            for section, keys in profile.config.items()
        },
    )


# ---- lines ----


def _machine_lines(profile: Profile) -> list[str]:
    machine = profile.machine
    hosts = len({rank.host for rank in profile.ranks})
    where = [machine.device, count(machine.ranks, "rank") + (f" on {hosts} hosts" if hosts > 1 else "")]
    if "cores" not in machine.device:  # the name of a CPU includes them
        where.append(count(machine.cores, "core") + (" each" if machine.ranks > 1 else ""))
    per_rank = f"{count(profile.batch_size, 'image')} in a batch"
    if machine.ranks > 1:
        per_rank += f" of a rank, {profile.batch_size * machine.ranks:,} of all"
    matrix = f"matrix rate {flop_rate(machine.matrix_flop_per_s)}"
    if machine.dtype != "bfloat16":
        matrix += f" (in bfloat16 {flop_rate(machine.bf16_flop_per_s)})"
    measured = ["measured: " + matrix, f"copy {byte_rate(machine.copy_bytes_per_s)}"]
    if machine.peak_bytes is not None:
        measured.append(f"peak memory {machine.peak_bytes / 1e9:.2f} GB")
    return [
        ", ".join([*where, f"torch {machine.torch}", machine.dtype]),
        f"{profile.recipe}, {per_rank}",
        ", ".join(measured),
    ]


def _headline(profile: Profile) -> str:
    return profile.findings[0].sentence if profile.findings else "no finding"


def _tiles(profile: Profile) -> Iterator[tuple[str, str]]:
    """The figures that matter most, each with its name."""
    for stage in profile.measured(BOTH, STEP_ALONE, INPUT_ALONE):
        yield f"{number(stage.images_per_s)} images/s", stage.name
    trained = profile.measured(BOTH, STEP_ALONE)
    if profile.work is not None and trained:
        share = profile.flop_per_s(trained[0]) / profile.machine.matrix_flop_per_s
        yield f"{share:.0%}", f"of the measured matrix rate, {trained[0].name}"


def _facts(profile: Profile) -> Iterator[tuple[str, str]]:
    """Names and texts of what is in no table."""
    both, step, work = profile.stage(BOTH), profile.stage(STEP_ALONE), profile.work
    alone = profile.measured(INPUT_ALONE, STEP_ALONE)
    if both is not None and len(alone) == 2:
        slower = min(alone, key=lambda stage: stage.images_per_s)
        yield BOTH, f"{both.images_per_s / slower.images_per_s:.1%} of the slower of the two, {slower.name}"
    if profile.doubled and step is not None:
        seconds = sum(profile.doubled.values())
        images_per_s = 2 * step.images / seconds
        more = ratio(images_per_s / step.images_per_s)
        text = f"a step alone takes {milliseconds(seconds)} ms, {number(images_per_s)} images/s, {more} as many"
        yield "with twice the images in a batch", text
    if work is None:
        return
    yield (
        "counted",
        f"{work.forward_flop / 1e9:.2f} GFLOP forward and {work.train_flop / 1e9:.2f} GFLOP with backward per "
        f"image; {work.bytes / 1e9:.2f} GB read and written in a step of a rank; "
        f"{work.parameter_bytes / 1e6:.1f} MB of weights",
    )
    if work.layout_kernels is not None:
        yield "layout conversions", f"{work.layout_kernels:g} kernels in a step"
    if work.host_reads:
        places = ", ".join(f"{read.place} ({count(read.times, 'time')} in a step)" for read in work.host_reads)
        yield "the host waits for the device", places


# ---- tables ----


def _tables(profile: Profile, *, most_ranks: int) -> list[Table]:
    tables = (_stages(profile), _rates(profile), _ranks(profile, most_ranks), _operators(profile))
    return [table for table in tables if table.rows]


def _stages(profile: Profile) -> Table:
    machine = profile.machine
    several = machine.ranks > 1
    rows = []
    for stage in profile.stages:
        per_one = [number(stage.images_per_s / machine.ranks)] if several else []
        rates = [number(stage.images_per_s), *per_one, f"{stage.busy:.0%}"]
        rows.append(Row([*_times(stage.whole), "", *rates]))
        for part in stage.parts:
            share = part.median_s / stage.whole.median_s if stage.whole.median_s else 0.0
            rows.append(Row([*_times(part), f"{share:.1%}", *[""] * len(rates)], 1, share))
    columns = ["", "median ms", "quartiles ms", "share", "images/s"]
    columns += [f"per {_one(profile)}"] * several + ["cores busy"]
    return Table("Stages", columns, rows, "of a batch or step")


def _times(part: Part) -> list[str]:
    return [part.name, milliseconds(part.median_s), f"{milliseconds(part.low_s)} to {milliseconds(part.high_s)}"]


def _rates(profile: Profile) -> Table:
    """Rates that a rank reaches, beside the measured ones; the roof is the lower of these for such operators."""
    work, machine, rows = profile.work, profile.machine, []
    for stage in profile.measured(STEP_ALONE, BOTH) if work else []:
        flop_per_s, bytes_per_s = profile.flop_per_s(stage), profile.bytes_per_s(stage)
        flop_share, byte_share = flop_per_s / machine.matrix_flop_per_s, bytes_per_s / machine.copy_bytes_per_s
        intensity = number(flop_per_s / bytes_per_s) if bytes_per_s else ""
        cells = [flop_rate(flop_per_s), f"{flop_share:.1%}", byte_rate(bytes_per_s), f"{byte_share:.1%}"]
        rows.append(Row([stage.name, *cells, intensity, f"{max(flop_share, byte_share):.1%}"]))
    columns = ["", "arithmetic", "of matrix rate", "memory", "of copy rate", "FLOP/byte", "of the roof"]
    if machine.is_gpu and work and rows:
        columns.append("GPU busy")  # known of the last stage only
        busy = "" if work.gpu_busy is None else f"{work.gpu_busy:.0%}"
        rows = [*(Row([*row.cells, ""]) for row in rows[:-1]), Row([*rows[-1].cells, busy])]
    return Table("Achieved", columns, rows, f"by one {_one(profile)}")


def _ranks(profile: Profile, most: int) -> Table:
    """A row for each of several ranks; of more than `most`, those that the others wait for."""
    ranks = list(enumerate(profile.ranks)) if len(profile.ranks) > 1 else []
    note = "median ms of a step"
    if len(ranks) > most:
        note += f"; the {most} of {len(ranks)} ranks that need longest before the gradients are averaged"
        ranks = sorted(ranks, key=lambda item: -_own_s(item[1]))[:most]
    rows = []
    for index, rank in ranks:
        seconds = (rank.input_s, rank.step_s, rank.waiting_s, rank.compute_s, rank.allreduce_s)
        cells = ["" if value is None else milliseconds(value) for value in seconds]
        rows.append(Row([f"{index} {shortened(rank.host, _HOST_LENGTH)}", *cells]))
    columns = ("rank, host", INPUT_ALONE, STEP_ALONE, "waiting for input", "computing", "allreduce")
    return Table("Ranks", columns, rows, note)


def _own_s(rank: Rank) -> float:
    return (rank.waiting_s or 0.0) + (rank.compute_s or rank.step_s or rank.input_s or 0.0)


def _operators(profile: Profile) -> Table:
    """The operators that take longest."""
    rows = []
    name = "Kernels of a step" if profile.machine.is_gpu else "Operators of a step"
    for stage in profile.measured(BOTH, STEP_ALONE)[:1]:
        whole = stage.whole.median_s
        for operator in sorted(profile.work.operators if profile.work else (), key=lambda item: -item.seconds):
            share = operator.seconds / whole
            cells = [shortened(operator.name, _OPERATOR_LENGTH), milliseconds(operator.seconds), f"{share:.1%}"]
            rows.append(Row(cells, share=share))
    return Table(name, ("", "ms", "share"), rows, f"{name.lower()}, without what they call")


def _one(profile: Profile) -> str:
    return "GPU" if profile.machine.is_gpu else "rank"


def _wrapped(lines: Iterable[str], indent: str = "    ") -> str:
    return "\n".join(textwrap.fill(line, _COLUMNS, subsequent_indent=indent) for line in lines)
