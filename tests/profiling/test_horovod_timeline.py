"""Reading a Horovod timeline."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from horovod_events import write_timeline

from ssd_fast.profiling.horovod_timeline import measure, read_timeline


@pytest.fixture
def timeline(tmp_path: Path) -> Path:
    return write_timeline(tmp_path / "timeline.json")


def test_a_timeline_shows_buckets_waiting_and_overlap(timeline: Path) -> None:
    steps = read_timeline(timeline)
    assert [len(step) for step in steps] == [3, 3]  # the first one is left out
    measured = measure(steps)
    assert (measured.num_steps, measured.bytes, measured.num_buckets) == (2, 4 * 1110, 2)
    assert measured.largest_bucket_bytes == 4 * 1010
    seconds = (measured.window_s, measured.wait_s, measured.transfer_s, measured.exposed_s)
    assert seconds == pytest.approx((0.050, 0.002, 0.016 + 0.008, 0.009))
    assert measured.hidden == pytest.approx(16 / 24)  # agreed on the last gradient at 61
    assert [gradient.num_elements for gradient in measured.gradients] == [1000, 10, 100]
    assert [gradient.ready for gradient in measured.gradients] == pytest.approx([0, 0.2, 1])


@pytest.mark.parametrize("end", [",", ', {"ph": "B", "name": "ALLRED', ""])
def test_the_timeline_of_a_killed_run_is_read(timeline: Path, end: str) -> None:
    whole = read_timeline(timeline)
    timeline.write_text(timeline.read_text()[:-1] + end)
    assert read_timeline(timeline) == whole


def test_a_step_that_was_cut_off_is_left_out(timeline: Path) -> None:
    whole = read_timeline(timeline)
    content = json.loads(timeline.read_text())
    end_of_step_3 = next(i for i in reversed(range(len(content))) if content[i].get("pid") == 3)
    timeline.write_text(json.dumps(content[:end_of_step_3]))
    assert read_timeline(timeline) == whole[:1]


@pytest.mark.parametrize(
    "content", ["", "no JSON", "[1, 2]", "{}", "[]", '[{"ph": "i", "name": "CYCLE_START", "ts": 1}]']
)
def test_what_is_no_timeline_of_training_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "file.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"file\.json: expected a Horovod timeline"):
        read_timeline(path)


@pytest.mark.parametrize("groups", [None, 2])
def test_a_timeline_written_by_horovod_is_read(tmp_path: Path, groups: int | None) -> None:
    pytest.importorskip("horovod", reason="make horovod")
    (tmp_path / "ranks.py").write_text(
        "import time, horovod.torch as hvd, torch\n"
        "hvd.init()\n"
        "model = torch.nn.Sequential(torch.nn.Linear(50, 40), torch.nn.ReLU(), torch.nn.Linear(40, 3))\n"
        "optimizer = torch.optim.SGD(model.parameters(), lr=0.1)\n"
        "names = model.named_parameters()\n"
        f"optimizer = hvd.DistributedOptimizer(optimizer, named_parameters=names, groups={groups})\n"
        "for _ in range(40):\n"
        "    model(torch.ones(2, 50)).sum().backward()\n"
        "    optimizer.step()\n"
        "    optimizer.zero_grad()\n"
        "    time.sleep(0.05)\n"  # at its end Horovod drops what its writer has not come to
    )
    path = tmp_path / "timeline.json"
    horovodrun = Path(sys.executable).with_name("horovodrun")
    command = [horovodrun, "-np", "2", "--gloo", "--timeline-filename", path, sys.executable, tmp_path / "ranks.py"]
    subprocess.run([*map(str, command)], check=True, capture_output=True, timeout=120)
    steps = read_timeline(path)
    assert 5 <= len(steps) <= 39  # of 39 after the first
    for step in steps:
        assert sorted(transfer.bytes for transfer in step) == [4 * 3, 4 * 40, 4 * 120, 4 * 2000]
        assert all(t.ready_s <= t.agreed_s <= t.start_s <= t.end_s for t in step)
