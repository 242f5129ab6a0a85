"""A process joins the world that its launcher describes, or is a world of one."""

import subprocess
import sys

import pytest
from ranks import horovodrun_environment
from tiny import tiny_config

from ssd_fast.distributed.launch import connect


def test_a_process_that_was_started_alone_is_a_world_of_one_without_horovod() -> None:
    code = (
        "import sys\n"
        "from ssd_fast.config.sections import DistributedConfig\n"
        "from ssd_fast.distributed.launch import connect\n"
        "with connect(DistributedConfig()) as world: assert (world.rank, world.size) == (0, 1)\n"
        "assert 'horovod' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_launch_without_horovod_names_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in horovodrun_environment(0, 2, 1).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="Horovod is not installed: make horovod"):
        connect(tiny_config().distributed)
