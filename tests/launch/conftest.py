"""A stand-in for the training that run.slurm starts, and a server for the download scripts."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest
from downloads import ANNOTATIONS, TRAIN, VAL, Server

# In the place of Python: prints what a task is and got; with WAIT it then waits for a TERM, and marks the run as saved.
# It also serves the rendezvous.
STAND_IN = """\
#!/bin/bash
if [[ $2 == ssd_fast.distributed.slurm ]]; then
    echo 4711
    exec cat
fi
echo "$SLURM_PROCID gpus=$CUDA_VISIBLE_DEVICES cores=$(taskset -cp $$ | sed 's/.*: //')" \
    "at=${SSD_FAST_RENDEZVOUS##*:} gloo=$HOROVOD_GLOO_IFACE"
printf 'argument <%s>\n' "$@"
trap 'touch "$9/interrupted"; exit 0' TERM
while [[ -n $WAIT ]]; do sleep 0.1; done
"""
# In the place of Apptainer: skips the options up to the image, whose name ends in .sif, and runs what follows.
CONTAINER = """\
#!/bin/bash
echo "container $*" >&2
while [[ $1 != *.sif ]]; do shift; done
PATH=${1%/*}/bin:$PATH exec "${@:2}"
"""


@pytest.fixture
def stand_in(tmp_path: Path) -> dict[str, str]:
    """Variables of a job that prints what it would train with."""
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


@pytest.fixture
def server() -> Iterator[Server]:
    with contextlib.closing(Server()) as server:
        yield server


@pytest.fixture
def here(tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a space in its name, and an environment in which the scripts ask the server."""
    (tmp_path / "manifest").write_text(server.manifest(ANNOTATIONS, VAL, TRAIN))
    for name, value in {
        "SSD_FAST_COCO_URL": server.url,
        "SSD_FAST_COCO_MANIFEST": str(tmp_path / "manifest"),
        "SSD_FAST_MODEL_URL": server.url,
        "no_proxy": "127.0.0.1",
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("SSD_FAST_MODEL_MANIFEST", raising=False)
    directory = tmp_path / "my data"
    directory.mkdir()
    monkeypatch.chdir(directory)
    return directory
