"""The order of training images, over ranks and epochs, and the state that continues it."""

import json
from collections import Counter
from itertools import chain
from typing import Any

import numpy as np
import pytest
import torch
from pipelines import (
    CPU,
    OWN_ENCODER,
    UNCHANGED,
    Item,
    batches,
    both_encoders,
    equal,
    image_set,
    train_arguments,
    train_loader,
)

from dali_pipelines.augment import PIXEL_PARTS
from dali_pipelines.batch import LabelledImages
from dali_pipelines.train import CutInput, Encode, _ragged


@pytest.mark.parametrize(("world_size", "batch_size"), [(1, 4), (2, 4), (3, 2), (3, 30)])
def test_every_epoch_gives_each_image_with_boxes_equally_often(
    small: LabelledImages, world_size: int, batch_size: int
) -> None:
    with_boxes = set(small.image_ids[np.diff(small.offsets) > 0].tolist())
    assert len(with_boxes) == 23
    loaders = [
        train_loader(small, batch_size=batch_size, rank=rank, world_size=world_size) for rank in range(world_size)
    ]
    for _ in range(3):
        counts: Counter[int] = Counter()
        for loader in loaders:
            given = [loader.last_image_ids.tolist() for _ in loader.epoch()]
            assert len(given) == loader.steps_per_epoch == -(-23 // (world_size * batch_size))
            assert all(len(ids) == batch_size for ids in given)
            counts.update(chain.from_iterable(given))
        assert set(counts) == with_boxes
        assert max(counts.values()) - min(counts.values()) <= 1


@pytest.mark.parametrize(("batch_size", "twice"), [(15, 14), (32, 16)])
def test_an_image_comes_again_with_other_crops_and_colours(small: LabelledImages, batch_size: int, twice: int) -> None:
    items = [Item("1.jpg", tuple(small.sizes_hw[1]), [[5, 5, 30, 30, 1]])] * 16
    loader = train_loader(image_set(small.image_dir, items), batch_size=batch_size)
    given: dict[int, list[torch.Tensor]] = {}
    for batch in loader.epoch():
        for image_id, image in zip(loader.last_image_ids.tolist(), batch.images, strict=True):
            given.setdefault(image_id, []).append(image)
    assert sorted(map(len, given.values())) == [1] * (16 - twice) + [2] * twice
    assert not any(torch.equal(*images) for images in given.values() if len(images) == 2)


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


def test_a_set_smaller_than_the_ranks_trains_and_one_without_boxes_is_refused(small: LabelledImages) -> None:
    item = Item("1.jpg", tuple(small.sizes_hw[1]), [[5, 5, 30, 30, 1]])
    batches_of_ranks = []
    for rank in range(2):
        loader = train_loader(image_set(small.image_dir, [item]), batch_size=3, rank=rank, world_size=2)
        assert loader.steps_per_epoch == 1
        batches_of_ranks.append(next(loader.epoch()))
    images = torch.cat([batch.images for batch in batches_of_ranks])
    assert len(images.flatten(1).unique(dim=0)) == 6
    with pytest.raises(ValueError, match="no image has a box"):
        train_loader(image_set(small.image_dir, [item._replace(boxes=[])]))


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


def test_state_of_a_rank_continues_in_the_filled_batch(small: LabelledImages) -> None:
    arguments: dict[str, Any] = {"batch_size": 3, "rank": 2, "world_size": 3}
    loader = train_loader(small, **arguments)
    assert loader.steps_per_epoch == 3
    for _ in batches(loader, 5):
        pass
    resumed = train_loader(small, state=loader.state(), **arguments)
    for (ids, batch), (resumed_ids, resumed_batch) in zip(batches(loader, 4), batches(resumed, 4), strict=True):
        assert ids == resumed_ids
        assert equal(batch, resumed_batch)


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
    with pytest.raises(ValueError, match=f"other images or boxes than .*{small.image_dir}.*: expected"):
        train_loader(small._replace(boxes_ltrb=boxes_ltrb), state=state)
    with pytest.raises(ValueError, match="batch size = 4: expected 3"):
        train_loader(small, batch_size=3, state=state)
    with pytest.raises(ValueError, match="seed = 1: expected 2"):
        train_loader(small, seed=2, state=state)
    with pytest.raises(ValueError, match="rank = 0: expected 1"):
        train_loader(small, rank=1, world_size=2, state=state)
    with pytest.raises(ValueError, match="box encoder = 'dali': expected 'kernels'"):
        train_loader(small, encode=OWN_ENCODER, state=state)
    header, _, rest = state.partition(b"\n")
    of_the_coco_reader = {key: value for key, value in json.loads(header).items() if key != "format"} | {"step": 0}
    with pytest.raises(ValueError, match=r"format = 1: expected 3: another version .* begin a new run"):
        train_loader(small, state=json.dumps(of_the_coco_reader).encode() + b"\n" + rest)
    for garbage in (b"", b"abc", b"[]\nabc", b'{"step": 0}'):
        with pytest.raises(ValueError, match="state"):
            train_loader(small, state=garbage)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("part", PIXEL_PARTS)
def test_a_pipeline_cut_after_a_part_goes_on_beyond_an_epoch(small: LabelledImages, part: str) -> None:
    loader = CutInput(part, **train_arguments(small))
    for _ in range(2 * loader.steps_per_epoch):
        loader.run_batch()


def test_boxes_that_a_crop_leaves_without_area_are_dropped_before_encoding() -> None:
    table = torch.tensor([[[0.1, 0.2, 0.5, 0.6], [0.3, 0.3, 0.3, 0.9]], [[0.2, 0.8, 0.4, 0.8], [0.0, 0.0, 0.0, 0.0]]])
    boxes, labels, offsets = _ragged(table, torch.tensor([[3, 4], [5, 0]], dtype=torch.int32), CPU)
    assert boxes.tolist() == table[0, :1].tolist()
    assert (labels.tolist(), offsets.tolist()) == ([3], [0, 1, 1])
