"""Images looked at before training: by all ranks together, and not again while they stay as they are."""

import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dali_pipelines.batch import LabelledImages
from ssd_fast.data import inspection
from ssd_fast.data.images import image_problem
from ssd_fast.data.inspection import inspect_images, jpeg_size
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
    assert len(opened) == len(set(opened)) == 9


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


def jpeg(mode: str = "RGB", **options: Any) -> bytes:
    pixels = np.random.default_rng(0).integers(0, 256, (*SIZE_HW, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(buffer, "JPEG", **options)
    return buffer.getvalue()


def with_thumbnail() -> bytes:
    """A JPEG in whose header another whole one lies."""
    content, thumbnail = jpeg(), jpeg(quality=5)
    segment = b"Exif\0\0" + thumbnail
    return content[:2] + b"\xff\xe1" + (len(segment) + 2).to_bytes(2) + segment + content[2:]


WHOLE: dict[str, Callable[[], bytes]] = {
    "baseline": jpeg,
    "progressive": lambda: jpeg(progressive=True),
    "grey": lambda: jpeg("L"),
    "restart markers": lambda: jpeg(restart_marker_blocks=1),
    "comment": lambda: jpeg(comment=b"\xff\xd9" * 100),
    "profile": lambda: jpeg(icc_profile=b"\xff\xd9" * 5000),
    "thumbnail": with_thumbnail,
    "bytes after the end": lambda: jpeg() + b"\0" * 100,
}


@pytest.mark.parametrize("kind", WHOLE)
def test_a_jpeg_is_taken_for_whole_exactly_when_it_is(tmp_path: Path, kind: str) -> None:
    content = WHOLE[kind]()
    path = tmp_path / "image.jpg"
    path.write_bytes(content)
    assert jpeg_size(str(path)) == SIZE_HW
    assert image_problem(path, *SIZE_HW) is None
    end = content.rindex(b"\xff\xd9")
    for cut in {2, 20, end // 2, end - 50, end, end + 1}:
        path.write_bytes(content[:cut])
        assert jpeg_size(str(path)) is None


@pytest.mark.parametrize("content", [b"", b"\xff\xd8", b"\xff" * 100, b"\xff\xd8\xff\xc0\0\0" * 50, b"\x89PNG" * 9])
def test_anything_else_is_left_to_pillow(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "image.jpg"
    path.write_bytes(content)
    assert jpeg_size(str(path)) is None
    for other in (jpeg("CMYK"), jpeg()[:2] + jpeg()[2:].replace(b"\xff\xc0", b"\xff\xc9")):
        path.write_bytes(other)
        assert jpeg_size(str(path)) is None


def test_every_photograph_has_the_size_that_pillow_reads(coco_ccby: Path) -> None:
    known = 0
    for path in sorted((coco_ccby / "val2017").iterdir()):
        size = jpeg_size(str(path))
        with Image.open(path) as image:
            assert size in (None, (image.height, image.width))
        known += size is not None
    assert known > 50
