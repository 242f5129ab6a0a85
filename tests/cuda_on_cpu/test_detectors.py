"""Bugs that are planted in the CUDA sources are found, with their line."""

import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
from build_emulation import build
from operator_samples import EMULATED
from repository import REPOSITORY

pytestmark = pytest.mark.skipif(not EMULATED, reason="make emulate-cuda builds the CUDA sources for the CPU")

SOURCES = REPOSITORY / "kernels" / "csrc" / "cuda"
RUN = """
from operator_samples import ground_truths, pyramid_anchors
from kernels import encode_boxes
encode_boxes(*ground_truths([40, 300, 5]), pyramid_anchors(1100))
"""


class Bug(NamedTuple):
    """A text of encode_boxes.cu that occurs once, what replaces it, and what is said of it: a line and a finding."""

    text: str
    replacement: str
    finding: str
    near: str


BOUND = "    if (threadIdx.x < size) {\n      const int row"
BOX = "load_four(boxes_ltrb + 4 * int64_t{row})"
DELTAS = "deltas.mutable_data_ptr<float>())"
VOTE = "__any_sync(kAllLanes, key > found)"
BUGS = {
    "barrier": Bug(
        "    __syncthreads();  // the next tile overwrites the ranks\n", "", "RACE in shared best_ranks", "best_ranks["
    ),
    "bound": Bug(BOUND, BOUND.replace("size", "kTile"), "OUT OF BOUNDS: read of", "load_four(boxes_ltrb"),
    "mask": Bug(VOTE, VOTE.replace("kAllLanes", "0xffffu"), "DIVERGENCE: ", "__any_sync("),
    "alignment": Bug(DELTAS, DELTAS[:-1] + " + 1)", "MISALIGNED: access of 16 bytes in", "deltas[place] = "),
    "wild": Bug(BOX, BOX.replace("4 *", "(int64_t{1} << 40) +"), "CRASH: an access", "load_four(boxes_ltrb"),
    "atomic": Bug("atomicMax(&keys[i], key);", "keys[i] = max(keys[i], key);", "RACE in shared keys", "keys[i] = max("),
}


@pytest.mark.parametrize("name", BUGS)
def test_a_planted_bug_is_found(tmp_path: Path, name: str) -> None:
    bug = BUGS[name]
    sources = tmp_path / "cuda"
    shutil.copytree(SOURCES, sources)
    path = sources / "encode_boxes.cu"
    source = path.read_text()
    assert source.count(bug.text) == 1
    source = source.replace(bug.text, bug.replacement)
    path.write_text(source)
    package = tmp_path / "package"
    build(package, sources, REPOSITORY / "build" / "cuda_on_cpu" / "objects")
    support = REPOSITORY / "tests" / "support"
    ended = subprocess.run(
        [sys.executable, "-c", RUN],
        check=False,
        capture_output=True,
        text=True,
        env={"PYTHONPATH": f"{package}:{support}", "PYTHONSAFEPATH": "1", "PATH": "/usr/bin:/bin"},
    )
    assert ended.returncode != 0
    assert bug.finding in ended.stderr
    lines = [number for number, line in enumerate(source.splitlines(), start=1) if bug.near in line]
    assert any(f"encode_boxes.cu:{line}" in ended.stderr for line in lines), ended.stderr
