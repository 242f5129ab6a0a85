"""The input pipelines: what is in a batch, in which order, after which changes, and what happens to bad images."""

import subprocess
import sys
import tempfile
from collections.abc import Iterator
from functools import partial
from itertools import chain, pairwise, zip_longest
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image
from repository import REPOSITORY
from tiny import tiny_config
from torchvision.transforms import functional as F

import kernels
from dali_pipelines.batch import LabelledImages, TrainBatch
from dali_pipelines.evaluate import EvalLoader
from dali_pipelines.loader import ImageError
from dali_pipelines.synthetic import SyntheticEvalLoader, SyntheticTrainLoader
from dali_pipelines.train import Augmentation, Encode, TrainLoader, _ragged
from kernels.boxes import cxcywh_to_ltrb, decode_deltas, iou_matrix
from kernels.reference import encode_boxes
from ssd_fast.data.coco import load_coco
from ssd_fast.data.loaders import box_encoder, make_encode, make_train_loader
from ssd_fast.distributed.world import World
from ssd_fast.model.anchors import model_anchors, reference_order
from ssd_fast.profiling.operator_cases import decided_by_rounding
from ssd_fast.recipe import load_config

CPU = torch.device("cpu")
MEAN = np.array([0.485, 0.456, 0.406]) * 255
STD = np.array([0.229, 0.224, 0.225]) * 255
UNCHANGED = Augmentation(
    crop_min_ious=(),
    crop_allow_none=True,
    crop_sides=(0.3, 1.0),
    crop_aspect=(0.5, 2.0),
    crop_attempts=1,
    brightness=(1.0, 1.0),
    contrast=(1.0, 1.0),
    saturation=(1.0, 1.0),
    hue_degrees=0.0,
    flip_probability=0.0,
)
SSD_CROP = UNCHANGED._replace(crop_min_ious=(0.0, 0.1, 0.3, 0.5, 0.7, 0.9))
SSD = SSD_CROP._replace(
    brightness=(0.875, 1.125), contrast=(0.5, 1.5), saturation=(0.5, 1.5), hue_degrees=18.0, flip_probability=0.5
)


def grid_anchors() -> torch.Tensor:
    """[A, 4] cxcywh, squares and rectangles of five sizes on grids."""
    rows = [
        [(cx + 0.5) / cells, (cy + 0.5) / cells, size * stretch, size / stretch]
        for cells, size in ((16, 0.08), (12, 0.16), (8, 0.3), (6, 0.5), (4, 0.8))
        for cy in range(cells)
        for cx in range(cells)
        for stretch in (1.0, 1.6, 1 / 1.6)
    ]
    return torch.tensor(rows).clamp(0, 1)


ANCHORS = grid_anchors()
OWN_ENCODER = partial(kernels.encode_boxes, anchors_cxcywh=ANCHORS)
both_encoders = pytest.mark.parametrize("encode", [None, OWN_ENCODER], ids=["dali", "kernels"])


class Item(NamedTuple):
    """An image of a set: its file, its size and its boxes [G, 5] (ltrb in pixels, label)."""

    name: str
    size_hw: tuple[int, int]
    boxes: list[list[float]]


def image_set(folder: Path, items: list[Item]) -> LabelledImages:
    boxes = np.array([box for item in items for box in item.boxes], dtype=np.float32).reshape(-1, 5)
    return LabelledImages(
        image_dir=folder,
        file_names=tuple(item.name for item in items),
        image_ids=np.arange(len(items), dtype=np.int64) * 7 + 1000,
        sizes_hw=np.array([item.size_hw for item in items], dtype=np.int32),
        boxes_ltrb=boxes[:, :4],
        labels=boxes[:, 4].astype(np.int32),
        offsets=np.cumsum([0] + [len(item.boxes) for item in items], dtype=np.int64),
    )


