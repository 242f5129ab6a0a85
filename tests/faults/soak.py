"""Random faults against a small run, resumed until it is finished: it must end as the undisturbed run, bit by bit.

`make soak MINUTES=30`. Two nodes in network namespaces, with two ranks each, train on a disk of their own. Needs root,
/dev/net/tun and a loop device. It does not run in the tests.
"""

import argparse
import json
import random
import shutil
import signal
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from faults import FAULTS, Event, Fault, disturb
from phases import PHASES
from soaked_job import Site, SoakedJob, make_site
from tiny import assert_same_end

from ssd_fast.checkpoints.checkpoint import CheckpointError
from ssd_fast.tables import Row, Table, format_table

RESULTS = Path("output/soak/faults.jsonl")


class Soak:
    """A run that is disturbed again and again."""

    def __init__(self, site: Site, seed: int, faults: Sequence[Fault], kept_in: Path) -> None:
        """kept_in: folder for runs whose end differs."""
        self.kept_in = kept_in.resolve()
        self.random = random.Random(seed)
        self.site = site
        self.faults = faults
        self.undisturbed = site.disk.folder / "undisturbed"
        with SoakedJob(site, site.disk.folder / "warm-up", self.random) as job:
            job.wait(600)  # the server of forks imports what ranks need
        start = time.monotonic()
        with SoakedJob(site, self.undisturbed, self.random) as job:
            job.wait(600)
            assert job.statuses() == [0] * len(job.ranks), job.errors()
        self.usual_s = time.monotonic() - start
        self.last_step = job.newest_step()
        print(f"undisturbed: {self.last_step} steps, {self.usual_s:.1f} s", flush=True)

    def run_once(self, output: Path, until: float) -> list[Event]:
        """Start a run, disturb and resume it until it is finished, and compare its end."""
        events: list[Event] = []
        while True:
            with SoakedJob(self.site, output, self.random) as job:
                while job.wait_at_random(self.usual_s) and time.monotonic() < until:
                    if event := disturb(job, self.random.choice(self.faults)):
                        events.append(event)
                        print(f"{len(events):4}  {_line(event)}", flush=True)
                job.wait(job.limit_s)
                statuses, errors, was_stopped = job.statuses(), job.errors(), job.was_stopped()
            if not any(statuses) and not was_stopped:
                break
            if time.monotonic() < until or (events and not events[-1].wrong):
                continue
            print(errors, flush=True)
            break
        try:
            assert_same_end(output, self.undisturbed, self.last_step)
        except (AssertionError, CheckpointError) as error:
            wrong = f"the end differs: {str(error)[:300] or 'other losses or scores'}"
            events.append(Event("all faults of a run", "end", True, 0.0, "", wrong))
            kept = Path(tempfile.mkdtemp(prefix="differs_", dir=self.kept_in))
            for run in (output, self.undisturbed):
                shutil.copytree(run, kept / run.name)
            print(f"{events[-1].wrong}: see {kept}", flush=True)
        else:
            shutil.rmtree(output)
        return events


def _line(event: Event) -> str:
    end = "ended" if event.ended else "went on"
    return f"{event.fault:32} {event.phase:11} {end:8} {event.seconds:6.1f} s  {event.wrong or event.message}"


def table(events: Sequence[dict[str, Any]]) -> str:
    """What came of each kind of fault."""
    kinds: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for event in events:
        kinds[event["fault"]].append(event)
        kinds["all"].append(event)
    rows = []
    for name, group in sorted(kinds.items(), key=lambda item: (item[0] == "all", item[0])):
        seconds = [event["seconds"] for event in group]
        counts = [len(group), *[sum(event["phase"] == phase for event in group) for phase in PHASES]]
        counts += [sum(event["ended"] for event in group), sum(bool(event["wrong"]) for event in group)]
        rows.append(Row((name, *map(str, counts), f"{statistics.median(seconds):.1f}", f"{max(seconds):.1f}")))
    columns = ("fault", "times", *(f"in {phase}" for phase in PHASES), "ended", "unexpected", "median s", "longest s")
    return format_table(Table("", columns, rows))


def main() -> None:
    """Soak for the given minutes, and print a table of all faults on record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--results", type=Path, default=RESULTS, help="file that faults are added to")
    parser.add_argument("--fault", action="append", help="cause only faults with this in their name; repeatable")
    options = parser.parse_args()
    chosen = [fault for fault in FAULTS if any(part in fault.name for part in options.fault or [""])]
    faults = [fault for fault in chosen if fault.is_possible()]
    if not faults:
        parser.error(f"no such fault is possible here: expected part of one of {[fault.name for fault in FAULTS]}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # through all contexts, which undo what they made
    until = time.monotonic() + 60 * options.minutes
    options.results.parent.mkdir(parents=True, exist_ok=True)
    print(f"seed {options.seed}", flush=True)
    wrong = runs = 0
    with tempfile.TemporaryDirectory() as folder, make_site(Path(folder)) as site:
        soak = Soak(site, options.seed, faults, options.results.parent)
        while time.monotonic() < until:
            events = soak.run_once(site.disk.folder / f"run{runs}", until)
            runs += 1
            with options.results.open("a") as file:
                file.writelines(json.dumps(event._asdict()) + "\n" for event in events)
            wrong += sum(bool(event.wrong) for event in events)
            print(f"run {runs}: {len(events)} faults", flush=True)
    print(table([json.loads(line) for line in options.results.read_text().splitlines()]))
    print(f"{runs} runs; unexpected: {wrong}")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
