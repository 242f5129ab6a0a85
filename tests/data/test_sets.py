"""The two sets of a recipe together: what fits, and what is refused before an image is looked at."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from small_set import make_set
from tiny import tiny_config

from ssd_fast.data.policy import DataError
from ssd_fast.data.sets import TrainAndVal, load_sets
from ssd_fast.distributed.world import World

Edit = Callable[[dict[str, Any]], object]


def load(folder: Path, edit_val: Edit = lambda val: None, classes: str = "[]") -> TrainAndVal:
    """Both sets are the small one, of which the validation set is edited."""
    for name, edit in (("train", lambda train: None), ("val", edit_val)):
        instances = make_set(folder)
        edit(instances)
        (folder / f"{name}.json").write_text(json.dumps(instances))
    places = [f'data.{name}_annotations="{name}.json"' for name in ("train", "val")]
    images = [f'data.{name}_images="."' for name in ("train", "val")]
    changes = [*places, *images, *([f"data.classes={classes}"] if classes != "[]" else [])]
    return load_sets(tiny_config(changes), folder, World())


def renumber(instances: dict[str, Any]) -> None:
    ids = {90: 1, 3: 2}
    for category in instances["categories"]:
        category["id"] = ids[category["id"]]
    for annotation in instances["annotations"]:
        annotation["category_id"] = ids[annotation["category_id"]]


def without_cars(instances: dict[str, Any]) -> None:
    instances["categories"] = [item for item in instances["categories"] if item["name"] != "car"]
    instances["annotations"] = [item for item in instances["annotations"] if item["category_id"] != 3]


def test_classes_of_the_two_sets_are_matched_by_name(tmp_path: Path) -> None:
    train, val = load(tmp_path, renumber)
    assert [category.name for category in train.categories] == ["car", "kite"]
    assert train.categories != val.categories
    assert val.ids_of(train.categories).tolist() == [2, 1]


def test_a_validation_set_that_lacks_a_class_is_refused_before_images_are_looked_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ssd_fast.data.coco.inspect_images", None)  # not called
    with pytest.raises(
        DataError, match=r"val\.json: lacks the categories \['car'\]: expected all of \['car', 'kite'\]"
    ):
        load(tmp_path, without_cars)


def test_a_validation_set_may_lack_what_is_not_learned(tmp_path: Path) -> None:
    assert len(load(tmp_path, without_cars, classes='["kite"]').train.categories) == 1


@pytest.mark.parametrize(
    "edit",
    [
        lambda val: val.pop("annotations"),
        lambda val: val.update(annotations=[item for item in val["annotations"] if item["category_id"] != 90]),
        lambda val: [item.update(bbox=None) for item in val["annotations"]],
    ],
    ids=["no annotations", "none of the classes", "none that can be read"],
)
def test_a_validation_set_without_a_box_to_score_by_is_refused(tmp_path: Path, edit: Edit) -> None:
    with pytest.raises(DataError, match=r"val\.json: no image has a box of these classes to score detections by"):
        load(tmp_path, edit, classes='["kite"]')


def test_an_area_that_is_no_number_is_refused_at_the_start(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"val\.json: annotations\[1\]\.area = 'large': expected a number"):
        load(tmp_path, lambda val: val["annotations"][1].update(area="large"))