def train_loader(images: LabelledImages, augmentation: Augmentation = SSD, **changes: Any) -> TrainLoader:
    arguments: dict[str, Any] = {
        "images": images,
        "anchors_ltrb": cxcywh_to_ltrb(ANCHORS).numpy(),
        "image_size": 32,
        "batch_size": 4,
        "device": CPU,
        "num_threads": 2,
        "prefetch_batches": 2,
        "seed": 1,
        "augmentation": augmentation,
    }
    return TrainLoader(**(arguments | changes))


def eval_loader(images: LabelledImages, **changes: Any) -> EvalLoader:
    arguments: dict[str, Any] = {
        "images": images,
        "image_size": 32,
        "batch_size": 4,
        "device": CPU,
        "num_threads": 2,
        "prefetch_batches": 2,
    }
    return EvalLoader(**(arguments | changes))


def batches(loader: TrainLoader, count: int) -> Iterator[tuple[list[int], TrainBatch]]:
    """Image ids and batch of the next steps, across the ends of epochs."""
    while count:
        for batch in loader.epoch():
            yield loader.last_image_ids.tolist(), batch
            count -= 1
            if not count:
                return


def pixels(images: torch.Tensor) -> np.ndarray:
    """[B, S, S, 3] grey levels of normalised images."""
    return images.permute(0, 2, 3, 1).numpy() * STD + MEAN


def equal(one: TrainBatch, other: TrainBatch) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def resized_by_pillow(path: Path, size: int) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB").resize((size, size), Image.Resampling.BILINEAR), dtype=np.float64)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> LabelledImages:
    """23 small noise images of different sizes with one to three boxes each; four more have none."""
    folder = tmp_path_factory.mktemp("small")
    random = np.random.default_rng(0)
    items = []
    for number in range(27):
        height, width = (int(side) for side in random.integers(40, 90, 2))
        noise = random.integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8)
        Image.fromarray(noise).resize((width, height)).save(folder / f"{number}.jpg", quality=95)
        corners = random.uniform(0, 0.5, (1 + number % 3, 2)) * [width, height]
        boxes = [[x, y, x + 15, y + 15, 1 + number % 5] for x, y in corners.tolist()] if number % 7 else []
        items.append(Item(f"{number}.jpg", (height, width), boxes))
    return image_set(folder, items)


