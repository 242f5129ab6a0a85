"""run.slurm on a real cluster: what it starts, how it goes on, how it ends, and what it refuses to begin."""

import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from repository import REPOSITORY
from slurm_cluster import Ended, SlurmCluster, missing_programs
from test_recipes import PUBLISHED
from tiny import assert_same_end, tiny_config

from ssd_fast.profiling.profile import read_profile
from ssd_fast.recipe import dump_toml
from ssd_fast.training.history import read_metrics

SCRIPT = REPOSITORY / "run.slurm"
RANKS = ("-N2", "-n4")  # two nodes with two each
STEPS = 8  # two epochs of four: 64 images, a global batch of 16
START_S, RUN_S = 120, 240  # of waiting, at most: other tests may keep the cores busy

# In the place of Python: says what a task is and got; with WAIT it then waits for a TERM, and says that it has saved.
# Also what serves the rendezvous.
STAND_IN = """\
#!/bin/bash
if [[ $2 == ssd_fast.distributed.world ]]; then
    echo 4711
    exec cat
fi
echo "$SLURM_PROCID gpus=$CUDA_VISIBLE_DEVICES cores=$(taskset -cp $$ | sed 's/.*: //')" \
    "at=${SSD_FAST_RENDEZVOUS##*:} gloo=$HOROVOD_GLOO_IFACE"
printf 'argument <%s>\n' "$@"
trap 'touch "$9/interrupted"; exit 0' TERM
while [[ -n $WAIT ]]; do sleep 0.1; done
"""
# Goes through the options to the image, whose name ends in .sif, and runs what follows.
CONTAINER = """\
#!/bin/bash
echo "container $*" >&2
while [[ $1 != *.sif ]]; do shift; done
PATH=${1%/*}/bin:$PATH exec "${@:2}"
"""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SlurmCluster]:
    """A running cluster."""
    missing = missing_programs()
    if missing:
        pytest.skip(f"no Slurm here: {', '.join(missing)} not found; Debian: apt-get install slurm-wlm munge")
    with SlurmCluster(tmp_path_factory.mktemp("slurm")) as running:
        yield running


class Site:
    """A cluster with a recipe, data and a folder for logs on it."""

    def __init__(self, cluster: SlurmCluster, recipe: Path, data: Path) -> None:
        self.cluster = cluster
        self.recipe = recipe
        self.logs = cluster.folder / "logs"
        self.logs.mkdir()
        self.variables = {
            "DATADIR": str(data),
            "LOGDIR": str(self.logs),
            "SYSTEM": str(recipe),
            "VENV": str(Path(sys.executable).parent.parent),
            "IFACE": "lo",
        }

    def submit(self, *options: str, ranks: Sequence[str] = RANKS, **variables: str) -> str:
        """Number of a job that trains, or profiles."""
        return self.cluster.submit(ranks, SCRIPT, options, environment=self.variables | variables)

    def run_of(self, job: str) -> Path:
        return self.logs / f"{self.recipe.stem}_{job}"

    def log_of(self, job: str) -> str:
        log = self.run_of(job) / "job.log"
        return log.read_text() if log.exists() else self.cluster.output(job)

    @contextmanager
    def stopped_within_training(self, job: str, rank: int) -> Iterator[int]:
        """A rank's process, which does nothing while this lasts; the others wait for it after some step."""

        def trains() -> bool:
            return " step 2/4 loss " in self.log_of(job)

        self.cluster.wait(lambda: trains() or self.cluster.field(job, "JobState") == "FAILED", START_S, job)
        assert trains(), self.log_of(job)
        process = process_of_rank(job, rank)
        os.kill(process, signal.SIGSTOP)
        try:
            yield process
        finally:
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGCONT)


def process_of_rank(job: str, rank: int) -> int:
    """The process that a job's task has become."""
    variables = {f"SLURM_JOB_ID={job}".encode(), f"SLURM_PROCID={rank}".encode()}
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # another user's, or over
            arguments = (folder / "cmdline").read_bytes().split(b"\0")
            if arguments[2:4] == [b"ssd_fast", b"train"] and (
                variables <= set((folder / "environ").read_bytes().split(b"\0"))
            ):
                return int(folder.name)
    raise AssertionError(f"no process of rank {rank}")


@pytest.fixture(scope="module")
def site(cluster: SlurmCluster, synthetic_set: Path) -> Site:
    """Where jobs of a tiny recipe can be submitted."""
    if importlib.util.find_spec("horovod") is None:
        pytest.skip("Horovod is not installed: make horovod")
    changes = (
        "training.batch_size=4",
        "training.log_every_steps=1",
        "data.num_threads=1",
        "distributed.timeout_s=60",
    )
    recipe = cluster.folder / "tiny.toml"
    recipe.write_text(dump_toml(tiny_config(changes)))
    return Site(cluster, recipe, synthetic_set)


