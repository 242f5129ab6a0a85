"""Both download scripts when a shell sources them, and the usage that they share."""

import shutil
import sys
from pathlib import Path

import pytest
from downloads import DATASET, MODEL, Server, run, visible
from repository import REPOSITORY

CALLER = """
function mine { :; }
alias ll=ls
set -u -o noclobber
shopt -s nullglob
trap 'echo interrupted' INT
changing='_|BASH.*|FUNCNAME|LINENO|PIPESTATUS|RANDOM|SECONDS|EPOCH.*|SRANDOM|before|status'
state() {
    pwd; set +o; shopt -p; trap -p; alias; declare -F
    declare -p | grep -vE "^declare -[^ ]+ ($changing)(=|$)"
}
script=$1 folder=$2
set --
before=$(state)
source "$script" "$folder"
status=$?
[[ $(state) == "$before" ]] || diff <(echo "$before") <(state)
echo "status $status"
"""


@pytest.mark.parametrize("script", [DATASET, MODEL])
def test_the_callers_shell_stays_as_it_is(here: Path, server: Server, script: Path) -> None:
    done = run("bash", "-c", CALLER, "bash", script, "a b")
    assert done.stdout.splitlines()[-1] == "status 0", done.stdout + done.stderr
    assert (here / "a b").is_dir()
    server.files.clear()
    done = run("bash", "-c", CALLER, "bash", script, "c d")
    assert done.stdout.splitlines()[-1] == "status 1", done.stdout + done.stderr
    assert "< " not in done.stdout


@pytest.mark.parametrize("script", [DATASET, MODEL])
def test_the_folder_is_below_the_callers_one(here: Path, script: Path) -> None:
    done = run("bash", "-eu", "-c", f'cd /; cd "{here}"; source "{script}" && source "{script}" && echo went on')
    assert done.stdout.endswith("went on\n"), done.stderr
    assert visible(here) == {"coco" if script == DATASET else "pretrained"}


@pytest.mark.parametrize("script", [DATASET, MODEL])
def test_zsh_can_source_it(here: Path, script: Path) -> None:
    if shutil.which("zsh") is None:
        pytest.skip("zsh is not installed")
    done = run("zsh", "-f", "-c", f'set -u; source "{script}" "a b"; echo "status $?"')
    assert done.stdout.endswith("status 0\n"), done.stderr
    assert (here / "a b").is_dir()


@pytest.mark.parametrize("script", [DATASET, MODEL])
def test_too_many_folders_are_refused_with_the_usage(here: Path, script: Path) -> None:
    done = run(script, "one", "two")
    assert done.returncode == 2
    assert done.stderr.startswith("usage: ")
    assert not visible(here)


def test_shellcheck_has_nothing_to_say_of_what_they_share() -> None:
    done = run(Path(sys.executable).with_name("shellcheck"), REPOSITORY / "downloading.sh")
    assert done.returncode == 0, done.stdout
