"""Annotations and images: what is read, what is left out, what is refused and how."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from small_set import load, make_set

from ssd_fast.data import coco
from ssd_fast.data.annotations import Category, Instances, read_instances
from ssd_fast.data.coco import load_coco
from ssd_fast.data.images import find_images
from ssd_fast.data.policy import DataError

Edit = Callable[[dict[str, Any]], None]


def test_boxes_become_clipped_corners_with_contiguous_labels(tmp_path: Path) -> None:
    coco_set = load(tmp_path, make_set(tmp_path))
    assert coco_set.categories == (Category(3, "car"), Category(90, "kite"))
    images = coco_set.images
    assert images.file_names == ("7.jpg", "5.jpg")
    assert images.image_ids.tolist() == [7, 5]
    assert images.sizes_hw.tolist() == [[40, 60], [50, 30]]
    assert images.offsets.tolist() == [0, 1, 2]
    assert images.labels.tolist() == [1, 2]
    assert images.boxes_ltrb.tolist() == [[50, 30, 60, 40], [1, 2, 11, 22]]
    assert images.boxes_ltrb.dtype == np.float32


def test_crowds_count_only_when_asked_for(tmp_path: Path) -> None:
    images = load(tmp_path, make_set(tmp_path), with_crowds=True).images
    assert images.offsets.tolist() == [0, 1, 3]


def test_chosen_classes_give_the_labels_and_their_order(tmp_path: Path) -> None:
    coco_set = load(tmp_path, make_set(tmp_path), classes=["kite"])
    assert coco_set.categories == (Category(90, "kite"),)
    assert coco_set.images.offsets.tolist() == [0, 0, 1]
    with pytest.raises(DataError, match=r"does not have \['boat'\], which data\.classes names.*car"):
        load(tmp_path, make_set(tmp_path), classes=["kite", "boat"])


def test_images_without_boxes_are_kept(tmp_path: Path) -> None:
    instances = make_set(tmp_path)
    instances["annotations"] = []
    assert load(tmp_path, instances).images.offsets.tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda d: d.pop("images"), r"images is missing: expected COCO instances"),
        (lambda d: d["images"][0].update(width="wide"), r"images\[0\]\.width = 'wide': expected a whole number"),
        (lambda d: d["annotations"][2].update(category_id=4), r"annotations\[2\]\.category_id = 4: expected the id"),
        (lambda d: d["annotations"][0].update(image_id=8), r"annotations\[0\]\.image_id = 8: expected the id"),
        (lambda d: d["images"][0].update(id=5), r"images: expected unique ids, 5 occurs more than once"),
        (lambda d: d["categories"][0].update(id=3), r"categories: expected unique ids, 3 occurs"),
        (
            lambda d: d["categories"][0].update(name="car"),
            r"categories: expected unique names, annotations use 2 ids of 'car'",
        ),
        (lambda d: d.update(images=[], annotations=[]), r"images is empty"),
        (lambda d: d.update(categories=[], annotations=[]), r"categories is empty"),
    ],
)
def test_annotations_that_are_not_coco_are_refused_with_the_place(tmp_path: Path, edit: Edit, message: str) -> None:
    instances = make_set(tmp_path)
    edit(instances)
    with pytest.raises(DataError, match=r"instances\.json: " + message):
        load(tmp_path, instances)


def test_missing_and_malformed_annotation_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere\.json: no such file: expected COCO instances"):
        load_coco(tmp_path / "nowhere.json", tmp_path)
    with pytest.raises(DataError, match=r"instances\.json: not JSON"):
        load(tmp_path, '{"images": [')
    with pytest.raises(DataError, match=r"instances\.json: expected COCO instances"):
        load(tmp_path, "[]")


@pytest.mark.parametrize(
    "bbox",
    [[10, 10, 0, 5], [10, 10, 5, -1], [100, 10, 5, 5], [10, 10, 0.01, 5]],
    ids=["flat", "negative", "outside", "thin"],
)
def test_boxes_without_area_end_the_run_or_are_left_out_with_a_count(
    tmp_path: Path, bbox: list[float], caplog: pytest.LogCaptureFixture
) -> None:
    instances = make_set(tmp_path)
    instances["annotations"][1]["bbox"] = bbox
    with pytest.raises(DataError, match=r"annotations\[1\] of image 7: box .* has no area inside its image of 60 x 40"):
        load(tmp_path, instances, bad_boxes="error")
    with caplog.at_level(logging.WARNING):
        images = load(tmp_path, instances, bad_boxes="skip").images
    assert images.offsets.tolist() == [0, 0, 1]
    assert "left out 1 boxes" in caplog.text
    assert "image 7" in caplog.text


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-40])


def save_noise(path: Path, mode: str, format: str) -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (40, 60, len(mode)), dtype=np.uint8)
    Image.fromarray(pixels.squeeze() if len(mode) == 1 else pixels, mode=mode).save(path, format=format)


BAD_IMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (lambda path: path.unlink(), "no such image"),
    "empty": (lambda path: path.write_bytes(b""), "not an image: expected an 8-bit JPEG or PNG"),
    "text": (lambda path: path.write_text("this is no image at all"), "not an image"),
    "truncated": (truncate, "cannot be decoded: .*cut short"),
    "gif": (lambda path: save_noise(path, "L", "GIF"), "not an image: expected an 8-bit JPEG or PNG"),
    "16-bit": (
        lambda path: Image.fromarray(np.full((40, 60), 40000, dtype=np.uint16)).save(path, format="PNG"),
        "more than 8 bits a channel",
    ),
    "other size": (lambda path: Image.new("RGB", (61, 40)).save(path), "is 61 x 40 pixels: expected 60 x 40"),
}


@pytest.mark.parametrize("kind", BAD_IMAGES)
def test_a_bad_image_ends_the_run_or_is_left_out_with_a_count(
    tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    instances = make_set(tmp_path)
    damage, message = BAD_IMAGES[kind]
    damage(tmp_path / "7.jpg")
    with pytest.raises(DataError, match=rf"7\.jpg: .*{message}.*data\.bad_images = \"skip\" would leave"):
        load(tmp_path, instances, bad_images="error")
    with caplog.at_level(logging.WARNING):
        images = load(tmp_path, instances, bad_images="skip").images
    assert images.file_names == ("5.jpg",)
    assert images.boxes_ltrb.tolist() == [[1, 2, 11, 22]]
    assert images.offsets.tolist() == [0, 1]
    assert "left out 1 images" in caplog.text
    assert "7.jpg" in caplog.text


def test_a_set_without_any_usable_image_is_refused(tmp_path: Path) -> None:
    instances = make_set(tmp_path)
    for name in ("5.jpg", "7.jpg"):
        (tmp_path / name).unlink()
    with pytest.raises(DataError, match="none of its 2 images can be used"):
        load(tmp_path, instances, bad_images="skip")


@pytest.mark.parametrize(("mode", "format"), [("L", "JPEG"), ("CMYK", "JPEG"), ("RGBA", "PNG"), ("RGB", "PNG")])
def test_other_kinds_of_images_are_accepted(tmp_path: Path, mode: str, format: str) -> None:
    instances = make_set(tmp_path)
    save_noise(tmp_path / "7.jpg", {"RGBA": "RGBA"}.get(mode, mode), format)
    assert len(load(tmp_path, instances).images.file_names) == 2


def test_data_after_the_end_of_a_jpeg_does_no_harm(tmp_path: Path) -> None:
    instances = make_set(tmp_path)
    with (tmp_path / "7.jpg").open("ab") as file:
        file.write(bytes(10_000))
    assert len(load(tmp_path, instances).images.file_names) == 2


def save_rotated(path: Path) -> None:
    """An image stored as 60 x 40 that viewers show as 40 x 60."""
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (60, 40)).save(path, exif=exif)


def test_boxes_of_an_exif_rotated_image_must_refer_to_the_stored_pixels(tmp_path: Path) -> None:
    instances = make_set(tmp_path)
    save_rotated(tmp_path / "7.jpg")
    assert load(tmp_path, instances).images.sizes_hw[0].tolist() == [40, 60]
    instances["images"][0].update(width=40, height=60)
    with pytest.raises(DataError, match=r"is 60 x 40 pixels \(its EXIF tag rotates it; boxes must refer to the stored"):
        load(tmp_path, instances)


def test_found_images_have_the_size_that_viewers_show(tmp_path: Path) -> None:
    save_rotated(tmp_path / "a.jpg")
    Image.new("RGB", (60, 40)).save(tmp_path / "b.PNG")
    (tmp_path / "notes.txt").write_text("not taken from a folder")
    images = find_images([tmp_path], bad_images="error").images
    assert [Path(name).name for name in images.file_names] == ["a.jpg", "b.PNG"]
    assert images.sizes_hw.tolist() == [[60, 40], [40, 60]]


def test_a_pattern_finds_the_files_that_match_it_and_a_name_that_looks_like_one_is_itself(tmp_path: Path) -> None:
    (tmp_path / "below").mkdir()
    for name in ("b1.jpg", "b2.jpg", "c1.jpg", "below/b3.jpg", "b[12].jpg"):
        Image.new("RGB", (60, 40)).save(tmp_path / name)

    def names(pattern: str) -> list[str]:
        found = find_images([tmp_path / pattern], bad_images="error").images
        return [str(Path(name).relative_to(tmp_path.resolve())) for name in found.file_names]

    assert names("b?.jpg") == ["b1.jpg", "b2.jpg"]
    assert names("[bc]1.jpg") == ["b1.jpg", "c1.jpg"]
    assert names("b*") == ["b1.jpg", "b2.jpg", "b[12].jpg"]
    assert names("**/b3*") == ["below/b3.jpg"]
    assert names("b[12].jpg") == ["b[12].jpg"]
    with pytest.raises(DataError, match=r"d\*\.jpg: no such file or folder, and no file matches it as a pattern"):
        names("d*.jpg")


def test_paths_that_hold_no_images_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere\.jpg: no such file or folder"):
        find_images([tmp_path / "nowhere.jpg"], bad_images="error")
    with pytest.raises(DataError, match="a folder without images"):
        find_images([tmp_path], bad_images="error")
    (tmp_path / "bad.jpg").write_bytes(b"nothing")
    with pytest.raises(DataError, match=r"bad\.jpg: not an image"):
        find_images([tmp_path], bad_images="error")
    with pytest.raises(DataError, match="no usable image"):
        find_images([tmp_path], bad_images="skip")


def test_real_photographs_load_completely(coco_ccby: Path) -> None:
    coco_set = load_coco(
        coco_ccby / "annotations" / "instances_val2017.json",
        coco_ccby / "val2017",
        bad_boxes="error",
        bad_images="error",
    )
    assert len(coco_set.categories) == 80
    assert len(coco_set.images.file_names) == 64
    assert coco_set.categories[79] == Category(90, "toothbrush")


def test_what_was_found_in_a_large_file_is_kept_until_the_file_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(coco, "_LARGE_BYTES", 0)
    monkeypatch.setenv("SSD_FAST_CACHE", str(tmp_path / "cache"))
    read: list[Path] = []

    def counted(path: Path) -> Instances:
        read.append(path)
        return read_instances(path)

    def everything(options: dict[str, Any]) -> Any:
        caplog.clear()
        found = load(tmp_path, instances, **options)
        images = [np.asarray(part).tolist() for part in found.images[1:]]
        return found.categories, images, found.num_left_out_boxes, caplog.messages

    monkeypatch.setattr(coco, "read_instances", counted)
    instances = make_set(tmp_path)
    instances["annotations"][1]["bbox"] = [100, 100, 5, 5]
    for options, reads in (({}, 1), ({}, 1), ({"with_crowds": True}, 2), ({"classes": ["kite"]}, 3), ({}, 3)):
        monkeypatch.setattr(coco, "_LARGE_BYTES", 2**40)
        expected = everything(options)
        read.pop()
        monkeypatch.setattr(coco, "_LARGE_BYTES", 0)
        assert everything(options) == expected  # its time has changed, its content has not
        assert len(read) == reads
    instances["annotations"].pop()
    assert everything({})[1][-1] == [0, 0, 1]
    assert len(read) == 4
    next((tmp_path / "cache").iterdir()).write_bytes(b"damaged")
    assert everything({"with_crowds": True})[1][-1] == everything({})[1][-1] == [0, 0, 1]


@pytest.mark.parametrize(
    ("index", "key", "value"),
    [(0, "bbox", [1, 2, 10, 21]), (0, "area", 201), (2, "iscrowd", 0), (1, "category_id", 90)],
)
def test_every_change_by_which_detections_score_otherwise_tells_sets_apart(
    tmp_path: Path, index: int, key: str, value: Any
) -> None:
    instances = make_set(tmp_path)
    before = load(tmp_path, instances).digest()
    instances["info"] = "something else"
    assert load(tmp_path, instances).digest() == before
    instances["annotations"][index][key] = value
    assert load(tmp_path, instances).digest() != before
