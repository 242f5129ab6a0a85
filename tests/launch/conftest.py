"""A stand-in for the training, which shows what run.slurm starts."""

from pathlib import Path

import pytest

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