@pytest.fixture(scope="module")
def uncut_job(site: Site) -> str:
    """Number of a job that trained from its first step to its last."""
    job = site.submit()
    assert site.cluster.wait_for_end(job, RUN_S) == Ended("COMPLETED", 0, 0), site.log_of(job)
    return job


def test_four_ranks_on_two_nodes_train_evaluate_and_agree(site: Site, uncut_job: str) -> None:
    log = site.log_of(uncut_job)
    agreed = re.findall(r"step (\d+): weights of all 4 ranks: \w{16}", log)  # of others the job fails
    assert agreed == [str(STEPS // 2), str(STEPS)]
    assert "goes on" not in log
    run = site.run_of(uncut_job)
    records = read_metrics(run / "metrics.jsonl")
    assert [record["step"] for record in records if record["kind"] == "eval"] == [STEPS // 2, STEPS]
    names = {path.name for path in run.iterdir()}
    assert names >= {"job.log", "train.log", "mlperf.log", "config.toml", "curves.png", "detections.png"}
    assert "interrupted" not in names


def test_a_run_cut_by_the_time_limit_is_requeued_and_ends_as_if_uncut(site: Site, uncut_job: str) -> None:
    job = site.submit()
    with site.stopped_within_training(job, 1):
        site.cluster.run("scancel", "--batch", "--signal=USR1", job)  # as Slurm does two minutes before the limit
        site.cluster.wait(lambda: "asked to stop: the training saves" in site.log_of(job), START_S, job)
    site.cluster.start_requeued(job, START_S)
    assert site.cluster.wait_for_end(job, RUN_S) == Ended("COMPLETED", 0, 1), site.log_of(job)
    assert f"{site.run_of(job)}: goes on after step" in site.log_of(job)
    assert not (site.run_of(job) / "interrupted").exists()
    assert_same_end(site.run_of(job), site.run_of(uncut_job), STEPS)


def test_a_profile_is_of_all_ranks(site: Site) -> None:
    job = site.submit("--stage", "both", "--seconds", "0.1", ranks=("-N2", "-n2"), PROFILE="1")
    assert site.cluster.wait_for_end(job, RUN_S) == Ended("COMPLETED", 0, 0), site.log_of(job)
    report = read_profile(site.run_of(job) / "profile")
    assert len(report.ranks) == 2
    assert all(rank.step_s and rank.allreduce_s is not None for rank in report.ranks)
    assert len(list((site.run_of(job) / "profile").glob("trace_rank*.json.gz"))) == 2
    assert "Bound by " in site.log_of(job)


def test_a_killed_rank_ends_the_job_with_its_name(site: Site) -> None:
    job = site.submit()
    with site.stopped_within_training(job, 3) as process:
        os.kill(process, signal.SIGKILL)
    ended = site.cluster.wait_for_end(job, 30)
    assert (ended.state, ended.restarts) == ("FAILED", 0)
    assert ended.status != 0
    log = site.log_of(job)
    assert "cpu1: task 3: Killed" in log
    assert f"RUN={site.run_of(job)}, with the rest of the command as it was, goes on" in log


def test_a_task_gets_its_cores_and_all_gpus_of_its_node(cluster: SlurmCluster, stand_in: dict[str, str]) -> None:
    job = cluster.submit(
        ("-p", "gpu", "-N1", "-n2"), SCRIPT, ("--set", "a.b=[1, 2]"), environment=stand_in | {"SEED": "7"}
    )
    assert cluster.wait_for_end(job, 60) == Ended("COMPLETED", 0, 0), cluster.output(job)
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
    cluster.wait(lambda: log.exists() and log.read_text().count("argument <--resume>") == 4, 60, job)
    cluster.run("scancel", job)
    assert cluster.wait_for_end(job, 60) == Ended("CANCELLED", 143, 0)
    assert (folder / "interrupted").exists()
    assert f"ended with status 143; RUN={folder}, with the rest of the command as it was, goes on" in log.read_text()
    assert cluster.field(job, "JobState") == "CANCELLED"


def test_starts_that_save_nothing_are_not_requeued_for_ever(cluster: SlurmCluster, stand_in: dict[str, str]) -> None:
    folder = Path(stand_in["LOGDIR"]) / "earlier"
    folder.mkdir()
    log, starts = folder / "job.log", folder / "fruitless_starts"
    starts.write_text("1\n")
    job = cluster.submit(RANKS, SCRIPT, environment=stand_in | {"WAIT": "1", "RUN": str(folder)})
    for number in (1, 2):
        cluster.wait(lambda n=number: log.exists() and log.read_text().count("gloo=") == 4 * n, START_S, job)
        cluster.run("scancel", "--batch", "--signal=USR1", job)
        if number == 1:
            cluster.start_requeued(job, START_S)
            assert starts.read_text() == "2\n"
    assert cluster.wait_for_end(job, 60) == Ended("FAILED", 1, 1)
    assert "not requeued: 3 starts, one after another, saved nothing" in log.read_text()


@pytest.mark.parametrize("program", ["false", "echo no port"])
def test_a_rendezvous_that_does_not_start_ends_the_job(
    cluster: SlurmCluster, stand_in: dict[str, str], program: str
) -> None:
    (Path(stand_in["VENV"]) / "bin" / "python").write_text(f"#!/bin/bash\n{program}\n")
    job = cluster.submit(RANKS, SCRIPT, environment=stand_in)
    assert cluster.wait_for_end(job, 60) == Ended("FAILED", 1, 0)
    log = Path(stand_in["LOGDIR"]) / f"own_{job}" / "job.log"
    assert f"the rendezvous server did not start: {log} says why" in cluster.output(job)


def test_in_a_container_paths_are_the_same_as_outside(cluster: SlurmCluster, stand_in: dict[str, str]) -> None:
    environment = Path(stand_in.pop("VENV"))
    image = environment / "image.sif"
    image.touch()
    variables = stand_in | {"CONT": str(image), "PATH": f"{environment}/container:{cluster.environment['PATH']}"}
    job = cluster.submit(("-p", "gpu", "-N1", "-n2"), SCRIPT, environment=variables)
    assert cluster.wait_for_end(job, 60) == Ended("COMPLETED", 0, 0), cluster.output(job)
    run = Path(stand_in["LOGDIR"]) / f"own_{job}"
    log = (run / "job.log").read_text()
    data, recipes = stand_in["DATADIR"], Path(stand_in["SYSTEM"]).parent
    binds = f"exec --nv --bind {data}:{data}:ro --bind {run} --bind {recipes} {image} python -m ssd_fast"
    assert f"container {binds}.distributed" in log
    assert log.count(f"container {binds} train --config {stand_in['SYSTEM']}") == 2
    assert f"0: argument <{run}>" in log


@pytest.fixture
def stand_in(tmp_path: Path) -> dict[str, str]:
    """Variables of a job that shows what it would train with."""
    for name, program in (("bin/python", STAND_IN), ("container/apptainer", CONTAINER)):
        path = tmp_path / "environment" / name
        path.parent.mkdir(parents=True)
        path.write_text(program)
        path.chmod(0o755)
    for folder in ("data", "logs"):
        (tmp_path / folder).mkdir()
    recipe = tmp_path / "own.toml"
    recipe.touch()
    folders = {"DATADIR": str(tmp_path / "data"), "LOGDIR": str(tmp_path / "logs")}
    return folders | {"SYSTEM": str(recipe), "VENV": str(tmp_path / "environment"), "IFACE": "lo"}


def run_script(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """The script itself, with an environment of nothing else."""
    return subprocess.run(
        [str(SCRIPT), *arguments],
        env={"PATH": os.environ["PATH"]} | variables,
        capture_output=True,
        text=True,
        check=False,
    )


def run_in_job(nodes: int, tasks: int, **variables: str) -> list[str]:
    """The lines with which the script refuses to begin, as if Slurm had given it so many nodes and tasks."""
    job = {"SLURM_JOB_ID": "1", "SLURM_JOB_NUM_NODES": str(nodes), "SLURM_NTASKS": str(tasks)}
    result = run_script(**job, SLURMD_NODENAME="node1", SLURM_CPUS_ON_NODE="40", **variables)
    assert result.returncode == 2, result.stderr
    assert result.stdout == ""
    return [line.removeprefix("run.slurm: ") for line in result.stderr.splitlines()]


def test_help_says_how_and_outside_of_slurm_so_does_one_line() -> None:
    shown = run_script("--help")
    assert shown.returncode == 0
    assert shown.stdout.startswith("usage: DATADIR=DIR LOGDIR=DIR SYSTEM=NAME sbatch -N NODES -n TASKS ./run.slurm")
    refused = run_script()
    assert refused.returncode == 2
    assert refused.stderr == "run.slurm: not in a Slurm job: submit it with sbatch; ./run.slurm --help says how\n"


@pytest.mark.parametrize("system", PUBLISHED)
def test_nodes_and_tasks_that_do_not_fit_a_system_are_refused_with_those_that_do(
    system: str, coco_folders: dict[str, str]
) -> None:
    num_gpus = PUBLISHED[system][0]
    nodes = num_gpus // (4 if "C4140" in system else 8)
    lines = run_in_job(nodes, num_gpus + 1, SYSTEM=system, **coco_folders)
    assert lines[0] == f"SYSTEM={system}: expected -N {nodes} -n {num_gpus}, not -N {nodes} -n {num_gpus + 1}"
    folders = " ".join(f"{name}={coco_folders[name]}" for name in ("DATADIR", "LOGDIR"))
    command = f"{folders} SYSTEM={system} VENV={coco_folders['VENV']} sbatch -N {nodes} -n {num_gpus} ./run.slurm"
    assert lines[1:] == [f"the command that would be right: {command}"]


@pytest.fixture
def coco_folders(stand_in: dict[str, str]) -> dict[str, str]:
    """Variables that are right for a system, but for the number of nodes and tasks."""
    data = Path(stand_in["DATADIR"])
    for name in ("annotations", "train2017", "val2017"):
        (data / name).mkdir()
    for name in ("train", "val"):
        (data / "annotations" / f"instances_{name}2017.json").touch()
    return {name: stand_in[name] for name in ("DATADIR", "LOGDIR", "VENV")}


NAMES = " ".join(["1xC4140", "2xC4140", "4xC4140", "8xC4140", "16xC4140", "dgx_a100", "h200"])


@pytest.mark.parametrize(
    ("variables", "problem", "right"),
    [
        ({"SYSTEM": "3xC4140"}, f"SYSTEM=3xC4140: expected one of {NAMES}, or the path of a recipe", "SYSTEM=1xC4140"),
        ({"SYSTEM": "/no/own.toml"}, "/no/own.toml: no such recipe", "SYSTEM=/path/to/recipe.toml"),
        ({"DATADIR": ""}, "DATADIR is not set: expected the folder of the data", "DATADIR=/path/to/coco"),
        ({"DATADIR": "/no"}, "DATADIR=/no: no such folder", "DATADIR=/path/to/coco"),
        ({"LOGDIR": ""}, "LOGDIR is not set: expected a folder for the run and its log", "LOGDIR=/path/to/logs"),
        ({"LOGDIR": "/no"}, "LOGDIR=/no: expected a folder that can be written to", "LOGDIR=/path/to/logs"),
        ({"RUN": "/no"}, "RUN=/no: expected the folder of an earlier job's run", "sbatch"),
        ({"SEED": "x"}, "SEED=x: expected a whole number", "sbatch"),
        (
            {"CONT": "/no.sif"},
            "CONT=/no.sif: no such image: ./build_container.sh makes one; ",
            "CONT=/path/to/image.sif",
        ),
        ({"VENV": "/no"}, "/no/bin/python: no such program; 'make install horovod' makes it", "sbatch"),
        ({"SLURM_GPUS_ON_NODE": "2"}, "node1 has 2 GPUs for 4 tasks: expected one per task", "sbatch"),
    ],
)
def test_what_is_wrong_is_refused_with_the_command_that_would_be_right(
    variables: dict[str, str], problem: str, right: str, coco_folders: dict[str, str]
) -> None:
    lines = run_in_job(1, 4, **coco_folders | variables)
    assert any(line.startswith(problem) for line in lines[:-1]), lines
    assert lines[-1].startswith("the command that would be right: ")
    assert right in lines[-1].split()
    assert lines[-1].endswith(" sbatch -N 1 -n 4 ./run.slurm")


def test_tasks_in_unequal_blocks_are_refused(stand_in: dict[str, str]) -> None:
    lines = run_in_job(2, 3, **stand_in)
    assert lines[0] == "-N 2 -n 3: expected as many tasks on each node, such as -n 4"
    assert lines[1].endswith("sbatch -N 2 -n 4 ./run.slurm")


def test_data_that_is_not_in_cocos_layout_is_refused(coco_folders: dict[str, str]) -> None:
    folder = Path(coco_folders["DATADIR"])
    shutil.rmtree(folder / "val2017")
    (folder / "annotations" / "instances_train2017.json").unlink()
    lines = run_in_job(1, 4, **coco_folders)
    start = f"DATADIR={folder}: expected COCO's layout, but"
    assert lines[:-1] == [f"{start} val2017 is missing", f"{start} annotations/instances_train2017.json is missing"]


def test_a_refused_job_fails_at_once_and_says_why_in_its_log(cluster: SlurmCluster, stand_in: dict[str, str]) -> None:
    job = cluster.submit(RANKS, SCRIPT, environment=stand_in | {"SYSTEM": "4xC4140"})
    assert cluster.wait_for_end(job, 60) == Ended("FAILED", 2, 0)
    assert "SYSTEM=4xC4140: expected -N 4 -n 16, not -N 2 -n 4" in cluster.output(job)
    assert list(Path(stand_in["LOGDIR"]).iterdir()) == []
