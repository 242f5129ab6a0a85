"""Batches from fixed tensors: they look like real ones and need no DALI."""

import importlib
import sys
from typing import Any

import pytest
import torch
from pipelines import CPU, equal

from dali_pipelines.synthetic import SyntheticEvalLoader, SyntheticTrainLoader


def synthetic(**changes: Any) -> SyntheticTrainLoader:
    arguments: dict[str, Any] = {
        "num_anchors": 8732,
        "num_classes": 80,
        "image_size": 32,
        "batch_size": 16,
        "device": CPU,
        "steps_per_epoch": 5,
        "seed": 0,
    }
    return SyntheticTrainLoader(**(arguments | changes))


def test_synthetic_training_batches_look_like_real_ones() -> None:
    with synthetic() as loader:
        batch = next(loader.epoch())
    assert batch.images.shape == (16, 3, 32, 32)
    assert batch.images.is_contiguous(memory_format=torch.channels_last)
    assert batch.deltas.shape == (16, 8732, 4)
    assert [tensor.dtype for tensor in batch] == [torch.float32, torch.float32, torch.int32]
    positive = batch.labels > 0
    assert 20 < positive.sum(dim=1).float().mean() < 60
    assert (batch.labels.min(), batch.labels.max()) == (0, 80)
    assert not batch.deltas[~positive].any()
    assert batch.deltas[positive].std() == pytest.approx(1, abs=0.1)
    same = next(synthetic().epoch())
    assert equal(batch, same)
    assert not equal(batch, next(synthetic(seed=1).epoch()))


def test_synthetic_evaluation_gives_every_id_once() -> None:
    loader = SyntheticEvalLoader(num_images=11, image_size=16, batch_size=4, device=CPU, seed=0)
    given = list(loader)
    assert len(given) == len(loader)
    assert torch.cat([batch.image_ids for batch in given]).tolist() == list(range(11))
    for batch in given:
        assert batch.images.shape == (len(batch.image_ids), 3, 16, 16)
        assert batch.images.is_contiguous(memory_format=torch.channels_last)
        assert batch.sizes_hw.dtype == torch.int32
        assert batch.sizes_hw.shape == (len(batch.image_ids), 2)


def test_synthetic_batches_need_no_dali(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] in ("nvidia", "dali_pipelines")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "nvidia", None)  # importing it fails
    module = importlib.import_module("dali_pipelines.synthetic")
    loader = module.SyntheticEvalLoader(num_images=3, image_size=8, batch_size=2, device=CPU, seed=0)
    assert sum(len(batch.image_ids) for batch in loader) == 3
