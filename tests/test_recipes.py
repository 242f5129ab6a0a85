"""The shipped recipes train as the published ones of their systems did."""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
from repository import REPOSITORY

from ssd_fast.config.recipe import load_config
from ssd_fast.config.sections import Config

NUM_IMAGES = 117_266  # of COCO's train2017 with at least one box
EVALUATION_EPOCHS = (33, 44, 50, 55, 61, 66, 71, 77)
BASE = "ssd300"

# recipe: GPUs, global batch, learning rate after warm-up, warm-up steps, weight decay, steps per epoch,
# steps after which the learning rate falls (44 and 55 epochs)
PUBLISHED = {
    "1xC4140": (4, 480, 0.045, 650, 1.6e-4, 245, (10_780, 13_475)),
    "2xC4140": (8, 960, 0.0875, 650, 1.6e-4, 123, (5_412, 6_765)),
    "4xC4140": (16, 896, 0.09, 650, 1.3e-4, 131, (5_764, 7_205)),
    "8xC4140": (32, 1024, 0.1025, 650, 1.3e-4, 115, (5_060, 6_325)),
    "16xC4140": (64, 1536, 0.14, 850, 1.7e-4, 77, (3_388, 4_235)),
    "dgx_a100": (8, 912, 0.09, 650, 1.3e-4, 129, (5_676, 7_095)),
    # of an H200 no recipe was published: that of its global batch
    "h200": (8, 1024, 0.1025, 650, 1.3e-4, 115, (5_060, 6_325)),
}


def recipe(name: str) -> Config:
    return load_config(REPOSITORY / "configs" / f"{name}.toml")


@pytest.mark.parametrize("name", PUBLISHED)
def test_batch_learning_rate_and_steps_are_the_published_ones(name: str) -> None:
    num_gpus, global_batch_size, peak, warmup_steps, weight_decay, steps_per_epoch, decay_steps = PUBLISHED[name]
    config = recipe(name)
    assert num_gpus * config.training.batch_size == global_batch_size
    assert math.ceil(NUM_IMAGES / global_batch_size) == steps_per_epoch

    def rate(step: int) -> float:
        return config.optimizer.learning_rate_at(
            step, global_batch_size=global_batch_size, steps_per_epoch=steps_per_epoch, epochs=80
        )

    first, second = decay_steps
    assert config.optimizer.effective_learning_rate(global_batch_size) == pytest.approx(peak, rel=1e-12)
    assert config.optimizer.weight_decay == weight_decay
    assert [rate(0), rate(warmup_steps // 2)] == pytest.approx([0, peak / 2], rel=1e-12)
    assert rate(warmup_steps - 1) < rate(warmup_steps) == rate(first - 1) == pytest.approx(peak, rel=1e-12)
    assert rate(first) == rate(second - 1) == pytest.approx(peak / 10, rel=1e-12)
    assert rate(second) == rate(80 * steps_per_epoch) == pytest.approx(peak / 100, rel=1e-12)


@pytest.mark.parametrize("name", PUBLISHED)
def test_evaluation_and_end_are_those_of_the_benchmark(name: str) -> None:
    config = recipe(name)
    assert config.evaluation.epochs == EVALUATION_EPOCHS
    assert (config.evaluation.target_map, config.training.epochs) == (0.23, 80)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_system_changes_nothing_but_batch_and_schedule(name: str) -> None:
    changed = {"learning_rate", "warmup_steps", "weight_decay", "batch_size"}

    def rest(config: Config) -> dict[str, dict[str, object]]:
        return {
            section: {key: value for key, value in values.items() if key not in changed or section == "evaluation"}
            for section, values in config.model_dump(exclude={"system"}).items()
        }

    assert rest(recipe(name)) == rest(recipe(BASE))


def test_every_recipe_of_a_system_states_its_gpus() -> None:
    found = {path.stem: load_config(path).system for path in (REPOSITORY / "configs").glob("*.toml")}
    gpus = {name: system.nodes * (system.gpus_per_node or 0) for name, system in found.items() if system.nodes}
    assert gpus == {name: num_gpus for name, (num_gpus, *_) in PUBLISHED.items()}


def test_an_installed_package_has_the_recipes(tmp_path: Path) -> None:
    command = [sys.executable, "setup.py", "--quiet", "build_py", "--build-lib", str(tmp_path)]
    subprocess.run(command, cwd=REPOSITORY, check=True, capture_output=True)
    inside = {path.name for path in (tmp_path / "ssd_fast" / "recipes").iterdir()}
    assert inside == {path.name for path in (REPOSITORY / "configs").iterdir()}
    code = "from ssd_fast.config.recipe import recipe_folder; print(recipe_folder())"
    found = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        check=True,
        capture_output=True,
        text=True,
    )
    assert found.stdout.strip() == str(tmp_path / "ssd_fast" / "recipes")
