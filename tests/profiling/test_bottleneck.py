"""The sentence that says what bounds a run, from made-up profiles in which it is known."""

from typing import Any

import pytest
from tiny import tiny_config

from dali_pipelines.augment import PIXEL_PARTS
from ssd_fast.profiling.bottleneck import find_bottlenecks
from ssd_fast.profiling.profile import (
    BOTH,
    INPUT_ALONE,
    REST,
    STEP_ALONE,
    HostRead,
    Machine,
    Profile,
    Rank,
    Stage,
    Work,
)
from ssd_fast.training.loop import INPUT
from ssd_fast.training.step import ALLREDUCE, BACKWARD, FORWARD, LOSS, OPTIMIZER

# seconds of a step of 8 images whose arithmetic takes nearly all of it
STEP = {INPUT: 0.0, FORWARD: 0.3, LOSS: 0.003, BACKWARD: 0.6, ALLREDUCE: 0.0, OPTIMIZER: 0.004, REST: 0.001}
FED = dict(zip((*PIXEL_PARTS, "encode"), (0.001, 0.02, 0.02, 0.002), strict=True))
FLOP_PER_S, COPIED_PER_S = 200e9, 20e9


def stage(name: str, seconds: dict[str, float]) -> Stage:
    return Stage.of(name, {part: [value] for part, value in seconds.items()}, images=8, busy=1.0)


def profile(
    *,
    fed: dict[str, float] | None = FED,
    alone: dict[str, float] | None = STEP,
    both: dict[str, float] | None = STEP,
    doubled: dict[str, float] | None = None,
    ranks: tuple[Rank, ...] = (),
    overrides: tuple[str, ...] = (),
    machine: dict[str, Any] | None = None,
    **work: Any,
) -> Profile:
    stages = ((INPUT_ALONE, fed), (STEP_ALONE, alone), (BOTH, both))
    counted = {"forward_flop": 6e9, "train_flop": 18e9, "bytes": 5e9, "parameter_bytes": 4_000_000, "host_reads": ()}
    described = {
        "device": "made up",
        "is_gpu": False,
        "ranks": max(1, len(ranks)),
        "cores": 4,
        "torch": "2",
        "dtype": "float32",
        "matrix_flop_per_s": FLOP_PER_S,
        "bf16_flop_per_s": FLOP_PER_S,
        "copy_bytes_per_s": COPIED_PER_S,
        "peak_bytes": None,
    }
    return Profile(
        machine=Machine(**(described | (machine or {}))),
        config=tiny_config(overrides).model_dump(mode="json"),
        recipe="made_up.toml",
        batch_size=8,
        stages=tuple(stage(name, seconds) for name, seconds in stages if seconds is not None),
        spans=(),
        work=Work(**(counted | work)),
        doubled={part: 2 * value for part, value in STEP.items()} if doubled is None else doubled,
        ranks=ranks,
        findings=(),
    )


def rank(allreduce_s: float, compute_s: float = 0.9, host: str = "node0") -> Rank:
    return Rank(host=host, input_s=0.04, step_s=1.0, compute_s=compute_s, allreduce_s=allreduce_s, waiting_s=0.0)


def sentences(measured: Profile) -> list[str]:
    return [finding.sentence for finding in find_bottlenecks(measured)]


def test_without_a_loss_the_arithmetic_bounds() -> None:
    (only,) = sentences(profile())
    # 8 x 18 GFLOP in 0.9 s of 0.908
    assert only.startswith(
        "Bound by the arithmetic: forward and backward are 99% of a step. They reach 160 GFLOP/s, 80%"
    )
    assert "more cores, or a GPU would help" in only


def test_arithmetic_in_float32_where_bfloat16_is_faster_names_the_setting() -> None:
    (only,) = sentences(profile(machine={"bf16_flop_per_s": 2 * FLOP_PER_S}))
    assert 'training.precision = "bf16" may help: products in it are 2.0 times as fast' in only


@pytest.mark.parametrize(
    ("slow", "overrides", "expected"),
    [
        ({"read": 2.0}, (), r"read takes 98% of its time: the disk"),
        ({"crop and decode": 2.0}, ("data.num_threads=1",), "on 1 of 4 cores: data.num_threads = 0 takes all"),
        ({"crop and decode": 2.0}, ("data.num_threads=0",), "crop and decode takes 99% of its time, on all 4 cores"),
        ({"encode": 2.0}, ("data.num_threads=4",), "try the other data.box_encoder"),
    ],
)
def test_a_slow_input_is_named_with_its_slow_part(
    slow: dict[str, float], overrides: tuple[str, ...], expected: str
) -> None:
    waiting = sum((FED | slow).values()) - sum(STEP.values())
    first, *_ = sentences(profile(fed=FED | slow, both=STEP | {INPUT: waiting}, overrides=overrides))
    assert first.startswith("Bound by the input: alone it makes ")
    assert expected in first


