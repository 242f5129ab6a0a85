"""horovodrun over ssh, between hosts that are real to the network."""

import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from network import Network, Weather
from ranks import needs_horovod
from repository import REPOSITORY
from ssh_hosts import PATH, PROGRAMS, on, ssh_servers
from tiny import TINY

LONGEST_S = 300
pytestmark = [
    needs_horovod,
    pytest.mark.skipif(
        any(not shutil.which(program, path=PATH) for program in PROGRAMS),
        reason="no ssh server here; Debian: apt-get install openssh-server",
    ),
]


@pytest.fixture(scope="module")
def network() -> Iterator[Network]:
    try:
        with Network(2) as network:
            yield network
    except OSError as error:
        pytest.skip(f"no network of one's own here: {error}")


@pytest.fixture(scope="module")
def ssh_environment(network: Network, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    with ssh_servers(network, tmp_path_factory.mktemp("ssh")) as environment:
        yield environment


@pytest.fixture
def run(
    network: Network, ssh_environment: dict[str, str], synthetic_set: Path, tmp_path: Path
) -> Iterator[subprocess.Popen[str]]:
    """Two ranks on each of two hosts, which train a tiny detector for a long time."""
    hosts = ",".join(f"{node.address}:2" for node in network.nodes)
    launch = [str(Path(sys.executable).with_name("horovodrun")), "-np", "4", "-H", hosts]
    recipe = str(REPOSITORY / "configs" / "demo.toml")
    overrides = (*TINY, "distributed.timeout_s=20", "training.epochs=100")
    sets = [part for override in overrides for part in ("--set", override)]
    places = ["--config", recipe, "--data", str(synthetic_set), "--output", str(tmp_path / "run")]
    process = subprocess.Popen(
        on(network.nodes[0], *launch, sys.executable, "-m", "ssd_fast", "train", *places, *sets),
        env=ssh_environment,
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    timer = threading.Timer(LONGEST_S, process.kill)  # a hang must not wait for lines for ever
    timer.start()
    yield process
    timer.cancel()
    process.kill()
    process.wait()
    network.set(network.nodes[1], Weather())


def test_four_ranks_on_two_hosts_train_and_agree_until_the_hosts_are_cut_from_each_other(
    run: subprocess.Popen[str], network: Network
) -> None:
    assert run.stdout is not None
    lines = []
    for line in run.stdout:
        lines.append(line)
        if re.search(r"step 4: weights of all 4 ranks", line):  # of others the run fails
            break
    assert any("mAP" in line for line in lines), "".join(lines)
    network.set(network.nodes[1], Weather(is_cut=True))
    lines += run.communicate(timeout=LONGEST_S)[0].splitlines(keepends=True)
    assert run.returncode != 0
    lost = rf"error: ranks 2, 3 \({network.nodes[1].address}\), each: gives no sign of life"
    assert any(re.search(lost, line) for line in lines), "".join(lines)
