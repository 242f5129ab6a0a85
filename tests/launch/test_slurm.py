"""run.slurm on a real cluster: what it starts, how it resumes, and how it ends.

SSD_FAST_IMAGE names the folder of an image to train in; default: a part of this machine stands in for one.
"""

import importlib.util
import os
import re
import signal
import subprocess
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
from repository import REPOSITORY
from slurm_cluster import Ended, SlurmCluster, missing_programs
from slurm_site import RANKS, RUN_S, SCRIPT, START_S, STEPS, SlurmSite
from tiny import assert_same_end

from ssd_fast.profiling.profile import read_profile
from ssd_fast.training.history import read_metrics


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SlurmCluster]:
    """A running cluster."""
    missing = missing_programs()
    if missing:
        pytest.skip(f"no Slurm here: {', '.join(missing)} not found; Debian: apt-get install slurm-wlm munge")
    with SlurmCluster(tmp_path_factory.mktemp("slurm")) as running:
        yield running


@pytest.fixture(scope="module")
def site(cluster: SlurmCluster, synthetic_set: Path) -> SlurmSite:
    """A place from which jobs of a tiny recipe can be submitted."""
    if importlib.util.find_spec("horovod") is None:
        pytest.skip("Horovod is not installed: make horovod")
    return SlurmSite(cluster, synthetic_set)


