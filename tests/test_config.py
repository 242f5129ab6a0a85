"""Recipes: what they hold, how they change, and how they are refused."""

import math
from pathlib import Path

import pytest
from repository import REPOSITORY

from ssd_fast.config.recipe import ConfigError, dump_toml, load_config, override_config
from ssd_fast.config.sections import Config

SSD300 = REPOSITORY / "configs" / "ssd300.toml"


def write(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_text(text)
    return path


@pytest.mark.parametrize("path", sorted((REPOSITORY / "configs").glob("*.toml")), ids=lambda path: path.name)
def test_every_shipped_recipe_is_valid(path: Path) -> None:
    load_config(path)


def test_grid_sizes_follow_from_image_size_and_strides() -> None:
    config = load_config(SSD300)
    assert config.model.grid_sizes() == (38, 19, 10, 5, 3, 1)
    at_1200 = override_config(
        config,
        [
            "model.image_size=1200",
            "model.head_stride=3",
            "model.extra_strides=[2, 2, 2, 2, 1]",
            "model.extra_paddings=[1, 1, 1, 0, 0]",
            "model.anchor_steps=[24, 48, 92, 171, 400, 400]",
            "model.anchor_scales=[84, 180, 396, 612, 828, 1044, 1260]",
        ],
        source="test",
    )
    assert at_1200.model.feature_sizes() == (150, 75, 38, 19, 9, 7)
    assert at_1200.model.grid_sizes() == (50, 25, 13, 7, 3, 3)


@pytest.mark.parametrize(
    ("learning_rate", "global_batch_size", "effective"),
    [(2.92e-3, 480, 0.045), (2.92e-3, 960, 0.0875), (3.2e-3, 896, 0.09), (3.2e-3, 1024, 0.1025), (2.9e-3, 1536, 0.14)],
)
def test_effective_learning_rate_is_the_published_one(
    learning_rate: float, global_batch_size: int, effective: float
) -> None:
    optimizer = load_config(SSD300, [f"optimizer.learning_rate={learning_rate}"]).optimizer
    assert optimizer.effective_learning_rate(global_batch_size) == pytest.approx(effective, rel=1e-12)


def test_learning_rate_warms_up_from_zero_and_decays_after_its_epochs() -> None:
    optimizer = load_config(SSD300, ["optimizer.warmup_steps=10", "optimizer.decay_epochs=[2, 3]"]).optimizer
    rates = [optimizer.learning_rate_at(step, global_batch_size=32, steps_per_epoch=20, epochs=4) for step in range(80)]
    assert rates[0] == 0
    assert rates[5] == pytest.approx(0.00125)
    assert rates[10] == rates[39] == pytest.approx(0.0025)
    assert rates[40] == rates[59] == pytest.approx(0.00025)
    assert rates[60] == rates[79] == pytest.approx(0.000025)


def test_learning_rate_falls_along_a_cosine_to_the_last_epoch() -> None:
    optimizer = load_config(SSD300, ["optimizer.warmup_steps=10", "optimizer.schedule=cosine"]).optimizer
    rates = [optimizer.learning_rate_at(step, global_batch_size=32, steps_per_epoch=20, epochs=4) for step in range(81)]
    assert rates[:1] == [0]
    assert rates[20] == pytest.approx(0.0025 * (1 + math.sqrt(0.5)) / 2)
    assert rates[40] == pytest.approx(0.00125)
    assert rates[80] == pytest.approx(0, abs=1e-12)
    assert sorted(rates[10:], reverse=True) == rates[10:]


def test_a_recipe_holds_only_what_differs_from_its_base(tmp_path: Path) -> None:
    write(tmp_path, "base.toml", "[training]\nbatch_size = 3\nepochs = 4\n")
    config = load_config(write(tmp_path, "own.toml", 'base = "base.toml"\n[training]\nbatch_size = 7\n'))
    assert config == load_config(SSD300, ["training.batch_size=7", "training.epochs=4"])


def test_a_base_of_a_base_is_refused(tmp_path: Path) -> None:
    write(tmp_path, "a.toml", 'base = "b.toml"\n')
    path = write(tmp_path, "c.toml", 'base = "a.toml"\n')
    with pytest.raises(ConfigError, match=r"a\.toml: base = 'b\.toml'.*may not have a base"):
        load_config(path)


def test_dumped_recipe_reads_back_equal(tmp_path: Path) -> None:
    config = load_config(SSD300, ["optimizer.clip_norm=2.5", 'data.classes=["cat", "dog"]'])
    assert load_config(write(tmp_path, "config.toml", dump_toml(config))) == config


def test_overrides_take_toml_values_and_bare_words() -> None:
    config = load_config(SSD300, ["model.backbone=resnet18", "training.epochs=90", "data.train_on_crowds=true"])
    assert (config.model.backbone, config.training.epochs, config.data.train_on_crowds) == ("resnet18", 90, True)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.epoch=3", r"training\.epoch = 3: unknown key"),
        ("trainin.epochs=3", r"trainin = .*: unknown key"),
        ("training.epochs=three", r"training\.epochs = 'three': expected a valid integer"),
        ("training.epochs=2.5", r"training\.epochs = 2\.5: expected a valid integer"),
        ("training.precision=fp8", r"training\.precision = 'fp8': expected 'auto', 'fp32', 'fp16' or 'bf16'"),
        ("data.box_encoder=cuda", r"data\.box_encoder = 'cuda': expected 'auto', 'dali' or 'kernels'"),
        ("optimizer.momentum=1", r"optimizer\.momentum = 1: expected less than 1"),
        ("optimizer.learning_rate=nan", r"optimizer\.learning_rate = nan: expected a finite number"),
        ("optimizer.decay_epochs=[5, 4]", r"optimizer\.decay_epochs = \[5\.0, 4\.0\]: expected strictly increasing"),
        ("evaluation.epochs=[0]", r"evaluation\.epochs\.0 = 0: expected greater than 0"),
        ("model.image_size=512", r"model\.anchor_steps\[5\] = 300: expected about 128, because image_size = 512"),
        ("model.extra_strides=[2, 2]", r"model\.extra_strides has 2 entries: expected 5"),
        ("model.anchor_scales=[9, 8, 7, 6, 5, 4, 3]", r"model\.anchor_scales.*strictly increasing"),
        ("augmentation.contrast=[1.5, 0.5]", r"augmentation\.contrast = \[1\.5, 0\.5\]: expected \[low, high\]"),
        ("epochs=3", r"--set epochs=3: expected section\.key=value"),
        ("training.epochs", r"--set training\.epochs: expected section\.key=value"),
    ],
)
def test_bad_values_are_refused_by_key_value_and_expectation(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(SSD300, [override])


def test_too_small_an_image_is_refused_with_the_empty_level() -> None:
    with pytest.raises(ConfigError, match=r"image_size = 64: the feature map of level \d would be empty"):
        load_config(SSD300, ["model.image_size=64"])


def test_all_bad_keys_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as error:
        load_config(write(tmp_path, "bad.toml", "[optimizer]\nmomentum = 2\n[training]\nsed = 0\n"))
    assert "bad.toml: optimizer.momentum = 2: expected less than 1" in str(error.value)
    assert "bad.toml: training.sed = 0: unknown key" in str(error.value)


def test_every_key_has_a_default_and_the_defaults_are_the_recipe_of_ssd300() -> None:
    assert load_config(SSD300) == Config()


def test_missing_and_malformed_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no such recipe: the program's own is --config ssd300$"):
        load_config(tmp_path / "configs" / "ssd300.toml")
    with pytest.raises(ConfigError, match=r"nowhere\.toml: no such recipe"):
        load_config(tmp_path / "nowhere.toml")
    with pytest.raises(ConfigError, match=r"broken\.toml: not TOML"):
        load_config(write(tmp_path, "broken.toml", "[training\n"))


def test_configurations_cannot_be_changed() -> None:
    config = load_config(SSD300)
    with pytest.raises(ValueError, match="frozen"):
        config.training.epochs = 1


def test_recipes_of_the_program_are_found_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ssd300").mkdir()  # a folder does not hide the recipe
    assert load_config(Path("ssd300")) == load_config(REPOSITORY / "configs" / "ssd300.toml")
    (tmp_path / "own.toml").write_text('base = "demo"\n[training]\nepochs = 3\n')
    own = load_config(tmp_path / "own.toml")
    assert own == load_config(Path("demo"), ["training.epochs=3"])
    with pytest.raises(ConfigError, match=r"ssd400: no such recipe: expected a file, or one of .*demo.*ssd300"):
        load_config(Path("ssd400"))
    (tmp_path / "own.toml").write_text('base = "other.toml"')
    with pytest.raises(ConfigError, match=rf"{tmp_path}/other\.toml: no such recipe"):
        load_config(tmp_path / "own.toml")
