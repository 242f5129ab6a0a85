"""What a profile says to people: text for a terminal, a page to open offline, and two profiles side by side."""

import json
import textwrap
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from jinja2 import Environment, StrictUndefined

from ssd_fast.profiling.charts import draw_charts
from ssd_fast.profiling.profile import BOTH, INPUT_ALONE, STEP_ALONE, Part, Profile, Rank, Stage

_COLUMNS = 110
_TERMINAL_RANKS = 16
_HOST_LENGTH = 36
_MEASURED = {"matrix_flop_per_s", "bf16_flop_per_s", "copy_bytes_per_s", "peak_bytes"}  # never twice the same


class Row(NamedTuple):
    """A line of a table. depth: 1 for a part of the row above. share: 0 to 1, of the cell that shows it, if any."""

    cells: Sequence[str]
    depth: int = 0
    share: float | None = None


class Table(NamedTuple):
    """columns: their heads; the first is text, the others figures, empty where there is none. note: how to read it."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Row]
    note: str = ""


def format_profile(profile: Profile) -> str:
    """For a terminal of 110 columns: machine, stages with their parts, achieved rates, ranks, findings."""
    blocks = [_wrapped(*_machine_lines(profile)), _format_table(_stage_table(profile))]
    blocks += [_format_table(table) for table in (_rate_table(profile), _rank_table(profile, _TERMINAL_RANKS)) if table]
    blocks.append(_wrapped(*(f"{name}: {text}" for name, text in _facts(profile))))
    blocks.append(_wrapped(*_sentences(profile)))
    return "\n\n".join(block for block in blocks if block)


def compare_profiles(before: Profile, after: Profile) -> str:
    """For a terminal of 110 columns: stages, parts and rates of both with their ratios, settings that differ, findings.

    Ratios of stages and parts are those of images/s, so that batches of different sizes can be compared.
    """
    settings = [f"  {name}: {old} -> {new}" for name, old, new in _differences(before, after)] or ["  none"]
    return "\n\n".join(
        [
            _format_table(_comparison_table(before, after)),
            _format_table(_rate_comparison_table(before, after)),
            "settings that differ:\n" + _wrapped(*settings, indent="      "),
            _wrapped(*(f"{name}: {_first_sentence(item)}" for name, item in (("before", before), ("after", after)))),
        ]
    )


def to_html(profile: Profile, before: Profile | None = None) -> str:
    """A page that needs nothing but itself. before: another profile to compare this one with."""
    comparison = None
    if before is not None:
        differing = [Row((name, old, new)) for name, old, new in _differences(before, profile)]
        comparison = {
            "before": _first_sentence(before),
            "tables": [_comparison_table(before, profile), _rate_comparison_table(before, profile)],
            "settings": Table("Settings that differ", ("", "before", "after"), differing) if differing else None,
        }
    tables = (_stage_table(profile), _rate_table(profile), _rank_table(profile, None))
    return _PAGE.render(
        recipe=profile.recipe,
        sentences=_sentences(profile),
        machine=_machine_lines(profile),
        tiles=list(_tiles(profile)),
        comparison=comparison,
        tables=[table for table in tables if table],
        facts=_facts(profile),
        charts=draw_charts(profile),
        config={
            section: {key: _toml_like(value) for key, value in keys.items()} for section, keys in profile.config.items()
        },
    )


# ---- what is said ----


def _machine_lines(profile: Profile) -> list[str]:
    machine = profile.machine
    hosts = len({rank.host for rank in profile.ranks})
    where = [machine.device, _count(machine.ranks, "rank") + (f" on {hosts} hosts" if hosts > 1 else "")]
    if "cores" not in machine.device:  # a CPU's name tells them
        where.append(_count(machine.cores, "core") + (" each" if machine.ranks > 1 else ""))
    per_rank = f"{_count(profile.batch_size, 'image')} in a batch"
    if machine.ranks > 1:
        per_rank += f" of a rank, {profile.batch_size * machine.ranks:,} of all"
    matrix = f"matrix rate {_flop_rate(machine.matrix_flop_per_s)}"
    if machine.dtype != "bfloat16":
        matrix += f" (in bfloat16 {_flop_rate(machine.bf16_flop_per_s)})"
    measured = ["measured: " + matrix, f"copy {_byte_rate(machine.copy_bytes_per_s)}"]
    if machine.peak_bytes is not None:
        measured.append(f"peak memory {machine.peak_bytes / 1e9:.2f} GB")
    return [
        ", ".join([*where, f"torch {machine.torch}", machine.dtype]),
        f"{profile.recipe}, {per_rank}",
        ", ".join(measured),
    ]


def _sentences(profile: Profile) -> list[str]:
    return [finding.sentence for finding in profile.findings]


def _first_sentence(profile: Profile) -> str:
    return profile.findings[0].sentence if profile.findings else "no finding"


def _tiles(profile: Profile) -> Iterator[tuple[str, str]]:
    """The few figures that matter most, each with what it is."""
    for name in (BOTH, STEP_ALONE, INPUT_ALONE):
        if (stage := profile.stage(name)) is not None:
            yield f"{_number(stage.images_per_s)} images/s", name
    for name in (BOTH, STEP_ALONE):
        if profile.work is not None and (stage := profile.stage(name)) is not None:
            share = _flop_per_s(profile, stage) / profile.machine.matrix_flop_per_s
            yield f"{share:.0%}", f"of the measured matrix rate, {name}"
            return


def _facts(profile: Profile) -> list[tuple[str, str]]:
    """What has no place in a table: names and texts."""
    facts = []
    both, step = profile.stage(BOTH), profile.stage(STEP_ALONE)
    alone = [stage for name in (INPUT_ALONE, STEP_ALONE) if (stage := profile.stage(name)) is not None]
    if both is not None and len(alone) == 2:
        slower = min(alone, key=lambda stage: stage.images_per_s)
        facts.append((BOTH, f"{both.images_per_s / slower.images_per_s:.1%} of the slower of the two, {slower.name}"))
    if profile.doubled and step is not None:
        seconds = sum(profile.doubled.values())
        images_per_s = 2 * step.images / seconds
        text = f"a step alone takes {_ms(seconds)} ms, {_number(images_per_s)} images/s"
        facts.append(
            ("with twice the images in a batch", f"{text}, {_times(images_per_s / step.images_per_s)} as many")
        )
    work = profile.work
    if work is not None:
        facts.append(
            (
                "counted",
                f"{work.forward_flop / 1e9:.2f} GFLOP forward and {work.train_flop / 1e9:.2f} GFLOP with backward per "
                f"image; {work.bytes / 1e9:.2f} GB read and written in a step of a rank; "
                f"{work.parameter_bytes / 1e6:.1f} MB of weights",
            )
        )
        if work.layout_kernels is not None:
            facts.append(("layout conversions", f"{work.layout_kernels:g} kernels in a step"))
        if work.host_reads:
            places = ", ".join(f"{read.place} ({_count(read.times, 'time')} in a step)" for read in work.host_reads)
            facts.append(("the host waits for the device", places))
    return facts


def _stage_table(profile: Profile) -> Table:
    machine = profile.machine
    several = machine.ranks > 1
    rows = []
    for stage in profile.stages:
        per_one = [_number(stage.images_per_s / machine.ranks)] if several else []
        rates = [_number(stage.images_per_s), *per_one, f"{stage.busy:.0%}"]
        rows.append(Row([*_timed(stage.name, stage.whole), "", *rates]))
        for part in stage.parts:
            share = part.median_s / stage.whole.median_s if stage.whole.median_s else 0.0
            rows.append(Row([*_timed(part.name, part), f"{share:.1%}", *[""] * (2 + several)], 1, share))
    columns = ["", "median ms", "quartiles ms", "share", "images/s"]
    columns += [f"per {_one(profile)}"] * several + ["cores busy"]
    return Table("Stages", columns, rows, "of a batch or step")


def _timed(name: str, part: Part) -> list[str]:
    return [name, _ms(part.median_s), f"{_ms(part.low_s)} to {_ms(part.high_s)}"]


def _rate_table(profile: Profile) -> Table | None:
    work, machine = profile.work, profile.machine
    if work is None:
        return None
    stages = [stage for name in (STEP_ALONE, BOTH) if (stage := profile.stage(name)) is not None]
    rows = []
    for stage in stages:
        flop_per_s, bytes_per_s = _flop_per_s(profile, stage), work.bytes / stage.whole.median_s
        flop_share, byte_share = flop_per_s / machine.matrix_flop_per_s, bytes_per_s / machine.copy_bytes_per_s
        cells = [_flop_rate(flop_per_s), f"{flop_share:.1%}", _byte_rate(bytes_per_s), f"{byte_share:.1%}"]
        rows.append(Row([stage.name, *cells, *[""] * machine.is_gpu]))
    columns = ["", "arithmetic", "of matrix rate", "memory", "of copy rate", *["GPU busy"] * machine.is_gpu]
    if rows and machine.is_gpu and work.gpu_busy is not None:  # seen in the last of the stages
        rows[-1] = Row([*rows[-1].cells[:-1], f"{work.gpu_busy:.0%}"])
    return Table("Achieved", columns, rows, f"by one {_one(profile)}") if rows else None


def _rank_table(profile: Profile, most: int | None) -> Table | None:
    """A line per rank; of more than `most` those that are busiest between two averages, whom the others wait for."""
    ranks = list(enumerate(profile.ranks))
    if len(ranks) < 2:
        return None
    note = "median ms of a step"
    if most is not None and len(ranks) > most:
        note += f"; the {most} of {len(ranks)} ranks that need longest before the gradients are averaged"
        ranks = sorted(ranks, key=lambda item: -_own_s(item[1]))[:most]
    rows = [
        Row(
            (
                f"{number} {_shortened(rank.host, _HOST_LENGTH)}",
                *(
                    "" if value is None else _ms(value)
                    for value in (rank.input_s, rank.step_s, rank.waiting_s, rank.compute_s, rank.allreduce_s)
                ),
            )
        )
        for number, rank in ranks
    ]
    columns = ("rank, host", INPUT_ALONE, STEP_ALONE, "waiting for input", "computing", "allreduce")
    return Table("Ranks", columns, rows, note)


def _own_s(rank: Rank) -> float:
    return (rank.waiting_s or 0.0) + (rank.compute_s or rank.step_s or rank.input_s or 0.0)


# ---- two profiles ----


def _comparison_table(before: Profile, after: Profile) -> Table:
    rows = []
    for name in _union([stage.name for stage in before.stages], [stage.name for stage in after.stages]):
        old, new = before.stage(name), after.stage(name)
        rows.append(
            _compared(
                name,
                (old.whole.median_s, old.images) if old else None,
                (new.whole.median_s, new.images) if new else None,
            )
        )
        if old is None or new is None:
            continue
        for part in _union([part.name for part in old.parts], [part.name for part in new.parts]):
            has_old, has_new = (any(item.name == part for item in stage.parts) for stage in (old, new))
            rows.append(
                _compared(
                    part,
                    (old.seconds(part), old.images) if has_old else None,
                    (new.seconds(part), new.images) if has_new else None,
                    depth=1,
                )
            )
    columns = ("", "before ms", "after ms", "before images/s", "after images/s", "faster")
    return Table("Before and after", columns, rows, "medians; faster: in images/s")


def _compared(name: str, old: tuple[float, float] | None, new: tuple[float, float] | None, *, depth: int = 0) -> Row:
    """old, new: seconds of a batch or step and its images."""
    if old is None or new is None:
        faster = "only after" if old is None else "only before"
    elif old[0] > 0 and new[0] > 0:  # noise can make a small part negative
        faster = _times(old[0] / old[1] * new[1] / new[0])
    else:
        faster = ""
    rates = ["" if depth or item is None else _number(item[1] / item[0]) for item in (old, new)]
    return Row([name, *("" if item is None else _ms(item[0]) for item in (old, new)), *rates, faster], depth)


def _rate_comparison_table(before: Profile, after: Profile) -> Table:
    rows = []

    def add(name: str, values: Sequence[float | None], text: Callable[[float], str]) -> None:
        old, new = values
        if old or new:
            cells = ["" if value is None else text(value) for value in values]
            rows.append(Row([name, *cells, _times(new / old) if old and new else ""]))

    pair = (before, after)
    for name in (STEP_ALONE, BOTH):
        stages = [(profile, profile.work, profile.stage(name)) for profile in pair]
        add(
            f"{name}, arithmetic",
            [_flop_per_s(profile, stage) if work and stage else None for profile, work, stage in stages],
            _flop_rate,
        )
        add(
            f"{name}, memory",
            [work.bytes / stage.whole.median_s if work and stage else None for _, work, stage in stages],
            _byte_rate,
        )
    add("measured matrix rate", [profile.machine.matrix_flop_per_s for profile in pair], _flop_rate)
    add("measured copy", [profile.machine.copy_bytes_per_s for profile in pair], _byte_rate)
    add("peak memory", [profile.machine.peak_bytes for profile in pair], lambda value: f"{value / 1e9:.2f} GB")
    return Table("Rates", ("", "before", "after", "after / before"), rows, "of one rank")


def _differences(before: Profile, after: Profile) -> list[tuple[str, str, str]]:
    """Names of settings, of the machine and then of the recipe, with both values."""
    old, new = _settings(before), _settings(after)
    pairs = [(name, old.get(name, "missing"), new.get(name, "missing")) for name in _union(list(old), list(new))]
    return [(name, left, right) for name, left, right in pairs if left != right]


def _settings(profile: Profile) -> dict[str, str]:
    machine = profile.machine.model_dump(exclude=_MEASURED)
    settings = {f"machine: {key}": value for key, value in machine.items()}
    settings["recipe"] = profile.recipe
    for section, keys in profile.config.items():
        settings |= {f"{section}.{key}": value for key, value in keys.items()}
    return {name: _toml_like(value) for name, value in settings.items()}


def _union(first: Sequence[str], second: Sequence[str]) -> list[str]:
    return list(dict.fromkeys([*first, *second]))


# ---- figures as text ----


def _flop_per_s(profile: Profile, stage: Stage) -> float:
    """Of one rank."""
    assert profile.work is not None
    return profile.work.train_flop * stage.images / profile.machine.ranks / stage.whole.median_s


def _one(profile: Profile) -> str:
    return "GPU" if profile.machine.is_gpu else "rank"


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:,.2f}"


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"


def _times(ratio: float) -> str:
    return f"{ratio:.2f}x"


def _flop_rate(value: float) -> str:
    return f"{value / 1e12:,.1f} TFLOP/s" if value >= 1e12 else f"{value / 1e9:,.1f} GFLOP/s"


def _byte_rate(value: float) -> str:
    return f"{value / 1e9:,.1f} GB/s"


def _toml_like(value: Any) -> str:
    return json.dumps(value, default=str, ensure_ascii=False)


def _shortened(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"


# ---- text ----


def _format_table(table: Table) -> str:
    """Columns as wide as what is in them, the first to the left; rows of depth 0 apart where there are deeper ones."""
    head = [table.columns[0] or table.note, *table.columns[1:]]
    lines = [head, *([f"{'  ' * row.depth}{row.cells[0]}", *row.cells[1:]] for row in table.rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    texts = [
        "  ".join(
            f"{cell:<{width}}" if n == 0 else f"{cell:>{width}}" for n, (cell, width) in enumerate(cells)
        ).rstrip()
        for cells in (list(zip(line, widths, strict=True)) for line in lines)
    ]
    if any(row.depth for row in table.rows):
        texts = [("\n" if n and not table.rows[n - 1].depth else "") + text for n, text in enumerate(texts)]
    if table.columns[0] and table.note:
        texts.insert(0, table.note)
    return "\n".join(texts)


def _wrapped(*lines: str, indent: str = "    ") -> str:
    return "\n".join(textwrap.fill(line, _COLUMNS, subsequent_indent=indent) for line in lines)


# ---- the page ----

_TEMPLATE = """\
{% macro show(table) %}
<h2>{{ table.title }}{% if table.note %} <small>{{ table.note }}</small>{% endif %}</h2>
<div class="wide"><table>
<thead><tr>{% for column in table.columns %}<th>{{ column }}</th>{% endfor %}</tr></thead>
<tbody>
{% for row in table.rows %}
<tr class="depth{{ row.depth }}">
{% for cell in row.cells %}
{% if row.share is not none and table.columns[loop.index0] == "share" %}
<td class="share" style="--share: {{ "%.1f" % (100 * row.share) }}%">{{ cell }}</td>
{% elif loop.first %}
<th scope="row">{{ cell }}</th>
{% else %}
<td>{{ cell }}</td>
{% endif %}
{% endfor %}
</tr>
{% endfor %}
</tbody></table></div>
{% endmacro %}
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Profile of {{ recipe }}</title>
<style>
:root { color-scheme: light dark; --ink: #222; --soft: #666; --line: #ddd; --ground: #fff; --card: #f5f6f8;
  --bar: #cfe0f2; --mark: #2e6fb0; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e4e4; --soft: #a0a0a0; --line: #3a3d42; --ground: #17191c;
  --card: #212428; --bar: #27486b; --mark: #6aa5e0; } }
body { margin: 0 auto; padding: 1.5rem; max-width: 62rem; background: var(--ground); color: var(--ink);
  font: 15px/1.5 system-ui, "Segoe UI", "Helvetica Neue", Arial, sans-serif; }
h1 { font-size: 1.3rem; line-height: 1.4; font-weight: 600; margin: 0 0 1rem; padding-left: .8rem;
  border-left: 5px solid var(--mark); }
h2 { font-size: 1.05rem; margin: 2rem 0 .4rem; }
small { font-weight: normal; color: var(--soft); font-size: .85rem; }
p { margin: .3rem 0; }
.soft { color: var(--soft); }
.tiles { display: flex; flex-wrap: wrap; gap: .7rem; margin: 1.1rem 0; }
.tiles div { flex: 1 1 10rem; background: var(--card); border-radius: 8px; padding: .6rem .9rem; }
.tiles b { display: block; font-size: 1.3rem; font-weight: 600; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: .2rem .6rem; text-align: right; white-space: nowrap; }
th:first-child { text-align: left; padding-left: 0; }
thead th { color: var(--soft); font-weight: normal; border-bottom: 1px solid var(--line); }
tbody th { font-weight: inherit; }
.depth0 { font-weight: 600; }
.plain .depth0, .settings .depth0 { font-weight: normal; }
tr.depth1 + tr.depth0 > * { padding-top: .9rem; }
.depth1 th:first-child { padding-left: 1.4rem; }
.share { min-width: 7rem;
  background: linear-gradient(to right, var(--bar) var(--share), transparent 0) no-repeat center / 100% 80%; }
.settings td { text-align: left; white-space: normal; overflow-wrap: anywhere; }
.settings thead th { text-align: left; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .2rem 1.2rem; margin: 1.5rem 0; }
dt { color: var(--soft); }
dd { margin: 0; overflow-wrap: anywhere; }
figure { margin: 1.5rem 0; padding: .9rem 1.1rem; background: #fff; color: #222; border: 1px solid var(--line);
  border-radius: 8px; break-inside: avoid; }
figcaption { margin-bottom: .5rem; }
figcaption span { color: #666; font-size: .87rem; display: block; }
figure svg { width: 100%; height: auto; display: block; }
figure svg text { font-family: inherit !important; }
details { margin-top: 2rem; }
summary { cursor: pointer; font-weight: 600; }
pre { background: var(--card); padding: .9rem; border-radius: 8px; white-space: pre-wrap; overflow-wrap: anywhere;
  font-size: .85rem; }
@media (max-width: 40rem) { dl { grid-template-columns: 1fr; } dd { margin-bottom: .5rem; } }
@media print { :root { --ink: #000; --soft: #555; --line: #ccc; --ground: #fff; --card: #f5f6f8; --bar: #cfe0f2; }
  body { max-width: none; padding: 0; font-size: 11px; } tr, .tiles { break-inside: avoid; }
  h2 { break-after: avoid; } * { print-color-adjust: exact; } }
</style>
</head>
<body>
<h1>{{ sentences[0] if sentences else "Profile of " ~ recipe }}</h1>
{% for sentence in sentences[1:] %}
<p>{{ sentence }}</p>
{% endfor %}
{% if tiles %}
<div class="tiles">{% for figure, name in tiles %}<div><b>{{ figure }}</b>{{ name }}</div>{% endfor %}</div>
{% endif %}
{% for line in machine %}
<p class="soft">{{ line }}</p>
{% endfor %}
{% if comparison %}
<h2>Compared</h2>
<p><span class="soft">before:</span> {{ comparison.before }}</p>
<p><span class="soft">after:</span> {{ sentences[0] if sentences else "no finding" }}</p>
{{ show(comparison.tables[0]) }}
<div class="plain">{{ show(comparison.tables[1]) }}</div>
{% if comparison.settings %}
<div class="settings">{{ show(comparison.settings) }}</div>
{% endif %}
{% endif %}
{{ show(tables[0]) }}
{% for table in tables[1:] %}
<div class="plain">{{ show(table) }}</div>
{% endfor %}
{% if facts %}
<dl>
{% for name, text in facts %}
<dt>{{ name }}</dt><dd>{{ text }}</dd>
{% endfor %}
</dl>
{% endif %}
{% for chart in charts %}
<figure id="{{ chart.name }}">
<figcaption><b>{{ chart.title }}</b><span>{{ chart.note }}</span></figcaption>
{{ chart.svg | safe }}
</figure>
{% endfor %}
{% if config %}
<details><summary>The recipe, complete</summary><pre>
{% for section, keys in config.items() %}
[{{ section }}]
{% for key, value in keys.items() %}
{{ key }} = {{ value }}
{% endfor %}

{% endfor %}
</pre></details>
{% endif %}
</body>
</html>
"""
_PAGE = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True).from_string(
    _TEMPLATE
)
