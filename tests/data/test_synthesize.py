import errno
import itertools
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO

from ssd_fast.data import synthesize as module
from ssd_fast.data.synthesize import KINDS, OTHER_KINDS, SyntheticImage, annotate, make_image, synthesize

SMALL, LARGE = 32**2, 96**2


@pytest.fixture(scope="module")
def small_set(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("synthesize") / "set"
    synthesize(directory, num_images=24, seed=7)
    return directory


@pytest.fixture(scope="module")
def synthetic_images() -> list[SyntheticImage]:
    return [make_image(11, number) for number in range(1, 201)]


@pytest.fixture(scope="module")
def annotations(synthetic_images: list[SyntheticImage]) -> list[list[dict[str, Any]]]:
    return [annotate(synthetic, number) for number, synthetic in enumerate(synthetic_images, 1)]


def contents(directory: Path) -> dict[str, bytes]:
    return {str(f.relative_to(directory)): f.read_bytes() for f in directory.rglob("*") if f.is_file()}


@pytest.mark.parametrize("split", ["train2017", "val2017"])
def test_set_has_coco_layout_and_loads_with_pycocotools(small_set: Path, split: str) -> None:
    coco = COCO(small_set / "annotations" / f"instances_{split}.json")
    assert [(c["id"], c["name"]) for c in coco.loadCats(coco.getCatIds())] == [(k.category_id, k.name) for k in KINDS]
    assert {"info", "licenses"} <= coco.dataset.keys()
    images = coco.loadImgs(coco.getImgIds())
    assert {i["file_name"] for i in images} == {f.name for f in (small_set / split).iterdir()}
    for image in images:
        with Image.open(small_set / split / image["file_name"]) as stored:
            stored.load()
            assert stored.format == "JPEG"
            assert stored.size == (image["width"], image["height"])
    assert {a["image_id"] for a in coco.anns.values()} <= {i["id"] for i in images}
    assert {a["category_id"] for a in coco.anns.values()} <= set(coco.getCatIds())


def test_category_ids_are_not_contiguous() -> None:
    assert [k.category_id for k in KINDS] != list(range(1, len(KINDS) + 1))


def test_other_classes_differ_in_name_number_and_look(tmp_path: Path) -> None:
    for kind, other in itertools.product(KINDS, OTHER_KINDS):
        assert (kind.name, kind.category_id) != (other.name, other.category_id)
        assert kind.category_id != other.category_id
        assert (kind.outline is other.outline) + (kind.texture is other.texture) < 2
    synthesize(tmp_path / "set", num_images=10, seed=11, kinds=OTHER_KINDS)
    coco = COCO(tmp_path / "set" / "annotations" / "instances_train2017.json")
    assert [category["name"] for category in coco.loadCats(coco.getCatIds())] == [kind.name for kind in OTHER_KINDS]


def test_a_fifth_is_for_validation_and_ids_are_unique_over_both_splits(small_set: Path) -> None:
    train, val = (COCO(small_set / "annotations" / f"instances_{s}2017.json") for s in ("train", "val"))
    assert (len(train.imgs), len(val.imgs)) == (19, 5)
    assert not train.imgs.keys() & val.imgs.keys()
    assert not train.anns.keys() & val.anns.keys()
    assert min(*train.anns, *val.anns) > 0, "pycocotools takes annotation id 0 for no match"


def test_same_seed_gives_the_same_bytes_and_a_smaller_set_is_a_part_of_a_larger_one(
    small_set: Path, tmp_path: Path
) -> None:
    synthesize(tmp_path / "same", num_images=24, seed=7)
    synthesize(tmp_path / "fewer", num_images=9, seed=7)
    whole = contents(small_set)
    assert contents(tmp_path / "same") == whole
    jpegs = {name: data for name, data in contents(tmp_path / "fewer").items() if name.endswith(".jpg")}
    assert len(jpegs) == 9
    assert jpegs.items() <= whole.items()


def test_images_differ_between_seeds_and_between_numbers() -> None:
    seen = {make_image(seed, number).image.tobytes() for seed in (0, 1) for number in (1, 2, 3)}
    assert len(seen) == 6


def test_smallest_set_has_one_image_in_each_split(tmp_path: Path) -> None:
    synthesize(tmp_path / "set", num_images=2, seed=0)
    for split in ("train2017", "val2017"):
        assert len(list((tmp_path / "set" / split).iterdir())) == 1
        assert len(json.loads((tmp_path / "set/annotations" / f"instances_{split}.json").read_text())["images"]) == 1


def test_boxes_lie_inside_the_image_and_bound_the_visible_part(
    synthetic_images: list[SyntheticImage], annotations: list[list[dict[str, Any]]]
) -> None:
    for synthetic, entries in zip(synthetic_images, annotations, strict=True):
        width, height = synthetic.image.size
        assert synthetic.owners.shape == (height, width)
        assert len(entries) == len(synthetic.things)
        for index, entry in enumerate(entries):
            left, top, w, h = (int(n) for n in entry["bbox"])
            assert [left, top, w, h] == entry["bbox"]
            assert 0 <= left < left + w <= width
            assert 0 <= top < top + h <= height
            mask = synthetic.owners == index + 1
            inside = mask[top : top + h, left : left + w]
            assert 0 < entry["area"] == mask.sum() == inside.sum() <= w * h
            assert all(edge.any() for edge in (inside[0], inside[-1], inside[:, 0], inside[:, -1]))


def test_the_last_object_is_painted_exactly_within_its_box() -> None:
    checked = 0
    for number in range(1, 60):
        synthetic = make_image(5, number)
        if not synthetic.things:
            continue
        checked += 1
        width, height = synthetic.image.size
        canvas = np.full((height, width, 3), 7, np.float32)
        for figure in synthetic.things[-1]:
            module._paint(canvas, figure)
        rows, columns = np.nonzero(canvas[..., 0] < 4)
        left, top, w, h = annotate(synthetic, number)[-1]["bbox"]
        assert (columns.min(), rows.min()) == (left, top)
        assert (columns.max() + 1, rows.max() + 1) == (left + w, top + h)
    assert checked > 40


def test_every_object_shows_a_fair_part_of_itself(synthetic_images: list[SyntheticImage]) -> None:
    for synthetic in synthetic_images:
        for index, thing in enumerate(synthetic.things):
            whole = module._claim(np.zeros_like(synthetic.owners), thing, 1)
            assert (synthetic.owners == index + 1).sum() >= module.MIN_VISIBLE * whole


def test_200_images_hold_every_class_size_range_and_difficulty(
    synthetic_images: list[SyntheticImage], annotations: list[list[dict[str, Any]]]
) -> None:
    everything = [entry for entries in annotations for entry in entries]
    objects = [entry for entry in everything if not entry["iscrowd"]]
    classes = Counter(entry["category_id"] for entry in objects)
    assert classes.keys() == {k.category_id for k in KINDS}
    assert min(classes.values()) > 0.1 * len(objects)
    areas = np.array([entry["area"] for entry in objects])
    assert 0.05 < (areas < SMALL).mean() < 0.25
    assert 0.03 < (areas > LARGE).mean() < 0.25
    assert 3 <= len(everything) - len(objects) <= 30, "crowds"
    counts = Counter(len(entries) for entries in annotations)
    assert 5 <= counts[0] <= 40, "images without objects"
    assert max(counts) >= 6
    modes = Counter(synthetic.image.mode for synthetic in synthetic_images)
    assert modes["L"] >= 1
    assert modes["RGB"] > 180
    ratios = [synthetic.image.width / synthetic.image.height for synthetic in synthetic_images]
    assert min(ratios) < 0.7
    assert max(ratios) > 1.4
    assert len({synthetic.quality for synthetic in synthetic_images}) > 10


def test_a_good_share_of_objects_is_hidden_in_part_or_cut_by_the_edge(synthetic_images: list[SyntheticImage]) -> None:
    hidden = cut = total = 0
    for synthetic in synthetic_images:
        for index, thing in enumerate(synthetic.things):
            alone = np.zeros_like(synthetic.owners)
            whole = module._claim(alone, thing, 1)
            total += 1
            hidden += (synthetic.owners == index + 1).sum() < alone.sum()
            cut += len(thing) == 1 and alone.sum() < whole
    assert 0.15 < hidden / total < 0.6
    assert 0.15 < cut / total < 0.6


def test_colour_alone_tells_no_class(synthetic_images: list[SyntheticImage]) -> None:
    """The figures of every class have the same mean colour, a middle grey."""
    figures = [figure for synthetic in synthetic_images for thing in synthetic.things for figure in thing]
    for kind in KINDS:
        mean = np.mean([figure.colours for figure in figures if figure.kind is kind], (0, 1))
        assert mean == pytest.approx(0.5, abs=0.08)


def test_progress_counts_every_image(tmp_path: Path) -> None:
    counts: list[int] = []
    synthesize(tmp_path / "set", num_images=6, seed=0, on_progress=counts.append)
    assert counts == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize(("arguments", "message"), [((1, 0), "num_images = 1"), ((5, -1), "seed = -1")])
def test_arguments_out_of_range_are_refused(tmp_path: Path, arguments: tuple[int, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        synthesize(tmp_path / "set", num_images=arguments[0], seed=arguments[1])
    assert list(tmp_path.iterdir()) == []


def test_a_folder_with_content_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "mine.txt").write_text("kept")
    with pytest.raises(ValueError, match=str(tmp_path / "set")):
        synthesize(tmp_path / "set", num_images=2, seed=0)
    assert contents(tmp_path) == {"set/mine.txt": b"kept"}


def test_a_file_in_the_way_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "set").write_text("kept")
    with pytest.raises(ValueError, match="expected the name of a folder"):
        synthesize(tmp_path / "set", num_images=2, seed=0)
    assert contents(tmp_path) == {"set": b"kept"}


def test_an_empty_folder_and_missing_parents_are_accepted(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    synthesize(tmp_path / "empty", num_images=2, seed=0)
    synthesize(tmp_path / "a" / "b", num_images=2, seed=0)
    assert contents(tmp_path / "empty") == contents(tmp_path / "a" / "b")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "empty"]


def test_an_interrupted_run_leaves_nothing(tmp_path: Path) -> None:
    def interrupt(done: int) -> None:
        assert not (tmp_path / "set").exists(), "the set appears only when it is complete"
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        synthesize(tmp_path / "set", num_images=40, seed=0, on_progress=interrupt)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_reported_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save = Image.Image.save

    def full(image: Image.Image, path: Path, **options: Any) -> None:
        if path.name == "000000000004.jpg":
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        save(image, path, **options)

    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(OSError, match="No space left"):
        synthesize(tmp_path / "set", num_images=10, seed=0)
    assert list(tmp_path.iterdir()) == []
