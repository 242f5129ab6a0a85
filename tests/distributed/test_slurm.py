"""Slurm's variables of a task become Horovod's variables, or one clear error."""

import pytest
from ranks import slurm_environment

from ssd_fast.distributed.slurm import launched_by_slurm, read_launch, slurm_variables

TASK = {
    "SSD_FAST_RENDEZVOUS": "10.0.0.1:4711",
    "SLURM_PROCID": "5",
    "SLURM_NTASKS": "8",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_NNODES": "2",
    "SLURMD_NODENAME": "b",
}


def test_slurms_variables_become_horovods() -> None:
    with pytest.raises(ValueError, match=r"task 5 of 8 is number 2 on node 1 of 2 .*expected equal blocks; srun --nt"):
        slurm_variables(TASK | {"SLURM_LOCALID": "2"})
    variables = slurm_variables(TASK)
    names = ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE", "CROSS_RANK", "CROSS_SIZE")
    assert [variables[f"HOROVOD_{name}"] for name in names] == ["5", "8", "1", "4", "1", "2"]
    assert variables["HOROVOD_HOSTNAME"] == "b"
    assert variables["HOROVOD_GLOO_RENDEZVOUS_ADDR"] == "10.0.0.1"
    assert variables["HOROVOD_GLOO_RENDEZVOUS_PORT"] == "4711"


def test_a_launch_is_read_from_slurms_variables_which_horovod_finds_as_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not launched_by_slurm()
    assert read_launch() is None
    environ = TASK | {"OMP_NUM_THREADS": "1"}
    monkeypatch.setattr("os.environ", environ)
    launch = read_launch()
    assert launched_by_slurm()
    assert launch is not None
    assert (launch.rank, launch.size, launch.local_rank, launch.local_size) == (5, 8, 1, 4)
    assert (launch.host, launch.rendezvous, launch.has_thread_count) == ("b", "http://10.0.0.1:4711", True)
    assert environ["HOROVOD_RANK"] == "5"


@pytest.mark.parametrize(
    ("rank", "layout"),
    [(2, {"LOCALID": "2", "NODEID": "0", "STEP_TASKS_PER_NODE": "3,1"}), (1, {"LOCALID": "0", "NODEID": "1"})],
    ids=["unequal", "cyclic"],
)
def test_tasks_that_are_not_in_equal_blocks_are_refused(rank: int, layout: dict[str, str]) -> None:
    environ = slurm_environment(rank, 4, 1) | {"SLURM_NNODES": "2"} | {f"SLURM_{k}": v for k, v in layout.items()}
    with pytest.raises(ValueError, match="expected equal blocks"):
        slurm_variables(environ)


def test_a_process_that_srun_did_not_start_is_refused() -> None:
    with pytest.raises(ValueError, match="SLURM_PROCID is not: expected to be started by srun"):
        slurm_variables({"SSD_FAST_RENDEZVOUS": "a:1"})
