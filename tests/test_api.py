"""The package from Python: detectors of images, training, evaluation, and the notebook."""

import json
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from repository import REPOSITORY
from tiny import save_weights, tiny_config

import ssd_fast
from ssd_fast.data.coco import load_coco
from ssd_fast.evaluation.detector import make_random_detector
from ssd_fast.evaluation.predict import ImageDetections, ImageDetector, detect_files

DEMO = REPOSITORY / "configs" / "demo.toml"


@pytest.fixture(scope="module")
def checkpoint(synthetic_set: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights, with a threshold at which they detect something."""
    config = tiny_config(["detection.score_threshold=0.2", "detection.max_detections=20"])
    categories = load_coco(
        synthetic_set / "annotations" / "instances_val2017.json", synthetic_set / "val2017"
    ).categories
    model = make_random_detector(config, categories, torch.device("cpu")).model
    path = tmp_path_factory.mktemp("api") / "random.pt"
    save_weights(path, config, categories, model)
    return path


@pytest.fixture(scope="module")
def detector(checkpoint: Path) -> ImageDetector:
    return ssd_fast.load_detector(checkpoint, device="cpu")


@pytest.fixture(scope="module")
def photo(synthetic_set: Path) -> Path:
    return min((synthetic_set / "val2017").iterdir())


@pytest.fixture(scope="module")
def png(photo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("lossless") / "photo.png"
    with Image.open(photo) as image:
        image.convert("RGB").save(path)
    return path


def pixels_of(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def assert_same(found: ImageDetections, expected: ImageDetections) -> None:
    assert len(expected.labels) > 0
    assert found.labels == expected.labels
    np.testing.assert_array_equal(found.boxes_ltrb, expected.boxes_ltrb)
    np.testing.assert_array_equal(found.scores, expected.scores)


def test_a_lossless_file_and_its_pixels_give_the_same_detections(detector: ImageDetector, png: Path) -> None:
    of_file = detector(png)
    assert of_file.boxes_ltrb.shape == (len(of_file.labels), 4)
    assert (of_file.boxes_ltrb.dtype, of_file.scores.dtype) == (np.float64, np.float64)
    assert of_file.scores.tolist() == sorted(of_file.scores.tolist(), reverse=True)
    assert set(of_file.labels) <= set(of_file.class_names)
    assert_same(detector(str(png)), of_file)
    assert_same(detector(pixels_of(png)), of_file)
    with Image.open(png) as image:
        assert_same(detector(image), of_file)


def test_arrays_may_be_views(detector: ImageDetector, png: Path) -> None:
    bgr = np.ascontiguousarray(pixels_of(png)[..., ::-1])
    assert_same(detector(bgr[..., ::-1]), detector(png))


def test_pil_images_are_turned_upright(detector: ImageDetector, photo: Path, tmp_path: Path) -> None:
    turned = tmp_path / "turned.jpg"
    exif = Image.Exif()
    exif[0x0112] = 6
    with Image.open(photo) as image:
        image.save(turned, exif=exif)
    with Image.open(turned) as image:
        upright = np.rot90(np.asarray(image.convert("RGB")), k=-1)
        assert_same(detector(image), detector(upright))
    assert detector(turned).draw().size == (upright.shape[1], upright.shape[0])


def test_a_list_gives_a_result_for_each_in_its_order(detector: ImageDetector, photo: Path, png: Path) -> None:
    pixels = pixels_of(photo)
    given: list[Any] = [pixels[:90], photo, pixels[:, :100], png, Image.fromarray(pixels[50:])]
    found = detector(given)
    assert [result.draw().size for result in found] == [
        Image.fromarray(pixels_of(item) if isinstance(item, Path) else np.asarray(item)).size for item in given
    ]
    for item, result in zip(given, found, strict=True):
        alone = detector(item)
        assert result.labels == alone.labels
        np.testing.assert_allclose(result.boxes_ltrb, alone.boxes_ltrb, rtol=1e-4, atol=1e-2)
        np.testing.assert_allclose(result.scores, alone.scores, rtol=1e-4)
    assert detector([]) == []
    assert len(detector((photo,))) == 1


def test_more_images_than_a_batch_holds(detector: ImageDetector, png: Path) -> None:
    pixels = pixels_of(png)
    many = detector([pixels] * 19)
    assert detector.config.evaluation.batch_size == 8
    assert [result.labels for result in many] == [detector(png).labels] * 19


def test_files_are_detected_on_as_by_the_command(
    detector: ImageDetector, checkpoint: Path, photo: Path, tmp_path: Path
) -> None:
    assert detect_files(checkpoint, [photo], tmp_path).num_images == 1
    (written,) = json.loads((tmp_path / "detections.json").read_text())
    found = detector(photo)
    assert [item["category"] for item in written["detections"]] == found.labels
    assert [item["score"] for item in written["detections"]] == found.scores.tolist()
    left_top = [item["bbox"][:2] for item in written["detections"]]
    assert left_top == found.boxes_ltrb[:, :2].tolist()


def test_draw_shows_what_reaches_the_score(detector: ImageDetector, photo: Path) -> None:
    found = detector(photo)
    original = pixels_of(photo)
    assert np.array_equal(np.asarray(found.draw(min_score=1.0)), original)
    drawn = np.asarray(found.draw(min_score=found.scores[0]))
    assert drawn.shape == original.shape
    assert not np.array_equal(drawn, original)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.zeros((5, 5, 3), np.float32), r"image 2 of 2: an array of float32 \[5, 5, 3\]: expected a path, a PIL"),
        (np.zeros((5, 5), np.uint8), r"an array of uint8 \[5, 5\]: expected"),
        (np.zeros((0, 5, 3), np.uint8), r"an array of uint8 \[0, 5, 3\]: expected"),
        (Image.new("F", (5, 5)), "a PIL image of mode F: expected one of 8 bits"),
        ("nowhere.jpg", "nowhere.jpg: no such file"),
        (REPOSITORY, "a folder: expected an image file"),
        (REPOSITORY / "pyproject.toml", "pyproject.toml: not an image"),
        (7, "image 2 of 2: int: expected a path, a PIL image, or a uint8 array"),
    ],
)
def test_what_is_no_image_is_refused(detector: ImageDetector, photo: Path, image: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        detector([photo, image])  # type: ignore[list-item]


def test_weights_of_another_program_need_a_recipe_and_class_names(
    detector: ImageDetector, checkpoint: Path, synthetic_set: Path, photo: Path, tmp_path: Path
) -> None:
    weights = tmp_path / "weights.pth"
    torch.save(torch.load(checkpoint)["model"], weights)
    annotations = synthetic_set / "annotations" / "instances_val2017.json"
    loaded = ssd_fast.load_detector(weights, config=detector.config, annotations=annotations, device="cpu")
    assert_same(loaded(photo), detector(photo))
    with pytest.raises(ValueError, match=r"weights\.pth: holds weights only"):
        ssd_fast.load_detector(weights)


def test_evaluation_gives_the_score_that_training_ended_with(synthetic_set: Path, tmp_path: Path) -> None:
    changes = ["training.epochs=1", "optimizer.decay_epochs=[]", "detection.score_threshold=0.01"]
    outcome = ssd_fast.train(tiny_config(changes), synthetic_set, tmp_path / "run")
    scores = ssd_fast.evaluate(str(tmp_path / "run" / "checkpoints" / "best.pt"), str(synthetic_set))
    assert scores is not None
    assert scores.map == outcome.best_map
    assert outcome.stopped_by == 0
    resumed = ssd_fast.train(tmp_path / "run" / "config.toml", synthetic_set, tmp_path / "run", resume=True)
    assert resumed == outcome


def test_recipes_are_read_with_overrides() -> None:
    assert ssd_fast.load_config(str(DEMO), ["training.epochs=7"]).training.epochs == 7
    with pytest.raises(ValueError, match=r"training\.epoch = 7: unknown key"):
        ssd_fast.load_config(DEMO, ["training.epoch=7"])


def test_the_import_loads_nothing_heavy() -> None:
    heavy = ("torch", "nvidia", "kernels", "numpy", "pydantic")
    code = f"import sys, ssd_fast; print(*(name for name in {heavy} if name in sys.modules))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=REPOSITORY)
    assert found.stdout.split() == []


def test_the_version_is_that_of_the_package() -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text("utf-8"))["project"]
    assert ssd_fast.__version__ == project.get("version", ssd_fast.__version__)
    assert all(hasattr(ssd_fast, name) for name in ssd_fast.__all__)


def test_the_notebook_runs(
    checkpoint: Path, synthetic_set: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    notebook = json.loads((REPOSITORY / "examples" / "detect.ipynb").read_text("utf-8"))
    monkeypatch.setenv("SSD_FAST_CHECKPOINT", str(checkpoint))
    monkeypatch.setenv("SSD_FAST_DATA", str(synthetic_set))
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    names: dict[str, object] = {}
    for cell in cells:
        assert cell["outputs"] == []
        exec(compile("".join(cell["source"]), cell["id"], "exec"), names)
    printed = capsys.readouterr().out.splitlines()
    assert any(line.startswith("mAP ") for line in printed)
    assert isinstance(names["found"], ImageDetections)
