"""Images looked at before training: by all ranks together, and not again while they stay as they are."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dali_pipelines.batch import LabelledImages
from ssd_fast.data import inspection
from ssd_fast.data.inspection import inspect_images
from ssd_fast.distributed.world import World

SIZE_HW = (30, 40)


def labelled(folder: Path) -> LabelledImages:
    names = tuple(sorted(path.name for path in folder.iterdir()))
    return LabelledImages(
        image_dir=folder,
        file_names=names,
        image_ids=np.arange(len(names)),
        sizes_hw=np.array([SIZE_HW] * len(names), np.int32),
        boxes_ltrb=np.zeros((0, 4), np.float32),
        labels=np.zeros(0, np.int32),
        offsets=np.zeros(len(names) + 1, np.int64),
    )


@pytest.fixture
def images(tmp_path: Path) -> LabelledImages:
    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(10):
        Image.new("RGB", SIZE_HW[::-1], (number, 0, 0)).save(folder / f"{number}.jpg")
    return labelled(folder)


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Paths of the files that were opened."""
    paths, original = [], os.open

    def counted(path: Any, *arguments: Any, **options: Any) -> int:
        if str(path).endswith(".jpg"):
            paths.append(str(path))
        return original(path, *arguments, **options)

    monkeypatch.setattr(os, "open", counted)
    return paths


class OneOfSeveral(World):
    """A rank whose others have been asked before."""

    def __init__(self, rank: int, size: int, shares: list[Any]) -> None:
        super().__init__(rank, size, rank, size)
        self._shares = shares

    def gather(self, value: Any) -> list[Any]:
        self._shares.insert(0, value)  # ranks come in reverse
        return self._shares if self.is_main else []


def test_each_rank_opens_its_share_and_the_first_knows_all_problems(images: LabelledImages, opened: list[str]) -> None:
    (images.image_dir / "7.jpg").write_bytes(b"no image")
    (images.image_dir / "2.jpg").unlink()
    shares: list[Any] = []
    for rank in reversed(range(4)):
        before = len(opened)
        problems = inspect_images(images, OneOfSeveral(rank, 4, shares))
        assert len(opened) - before <= 3
    assert list(problems) == [2, 7]
    assert problems[2].endswith("2.jpg: no such image")
    assert "7.jpg: not an image" in problems[7]
    assert len(opened) == len(set(opened)) == 10


def test_images_of_a_large_set_are_opened_again_only_when_they_have_changed(
    images: LabelledImages, opened: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(inspection, "_LARGE", 1)
    monkeypatch.setenv("SSD_FAST_CACHE", str(tmp_path / "cache"))
    (images.image_dir / "5.jpg").write_bytes(b"no image")
    for number, expected in enumerate((10, 1, 2)):
        if number == 2:
            changed = images.image_dir / "3.jpg"
            changed.write_bytes(changed.read_bytes()[:-200])  # cut short since
        opened.clear()
        problems = inspect_images(images, None)
        assert len(opened) == expected
        assert list(problems) == ([3, 5] if number == 2 else [5])
    (next((tmp_path / "cache").iterdir())).write_bytes(b"damaged")
    opened.clear()
    assert list(inspect_images(images, None)) == [3, 5]
    assert len(opened) == 10


def test_a_small_set_leaves_nothing_in_the_cache(
    images: LabelledImages, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("SSD_FAST_CACHE", str(tmp_path / "cache"))
    assert inspect_images(images, None) == {}
    assert not (tmp_path / "cache").exists()
