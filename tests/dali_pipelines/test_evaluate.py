"""The order of evaluation images, over ranks and passes, and their orientation."""

from itertools import zip_longest
from pathlib import Path

import numpy as np
import pytest
import torch
from pipelines import Item, eval_loader, image_set, odd_image, pixels, resized_by_pillow

from dali_pipelines.batch import LabelledImages


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


def test_orientation_is_applied_only_where_asked(tmp_path: Path) -> None:
    odd_image(tmp_path / "rotated.jpg")
    stored = resized_by_pillow(tmp_path / "rotated.jpg", 32)
    images = image_set(tmp_path, [Item("rotated.jpg", (96, 64), [])])
    upright = next(iter(eval_loader(images, apply_orientation=True)))
    assert np.abs(pixels(upright.images)[0] - np.rot90(stored, -1)).mean() < 1.5
    assert upright.sizes_hw.tolist() == [[96, 64]]
    as_stored = next(iter(eval_loader(images)))
    assert np.abs(pixels(as_stored.images)[0] - stored).mean() < 1