@pytest.fixture(scope="module")
def in_image(site: SlurmSite, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Variables of a job in a container that sees of this test's folders only what it is told to bind; else none."""
    programs = site.cluster.folder / "programs"
    programs.mkdir()
    (programs / "apptainer").symlink_to(REPOSITORY / "tests" / "support" / "apptainer.sh")
    image = os.environ.get("SSD_FAST_IMAGE", "/")
    if subprocess.run(["unshare", "--mount", "true"], check=False).returncode:
        return {}
    path = f"{programs}:{Path(site.variables['VENV']) / 'bin'}:{site.cluster.environment['PATH']}"
    return {"CONT": image, "PATH": path, "HIDDEN": str(tmp_path_factory.getbasetemp()) if image == "/" else ""}


@pytest.fixture(scope="module")
def uncut_job(site: SlurmSite, in_image: dict[str, str]) -> str:
    """Number of a job that trained from its first step to its last, in a container where one can be pretended."""
    job = site.submit(**in_image)
    assert site.cluster.wait_for_end(job, RUN_S) == Ended("COMPLETED", 0, 0), site.log_of(job)
    return job


def test_four_ranks_on_two_nodes_train_evaluate_and_agree(site: SlurmSite, uncut_job: str) -> None:
    log = site.log_of(uncut_job)
    agreed = re.findall(r"step (\d+): weights of all 4 ranks: \w{16}", log)  # of others the job fails
    assert agreed == [str(STEPS // 2), str(STEPS)]
    assert "to resume" not in log
    run = site.run_of(uncut_job)
    records = read_metrics(run / "metrics.jsonl")
    assert [record["step"] for record in records if record["kind"] == "eval"] == [STEPS // 2, STEPS]
    names = {path.name for path in run.iterdir()}
    assert names >= {"job.log", "train.log", "mlperf.log", "config.toml", "curves.png", "detections.png"}
    assert "interrupted" not in names


def test_a_run_cut_by_the_time_limit_is_requeued_and_ends_as_if_uncut(site: SlurmSite, uncut_job: str) -> None:
    job = site.submit()
    with site.stopped_within("training", job, 1):
        site.cluster.run("scancel", "--batch", "--signal=USR1", job)  # as Slurm does two minutes before the limit
        site.cluster.wait(lambda: "asked to stop: the training saves within 90 s" in site.log_of(job), START_S, job)
    site.cluster.start_requeued(job, START_S)
    assert site.cluster.wait_for_end(job, RUN_S) == Ended("COMPLETED", 0, 1), site.log_of(job)
    assert f"{site.run_of(job)}: resumes after step" in site.log_of(job)
    assert not (site.run_of(job) / "interrupted").exists()
    assert_same_end(site.run_of(job), site.run_of(uncut_job), STEPS)


def test_what_a_container_does_not_see_is_named_before_the_training(
    site: SlurmSite, in_image: dict[str, str], synthetic_set: Path, tmp_path: Path
) -> None:
    if not in_image:
        pytest.skip("no mounts of one's own here, in which a container could be pretended")
    linked = site.cluster.folder / "linked"
    (linked / "train2017").mkdir(parents=True)
    image = next((synthetic_set / "train2017").iterdir())
    (linked / "train2017" / image.name).symlink_to(image)
    weights = tmp_path / "weights.pth"
    weights.touch()
    override = f"model.backbone_weights={weights}"
    job = site.submit("--set", override, DATADIR=str(linked), **in_image)
    assert site.cluster.wait_for_end(job, RUN_S) == Ended("FAILED", 2, 0), site.log_of(job)
    unseen = f"{linked}/train2017/{image.name}, {weights}: expected the folders of these in APPTAINER_BIND"
    assert f"CONT={in_image['CONT']} does not see {unseen}" in site.cluster.output(job)


def test_a_profile_is_of_all_ranks(site: SlurmSite) -> None:
    job = site.submit("--stage", "both", "--seconds", "0.1", ranks=("-N2", "-n2"), PROFILE="1")
    assert site.cluster.wait_for_end(job, RUN_S) == Ended("COMPLETED", 0, 0), site.log_of(job)
    report = read_profile(site.run_of(job) / "profile")
    assert len(report.ranks) == 2
    assert all(rank.step_s and rank.allreduce_s is not None for rank in report.ranks)
    assert len(list((site.run_of(job) / "profile").glob("trace_rank*.json.gz"))) == 2
    assert "Bound by " in site.log_of(job)


def test_a_killed_rank_ends_the_job_with_its_name(site: SlurmSite) -> None:
    job = site.submit(ranks=("-N2", "-n2"))
    with site.stopped_within("training", job, 1) as process:
        os.kill(process, signal.SIGKILL)
    ended = site.cluster.wait_for_end(job, START_S)
    assert (ended.state, ended.restarts) == ("FAILED", 0)
    assert ended.status != 0
    log = site.log_of(job)
    assert "cpu1: task 1: Killed" in log
    assert f"to resume, repeat the command with RUN={site.run_of(job)}" in log


def test_a_task_gets_its_cores_and_all_gpus_of_its_node(cluster: SlurmCluster, stand_in: dict[str, str]) -> None:
    job = cluster.submit(
        ("-p", "gpu", "-N1", "-n2"), SCRIPT, ("--set", "a.b=[1, 2]"), environment=stand_in | {"SEED": "7"}
    )
    assert cluster.wait_for_end(job, START_S) == Ended("COMPLETED", 0, 0), cluster.output(job)
    run = Path(stand_in["LOGDIR"]) / f"own_{job}"
    lines = (run / "job.log").read_text().splitlines()
    tasks = sorted(line for line in lines if "gpus=" in line)
    pattern = r"{0}: {0} gpus=0,1 cores=(\S+) at=4711 gloo=lo"
    matches = [re.fullmatch(pattern.format(rank), task) for rank, task in enumerate(tasks)]
    assert len(matches) == 2
    cores = [match.group(1) for match in matches if match]
    if len(os.sched_getaffinity(0)) > 1:
        assert len(set(cores)) == 2
    arguments = [line.removeprefix("0: argument ") for line in lines if line.startswith("0: argument ")]
    recipe, data = stand_in["SYSTEM"], stand_in["DATADIR"]
    places = ("--config", recipe, "--data", data, "--output", str(run), "--resume")
    expected = ("-m", "ssd_fast", "train", *places, "--set", "training.seed=7", "--set", "a.b=[1, 2]")
    assert arguments == [f"<{argument}>" for argument in expected]


def test_a_cancelled_job_does_not_come_back_though_saved(cluster: SlurmCluster, stand_in: dict[str, str]) -> None:
    folder = Path(stand_in["LOGDIR"]) / "earlier"
    folder.mkdir()
    job = cluster.submit(RANKS, SCRIPT, environment=stand_in | {"WAIT": "1", "RUN": str(folder)})
    log = folder / "job.log"
    cluster.wait(partial(counted, log, "argument <--resume>", 4), START_S, job)
    cluster.run("scancel", job)
    assert cluster.wait_for_end(job, START_S) == Ended("CANCELLED", 143, 0)
    assert (folder / "interrupted").exists()
    assert f"ended with status 143; to resume, repeat the command with RUN={folder}\n" in log.read_text()
    assert cluster.field(job, "JobState") == "CANCELLED"


def counted(log: Path, word: str, times: int) -> bool:
    """Return True when a log has a word so many times."""
    return log.exists() and log.read_text().count(word) == times


def test_starts_that_save_nothing_are_not_requeued_for_ever(cluster: SlurmCluster, stand_in: dict[str, str]) -> None:
    folder = Path(stand_in["LOGDIR"]) / "earlier"
    folder.mkdir()
    log, starts = folder / "job.log", folder / "fruitless_starts"
    starts.write_text("1\n")
    job = cluster.submit(RANKS, SCRIPT, environment=stand_in | {"WAIT": "1", "RUN": str(folder)})
    for number in (1, 2):
        cluster.wait(partial(counted, log, "gloo=", 4 * number), START_S, job)
        cluster.run("scancel", "--batch", "--signal=USR1", job)
        if number == 1:
            cluster.start_requeued(job, START_S)
            assert starts.read_text() == "2\n"
    assert cluster.wait_for_end(job, START_S) == Ended("FAILED", 1, 1)
    assert "not requeued: 3 starts in a row saved nothing" in log.read_text()


@pytest.mark.parametrize("program", ["false", "echo no port"])
def test_a_rendezvous_that_does_not_start_ends_the_job(
    cluster: SlurmCluster, stand_in: dict[str, str], program: str
) -> None:
    (Path(stand_in["VENV"]) / "bin" / "python").write_text(f"#!/bin/bash\n{program}\n")
    job = cluster.submit(RANKS, SCRIPT, environment=stand_in)
    assert cluster.wait_for_end(job, START_S) == Ended("FAILED", 1, 0)
    log = Path(stand_in["LOGDIR"]) / f"own_{job}" / "job.log"
    assert f"the rendezvous server did not start: see {log}" in cluster.output(job)


def test_in_a_container_paths_are_the_same_as_outside(cluster: SlurmCluster, stand_in: dict[str, str]) -> None:
    environment = Path(stand_in.pop("VENV"))
    image = environment / "image.sif"
    image.touch()
    variables = stand_in | {"CONT": str(image), "PATH": f"{environment}/container:{cluster.environment['PATH']}"}
    job = cluster.submit(("-p", "gpu", "-N1", "-n2"), SCRIPT, environment=variables)
    assert cluster.wait_for_end(job, START_S) == Ended("COMPLETED", 0, 0), cluster.output(job)
    run = Path(stand_in["LOGDIR"]) / f"own_{job}"
    log = (run / "job.log").read_text()
    data, recipes = stand_in["DATADIR"], Path(stand_in["SYSTEM"]).parent
    binds = f"exec --nv --bind {data}:{data}:ro --bind {run} --bind {recipes} {image} python -m ssd_fast"
    assert f"container {binds}.distributed" in log
    assert log.count(f"container {binds} train --config {stand_in['SYSTEM']}") == 2
    assert f"0: argument <{run}>" in log


def test_a_refused_job_fails_at_once_and_says_why_in_its_log(cluster: SlurmCluster, stand_in: dict[str, str]) -> None:
    job = cluster.submit(RANKS, SCRIPT, environment=stand_in | {"SYSTEM": "4xC4140"})
    assert cluster.wait_for_end(job, START_S) == Ended("FAILED", 2, 0)
    assert "SYSTEM=4xC4140: expected -N 4 -n 16, not -N 2 -n 4" in cluster.output(job)
    assert list(Path(stand_in["LOGDIR"]).iterdir()) == []
