"""run.slurm without a cluster: the settings that it accepts, and the messages with which it refuses others."""

import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest
from repository import REPOSITORY

from ssd_fast.config.recipe import load_config
from ssd_fast.files import Claim

SCRIPT = REPOSITORY / "run.slurm"


class Layout(NamedTuple):
    nodes: int
    num_gpus: int


def layouts() -> dict[str, Layout]:
    """Nodes and GPUs of each recipe that states them, by name, as Python reads it."""
    systems = {path.stem: load_config(path).system for path in (REPOSITORY / "configs").glob("*.toml")}
    return {
        name: Layout(system.nodes, system.nodes * system.gpus_per_node)
        for name, system in systems.items()
        if system.nodes and system.gpus_per_node
    }


LAYOUTS = layouts()


def run_script(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run the script with no other environment variables."""
    return subprocess.run(
        [str(SCRIPT), *arguments],
        env={"PATH": os.environ["PATH"]} | variables,
        capture_output=True,
        text=True,
        check=False,
    )


def run_in_job(nodes: int, tasks: int, **variables: str) -> list[str]:
    """Lines with which the script refuses a job that Slurm has given so many nodes and tasks."""
    job = {"SLURM_JOB_ID": "1", "SLURM_JOB_NUM_NODES": str(nodes), "SLURM_NTASKS": str(tasks)}
    result = run_script(**job, SLURMD_NODENAME="node1", SLURM_CPUS_ON_NODE="40", **variables)
    assert result.returncode == 2, result.stderr
    assert result.stdout == ""
    return [line.removeprefix("run.slurm: ") for line in result.stderr.splitlines()]


def test_a_run_that_another_job_trains_is_refused(tmp_path: Path, coco_folders: dict[str, str]) -> None:
    claim = Claim(tmp_path / "lock", "a test")
    holder = f"{os.uname().nodename}, process {os.getpid()}"
    line, command = run_in_job(1, 4, RUN=str(tmp_path), **coco_folders)
    assert line == f"RUN={tmp_path}: in use by {holder}: wait until it has ended, or leave RUN out for a new run"
    assert "RUN=" not in command
    claim.close()
    before = (tmp_path / "lock").read_text()
    assert not run_in_job(1, 5, RUN=str(tmp_path), **coco_folders)[0].startswith("RUN=")
    assert (tmp_path / "lock").read_text() == before


def test_help_says_how_and_outside_of_slurm_so_does_one_line() -> None:
    shown = run_script("--help")
    assert shown.returncode == 0
    assert shown.stdout.startswith("usage: DATADIR=DIR LOGDIR=DIR SYSTEM=NAME sbatch -N NODES -n TASKS ./run.slurm")
    refused = run_script()
    assert refused.returncode == 2
    assert refused.stderr == "run.slurm: not in a Slurm job: submit it with sbatch; ./run.slurm --help says how\n"


@pytest.mark.parametrize("system", LAYOUTS)
def test_nodes_and_tasks_that_do_not_fit_a_system_are_refused_with_those_that_do(
    system: str, coco_folders: dict[str, str]
) -> None:
    nodes, num_gpus = LAYOUTS[system]
    assert re.search(rf"^  {system} +-N {nodes} -n {num_gpus}$", run_script("--help").stdout, re.MULTILINE)
    lines = run_in_job(nodes, num_gpus + 1, SYSTEM=system, **coco_folders)
    assert lines[0] == f"SYSTEM={system}: expected -N {nodes} -n {num_gpus}, not -N {nodes} -n {num_gpus + 1}"
    folders = " ".join(f"{name}={coco_folders[name]}" for name in ("DATADIR", "LOGDIR"))
    command = f"{folders} SYSTEM={system} VENV={coco_folders['VENV']} sbatch -N {nodes} -n {num_gpus} ./run.slurm"
    assert lines[1:] == [f"corrected command: {command}"]


@pytest.fixture
def coco_folders(stand_in: dict[str, str]) -> dict[str, str]:
    """Variables that are right for every system; the number of nodes and tasks is not among them."""
    data = Path(stand_in["DATADIR"])
    for name in ("annotations", "train2017", "val2017"):
        (data / name).mkdir()
    for name in ("train", "val"):
        (data / "annotations" / f"instances_{name}2017.json").touch()
    return {name: stand_in[name] for name in ("DATADIR", "LOGDIR", "VENV")}


NAMES = "1xC4140 2xC4140 4xC4140 8xC4140 16xC4140 dgx_a100 h200"


@pytest.mark.parametrize(
    ("variables", "problem", "right"),
    [
        (
            {"SYSTEM": "3xC4140"},
            f"SYSTEM=3xC4140: expected one of {NAMES}, or the path of a recipe",
            "SYSTEM=1xC4140",
        ),
        ({"SYSTEM": "/no/own.toml"}, "/no/own.toml: no such recipe", "SYSTEM=/path/to/recipe.toml"),
        ({"DATADIR": ""}, "DATADIR is not set: expected the folder of the data", "DATADIR=/path/to/coco"),
        ({"DATADIR": "/no"}, "DATADIR=/no: no such folder", "DATADIR=/path/to/coco"),
        ({"LOGDIR": ""}, "LOGDIR is not set: expected a folder for the run and its log", "LOGDIR=/path/to/logs"),
        ({"LOGDIR": "/no"}, "LOGDIR=/no: expected a folder that can be written to", "LOGDIR=/path/to/logs"),
        ({"RUN": "/no"}, "RUN=/no: expected the folder of an earlier job's run", "sbatch"),
        ({"SEED": "x"}, "SEED=x: expected a whole number", "sbatch"),
        (
            {"CONT": "/no.sif"},
            "CONT=/no.sif: no such image: build one with ./build_container.sh, ",
            "CONT=/path/to/image.sif",
        ),
        ({"VENV": "/no"}, "/no/bin/python: no such program: make it with 'make install horovod'", "sbatch"),
        ({"SLURM_GPUS_ON_NODE": "2"}, "node1 has 2 GPUs for 4 tasks: expected one per task", "sbatch"),
    ],
)
def test_what_is_wrong_is_refused_with_a_corrected_command(
    variables: dict[str, str], problem: str, right: str, coco_folders: dict[str, str]
) -> None:
    lines = run_in_job(1, 4, **coco_folders | variables)
    assert any(line.startswith(problem) for line in lines[:-1]), lines
    assert lines[-1].startswith("corrected command: ")
    assert right in lines[-1].split()
    assert lines[-1].endswith(" sbatch -N 1 -n 4 ./run.slurm")


def test_tasks_in_unequal_blocks_are_refused(stand_in: dict[str, str]) -> None:
    lines = run_in_job(2, 3, **stand_in)
    assert lines[0] == "-N 2 -n 3: expected as many tasks on each node, such as -n 4"
    assert lines[1].endswith("sbatch -N 2 -n 4 ./run.slurm")


@pytest.mark.parametrize(
    ("section", "problem"),
    [
        ("[system]\nnodes = 2\ngpus_per_node=3 # GPUs\n", "SYSTEM={recipe}: expected -N 2 -n 6, not -N 1 -n 4"),
        (
            "  [system] # mine\r\n  gpus_per_node  =  3\r\n\tnodes=2",
            "SYSTEM={recipe}: expected -N 2 -n 6, not -N 1 -n 4",
        ),
        (
            '[system]\nnodes = "2"\ngpus_per_node = 3',
            "{recipe}: [system]: expected nodes and gpus_per_node, each a whole",
        ),
        ("[system]\nnodes = 2", "{recipe}: [system]: expected nodes and gpus_per_node, each a whole number from 1"),
        ("[system]\nnodes = 2 1\ngpus_per_node = 0", "{recipe}: [system]: expected nodes and gpus_per_node, each"),
        ("[system]\n", "SEED=x: expected a whole number"),
        ("[data]\nnodes = 2\ngpus_per_node = 3", "SEED=x: expected a whole number"),
    ],
)
def test_a_recipe_of_ones_own_may_state_its_nodes_and_gpus(
    stand_in: dict[str, str], section: str, problem: str
) -> None:
    recipe = stand_in["SYSTEM"]
    Path(recipe).write_bytes(f"[training]\nnodes = 9\n{section}\n[model]\nnodes = 8\n".encode())
    lines = run_in_job(1, 4, **stand_in | {"SEED": "x"})
    assert lines[0].startswith(problem.format(recipe=recipe))
    assert lines[-1].endswith(" sbatch -N 2 -n 6 ./run.slurm" if "-N 2" in problem else " sbatch -N 1 -n 4 ./run.slurm")


def test_data_that_is_not_in_cocos_layout_is_refused(coco_folders: dict[str, str]) -> None:
    folder = Path(coco_folders["DATADIR"])
    shutil.rmtree(folder / "val2017")
    (folder / "annotations" / "instances_train2017.json").unlink()
    lines = run_in_job(1, 4, **coco_folders)
    start = f"DATADIR={folder}: expected COCO's layout, but"
    assert lines[:-1] == [f"{start} val2017 is missing", f"{start} annotations/instances_train2017.json is missing"]
