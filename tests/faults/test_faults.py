"""Faults between nodes that are real to the network, on a disk of their own: what ends a run, and what it survives."""

import random
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from faults import FAULTS, disturb
from phases import phase_of
from ranks import needs_horovod
from soaked_job import Site, SoakedJob, make_site
from tiny import assert_same_end

TIMEOUT_S = 30  # hence cuts of 10 s; other tests may keep the cores busy
CHANCE = random.Random(0)
TESTED = (
    "a node dies",
    "a link is cut",
    "a link is cut for T / 3",
    "the disk is full",
    "the disk dies",
    "the kernel kills a rank for memory",
)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    try:
        with make_site(tmp_path_factory.mktemp("site")) as site:
            yield site
    except OSError as error:
        pytest.skip(f"no nodes and disk of one's own here: {error}")


@pytest.fixture(scope="module")
def undisturbed(site: Site) -> Path:
    output = site.disk.folder / "undisturbed"
    finish(site, output)
    return output


def finish(site: Site, output: Path) -> None:
    with SoakedJob(site, output, CHANCE, TIMEOUT_S) as job:
        assert job.wait_for_end(300)
        assert job.statuses() == [0] * 4, job.errors()


@needs_horovod
@pytest.mark.parametrize("name", TESTED)
def test_a_fault_has_its_message_and_the_resumed_run_ends_as_if_undisturbed(
    site: Site, undisturbed: Path, name: str
) -> None:
    output = site.disk.folder / name.replace(" ", "_")
    fault = next(fault for fault in FAULTS if fault.name == name)
    if not fault.is_possible():
        pytest.skip("no cgroups of version 1 here")
    with SoakedJob(site, output, CHANCE, TIMEOUT_S) as job:
        while job.phase() != "training":
            assert job.wait(0.01), job.errors()
        event = disturb(job, fault)
        assert event is not None, job.errors()
        assert event.wrong == ""
        assert event.ended == (fault.ends is not False)
        job.wait(300)
    finish(site, output)
    assert_same_end(output, undisturbed, job.newest_step())
    shutil.rmtree(output)  # the disk is small


def test_a_phase_is_told_while_the_run_renames_its_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = iter(([tmp_path / "mlperf.log"], []))  # gone when it is looked at
    monkeypatch.setattr(Path, "glob", lambda *_: next(seen))
    assert phase_of(tmp_path) == "start"
