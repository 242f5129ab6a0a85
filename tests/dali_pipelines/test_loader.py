"""Both loaders and their files: layouts, names, pixels against Pillow's, and files that cannot be decoded."""

import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pipelines import (
    ANCHORS,
    UNCHANGED,
    Item,
    batches,
    both_encoders,
    eval_loader,
    image_set,
    odd_image,
    pixels,
    resized_by_pillow,
    train_loader,
)

from dali_pipelines.batch import LabelledImages
from dali_pipelines.loader import ImageError
from dali_pipelines.train import Encode
from ssd_fast.data.coco import load_coco


@both_encoders
def test_training_batch_has_the_promised_layout_and_dtypes(small: LabelledImages, encode: Encode | None) -> None:
    with train_loader(small, encode=encode) as loader:
        batch = next(loader.epoch())
        assert batch.images.shape == (4, 3, 32, 32)
        assert batch.images.is_contiguous(memory_format=torch.channels_last)
        assert batch.deltas.shape == (4, len(ANCHORS), 4)
        assert batch.labels.shape == (4, len(ANCHORS))
        assert [tensor.dtype for tensor in batch] == [torch.float32, torch.float32, torch.int32]
        assert (batch.labels > 0).any(dim=1).all()
        assert not batch.deltas[batch.labels == 0].any()
        assert loader.last_image_ids.shape == (4,)


def test_evaluation_batch_has_the_promised_layout_and_dtypes(small: LabelledImages) -> None:
    for batch in eval_loader(small, batch_size=5):
        assert batch.images.shape == (len(batch.image_ids), 3, 32, 32)
        assert batch.images.is_contiguous(memory_format=torch.channels_last)
        assert [tensor.dtype for tensor in batch] == [torch.float32, torch.int64, torch.int32]
        assert batch.sizes_hw.shape == (len(batch.image_ids), 2)


@both_encoders
def test_batches_that_are_kept_do_not_change(small: LabelledImages, encode: Encode | None) -> None:
    loader, passes = train_loader(small, encode=encode, prefetch_batches=3), eval_loader(small, prefetch_batches=3)
    kept = [batch for _, batch in batches(loader, 8)]
    kept_eval = list(passes)
    copies = [[tensor.clone() for tensor in batch] for batch in kept]
    copies_eval = [[tensor.clone() for tensor in batch] for batch in kept_eval]
    for _ in batches(loader, 30):
        pass
    for _ in range(3):
        list(passes)
    loader.close()
    passes.close()
    for batch, copy in zip([*kept, *kept_eval], [*copies, *copies_eval], strict=True):
        assert all(torch.equal(now, then) for now, then in zip(batch, copy, strict=True))
    assert len({tensor.data_ptr() for batch in kept for tensor in batch}) == 3 * len(kept)


@pytest.mark.parametrize("name", ['q"uote.jpg', "tab\t.jpg", "back\\slash.jpg", "sub folder/é 日本.jpg"])
def test_any_file_name_is_read(tmp_path: Path, name: str) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    Image.new("RGB", (40, 40), "red").save(tmp_path / name)
    images = image_set(tmp_path, [Item(name, (40, 40), [[5, 5, 30, 30, 1]])])
    for batch in (next(train_loader(images, UNCHANGED).epoch()), next(iter(eval_loader(images)))):
        assert pixels(batch.images)[0, 16, 16] == pytest.approx([254, 0, 0], abs=2)


def test_unchanged_training_images_and_evaluation_images_equal_pillows(coco_ccby: Path) -> None:
    annotations = coco_ccby / "annotations" / "instances_val2017.json"
    images = load_coco(annotations, coco_ccby / "val2017").images
    paths = dict(zip(images.image_ids.tolist(), images.file_names, strict=True))
    training = train_loader(images, UNCHANGED, image_size=300, batch_size=16)
    given = [(training.last_image_ids.tolist(), batch.images) for batch in training.epoch()]
    given += [(batch.image_ids.tolist(), batch.images) for batch in eval_loader(images, image_size=300, batch_size=16)]
    compared = 0
    for ids, tensor in given:
        for image_id, levels in zip(ids, pixels(tensor), strict=True):
            expected = resized_by_pillow(images.image_dir / paths[image_id], 300)
            assert np.abs(levels - expected).mean() < 1, paths[image_id]
            compared += 1
    assert compared >= 2 * len(images.file_names) - 1