@pytest.fixture(scope="module")
def ramp(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An image of 256 x 256 whose red is the column and whose green is the row: it tells where a crop was."""
    folder = tmp_path_factory.mktemp("ramp")
    column, row = np.meshgrid(np.arange(256), np.arange(256))
    image = Image.fromarray(np.stack([column, row, 0 * row], axis=-1).astype(np.uint8))
    image.save(folder / "ramp.jpg", quality=98, subsampling=0)
    return folder


def crops_of_ramp(images: torch.Tensor) -> np.ndarray:
    """[B, 4] ltrb fractions of the crop that each output image shows."""
    levels = pixels(images)
    size = levels.shape[1]
    inner = slice(2, size - 2)  # the filter bends the ramp at the border
    red, green = levels[:, :, inner, 0].mean(1), levels[:, inner, :, 1].mean(2)
    centres = (np.arange(size)[inner] + 0.5) / size
    lines = [np.polyfit(centres, values.T, 1) for values in (red, green)]  # slope and value at 0
    (width, left), (height, top) = lines
    return np.stack([left + 0.5, top + 0.5, left + width + 0.5, top + height + 0.5], axis=1) / 256


def iou(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    sides = np.minimum(one[..., 2:], other[..., 2:]) - np.maximum(one[..., :2], other[..., :2])
    common = sides.clip(0).prod(-1)
    areas = [(box[..., 2:] - box[..., :2]).prod(-1) for box in (one, other)]
    return common / (sum(areas) - common)


# ---- batches ----


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


def test_building_leaves_no_file_behind(small: LabelledImages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    before = sorted(small.image_dir.iterdir())
    loader = train_loader(small)
    assert list(tmp_path.iterdir()) == []
    next(loader.epoch())
    assert sorted(small.image_dir.iterdir()) == before


@pytest.mark.parametrize("name", ['q"uote.jpg', "tab\t.jpg", "back\\slash.jpg", "sub folder/é 日本.jpg"])
def test_any_file_name_is_read(tmp_path: Path, name: str) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    Image.new("RGB", (40, 40), "red").save(tmp_path / name)
    images = image_set(tmp_path, [Item(name, (40, 40), [[5, 5, 30, 30, 1]])])
    for batch in (next(train_loader(images, UNCHANGED).epoch()), next(iter(eval_loader(images)))):
        assert pixels(batch.images)[0, 16, 16] == pytest.approx([254, 0, 0], abs=2)


# ---- order ----


@pytest.mark.parametrize(("world_size", "batch_size"), [(1, 4), (2, 4), (3, 2), (3, 30)])
def test_every_epoch_covers_the_images_with_boxes_once(small: LabelledImages, world_size: int, batch_size: int) -> None:
    with_boxes = set(small.image_ids[np.diff(small.offsets) > 0].tolist())
    assert len(with_boxes) == 23
    loaders = [
        train_loader(small, batch_size=batch_size, rank=rank, world_size=world_size) for rank in range(world_size)
    ]
    for _ in range(3):
        shards = []
        for loader in loaders:
            given = [loader.last_image_ids.tolist() for _ in loader.epoch()]
            assert len(given) == loader.steps_per_epoch == -(-23 // (world_size * batch_size))
            assert all(len(ids) == batch_size for ids in given)
            flat = list(chain.from_iterable(given))
            shard = list(dict.fromkeys(flat))
            assert flat == shard + [shard[-1]] * (len(flat) - len(shard))  # only the padding repeats
            shards.append(shard)
        assert sum(map(len, shards)) == 23
        assert set().union(*shards) == with_boxes


def test_order_is_shuffled_from_the_first_epoch_and_differs_per_epoch_and_seed(small: LabelledImages) -> None:
    def epochs(seed: int) -> list[list[int]]:
        loader = train_loader(small, batch_size=23, seed=seed)
        return [ids for ids, _ in batches(loader, 3)]

    orders = epochs(1) + epochs(2)
    assert sorted(orders[0]) != orders[0]
    assert len({tuple(order) for order in orders}) == 6
    assert epochs(1) == orders[:3]


@both_encoders
def test_same_seed_gives_the_same_batches_and_another_seed_others(small: LabelledImages, encode: Encode | None) -> None:
    one, same, other = (list(batches(train_loader(small, encode=encode, seed=seed), 8)) for seed in (1, 1, 2))
    assert [ids for ids, _ in one] == [ids for ids, _ in same]
    assert all(equal(a, b) for (_, a), (_, b) in zip(one, same, strict=True))
    assert not any(equal(a, b) for (_, a), (_, b) in zip(one, other, strict=True))


def test_ranks_augment_differently(small: LabelledImages) -> None:
    twins = image_set(small.image_dir, [Item("1.jpg", tuple(small.sizes_hw[1]), [[5, 5, 30, 30, 1]])] * 2)
    one, other = (next(train_loader(twins, rank=rank, world_size=2).epoch()) for rank in (0, 1))
    assert not torch.equal(one.images, other.images)


def test_a_set_smaller_than_a_batch_trains_and_one_smaller_than_the_world_is_refused(small: LabelledImages) -> None:
    item = Item("1.jpg", tuple(small.sizes_hw[1]), [[5, 5, 30, 30, 1]])
    loader = train_loader(image_set(small.image_dir, [item]), batch_size=3)
    assert loader.steps_per_epoch == 1
    batch = next(loader.epoch())
    assert len(batch.images) == 3
    assert not torch.equal(batch.images[0], batch.images[1])
    with pytest.raises(ValueError, match="1 images with boxes: expected at least one for each of 2 ranks"):
        train_loader(image_set(small.image_dir, [item]), world_size=2)
    with pytest.raises(ValueError, match="0 images with boxes"):
        train_loader(image_set(small.image_dir, [item._replace(boxes=[])]))


@pytest.mark.parametrize("world_size", [1, 2, 3, 40])
def test_evaluation_gives_the_ranks_the_batches_of_one_rank_in_turns(small: LabelledImages, world_size: int) -> None:
    sizes = dict(zip(small.image_ids.tolist(), small.sizes_hw.tolist(), strict=True))
    loaders = [eval_loader(small, batch_size=4, rank=rank, world_size=world_size) for rank in range(world_size)]
    for _ in range(2):
        given = [list(loader) for loader in loaders]
        assert [len(part) for part in given] == [len(loader) for loader in loaders]
        flat = [batch for turn in zip_longest(*given) for batch in turn if batch is not None]
        assert [len(batch.image_ids) for batch in flat[:-1]] == [4] * (len(flat) - 1)
        assert torch.cat([batch.image_ids for batch in flat]).tolist() == small.image_ids.tolist()
        assert all([sizes[int(n)] for n in batch.image_ids] == batch.sizes_hw.tolist() for batch in flat)
    if world_size == 40:
        assert any(len(part) == 0 for part in given)


def test_a_pass_begins_anew_after_one_that_was_left(small: LabelledImages) -> None:
    loader = eval_loader(small)
    first = [batch for batch, _ in zip(loader, range(3), strict=False)]
    again = list(loader)
    assert torch.equal(first[0].image_ids, again[0].image_ids)
    assert len(again) == len(loader)
    assert torch.equal(torch.cat([batch.images for batch in loader]), torch.cat([batch.images for batch in again]))


# ---- state ----


@both_encoders
@pytest.mark.parametrize("steps_before", [0, 1, 4, 6, 12, 15])
def test_state_continues_with_the_very_next_batch(
    small: LabelledImages, steps_before: int, encode: Encode | None
) -> None:
    loader = train_loader(small, encode=encode, prefetch_batches=3)
    assert loader.steps_per_epoch == 6
    for _ in batches(loader, steps_before):
        pass
    state = loader.state()
    expected = list(batches(loader, 8))  # across the end of an epoch
    resumed = train_loader(small, encode=encode, prefetch_batches=1, num_threads=1, state=state)
    assert len(list(resumed.epoch())) == 6 - steps_before % 6
    resumed = train_loader(small, encode=encode, state=state)
    for (ids, batch), (resumed_ids, resumed_batch) in zip(expected, batches(resumed, 8), strict=True):
        assert ids == resumed_ids
        assert equal(batch, resumed_batch)
    assert resumed.state() == loader.state()


def test_state_of_an_epoch_left_by_break_continues_in_it(small: LabelledImages) -> None:
    loader = train_loader(small)
    seen = []
    for _ in loader.epoch():
        seen.append(loader.last_image_ids.tolist())
        if len(seen) == 2:
            break
    seen += [loader.last_image_ids.tolist() for _ in loader.epoch()]
    assert len(seen) == 6
    assert len(set(chain.from_iterable(seen))) == 23


def test_state_suits_another_augmentation(small: LabelledImages) -> None:
    loader = train_loader(small)
    next(loader.epoch())
    resumed = train_loader(small, UNCHANGED, state=loader.state())
    next(loader.epoch())
    next(resumed.epoch())
    assert loader.last_image_ids.tolist() == resumed.last_image_ids.tolist()


def test_state_of_other_data_or_arguments_is_refused(small: LabelledImages) -> None:
    state = train_loader(small).state()
    boxes_ltrb = small.boxes_ltrb.copy()
    boxes_ltrb[0, 0] += 1
    with pytest.raises(ValueError, match="data set"):
        train_loader(small._replace(boxes_ltrb=boxes_ltrb), state=state)
    with pytest.raises(ValueError, match="batch size = 4: expected 3"):
        train_loader(small, batch_size=3, state=state)
    with pytest.raises(ValueError, match="seed = 1: expected 2"):
        train_loader(small, seed=2, state=state)
    with pytest.raises(ValueError, match="rank = 0: expected 1"):
        train_loader(small, rank=1, world_size=2, state=state)
    with pytest.raises(ValueError, match="box encoder = 'dali': expected 'kernels'"):
        train_loader(small, encode=OWN_ENCODER, state=state)
    for garbage in (b"", b"abc", b"[]\nabc", b'{"step": 0}'):
        with pytest.raises(ValueError, match="state"):
            train_loader(small, state=garbage)


# ---- images against Pillow ----


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


def odd_image(path: Path) -> None:
    """Saves the image that the file's name asks for."""
    random = np.random.default_rng(3)
    colours = random.integers(0, 256, (8, 12, 3), dtype=np.uint8)
    image = Image.fromarray(colours).resize((96, 64), Image.Resampling.BICUBIC)
    rotated = Image.Exif()
    rotated[0x0112] = 6
    match path.stem:
        case "grey":
            image.convert("L").save(path)
        case "cmyk":
            image.convert("CMYK").save(path)
        case "progressive":
            image.save(path, progressive=True)
        case "palette":
            image.convert("P", palette=Image.Palette.ADAPTIVE).save(path)
        case "alpha":
            image.putalpha(Image.linear_gradient("L").resize(image.size))
            image.save(path)
        case "bilevel":
            image.convert("1").save(path)
        case "rotated":
            image.save(path, exif=rotated)
        case _:
            image.save(path)


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


def test_orientation_is_applied_only_where_asked(tmp_path: Path) -> None:
    odd_image(tmp_path / "rotated.jpg")
    stored = resized_by_pillow(tmp_path / "rotated.jpg", 32)
    images = image_set(tmp_path, [Item("rotated.jpg", (96, 64), [])])
    upright = next(iter(eval_loader(images, apply_orientation=True)))
    assert np.abs(pixels(upright.images)[0] - np.rot90(stored, -1)).mean() < 1.5
    assert upright.sizes_hw.tolist() == [[96, 64]]
    as_stored = next(iter(eval_loader(images)))
    assert np.abs(pixels(as_stored.images)[0] - stored).mean() < 1


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
def test_a_image_that_cannot_be_decoded_is_named(tmp_path: Path, name: str, damage: Any) -> None:
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
    with pytest.raises(ImageError, match=name):
        list(train_loader(images, UNCHANGED, batch_size=2).epoch())


def test_a_image_too_small_to_crop_is_named_and_the_smallest_allowed_works(tmp_path: Path) -> None:
    for side in (3, 4):
        Image.new("RGB", (50, side), "blue").save(tmp_path / f"{side}.png")
    sets = {side: image_set(tmp_path, [Item(f"{side}.png", (side, 50), [[0, 0, 50, side, 1]])] * 64) for side in (3, 4)}
    with pytest.raises(ValueError, match=r"3\.png: 50 x 3 pixels: expected larger"):
        train_loader(sets[3], SSD_CROP)
    assert len(list(train_loader(sets[4], SSD_CROP).epoch())) == 16
    assert len(list(train_loader(sets[3], UNCHANGED).epoch())) == 16


# ---- crops and flips ----


@pytest.mark.parametrize(("side", "num_possible"), [(0.97, 6), (0.89, 5), (0.77, 4), (0.62, 3), (0.45, 2), (0.31, 1)])
def test_the_seven_crop_options_are_equally_likely(ramp: Path, side: float, num_possible: int) -> None:
    """Every crop has one size, so that num_possible of the six conditions hold for a box that covers the image."""
    images = image_set(ramp, [Item("ramp.jpg", (256, 256), [[0, 0, 256, 256, 1]])] * 4000)
    augmentation = SSD_CROP._replace(crop_sides=(side, side))
    loader = train_loader(images, augmentation, batch_size=250, image_size=8)
    crops = np.concatenate([crops_of_ramp(batch.images) for batch in loader.epoch()])
    untouched = (np.abs(crops - [0, 0, 1, 1]) < 0.005).all(axis=1)
    centred = min(1.0, side / (1 - side)) ** 2  # chance that the crop holds the box's centre
    expected = 1 / (1 + num_possible * centred)
    assert untouched.mean() == pytest.approx(expected, abs=3 * np.sqrt(expected * (1 - expected) / 4000))


@pytest.mark.parametrize("min_iou", [0.1, 0.3, 0.5, 0.7, 0.9])
def test_all_boxes_overlap_the_crop_by_the_drawn_iou(ramp: Path, min_iou: float) -> None:
    boxes = np.array([[12, 10, 244, 246], [16, 8, 248, 240]])
    images = image_set(ramp, [Item("ramp.jpg", (256, 256), [[*box, 1] for box in boxes])] * 300)
    augmentation = SSD_CROP._replace(crop_min_ious=(min_iou,), crop_attempts=50)
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
    augmentation = SSD_CROP._replace(crop_min_ious=(0.0,))
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
    images = image_set(ramp, [Item("ramp.jpg", (256, 256), [[0, 0, 8, 8, 1]])] * 32)
    augmentation = SSD_CROP._replace(crop_min_ious=(0.9,), crop_allow_none=False)
    loader = train_loader(images, augmentation, encode=encode, batch_size=32)
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
    straight, flipped = train_loader(small, UNCHANGED), train_loader(small, UNCHANGED._replace(flip_probability=1.0))
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
    images = image_set(ramp, [Item("ramp.jpg", (256, 256), [[0, 0, 200, 200, 1]])] * 800)
    loader = train_loader(images, UNCHANGED._replace(flip_probability=0.5), batch_size=200, image_size=8)
    levels = np.concatenate([pixels(batch.images) for batch in loader.epoch()])
    assert (levels[:, 4, 0, 0] > levels[:, 4, 7, 0]).mean() == pytest.approx(0.5, abs=0.055)


# ---- colours ----


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
            found = colours_after(ramp, UNCHANGED._replace(**change))[0]
            assert found == pytest.approx(adjust(plain, factor).flatten().tolist(), abs=1.5), (name, factor)


def test_contrast_pulls_towards_the_middle_before_brightness(ramp: Path) -> None:
    found = colours_after(ramp, UNCHANGED._replace(contrast=(0.5, 0.5), brightness=(1.1, 1.1)))[0]
    assert found == pytest.approx([(128 + (value - 128) * 0.5) * 1.1 for value in (150, 90, 120)], abs=1)


def test_hue_turns_up_to_its_limit_both_ways(ramp: Path) -> None:
    found = colours_after(ramp, UNCHANGED._replace(hue_degrees=18.0), count=500)
    to_chroma = np.array([[0.596, -0.274, -0.322], [0.211, -0.523, 0.312]])  # I and Q of YIQ
    before, after = to_chroma @ [150, 90, 120], found @ to_chroma.T
    turns = np.degrees(np.angle((after[:, 0] + 1j * after[:, 1]) / complex(*before)))
    assert np.abs(turns).max() < 18.7  # pixels are rounded to integers
    assert turns.min() < -16
    assert turns.max() > 16
    assert np.abs(turns.mean()) < 2


def test_factors_fill_their_range(ramp: Path) -> None:
    found = colours_after(ramp, UNCHANGED._replace(brightness=(0.875, 1.125)), count=500)[:, 0] / 150
    assert found.min() == pytest.approx(0.875, abs=0.01)
    assert found.max() == pytest.approx(1.125, abs=0.01)
    assert np.histogram(found, bins=5, range=(0.875, 1.125))[0].min() > 60


# ---- targets ----


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
    given: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []

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


def test_boxes_that_a_crop_leaves_without_area_are_dropped_before_encoding() -> None:
    table = torch.tensor([[[0.1, 0.2, 0.5, 0.6], [0.3, 0.3, 0.3, 0.9]], [[0.2, 0.8, 0.4, 0.8], [0.0, 0.0, 0.0, 0.0]]])
    boxes, labels, offsets = _ragged(table, torch.tensor([[3, 4], [5, 0]], dtype=torch.int32), CPU)
    assert boxes.tolist() == table[0, :1].tolist()
    assert (labels.tolist(), offsets.tolist()) == ([3], [0, 1, 1])


def test_the_recipe_names_the_encoder_and_auto_is_ours_on_the_cpu(synthetic_set: Path) -> None:
    images = load_coco(synthetic_set / "annotations" / "instances_train2017.json", synthetic_set / "train2017")
    states = {}
    for setting in ("auto", "dali", "kernels"):
        config = tiny_config([f"data.box_encoder={setting}"])
        with make_train_loader(config, images, model_anchors(config.model), CPU, World()) as loader:
            states[setting] = loader.state().partition(b"\n")[0]
    assert b'"box encoder": "dali"' in states["dali"]
    assert b'"box encoder": "kernels"' in states["kernels"]
    assert states["auto"] == states["kernels"]
    assert box_encoder("auto", torch.device("cuda")) == "dali"


def test_in_training_ties_fall_as_in_the_mlperf_reference() -> None:
    config = load_config(REPOSITORY / "configs" / "ssd300.toml", ["data.box_encoder=kernels"])
    anchors, model = model_anchors(config.model), config.model
    corners = torch.rand(64, 2, generator=torch.Generator().manual_seed(0)) * 0.98
    boxes = torch.cat((corners, corners + 0.02), dim=1)  # so small that they lie within several anchors of an area
    ground_truths = boxes, torch.arange(1, 65, dtype=torch.int32), torch.arange(65)
    encode = make_encode(config, anchors)
    assert encode is not None
    labels = encode(*ground_truths)[1]
    order = reference_order(grid_sizes=model.grid_sizes(), anchors_per_cell=model.anchors_per_cell())
    assert torch.equal(labels, encode_boxes(*ground_truths, anchors, tie_ranks=order).labels)
    assert not torch.equal(labels, encode_boxes(*ground_truths, anchors).labels)


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


# ---- synthetic batches ----


def synthetic(state: bytes | None = None, **changes: Any) -> SyntheticTrainLoader:
    arguments: dict[str, Any] = {
        "num_anchors": 8732,
        "num_classes": 80,
        "image_size": 32,
        "batch_size": 16,
        "device": CPU,
        "steps_per_epoch": 5,
        "seed": 0,
    }
    return SyntheticTrainLoader(**(arguments | changes), state=state)


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


def test_synthetic_state_continues_within_the_epoch() -> None:
    loader = synthetic()
    assert len([batch for batch, _ in zip(loader.epoch(), range(3), strict=False)]) == 3
    resumed = synthetic(state=loader.state())
    remaining = len(list(loader.epoch()))
    assert len(list(resumed.epoch())) == remaining
    assert len(list(resumed.epoch())) == 5
    assert resumed.state() == synthetic().state()
    for bad in (b"abc", b"[]", synthetic(steps_per_epoch=4).state()):
        with pytest.raises(ValueError, match="steps per epoch = 5"):
            synthetic(state=bad)


@pytest.mark.parametrize("world_size", [1, 3, 12])
def test_synthetic_evaluation_gives_every_id_once(world_size: int) -> None:
    arguments: dict[str, Any] = {"num_images": 11, "image_size": 16, "batch_size": 4, "device": CPU, "seed": 0}
    loaders = [SyntheticEvalLoader(**arguments, rank=rank, world_size=world_size) for rank in range(world_size)]
    given = [batch for loader in loaders for batch in loader]
    assert len(given) == sum(len(loader) for loader in loaders)
    assert torch.cat([batch.image_ids for batch in given]).tolist() == list(range(11))
    for batch in given:
        assert batch.images.shape == (len(batch.image_ids), 3, 16, 16)
        assert batch.images.is_contiguous(memory_format=torch.channels_last)
        assert batch.sizes_hw.dtype == torch.int32
        assert batch.sizes_hw.shape == (len(batch.image_ids), 2)


def test_synthetic_batches_need_no_dali() -> None:
    code = (
        "import sys; sys.modules['nvidia'] = None; import torch; from dali_pipelines.synthetic import *; "
        "loader = SyntheticEvalLoader(num_images=3, image_size=8, batch_size=2, device=torch.device('cpu'), seed=0); "
        "print(sum(len(batch.image_ids) for batch in loader))"
    )
    root = REPOSITORY
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root, check=False)
    assert result.stdout.strip() == "3", result.stderr
