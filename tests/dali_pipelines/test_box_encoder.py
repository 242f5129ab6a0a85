"""The targets of DALI's encoder and of the operator, against the plain version."""

from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pipelines import ANCHORS, OWN_ENCODER, UNCHANGED, Item, batches, both_encoders, image_set, train_loader

import kernels
from dali_pipelines.batch import LabelledImages
from dali_pipelines.train import Encode
from kernels.boxes import cxcywh_to_ltrb, iou_matrix
from kernels.reference import encode_boxes
from ssd_fast.profiling.operator_cases import decided_by_rounding


@pytest.mark.parametrize("own", [False, True], ids=["dali", "kernels"])
def test_targets_equal_the_reference_encoding(small: LabelledImages, own: bool) -> None:
    """With anchors at random places, so that no two overlap a box equally, and labels with gaps."""
    random = np.random.default_rng(2)
    centres, sizes = random.uniform(0.1, 0.9, (900, 2)), random.uniform(0.05, 0.6, (900, 2))
    anchors = torch.from_numpy(np.concatenate([centres, sizes], axis=1).astype(np.float32))
    items = []
    for index in range(1, 25):
        height, width = small.sizes_hw[1].tolist()
        count = index % 9 + 1
        corners, extents = random.uniform(0, 0.6, (count, 2)), random.uniform(0.1, 0.4, (count, 2))
        boxes = np.concatenate([corners, corners + extents], axis=1) * [width, height, width, height]
        items.append(Item("1.jpg", (height, width), [[*box, 3 * label] for label, box in enumerate(boxes, start=1)]))
    images = image_set(small.image_dir, items)
    encode = partial(kernels.encode_boxes, anchors_cxcywh=anchors) if own else None
    loader = train_loader(images, UNCHANGED, encode=encode, anchors_ltrb=cxcywh_to_ltrb(anchors).numpy(), batch_size=24)
    batch = next(loader.epoch())
    order = [images.image_ids.tolist().index(image_id) for image_id in loader.last_image_ids]
    scale = torch.tensor([width, height, width, height], dtype=torch.float64)
    expected = encode_boxes(
        torch.from_numpy(images.boxes_ltrb).double() / scale,
        torch.from_numpy(images.labels),
        torch.from_numpy(images.offsets),
        anchors.double(),
    )
    assert torch.equal(batch.labels, expected.labels[order])
    torch.testing.assert_close(batch.deltas.double(), expected.deltas[order], atol=1e-4, rtol=0)
    assert (expected.labels > 0).sum() > 200


def test_both_encoders_give_the_same_targets_of_the_same_crops(small: LabelledImages) -> None:
    given: list[tuple[torch.Tensor, ...]] = []

    def encode(*ground_truths: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        given.append(ground_truths)
        return OWN_ENCODER(*ground_truths)

    by_dali, by_kernels = train_loader(small), train_loader(small, encode=encode)
    num_positives = num_left_out = 0
    for (ids, one), (other_ids, other) in zip(batches(by_dali, 40), batches(by_kernels, 40), strict=True):
        assert ids == other_ids
        assert torch.equal(one.images, other.images)
        boxes, labels, offsets = given.pop()
        assert (boxes.dtype, labels.dtype, offsets.dtype) == (torch.float32, torch.int32, torch.int64)
        for image, (begin, end) in enumerate(pairwise(offsets.tolist())):
            alike = ~decided_by_rounding(iou_matrix(boxes[begin:end], cxcywh_to_ltrb(ANCHORS)))
            assert torch.equal(one.labels[image, alike], other.labels[image, alike])
            torch.testing.assert_close(one.deltas[image, alike], other.deltas[image, alike], atol=1e-4, rtol=0)
            num_positives += int((other.labels[image] > 0).sum())
            num_left_out += int((~alike).sum())
    assert num_positives > 500
    assert num_left_out < num_positives / 10


@both_encoders
def test_a_box_beyond_the_image_by_a_rounding_error_is_accepted(tmp_path: Path, encode: Encode | None) -> None:
    Image.new("RGB", (640, 480)).save(tmp_path / "a.png")
    images = image_set(tmp_path, [Item("a.png", (480, 640), [[20, 30, 640.0005, 480.0005, 1]])])
    assert (images.boxes_ltrb[0, 2:] > [640, 480]).all()
    assert (next(train_loader(images, encode=encode).epoch()).labels > 0).any()


@both_encoders
def test_a_very_narrow_box_is_kept(tmp_path: Path, encode: Encode | None) -> None:
    Image.new("RGB", (640, 480)).save(tmp_path / "a.png")
    images = image_set(tmp_path, [Item("a.png", (480, 640), [[20, 30, 20.06, 200, 1]])])
    batch = next(train_loader(images, UNCHANGED, encode=encode).epoch())
    assert (batch.labels > 0).any()
    assert batch.deltas.isfinite().all()
