"""A detector's weights in a network of other classes: by name where names are known."""

from pathlib import Path
from typing import Any

import pytest
import torch
from reference_weights import BOXES_PER_CELL, CONFIG, equal, reference_state
from repository import REPOSITORY
from torch import Tensor

from ssd_fast.checkpoints.checkpoint import FORMAT
from ssd_fast.checkpoints.finetuning import load_for_finetuning
from ssd_fast.checkpoints.weights import load_weights
from ssd_fast.config.sections import Config
from ssd_fast.data.annotations import Category, read_categories
from ssd_fast.data.coco_classes import COCO_CATEGORIES
from ssd_fast.evaluation.detector import load_detector
from ssd_fast.model.ssd import SSD


def checkpoint(model: SSD, classes: list[str]) -> dict[str, Any]:
    """What of a checkpoint counts here."""
    categories = [{"id": number, "name": name} for number, name in enumerate(classes)]
    return {"format": FORMAT, "model": model.state_dict(), "categories": categories}


def rows(state: dict[str, Tensor], level: int, kind: str) -> Tensor:
    """A class head as [boxes, classes, ...]."""
    return state[f"class_heads.{level}.{kind}"].unflatten(0, (BOXES_PER_CELL[level], -1))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (["a", "b", "c"], ["c", "a", "b"]),
        (["a", "b", "c"], ["d", "b"]),
        (["a"], ["x", "a", "y", "z"]),
        (["a", "b"], ["c", "d"]),
    ],
)
def test_classes_are_taken_over_by_their_names(old: list[str], new: list[str]) -> None:
    source, model = SSD(CONFIG, num_classes=len(old)), SSD(CONFIG, num_classes=len(new))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    adapted = load_for_finetuning(model, checkpoint(source, old), new)
    assert adapted.kept == [name for name in new if name in old]
    assert adapted.new == [name for name in new if name not in old]
    assert adapted.dropped == [name for name in old if name not in new]
    assert (adapted.fresh_heads, adapted.by_position) == ([], False)
    after, theirs = model.state_dict(), source.state_dict()
    for name, tensor in after.items():
        if not name.startswith("class_heads"):
            assert torch.equal(tensor, theirs[name]), name
    for level in range(len(BOXES_PER_CELL)):
        for kind in ("weight", "bias"):
            for row, name in enumerate(["background", *new]):
                expected = theirs if name in ["background", *old] else before
                position = ["background", *old].index(name) if expected is theirs else row
                found = rows(after, level, kind)[:, row]
                assert torch.equal(found, rows(expected, level, kind)[:, position]), (name, kind)
    for name in adapted.kept:
        assert name in adapted.describe()


def test_weights_without_names_keep_their_order_where_there_are_as_many_classes() -> None:
    source, model = SSD(CONFIG, num_classes=3), SSD(CONFIG, num_classes=3)
    adapted = load_for_finetuning(model, {"model": source.state_dict()}, ["a", "b", "c"])
    assert adapted.by_position
    assert "kept in their order, for the file has no names: a, b, c" in adapted.describe()
    assert equal(model.state_dict(), source.state_dict())


def test_weights_without_names_and_of_another_number_of_classes_leave_the_class_heads_fresh() -> None:
    strict, model = SSD(CONFIG, num_classes=8), SSD(CONFIG, num_classes=3)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    load_weights(strict, reference_state(num_classes=8))
    adapted = load_for_finetuning(model, reference_state(num_classes=8), ["a", "b", "c"])
    assert adapted.fresh_heads == ["class_heads.0", "class_heads.1", "class_heads.2"]
    assert (adapted.kept, adapted.new) == ([], ["a", "b", "c"])
    for name, tensor in model.state_dict().items():
        expected = before if name.startswith("class_heads") else strict.state_dict()
        assert torch.equal(tensor, expected[name]), name


def test_weights_of_80_classes_are_cocos() -> None:
    strict, model = SSD(CONFIG, num_classes=80), SSD(CONFIG, num_classes=2)
    load_weights(strict, reference_state(num_classes=80))
    adapted = load_for_finetuning(model, reference_state(num_classes=80), ["cow", "ship"])
    assert (adapted.kept, adapted.new, len(adapted.dropped)) == (["cow"], ["ship"], 79)
    row = [category.name for category in COCO_CATEGORIES].index("cow") + 1
    assert torch.equal(rows(model.state_dict(), 1, "weight")[:, 1], rows(strict.state_dict(), 1, "weight")[:, row])


def test_a_head_with_half_of_its_tensors_stays_fresh_whole() -> None:
    source, model = SSD(CONFIG, num_classes=3).state_dict(), SSD(CONFIG, num_classes=3)
    fresh = model.state_dict()["box_heads.1.weight"].clone()
    del source["box_heads.1.bias"]
    assert load_for_finetuning(model, source, ["a", "b", "c"]).fresh_heads == ["box_heads.1"]
    assert torch.equal(model.state_dict()["box_heads.1.weight"], fresh)


def test_a_misfit_outside_the_heads_is_an_error() -> None:
    source = SSD(CONFIG.model_copy(update={"extra_channels": ((16, 32), (8, 24))}), num_classes=5)
    with pytest.raises(ValueError, match="2 entries") as error:
        load_for_finetuning(SSD(CONFIG, num_classes=3), source.state_dict(), ["a", "b", "c"])
    assert "extras.1.2.weight is float32 [24, 8, 3, 3]: expected float32 [16, 8, 3, 3]" in str(error.value)
    assert "heads" not in str(error.value)


def test_the_names_of_coco_are_those_of_its_annotations() -> None:
    ids = [category.id for category in COCO_CATEGORIES]
    assert len(ids) == len({category.name for category in COCO_CATEGORIES}) == 80
    assert (ids[0], ids[-1], sum(ids)) == (1, 90, 3596)
    path = REPOSITORY.parent / "shared" / "data" / "coco_annotations" / "instances_val2017_rebuilt.json"
    if not path.is_file():
        pytest.skip(f"no annotations at {path}")
    assert read_categories(path) == COCO_CATEGORIES


def test_weights_of_coco_keep_their_names_on_a_set_of_other_ids(tmp_path: Path) -> None:
    path = tmp_path / "weights.pt"
    torch.save(SSD(CONFIG, num_classes=80).state_dict(), path)
    config = Config(model=CONFIG)
    other = tuple(Category(1 + row, category.name) for row, category in enumerate(reversed(COCO_CATEGORIES)))
    for given in (None, COCO_CATEGORIES, other):
        detector, _ = load_detector(path, torch.device("cpu"), config=config, categories=given)
        assert detector.categories == COCO_CATEGORIES
    own = tuple(Category(row, f"own {row}") for row in range(80))
    assert load_detector(path, torch.device("cpu"), config=config, categories=own)[0].categories == own
    with pytest.raises(ValueError, match=r"weights\.pt: holds weights of 80 classes: expected 5, as the data has"):
        load_detector(path, torch.device("cpu"), config=config, categories=own[:5])
