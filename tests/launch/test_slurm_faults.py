"""Jobs of run.slurm on a cluster that misbehaves: they go on, or resume and end as if undisturbed."""

import importlib.util
import os
import signal
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
from slurm_cluster import Ended, SlurmCluster, missing_programs
from slurm_site import RUN_S, START_S, SlurmSite
from tiny import assert_same_end

TWO_NODES = ("-N2", "-n2")  # of three
# Each is met once in a run, which must not be over by then.
PHASES = ("start", "saving", "training", "evaluation")
OVERRIDES = (
    "training.batch_size=8",
    "training.epochs=3",
    "training.checkpoint_every_steps=1",
    "evaluation.epochs=[1, 2]",
)
STEPS = 12


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory, synthetic_set: Path) -> Iterator[SlurmSite]:
    """A cluster of its own, as its daemons are killed."""
    if missing := missing_programs():
        pytest.skip(f"no Slurm here: {', '.join(missing)} not found; Debian: apt-get install slurm-wlm munge")
    if importlib.util.find_spec("horovod") is None:
        pytest.skip("Horovod is not installed: make horovod")
    with SlurmCluster(tmp_path_factory.mktemp("faults"), num_nodes=3) as cluster:
        yield SlurmSite(cluster, synthetic_set, *OVERRIDES)


@pytest.fixture(scope="module")
def undisturbed(site: SlurmSite) -> Path:
    """Folder of a run that nothing disturbed."""
    job = site.submit(ranks=TWO_NODES)
    assert site.cluster.wait_for_end(job, RUN_S) == Ended("COMPLETED", 0, 0), site.log_of(job)
    return site.run_of(job)


def test_a_job_trains_on_while_the_controller_is_restarted(site: SlurmSite, undisturbed: Path) -> None:
    job = site.submit(ranks=TWO_NODES)
    with site.stopped_within("training", job, 0):
        site.cluster.restart_controller(2.0)
    assert site.cluster.wait_for_end(job, RUN_S) == Ended("COMPLETED", 0, 0), site.log_of(job)
    assert_same_end(site.run_of(job), undisturbed, STEPS)


def test_a_job_cancelled_in_any_phase_and_resumed_ends_as_if_undisturbed(site: SlurmSite, undisturbed: Path) -> None:
    run = site.logs / "cancelled"
    run.mkdir()
    for phase in PHASES:
        job = site.submit(ranks=TWO_NODES, RUN=str(run))
        with site.stopped_within(phase, job, 0, run):
            site.cluster.run("scancel", job)  # Slurm also continues what is stopped
        ended = site.cluster.wait_for_end(job, START_S)
        assert (ended.state, ended.restarts) == ("CANCELLED", 0), phase
        assert f"to resume, repeat the command with RUN={run}" in (run / "job.log").read_text()
    job = site.submit(ranks=TWO_NODES, RUN=str(run))
    assert site.cluster.wait_for_end(job, RUN_S) == Ended("COMPLETED", 0, 0), (run / "job.log").read_text()
    assert_same_end(run, undisturbed, STEPS)


def test_a_job_that_meets_its_time_limit_in_any_phase_ends_as_if_undisturbed(
    site: SlurmSite, undisturbed: Path
) -> None:
    job = site.submit(ranks=TWO_NODES)
    for number, phase in enumerate(PHASES, 1):
        with site.stopped_within(phase, job, 0):
            site.cluster.run("scancel", "--batch", "--signal=USR1", job)  # as Slurm does two minutes before the limit
            site.cluster.wait(partial(_was_asked, site, job, number), START_S, job)
        site.cluster.start_requeued(job, START_S)
    assert site.cluster.wait_for_end(job, RUN_S) == Ended("COMPLETED", 0, len(PHASES)), site.log_of(job)
    assert_same_end(site.run_of(job), undisturbed, STEPS)


def _was_asked(site: SlurmSite, job: str, times: int) -> bool:
    """Whether a job has been asked to stop so many times."""
    return site.log_of(job).count("asked to stop: the training saves") == times


def test_a_job_whose_batch_node_dies_is_requeued_on_other_nodes_and_ends_as_if_undisturbed(
    site: SlurmSite, undisturbed: Path
) -> None:
    job = site.submit(ranks=TWO_NODES)
    with site.stopped_within("training", job, 1) as process:
        node = site.cluster.field(job, "BatchHost")
        site.cluster.kill_node(job, node)
        os.kill(process, signal.SIGCONT)
        site.cluster.start_requeued(job, START_S)
    assert site.cluster.wait_for_end(job, RUN_S) == Ended("COMPLETED", 0, 1), site.log_of(job)
    assert node not in site.cluster.field(job, "NodeList")
    assert_same_end(site.run_of(job), undisturbed, STEPS)
