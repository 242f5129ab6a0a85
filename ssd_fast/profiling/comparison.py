"""Two profiles side by side: their stages, rates and settings."""

import json
from collections.abc import Callable, Iterable, Sequence

from ssd_fast.profiling.profile import BOTH, STEP_ALONE, Profile
from ssd_fast.profiling.quantities import byte_rate, flop_rate, milliseconds, number, ratio
from ssd_fast.tables import Row, Table

_MEASURED = {"matrix_flop_per_s", "bf16_flop_per_s", "copy_bytes_per_s", "peak_bytes"}  # these always differ


def tables(before: Profile, after: Profile) -> list[Table]:
    """Stages with their parts, and rates.

    Ratios of stages and parts are those of images/s, so that batches of different sizes can be compared.
    """
    return [_stages(before, after), _rates(before, after)]


def differing_settings(before: Profile, after: Profile) -> list[tuple[str, str, str]]:
    """Names of settings, of the machine and then of the recipe, with both values."""
    old, new = _settings(before), _settings(after)
    pairs = [(name, old.get(name, "missing"), new.get(name, "missing")) for name in _union(old, new)]
    return [(name, left, right) for name, left, right in pairs if left != right]


def _settings(profile: Profile) -> dict[str, str]:
    machine = profile.machine.model_dump(exclude=_MEASURED)
    settings = {f"machine: {key}": value for key, value in machine.items()} | {"recipe": profile.recipe}
    for section, keys in profile.config.items():
        settings |= {f"{section}.{key}": value for key, value in keys.items()}
    return {name: json.dumps(value, ensure_ascii=False) for name, value in settings.items()}


def _stages(before: Profile, after: Profile) -> Table:
    rows = []
    profiles = (before, after)
    for name in _union(*((stage.name for stage in profile.stages) for profile in profiles)):
        stages = [profile.stage(name) for profile in profiles]
        rows.append(_stage_row(name, [(stage.whole.median_s, stage.images) if stage else None for stage in stages]))
        measured = [stage for stage in stages if stage is not None]
        if len(measured) < 2:
            continue
        parts = [{part.name: (part.median_s, stage.images) for part in stage.parts} for stage in measured]
        rows += [_stage_row(part, [of_stage.get(part) for of_stage in parts], depth=1) for part in _union(*parts)]
    columns = ("", "before ms", "after ms", "before images/s", "after images/s", "faster")
    return Table("Before and after", columns, rows, "medians; faster: in images/s")


def _stage_row(name: str, measured: Sequence[tuple[float, float] | None], *, depth: int = 0) -> Row:
    """measured: before and after, seconds of a batch or step and its images."""
    old, new = measured
    if old is None or new is None:
        faster = "only after" if old is None else "only before"
    elif old[0] > 0 and new[0] > 0:  # noise can make a small part negative
        faster = ratio(old[0] / old[1] * new[1] / new[0])
    else:
        faster = ""
    times = ["" if item is None else milliseconds(item[0]) for item in measured]
    rates = ["" if depth or item is None else number(item[1] / item[0]) for item in measured]
    return Row([name, *times, *rates, faster], depth)


def _rates(before: Profile, after: Profile) -> Table:
    rows = []

    def add(name: str, values: Sequence[float | None], text: Callable[[float], str]) -> None:
        old, new = values
        if old or new:
            cells = ["" if value is None else text(value) for value in values]
            rows.append(Row([name, *cells, ratio(new / old) if old and new else ""]))

    profiles = (before, after)
    for name in (STEP_ALONE, BOTH):
        stages = [profile.stage(name) if profile.work else None for profile in profiles]
        pairs = list(zip(profiles, stages, strict=True))
        add(
            f"{name}, arithmetic", [profile.flop_per_s(stage) if stage else None for profile, stage in pairs], flop_rate
        )
        add(f"{name}, memory", [profile.bytes_per_s(stage) if stage else None for profile, stage in pairs], byte_rate)
    add("measured matrix rate", [profile.machine.matrix_flop_per_s for profile in profiles], flop_rate)
    add("measured copy", [profile.machine.copy_bytes_per_s for profile in profiles], byte_rate)
    add("peak memory", [profile.machine.peak_bytes for profile in profiles], lambda value: f"{value / 1e9:.2f} GB")
    return Table("Rates", ("", "before", "after", "after / before"), rows, "of one rank")


def _union(first: Iterable[str], second: Iterable[str]) -> list[str]:
    return list(dict.fromkeys([*first, *second]))