GOOD = ("grey.jpg", "cmyk.jpg", "progressive.jpg", "rgb.png", "palette.png", "alpha.png", "bilevel.png", "grey.png")


def test_every_kind_of_image_is_decoded_as_pillow_does(tmp_path: Path) -> None:
    for name in (*GOOD, "rotated.jpg"):
        odd_image(tmp_path / name)
    images = image_set(tmp_path, [Item(name, (64, 96), [[8, 8, 60, 60, 1]]) for name in (*GOOD, "rotated.jpg")])
    names = dict(zip(images.image_ids.tolist(), images.file_names, strict=True))
    training = train_loader(images, UNCHANGED, batch_size=9)
    batch = next(training.epoch())
    given = [*zip(training.last_image_ids.tolist(), pixels(batch.images), strict=True)]
    for evaluation in eval_loader(images, batch_size=9):
        given += [*zip(evaluation.image_ids.tolist(), pixels(evaluation.images), strict=True)]
    assert len(given) == 18
    for image_id, levels in given:
        assert np.abs(levels - resized_by_pillow(tmp_path / names[image_id], 32)).mean() < 1, names[image_id]


def truncated(data: bytes) -> bytes:
    return data[: len(data) // 2]


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("cut.jpg", truncated),
        ("cut.png", truncated),
        ("text.jpg", lambda data: b"<!DOCTYPE html>" + b"not found " * 100),
        ("empty.jpg", lambda data: b""),
        ("missing.jpg", None),
    ],
)
def test_an_image_that_cannot_be_decoded_is_named(tmp_path: Path, name: str, damage: Any) -> None:
    for number in range(6):
        odd_image(tmp_path / f"{number}.jpg")
    odd_image(tmp_path / name)
    data = (tmp_path / name).read_bytes()
    (tmp_path / name).unlink()
    if damage is not None:
        (tmp_path / name).write_bytes(damage(data))
    names = ["0.jpg", "1.jpg", "2.jpg", "3.jpg", name, "4.jpg", "5.jpg"]
    images = image_set(tmp_path, [Item(name, (64, 96), [[8, 8, 60, 60, 1]]) for name in names])
    with pytest.raises(ImageError, match=name):
        list(eval_loader(images, batch_size=2))
    for batch_size in (2, 5, 7):
        with pytest.raises(ImageError, match=name):
            list(train_loader(images, UNCHANGED, batch_size=batch_size).epoch())


@pytest.mark.parametrize("name", [b"new\nline.jpg", b"\xff\xfe.jpg", b"% #?.jpg"], ids=["newline", "no UTF-8", "URI"])
def test_a_file_that_vanishes_between_two_epochs_is_named(tmp_path: Path, name: bytes) -> None:
    names = [os.fsdecode(name), "1.jpg", "2.jpg"]
    for each in names:
        Image.new("RGB", (40, 40), "red").save(tmp_path / each)
    images = image_set(tmp_path, [Item(each, (40, 40), [[5, 5, 30, 30, 1]]) for each in names])
    loader = train_loader(images, UNCHANGED, batch_size=2)
    for batch in loader.epoch():
        assert pixels(batch.images)[:, 16, 16] == pytest.approx(np.array([[254, 0, 0]] * 2), abs=2)
    (tmp_path / names[0]).unlink()
    with pytest.raises(ImageError, match=f"^{re.escape(str(tmp_path / names[0]))}: cannot be read"):
        for _ in batches(loader, 8):
            pass
