"""The emulated operators give the same bits whatever the order of threads and blocks, and whatever memory held."""

from typing import Any

import pytest
import torch
from box_samples import seeded
from operator_samples import (
    EMULATED,
    DecodeInput,
    assert_same_bits,
    decode_input,
    ground_truths,
    loss_input,
    pyramid_anchors,
    random_predictions,
    run_loss,
)
from torch import Tensor

from kernels import decode_nms, encode_boxes, multibox_loss

pytestmark = pytest.mark.skipif(not EMULATED, reason="make emulate-cuda builds the CUDA sources for the CPU")


def everything() -> tuple[Tensor, ...]:
    """Results of every kernel, on its fast and on its slow way."""
    truths, anchors = ground_truths([0, 8, 300, 1, 0]), pyramid_anchors(1100)
    ranks = torch.randperm(1100, generator=seeded(1))
    results = [*encode_boxes(*truths, anchors), *encode_boxes(*truths, anchors, tie_ranks=ranks)]
    ones = torch.ones(2, 2)
    for dtype, classes in ((torch.float16, 81), (torch.float64, 5), (torch.float32, 1600)):
        results += run_loss(multibox_loss, loss_input(2, 300, classes, dtype, positive_share=0.03), *ones)
    equal = loss_input(2, 1500, 3, positive_share=0.01)
    equal.logits[:] = 1
    results += run_loss(multibox_loss, equal, *ones)
    results += decode_nms(*decode_input(2, 300, 81, torch.float16))
    for limits in ((200, 200), (1100, 1200)):
        options: dict[str, Any] = {"max_per_class": limits[0], "max_detections": limits[1]}
        results += decode_nms(*random_predictions(1, 1200, 4), score_threshold=0.0, iou_threshold=0.9, **options)
    alike = DecodeInput(torch.zeros(1, 1300, 4), torch.zeros(1, 1300, 3), pyramid_anchors(1300))
    for limit in (50, 2000):
        results += decode_nms(*alike, max_per_class=limit, max_detections=limit)
    return tuple(results)


@pytest.fixture(scope="module")
def first() -> tuple[Tensor, ...]:
    return everything()


@pytest.mark.parametrize("blocks", ["forward", "reverse"])
@pytest.mark.parametrize("schedule", ["forward", "reverse", "fifo", "random:1", "random:2"])
def test_the_order_of_threads_and_blocks_does_not_matter(
    monkeypatch: pytest.MonkeyPatch, first: tuple[Tensor, ...], schedule: str, blocks: str
) -> None:
    monkeypatch.setenv("EMULATION_SCHEDULE", schedule)
    monkeypatch.setenv("EMULATION_BLOCKS", blocks)
    assert_same_bits(everything(), first)


@pytest.mark.parametrize("poison", ["zero", "ff"])
def test_what_fresh_memory_holds_does_not_matter(
    monkeypatch: pytest.MonkeyPatch, first: tuple[Tensor, ...], poison: str
) -> None:
    monkeypatch.setenv("EMULATION_POISON", poison)
    assert_same_bits(everything(), first)


@pytest.mark.parametrize("name", ["EMULATION_SCHEDULE", "EMULATION_BLOCKS", "EMULATION_POISON"])
def test_a_setting_that_does_not_exist_is_refused(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, "sideways")
    with pytest.raises(RuntimeError, match=f"{name}=sideways: expected"):
        encode_boxes(*ground_truths([1]), pyramid_anchors(3))
