"""The order of evaluation images, over ranks and passes, and their orientation."""

from itertools import zip_longest
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from pipelines import Item, eval_loader, image_set, odd_image, pixels, resized_by_pillow

from dali_pipelines.batch import LabelledImages
from dali_pipelines.evaluate import EvalLoader


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


@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_are_turned_as_they_should_be(tmp_path: Path, orientation: int) -> None:
    names = ("stored.png", "also stored.png")
    for name in names:
        odd_image(tmp_path / name)
    images = image_set(tmp_path, [Item(name, (64, 96), []) for name in names])
    with Image.open(tmp_path / names[0]) as image:
        image.getexif()[0x0112] = orientation
        expected = np.asarray(ImageOps.exif_transpose(image).resize((32, 32), Image.Resampling.BILINEAR), np.float64)
    turned = next(iter(eval_loader(images, orientations=np.array([1, orientation], np.uint8))))
    assert np.abs(pixels(turned.images)[1] - expected).mean() < 1
    assert np.abs(pixels(turned.images)[0] - resized_by_pillow(tmp_path / names[0], 32)).mean() < 1


def test_metadata_turn_nothing_by_themselves(tmp_path: Path) -> None:
    odd_image(tmp_path / "rotated.jpg")
    images = image_set(tmp_path, [Item("rotated.jpg", (64, 96), [])])
    as_stored = next(iter(eval_loader(images)))
    assert np.abs(pixels(as_stored.images)[0] - resized_by_pillow(tmp_path / "rotated.jpg", 32)).mean() < 1


def test_a_batch_that_is_not_full_decodes_no_image_twice(
    small: LabelledImages, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[list[np.ndarray]] = []
    original = EvalLoader._names

    def names(self: EvalLoader, batch: int) -> list[np.ndarray]:
        given.append(original(self, batch))
        return given[-1]

    monkeypatch.setattr(EvalLoader, "_names", names)
    loader = eval_loader(small, batch_size=7)
    list(loader)
    first_pass = [name.tobytes() for batch in given[: len(loader)] for name in batch]
    assert len(first_pass) == len(set(first_pass)) == len(small.file_names)
