"""A function computed by another process."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ssd_fast.background import BackgroundCall
from ssd_fast.config.recipe import load_config


def test_the_result_is_that_of_the_function() -> None:
    call = BackgroundCall("divided", divmod, 17, 5)
    assert call.result(60) == (3, 2)
    assert call.is_done()


def test_an_error_that_the_user_can_correct_is_raised_here() -> None:
    with pytest.raises(ValueError, match=r"nowhere\.toml: no such recipe"):
        BackgroundCall("read a recipe", load_config, Path("nowhere.toml")).result(60)


def test_a_process_that_dies_or_hangs_is_named_by_its_work() -> None:
    with pytest.raises(ChildProcessError, match="the process that left ended with status 7"):
        BackgroundCall("left", sys.exit, 7).result(60)
    with pytest.raises(ChildProcessError, match=r"the process that slept took more than 0\.1 s"):
        BackgroundCall("slept", time.sleep, 1000).result(0.1)


KILLED = """
import os, signal, time
from ssd_fast.background import BackgroundCall
call = BackgroundCall("slept", time.sleep, 1000)
print(call._process.pid, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_it_ends_with_the_process_that_asked() -> None:
    killed = subprocess.run([sys.executable, "-c", KILLED], stdout=subprocess.PIPE, text=True, check=False)
    assert killed.returncode == -signal.SIGKILL
    process, deadline = Path("/proc", killed.stdout.strip()), time.monotonic() + 60
    while process.exists() and process.joinpath("stat").read_text().rpartition(")")[2].split()[0] != "Z":
        assert time.monotonic() < deadline, "it goes on without anybody to ask"
        time.sleep(0.05)
