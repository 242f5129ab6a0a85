"""No verb writes over a file that it did not make: it stops before its work starts."""

import json
from pathlib import Path

import numpy as np
import pytest
from repository import REPOSITORY
from tiny import tiny_config
from typer.testing import CliRunner

from ssd_fast.__main__ import app
from ssd_fast.config.recipe import dump_toml, load_config
from ssd_fast.evaluation import coco_eval
from ssd_fast.loadgen.logs import LOGS
from ssd_fast.profiling import operators, profile
from ssd_fast.training.folder import RunFolder
from ssd_fast.training.run import train

DEMO = str(REPOSITORY / "configs" / "demo.toml")
MINE = '{"images": [], "annotations": [], "categories": []}'
FILES = {
    "evaluate": (["--checkpoint", "none.pt", "--data", "none"], ["results.json"], True),
    "export": (["--checkpoint", "none.pt"], ["model.onnx"], True),
    "profile": (["--config", DEMO, "--stage", "step"], ["report.html", "profile.json", "trace_rank3.json.gz"], False),
    "operators": (["--config", DEMO], ["operators.json"], False),
    "benchmark": (["--config", DEMO, "--scenario", "Offline"], [*LOGS, "benchmark.toml"], False),
}


@pytest.mark.parametrize(("verb", "name"), [(verb, name) for verb, (_, names, _) in FILES.items() for name in names])
def test_a_file_of_the_users_is_in_the_way(tmp_path: Path, verb: str, name: str) -> None:
    options, _, is_file = FILES[verb]
    path = tmp_path / name
    path.write_text(MINE)
    result = CliRunner().invoke(app, [verb, *options, "--output", str(path if is_file else tmp_path)])
    assert isinstance(result.exception, ValueError), result.output
    assert f"--output {path if is_file else tmp_path}: " in str(result.exception)
    assert f"{name}" in str(result.exception)
    assert "exists" in str(result.exception)
    assert [(item.name, item.read_text()) for item in tmp_path.iterdir()] == [(name, MINE)]


@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.parametrize("name", RunFolder(Path()).results())
def test_a_file_of_the_users_is_in_the_way_of_a_run(
    tmp_path: Path, synthetic_set: Path, name: str, *, resume: bool
) -> None:
    path = tmp_path / name.replace("*", "000000016")
    path.parent.mkdir(exist_ok=True)
    path.write_text(MINE)
    with pytest.raises(ValueError, match=f"{path.name} exists and would be replaced|holds a run already"):
        train(tiny_config(), synthetic_set, tmp_path, resume=resume)
    assert path.read_text() == MINE
    assert {item.name for item in tmp_path.rglob("*") if item.is_file()} == {path.name}


def test_the_recipe_of_a_user_is_not_replaced_by_that_of_a_run(tmp_path: Path, synthetic_set: Path) -> None:
    recipe = tmp_path / "config.toml"
    text = "# two weeks of tuning\n" + dump_toml(tiny_config())
    recipe.write_text(text)
    with pytest.raises(ValueError, match=r"config\.toml exists and would be replaced"):
        train(load_config(recipe), synthetic_set, tmp_path, resume=True)
    assert recipe.read_text() == text


def test_what_was_made_before_is_known(tmp_path: Path) -> None:
    table = coco_eval.DetectionTable(
        np.array([3, 3]), np.array([[1.0, 2, 3, 4], [5, 6, 7, 8]]), np.array([0.25, 0.5]), np.array([1, 2])
    )
    for number in (0, 1, 2):
        path = tmp_path / f"{number}.json"
        coco_eval.write_results(coco_eval.DetectionTable(*(column[:number] for column in table)), path)
        assert coco_eval.is_results_file(path)
        assert len(json.loads(path.read_text())) == number
        assert len(coco_eval.read_results(path).scores) == number
        path.write_text(json.dumps(json.loads(path.read_text())))  # as another program would
        assert not coco_eval.is_results_file(path)
    assert not profile.is_result(tmp_path)
    assert not operators.is_result(tmp_path)
    (tmp_path / operators.OPERATORS_FILE).write_text('{"environment": {}, "rows": []}')
    assert operators.is_result(tmp_path)
