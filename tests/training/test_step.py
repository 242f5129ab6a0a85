"""The training step and its meter."""

import math

import pytest
import torch
from tiny import tiny_config

from dali_pipelines.batch import TrainBatch
from ssd_fast.distributed.world import World
from ssd_fast.evaluation.detector import TorchNetwork
from ssd_fast.model.loss import Loss
from ssd_fast.model.ssd import SSD
from ssd_fast.training.step import LossMeter, TrainStep

CPU = torch.device("cpu")
GOLDEN = [18.5001, 15.2469, 11.1869, 8.4037, 7.1155, 6.4857]


def make_trainer(overrides: tuple[str, ...] = (), *, dtype: torch.dtype = torch.float32) -> TrainStep:
    config = tiny_config(overrides)
    torch.manual_seed(0)
    return TrainStep(SSD(config.model, num_classes=3), config.optimizer, device=CPU, dtype=dtype)


def make_batch(trainer: TrainStep, seed: int = 0) -> TrainBatch:
    generator = torch.Generator().manual_seed(seed)
    num_anchors = trainer.model.num_anchors
    labels = torch.zeros(4, num_anchors, dtype=torch.int32)
    labels[:, ::20] = torch.randint(1, 4, labels[:, ::20].shape, generator=generator, dtype=torch.int32)
    images = torch.randn(4, 3, 64, 64, generator=generator).to(memory_format=torch.channels_last)
    return TrainBatch(images, torch.randn(4, num_anchors, 4, generator=generator) * (labels > 0)[..., None], labels)


def state_of(trainer: TrainStep) -> dict[str, torch.Tensor]:
    statistics = {name: value.clone() for name, value in trainer.model.named_buffers() if value.is_floating_point()}
    tensors = statistics | {name: value.clone() for name, value in trainer.model.named_parameters()}
    for index, state in trainer.optimizer.state_dict()["state"].items():
        tensors[f"momentum {index}"] = state["momentum_buffer"].clone()
    return tensors


def test_losses_of_a_fixed_short_run_are_golden() -> None:
    trainer = make_trainer()
    batch = make_batch(trainer)
    losses = [trainer(batch, 0.0002).total.item() for _ in range(6)]
    assert losses == pytest.approx(GOLDEN, rel=2e-3)


def test_steps_equal_those_of_plain_sgd() -> None:
    trainer = make_trainer()
    oracle = make_trainer()
    plain = torch.optim.SGD(oracle.model.parameters(), lr=0.02, momentum=0.9, weight_decay=5e-4, fused=False)
    oracle.optimizer = plain
    for seed in range(3):
        batch = make_batch(trainer, seed)
        trainer(batch, 0.02)
        oracle(batch, 0.02)
    for ours, theirs in zip(trainer.model.parameters(), oracle.model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("first", [True, False], ids=["first step", "later step"])
@pytest.mark.parametrize("clip", [(), ("optimizer.clip_norm=1.0",)], ids=["no clipping", "clipping"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("where", ["images", "targets"])
def test_a_step_that_is_not_finite_changes_neither_weights_nor_momentum_nor_statistics(
    first: bool, clip: tuple[str, ...], bad: float, where: str
) -> None:
    trainer = make_trainer(clip)
    batch = make_batch(trainer)
    if not first:
        trainer(batch, 0.02)
    before = state_of(trainer)
    if where == "images":
        poisoned = batch._replace(images=batch.images + bad)
    else:
        poisoned = batch._replace(deltas=batch.deltas.masked_fill(batch.labels[..., None] > 0, bad))
    assert not math.isfinite(trainer(poisoned, 0.02).total.item())
    after = state_of(trainer)
    assert not [name for name in before if not torch.equal(before[name], after[name])]
    assert math.isfinite(trainer(batch, 0.02).total.item())
    assert not torch.equal(before["class_heads.0.weight"], state_of(trainer)["class_heads.0.weight"])


def test_clipping_bounds_the_update() -> None:
    trainer = make_trainer(("optimizer.clip_norm=0.5", "optimizer.weight_decay=0.0", "optimizer.momentum=0.0"))
    before = [parameter.detach().clone() for parameter in trainer.model.parameters()]
    trainer(make_batch(trainer), 1.0)
    moved = [(new - old).norm() for new, old in zip(trainer.model.parameters(), before, strict=True)]
    assert torch.stack(moved).norm().item() == pytest.approx(0.5, rel=1e-3)


def test_weight_decay_spares_norm_and_bias_only_when_told() -> None:
    def decayed(overrides: tuple[str, ...]) -> set[int]:
        groups = make_trainer(overrides).optimizer.param_groups
        return {parameter.ndim for group in groups if group["weight_decay"] > 0 for parameter in group["params"]}

    assert decayed(("optimizer.weight_decay_on_norm_and_bias=true",)) == {1, 4}
    assert decayed(("optimizer.weight_decay_on_norm_and_bias=false",)) == {4}


def test_bfloat16_autocast_trains_with_float32_weights() -> None:
    trainer = make_trainer(dtype=torch.bfloat16)
    batch = make_batch(trainer)
    losses = [trainer(batch, 0.002).total.item() for _ in range(6)]
    assert losses[-1] < losses[0]
    assert {parameter.dtype for parameter in trainer.model.parameters()} == {torch.float32}


def loss_of(value: float) -> Loss:
    return Loss(total=torch.tensor(value), box=torch.tensor(value / 4), class_=torch.tensor(value * 3 / 4))


def test_frozen_statistics_are_those_of_the_initial_weights_also_after_an_evaluation() -> None:
    trainer = make_trainer(("model.frozen_statistics=true",))
    batch = make_batch(trainer)
    before = trainer.running_statistics.clone()
    expected = trainer.model.eval()(batch.images).logits
    trainer.model.train()
    assert trainer.model(batch.images).logits.equal(expected)
    weights = trainer.weights_digest()
    trainer(batch, 0.02)
    TorchNetwork(trainer.model, torch.float32)(batch.images)
    trainer(batch, 0.02)
    assert trainer.running_statistics.equal(before)
    assert trainer.weights_digest() != weights


def test_meter_averages_finite_losses_and_counts_the_others() -> None:
    meter = LossMeter(World())
    for step, value in enumerate([2.0, math.nan, 4.0, math.inf, math.nan]):
        meter.add(loss_of(value), step)
    window = meter.read()
    assert (window.total, window.box, window.class_) == (3.0, 0.75, 2.25)
    assert (window.num_nonfinite, window.longest_nonfinite, window.last_nonfinite_step) == (3, 2, 4)


def test_meter_follows_a_row_of_bad_losses_across_windows() -> None:
    meter = LossMeter(World())
    for step in range(3):
        meter.add(loss_of(math.nan), step)
    assert math.isnan(meter.read().total)
    meter.add(loss_of(math.nan), 3)
    meter.add(loss_of(1.0), 4)
    window = meter.read()
    assert (window.total, window.num_nonfinite, window.longest_nonfinite) == (1.0, 1, 4)
    meter.add(loss_of(1.0), 5)
    assert meter.read().longest_nonfinite == 0