def test_an_input_that_takes_cores_from_the_step_is_named() -> None:
    (first, *_) = sentences(profile(both=STEP | {FORWARD: 0.5}))
    assert first.startswith("Bound by the input: ")
    assert "both want the same cores" in first


@pytest.mark.parametrize(
    ("part", "seconds", "expected"),
    [
        (OPTIMIZER, 0.3, "the optimizer: it takes 300 ms a step, but reading and writing 4 MB"),
        (LOSS, 0.5, "the loss: it takes 56% of the time of forward and backward"),
        (REST, 0.2, "the host: 18% of a step lies between its parts"),
    ],
)
def test_a_slow_part_is_named(part: str, seconds: float, expected: str) -> None:
    slow = STEP | {part: seconds}
    first, *_ = sentences(profile(alone=slow, both=slow, doubled={}))
    assert first.startswith("Bound by " + expected)


def test_a_sleep_in_the_optimizer_is_not_taken_for_a_small_batch() -> None:
    slow = STEP | {OPTIMIZER: 0.3}
    doubled = {part: 2 * value for part, value in STEP.items()} | {OPTIMIZER: 0.3}
    first, *others = sentences(profile(alone=slow, both=slow, doubled=doubled))
    assert first.startswith("Bound by the optimizer")
    assert not any("batch" in other for other in others)


def test_a_small_batch_is_named_with_what_twice_of_it_gains() -> None:
    doubled = STEP | {FORWARD: 1.2 * STEP[FORWARD], BACKWARD: 1.2 * STEP[BACKWARD]}
    (first, *_) = sentences(profile(doubled=doubled))
    assert first.startswith("Bound by a small batch: with training.batch_size = 16 in place of 8 ")
    assert "1.67 times as many" in first


def test_of_several_losses_the_largest_bounds_and_small_ones_are_left_out() -> None:
    slow = STEP | {OPTIMIZER: 0.3, REST: 0.2, LOSS: 0.16}
    found = find_bottlenecks(profile(alone=slow, both=slow, doubled={}))
    assert [finding.name for finding in found] == ["optimizer", "host"]
    assert [finding.sentence.split(":")[0] for finding in found] == ["Bound by the optimizer", "Also"]
    small = STEP | {OPTIMIZER: 0.06}
    found = find_bottlenecks(profile(alone=small, both=small, doubled={}))
    assert [finding.name for finding in found] == ["arithmetic", "optimizer"]


def test_waiting_for_gradients_and_uneven_ranks_are_told_apart() -> None:
    step = STEP | {ALLREDUCE: 0.4}
    arguments: dict[str, Any] = {"alone": step, "both": step, "doubled": {}}
    (first, *_) = sentences(profile(ranks=(rank(0.4), rank(0.41)), **arguments))
    assert first.startswith("Bound by averaging the gradients: after backward 31% of a step")
    uneven = (rank(0.4), rank(0.0, 1.3, "node7"), rank(0.4))
    (first, *_) = sentences(profile(ranks=uneven, **arguments))
    assert first.startswith("Bound by uneven ranks: 31% of a step waits for the slowest, rank 1 on node7")


def test_an_idle_gpu_is_the_hosts_fault() -> None:
    reads = (HostRead(place="ssd_fast/training/loop.py:61", times=2),)
    (first, second) = sentences(profile(machine={"is_gpu": True}, gpu_busy=0.6, host_reads=reads))
    assert first.startswith("Bound by the host: 40% of the time the GPU has nothing to do though its input is there.")
    assert "2 a step at ssd_fast/training/loop.py:61" in first
    assert second.startswith("Also: the host reads values of the device")
    (first,) = sentences(profile(machine={"is_gpu": True}, gpu_busy=0.6))
    assert "Kernels are shorter than the host takes to launch them" in first


def test_values_that_the_host_reads_are_named_on_a_cpu_too() -> None:
    first, second = sentences(profile(host_reads=(HostRead(place="ssd_fast/training/loop.py:61", times=1),)))
    assert first.startswith("Bound by the arithmetic")
    assert "1 a step at ssd_fast/training/loop.py:61: free on a CPU, on a GPU every step waits for it" in second


def test_parts_alone_have_a_sentence_too() -> None:
    (only,) = sentences(profile(alone=None, both=None))
    assert only.startswith("Bound by the input: crop and decode takes 47% of its time")
    assert sentences(profile(fed=None, both=None))[0].startswith("Bound by the arithmetic")
    assert not sentences(profile(fed=None, alone=None, both=None))
