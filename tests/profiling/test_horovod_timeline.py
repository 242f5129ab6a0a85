"""Reading a Horovod timeline."""

import json
from pathlib import Path

import pytest
from horovod_events import write_timeline
from ranks import needs_horovod, run_job

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


TRAINING = """
import os, sys, time
os.environ["HOROVOD_TIMELINE"] = "DYNAMIC"
import horovod.torch as hvd, torch
hvd.init()
for number, groups in enumerate((None, 2)):
    hvd.start_timeline(f"{sys.argv[1]}/{number}.json", mark_cycles=True)
    model = torch.nn.Sequential(torch.nn.Linear(50, 40), torch.nn.ReLU(), torch.nn.Linear(40, 3))
    optimizer = hvd.DistributedOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1), named_parameters=model.named_parameters(), groups=groups
    )
    for _ in range(40):
        model(torch.ones(2, 50)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        time.sleep(0.05)  # at its end Horovod drops what its writer has not come to
    hvd.stop_timeline()
"""


@needs_horovod
def test_a_timeline_written_by_horovod_is_read(tmp_path: Path) -> None:
    ranks = run_job(2, "-c", TRAINING, str(tmp_path))
    assert [ended.status for ended in ranks] == [0, 0], ranks
    for name in ("0.json", "1.json"):  # gradients one by one, and in groups
        steps = read_timeline(tmp_path / name)
        assert 5 <= len(steps) <= 39  # of 39 after the first
        for step in steps:
            assert sorted(transfer.bytes for transfer in step) == [4 * 3, 4 * 40, 4 * 120, 4 * 2000]
            assert all(t.ready_s <= t.agreed_s <= t.start_s <= t.end_s for t in step)
