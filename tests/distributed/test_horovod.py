"""Two ranks compute what one rank with the whole batch computes."""

import subprocess
import sys
from typing import Any

import pytest
import torch
from distributed_worker import BAD_STEP, CASES
from ranks import WORKER, needs_horovod, slurm_environment, started

from ssd_fast.distributed.horovod import WireFormat
from ssd_fast.distributed.world import World


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Results of all cases on each of two ranks, which were started as run.slurm starts them."""
    folder = tmp_path_factory.mktemp("cases")
    server = [sys.executable, "-m", "ssd_fast.distributed.slurm"]
    with subprocess.Popen(server, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as rendezvous_server:
        assert rendezvous_server.stdout is not None
        port = int(rendezvous_server.stdout.readline())
        with started(2, [WORKER, "cases", str(folder)], slurm_environment, port) as job:
            for ended in job.end_of():
                assert ended.status == 0, ended.errors
    assert rendezvous_server.returncode == 0  # it has ended with its standard input
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(2)]


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    """Results of one process with the whole batch."""
    return {name: CASES[name](World()) for name in ("frozen", "live", "bad")}


def assert_close(tensors: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float) -> None:
    assert tensors.keys() == expected.keys()
    for name, tensor in tensors.items():
        error = (tensor - expected[name]).norm()
        allowed = 10 * tolerance if name.startswith("momentum") else tolerance
        assert error <= allowed * expected[name].norm(), f"{name}: {error:.2g}"


@needs_horovod
def test_two_ranks_with_half_a_batch_each_train_as_one_with_all_of_it(cases: list[Any], alone: Any) -> None:
    losses, expected = (torch.tensor(result["frozen"]["windows"]) for result in (cases[0], alone))
    torch.testing.assert_close(losses, expected, rtol=1e-5, atol=1e-6)
    assert_close(cases[0]["frozen"]["tensors"], alone["frozen"]["tensors"], 2e-4)


@needs_horovod
def test_live_batch_norm_sees_half_a_batch_on_each_of_two_ranks(cases: list[Any], alone: Any) -> None:
    first = [result["live"]["statistics"][0] for result in (*cases, alone)]
    mean = slice(0, 64)  # of the first layer, whose input does not depend on other layers' statistics
    variance = slice(64, 128)
    torch.testing.assert_close((first[0] + first[1])[mean] / 2, first[2][mean], rtol=1e-4, atol=1e-6)
    assert bool(((first[0] + first[1])[variance] / 2 <= first[2][variance] * 1.001).all())
    assert not torch.equal(first[0], first[1])
    assert torch.equal(cases[0]["live"]["averaged"], cases[1]["live"]["averaged"])
    own = (cases[0]["live"]["statistics"][-1] + cases[1]["live"]["statistics"][-1]) / 2
    torch.testing.assert_close(cases[0]["live"]["averaged"], own)


@needs_horovod
@pytest.mark.parametrize("case", ["frozen", "live", "bad", "fp16", "predivided"])
def test_all_ranks_have_the_same_weights_and_the_same_losses_after_every_step(cases: list[Any], case: str) -> None:
    assert cases[0][case]["digests"] == cases[1][case]["digests"]
    assert len(set(cases[0][case]["digests"])) == 5 - (case == "bad")
    assert str(cases[0][case]["windows"]) == str(cases[1][case]["windows"])


@needs_horovod
def test_a_step_that_is_bad_on_one_rank_is_skipped_by_all(cases: list[Any]) -> None:
    for rank, result in enumerate(cases):
        digests, statistics, windows = (result["bad"][key] for key in ("digests", "statistics", "windows"))
        assert digests[BAD_STEP] == digests[BAD_STEP - 1]
        assert digests[BAD_STEP + 1] != digests[BAD_STEP]
        assert [window[3] for window in windows] == [0, 0, 1, 0, 0]
        assert torch.equal(statistics[BAD_STEP], statistics[BAD_STEP - 1]) == (rank == 1)
        assert bool(torch.isfinite(statistics[-1]).all())


@needs_horovod
def test_gradients_travel_as_float16_or_divided_beforehand_when_asked_to(cases: list[Any]) -> None:
    exact = cases[0]["frozen"]["tensors"]
    assert_close(cases[0]["predivided"]["tensors"], exact, 1e-5)
    assert_close(cases[0]["fp16"]["tensors"], exact, 2e-2)
    assert cases[0]["fp16"]["digests"] != cases[0]["frozen"]["digests"]


@needs_horovod
def test_gradients_in_channels_last_are_averaged_to_the_same_bits_and_keep_their_layout(cases: list[Any]) -> None:
    for result in cases:
        for layout in result["layouts"].values():
            assert all(layout["equal"])
            assert all(layout["strides"])


def test_a_gradient_in_channels_last_goes_on_its_way_without_a_copy() -> None:
    for shape in ((6, 5, 3, 3), (6, 5, 1, 1), (6,)):
        gradient = torch.randn(shape)
        if len(shape) == 4:
            gradient = gradient.to(memory_format=torch.channels_last)
        wire, context = WireFormat(None).compress(gradient)
        back = WireFormat(None).decompress(wire, context)
        assert wire.is_contiguous()
        assert wire.data_ptr() == back.data_ptr() == gradient.data_ptr()
        assert back.stride() == gradient.stride()


@needs_horovod
def test_what_ranks_tell_each_other_arrives(cases: list[Any]) -> None:
    gathered = [result["collectives"]["gathered"] for result in cases]
    assert [value["rank"] for value in gathered[0]] == [0, 1]
    assert len(gathered[0][1]["ballast"]) == 1000
    assert gathered[1] == []
    assert [result["collectives"]["broadcast"] for result in cases] == ["from 0", "from 0"]
    for result in cases:  # what is read at a step was said at the one before
        assert result["collectives"]["agreed"] == [(0, 0), (0, 0), (1, 1), (0, 2)]


@needs_horovod
def test_a_rank_that_lets_the_others_wait_is_named_once(cases: list[Any]) -> None:
    first, again, even, other = cases[0]["collectives"]["slow"]
    assert first == "rank 1 (node0) is slow: the others wait for it 90% of the time"
    assert (again, even) == (None, None)
    assert other == "rank 0 (node0) is slow: the others wait for it 70% of the time"
    assert cases[1]["collectives"]["slow"] == [None] * 4


@needs_horovod
def test_a_rank_with_one_core_leaves_it_to_the_training(cases: list[Any]) -> None:
    for result in cases:
        cores, cycle_ms = result["collectives"]["cycle"]
        assert cycle_ms == ("10" if cores == 1 else None)
