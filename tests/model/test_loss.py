"""The loss of a batch: the mean of its images' losses."""

import pytest
import torch
from operator_samples import loss_of_labels

from kernels.reference import multibox_loss
from ssd_fast.model.loss import multibox_loss_mean
from ssd_fast.model.ssd import Predictions


def test_the_mean_counts_images_without_positives() -> None:
    deltas, logits, targets, labels = loss_of_labels([[0, 1, 0, 2, 0], [0] * 5], dtype=torch.float64)
    parts = multibox_loss(deltas, logits, targets, labels)
    loss = multibox_loss_mean(Predictions(deltas=deltas, logits=logits), targets, labels)
    assert loss.box.item() == pytest.approx(parts.box[0].item() / 2)
    assert loss.class_.item() == pytest.approx(parts.class_[0].item() / 2)
    assert loss.total.item() == pytest.approx(loss.box.item() + loss.class_.item())


def test_the_mean_under_autocast_is_float32() -> None:
    deltas, logits, targets, labels = loss_of_labels([[0, 1, 0, 2, 0]], dtype=torch.bfloat16)
    expected = multibox_loss_mean(Predictions(deltas=deltas, logits=logits), targets, labels)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = multibox_loss_mean(Predictions(deltas=deltas, logits=logits), targets, labels)
    assert loss.total.dtype == torch.float32
    assert torch.equal(loss.total, expected.total)
