"""The scores of a run: who is best, and the file that keeps them."""

from pathlib import Path

import numpy as np
import pytest

from ssd_fast.evaluation.coco_eval import CocoScores
from ssd_fast.training.scores import NO_MAP, Scores, read_scores


def coco_scores(map_: float) -> CocoScores:
    per_class = {"star": map_, "bar": map_ / 2}
    precision_50 = np.linspace(0, map_, 202).reshape(101, 2)
    numbers = dict.fromkeys(CocoScores._fields[:12], 0.0) | {"map": map_}
    return CocoScores(**numbers, per_class=per_class, precision_50=precision_50)


def add(scores: Scores, epoch: int, map_: float) -> bool:
    return scores.add(epoch, {"map": map_}, coco_scores(map_))


def test_the_first_of_the_highest_is_the_best() -> None:
    scores = Scores()
    assert (scores.best_map, scores.num_since_best) == (NO_MAP, 0)
    assert [add(scores, epoch, map_) for epoch, map_ in enumerate((-1.0, 0.2, 0.1, 0.2, 0.3), 1)] == [
        True,
        True,
        False,
        False,
        True,
    ]
    assert (scores.best_map, scores.num_since_best) == (0.3, 0)
    assert [add(scores, 6, 0.3), add(scores, 7, 0.1)] == [False, False]
    assert scores.num_since_best == 2
    assert scores.curves is not None
    assert scores.curves.epoch == 5


def test_the_file_keeps_every_bit(tmp_path: Path) -> None:
    scores = Scores()
    add(scores, 2, 1 / 3)
    scores.write(tmp_path / "scores.json")
    read = read_scores(tmp_path / "scores.json", until_epoch=2)
    assert (read.by_epoch, read.curves) == (scores.by_epoch, scores.curves)
    assert read.curves is not None
    expected = coco_scores(1 / 3).precision_50
    assert np.array_equal(np.array([*read.curves.precision_50.values()]).T, expected)


def test_scores_of_epochs_that_are_trained_again_are_left_out(tmp_path: Path) -> None:
    scores = Scores()
    add(scores, 1, 0.1)
    add(scores, 2, 0.2)
    scores.write(tmp_path / "scores.json")
    read = read_scores(tmp_path / "scores.json", until_epoch=1)
    assert (read.by_epoch, read.curves) == ({1: {"map": 0.1}}, None)
    assert read_scores(tmp_path / "missing.json", until_epoch=9).by_epoch == {}


def test_scores_on_another_validation_set_cannot_be_the_best(tmp_path: Path) -> None:
    scores = Scores()
    assert add(scores, 1, 0.5)
    scores.compare_after(1)
    assert (scores.best_map, scores.curves) == (NO_MAP, None)
    assert [add(scores, epoch, map_) for epoch, map_ in ((2, 0.1), (3, 0.05), (4, 0.2))] == [True, False, True]
    scores.write(tmp_path / "scores.json")
    read = read_scores(tmp_path / "scores.json", until_epoch=3)
    assert (read.best_map, read.by_epoch[1]) == (0.1, {"map": 0.5})
    assert read_scores(tmp_path / "scores.json", until_epoch=0).uncompared_epoch == 0


@pytest.mark.parametrize("content", ["", "[]", '{"epochs": {"one": {}}, "best": null}', '{"epochs": {}}'])
def test_another_file_is_refused_by_name(content: str, tmp_path: Path) -> None:
    (tmp_path / "scores.json").write_text(content)
    with pytest.raises(ValueError, match=r"scores\.json: expected the scores of a run"):
        read_scores(tmp_path / "scores.json", until_epoch=1)
