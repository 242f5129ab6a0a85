"""Crops, flips and colours, and the boxes that follow them."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from nvidia.dali import fn, types
from PIL import Image
from pipelines import (
    ANCHORS,
    SSD_CROP,
    UNCHANGED,
    Item,
    batches,
    both_encoders,
    changed,
    crops_of_ramp,
    image_set,
    pixels,
    train_loader,
)
from torchvision.transforms import functional as F

from dali_pipelines.batch import Augmentation, LabelledImages
from dali_pipelines.finish import finished
from dali_pipelines.loader import make_pipeline
from dali_pipelines.train import Encode
from kernels.boxes import decode_deltas


def iou(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    sides = np.minimum(one[..., 2:], other[..., 2:]) - np.maximum(one[..., :2], other[..., :2])
    common = sides.clip(0).prod(-1)
    areas = [(box[..., 2:] - box[..., :2]).prod(-1) for box in (one, other)]
    return common / (sum(areas) - common)


def test_an_image_too_small_to_crop_is_named_and_the_smallest_allowed_works(tmp_path: Path) -> None:
    for side in (3, 4):
        Image.new("RGB", (50, side), "blue").save(tmp_path / f"{side}.png")
    sets = {side: image_set(tmp_path, [Item(f"{side}.png", (side, 50), [[0, 0, 50, side, 1]])] * 64) for side in (3, 4)}
    with pytest.raises(ValueError, match=r"3\.png: 50 x 3 pixels: expected larger"):
        train_loader(sets[3], SSD_CROP)
    assert len(list(train_loader(sets[4], SSD_CROP).epoch())) == 16
    assert len(list(train_loader(sets[3], UNCHANGED).epoch())) == 16


@pytest.mark.parametrize(("side", "num_possible"), [(0.97, 6), (0.89, 5), (0.77, 4), (0.62, 3), (0.45, 2), (0.31, 1)])
def test_the_seven_crop_options_are_equally_likely(ramp: Path, side: float, num_possible: int) -> None:
    """Every crop has one size, so that num_possible of the six conditions hold for a box that covers the image."""
    images = image_set(ramp, [Item("small_ramp.jpg", (64, 64), [[0, 0, 64, 64, 1]])] * 4000)
    augmentation = changed(SSD_CROP, crop_sides=(side, side))
    loader = train_loader(images, augmentation, batch_size=250, image_size=8)
    crops = np.concatenate([crops_of_ramp(batch.images) for batch in loader.epoch()])
    untouched = (np.abs(crops - [0, 0, 1, 1]) < 0.01).all(axis=1)
    centred = min(1.0, side / (1 - side)) ** 2  # chance that the crop holds the box's centre
    expected = 1 / (1 + num_possible * centred)
    assert untouched.mean() == pytest.approx(expected, abs=3 * np.sqrt(expected * (1 - expected) / 4000))


@pytest.mark.parametrize("min_iou", [0.1, 0.3, 0.5, 0.7, 0.9])
def test_all_boxes_overlap_the_crop_by_the_drawn_iou(ramp: Path, min_iou: float) -> None:
    boxes = np.array([[12, 10, 244, 246], [16, 8, 248, 240]])
    images = image_set(ramp, [Item("ramp.jpg", (256, 256), [[*box, 1] for box in boxes])] * 300)
    augmentation = changed(SSD_CROP, crop_min_ious=(min_iou,), crop_attempts=50)
    loader = train_loader(images, augmentation, batch_size=100, image_size=32)
    crops = np.concatenate([crops_of_ramp(batch.images) for batch in loader.epoch()])
    crops = crops[(np.abs(crops - [0, 0, 1, 1]) > 0.005).any(axis=1)]
    overlaps = iou(crops[:, None], boxes / 256).min(axis=1)
    assert len(crops) > 50
    assert overlaps.min() > min_iou - 0.015  # crops are rounded to pixels
    assert overlaps.min() < min_iou + 0.15
    sides = crops[:, 2:] - crops[:, :2]
    assert sides.min() > 0.295
    aspect = sides[:, 0] / sides[:, 1]
    assert aspect.min() > 0.49
    assert aspect.max() < 2.05


@both_encoders
def test_a_crop_keeps_the_boxes_whose_centre_it_holds_and_clips_them(ramp: Path, encode: Encode | None) -> None:
    boxes = np.array([[20, 30, 90, 80], [60, 140, 220, 230], [150, 20, 240, 120]])
    items = [Item("ramp.jpg", (256, 256), [[*box, label + 1] for label, box in enumerate(boxes)])] * 300
    augmentation = changed(SSD_CROP, crop_min_ious=(0.0,))
    loader = train_loader(image_set(ramp, items), augmentation, encode=encode, batch_size=100, image_size=64)
    kept_counts = np.zeros(4, dtype=int)
    for batch in loader.epoch():
        decoded = decode_deltas(batch.deltas, ANCHORS)
        for crop, labels, decoded_boxes in zip(crops_of_ramp(batch.images), batch.labels, decoded, strict=True):
            corner, size = crop[:2], crop[2:] - crop[:2]
            kept = 0
            for label, box in enumerate(boxes / 256, start=1):
                centre = ((box[:2] + box[2:]) / 2 - corner) / size
                present = bool((labels == label).any())
                if np.abs(centre).min() > 0.02 and np.abs(centre - 1).min() > 0.02:
                    assert present == bool(((centre > 0) & (centre < 1)).all())
                if present:
                    expected = ((box.reshape(2, 2) - corner) / size).clip(0, 1).ravel()
                    found = decoded_boxes[labels == label].numpy()
                    assert np.abs(found - expected).max() * 64 < 1.5
                kept += present
            kept_counts[kept] += 1
    assert kept_counts[0] == 0
    assert (kept_counts[1:] > 10).all()


@both_encoders
def test_boxes_without_any_possible_crop_end_as_background(ramp: Path, encode: Encode | None) -> None:
    images = image_set(ramp, [Item("ramp.jpg", (256, 256), [[0, 0, 8, 8, 1]])] * 64)
    augmentation = changed(SSD_CROP, crop_min_ious=(0.9,), crop_allow_none=False)
    loader = train_loader(images, augmentation, encode=encode, batch_size=64)
    batch = next(loader.epoch())
    without = (batch.labels == 0).all(dim=1)
    assert without.any()
    assert not batch.deltas[without].any()


@both_encoders
def test_decoded_boxes_land_on_the_objects(tmp_path: Path, encode: Encode | None) -> None:
    """A bright rectangle on dark ground, through crops, flips, resizing and colour changes."""
    random = np.random.default_rng(5)
    items = []
    for number in range(24):
        width, height = (int(side) for side in random.integers(300, 500, 2))
        left, top = (int(edge) for edge in random.integers(10, 120, 2))
        right, bottom = left + int(random.integers(60, 170)), top + int(random.integers(60, 170))
        image = Image.new("RGB", (width, height), (30, 25, 40))
        image.paste((200, 190, 170), (left, top, right, bottom))
        image.save(tmp_path / f"{number}.png")
        items += [Item(f"{number}.png", (height, width), [[left, top, right, bottom, 1 + number % 3]])] * 8
    loader = train_loader(image_set(tmp_path, items), encode=encode, image_size=128, batch_size=32)
    flips = 0
    for batch in loader.epoch():
        decoded = decode_deltas(batch.deltas, ANCHORS)
        for levels, labels, boxes in zip(pixels(batch.images), batch.labels, decoded, strict=True):
            bright = levels.mean(axis=-1)
            bright = bright > (bright.max() + bright.min()) / 2
            rows, columns = np.flatnonzero(bright.any(axis=1)), np.flatnonzero(bright.any(axis=0))
            seen = np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1])
            found = boxes[labels > 0].numpy() * 128
            assert len(found)
            assert np.abs(found - seen).max() < 1.5
            flips += seen[0] > 128 - seen[2]
    assert flips > 10


def test_a_flip_mirrors_images_and_boxes(small: LabelledImages) -> None:
    straight, flipped = train_loader(small, UNCHANGED), train_loader(small, changed(UNCHANGED, flip_probability=1.0))
    for (ids, one), (other_ids, other) in zip(batches(straight, 6), batches(flipped, 6), strict=True):
        assert ids == other_ids
        assert torch.equal(one.images.flip(3), other.images)
        for index in range(4):
            boxes = decode_deltas(one.deltas[index], ANCHORS)[one.labels[index] > 0]
            mirrored = decode_deltas(other.deltas[index], ANCHORS)[other.labels[index] > 0]
            back = mirrored[:, [2, 1, 0, 3]] * torch.tensor([-1.0, 1.0, -1.0, 1.0]) + torch.tensor([1.0, 0.0, 1.0, 0.0])
            distances = torch.cdist(boxes, back)
            assert distances.min(dim=0).values.max() < 1e-5
            assert distances.min(dim=1).values.max() < 1e-5


def test_half_of_the_images_are_flipped(ramp: Path) -> None:
    images = image_set(ramp, [Item("small_ramp.jpg", (64, 64), [[0, 0, 50, 50, 1]])] * 800)
    loader = train_loader(images, changed(UNCHANGED, flip_probability=0.5), batch_size=200, image_size=8)
    levels = np.concatenate([pixels(batch.images) for batch in loader.epoch()])
    assert (levels[:, 4, 0, 0] > levels[:, 4, 7, 0]).mean() == pytest.approx(0.5, abs=0.055)


def colours_after(ramp: Path, augmentation: Augmentation, count: int = 1) -> np.ndarray:
    """[count, 3] the colour that (150, 90, 120) becomes."""
    Image.new("RGB", (16, 16), (150, 90, 120)).save(ramp / "plain.png")
    images = image_set(ramp, [Item("plain.png", (16, 16), [[0, 0, 16, 16, 1]])] * count)
    batch = next(train_loader(images, augmentation, batch_size=count, image_size=8).epoch())
    return pixels(batch.images)[:, 4, 4]


def test_brightness_and_saturation_are_torchvisions(ramp: Path) -> None:
    plain = torch.tensor([150, 90, 120], dtype=torch.uint8).view(3, 1, 1)
    for name, adjust in (("brightness", F.adjust_brightness), ("saturation", F.adjust_saturation)):
        for factor in (0.5, 1.4):
            change: dict[str, Any] = {name: (factor, factor)}
            found = colours_after(ramp, changed(UNCHANGED, **change))[0]
            assert found == pytest.approx(adjust(plain, factor).flatten().tolist(), abs=1.5), (name, factor)


def test_contrast_pulls_towards_the_middle_before_brightness(ramp: Path) -> None:
    found = colours_after(ramp, changed(UNCHANGED, contrast=(0.5, 0.5), brightness=(1.1, 1.1)))[0]
    assert found == pytest.approx([(128 + (value - 128) * 0.5) * 1.1 for value in (150, 90, 120)], abs=1)


def test_hue_turns_up_to_its_limit_both_ways(ramp: Path) -> None:
    found = colours_after(ramp, changed(UNCHANGED, hue_degrees=18.0), count=500)
    to_chroma = np.array([[0.596, -0.274, -0.322], [0.211, -0.523, 0.312]])  # I and Q of YIQ
    before, after = to_chroma @ [150, 90, 120], found @ to_chroma.T
    turns = np.degrees(np.angle((after[:, 0] + 1j * after[:, 1]) / complex(*before)))
    assert np.abs(turns).max() < 18.7  # pixels are rounded to integers
    assert turns.min() < -16
    assert turns.max() > 16
    assert np.abs(turns.mean()) < 2


def test_factors_fill_their_range(ramp: Path) -> None:
    found = colours_after(ramp, changed(UNCHANGED, brightness=(0.875, 1.125)), count=500)[:, 0] / 150
    assert found.min() == pytest.approx(0.875, abs=0.01)
    assert found.max() == pytest.approx(1.125, abs=0.01)
    assert np.histogram(found, bins=5, range=(0.875, 1.125))[0].min() > 60


@pytest.mark.parametrize(
    "colours",
    [(1.0, 1.0, 1.0, 0.0), (1.1, 1.0, 1.0, 0.0), (1.0, 0.7, 1.0, 0.0), (1.0, 1.0, 0.5, 0.0), (0.9, 1.3, 1.4, -18.0)],
)
def test_on_a_cpu_colours_are_those_that_dali_gives_on_a_gpu(colours: tuple[float, float, float, float]) -> None:
    image = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    pipeline = make_pipeline(torch.device("cpu"), batch_size=1, num_threads=1, prefetch_batches=1)
    with pipeline:
        named = dict(zip(("brightness", "contrast", "saturation", "hue"), colours, strict=True))
        twisted = fn.color_twist(fn.external_source(source=lambda: [image], layout="HWC"), dtype=types.FLOAT, **named)
        pipeline.set_outputs(twisted)
    expected = np.array(pipeline.run()[0].as_array()[0]).clip(0, 255)
    found = finished([torch.from_numpy(image)], 32, colours=np.array([colours]))
    assert np.abs(pixels(found.permute(0, 3, 1, 2))[0] - expected).max() < 1  # its matrices are no exact inverses
