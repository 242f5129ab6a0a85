"""SSD-ResNet34 object detection on COCO: training and inference.

    detector = ssd_fast.load_detector("best.pt")
    found = detector("photo.jpg")
    found.draw().save("annotated.png")

Importing this module is cheap: PyTorch and DALI are loaded by the first call that needs them.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from ssd_fast.config.sections import Config
    from ssd_fast.evaluation.coco_eval import CocoScores
    from ssd_fast.evaluation.predict import ImageDetector
    from ssd_fast.training.run import Outcome

__version__ = "0.1.0"
__all__ = ["__version__", "evaluate", "load_config", "load_detector", "train"]


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Return the configuration of a recipe.

    path: TOML file.
    overrides: "section.key=value" each, with the value in TOML's notation; a bare word is a string.
    Raises ValueError that lists every key that is unknown, has the wrong type or contradicts another.
    """
    from ssd_fast.config import recipe

    return recipe.load_config(Path(path), overrides)


def load_detector(
    path: str | Path,
    *,
    config: str | Path | Config | None = None,
    overrides: Sequence[str] = (),
    annotations: str | Path | None = None,
    device: str | torch.device | None = None,
) -> ImageDetector:
    """Return the detector of a checkpoint, to be called with a path, a PIL image, an array, or a list of these.

    An array holds RGB as uint8 [H, W, 3]. A call returns boxes in pixels, scores and class names of each image.

    path: checkpoint, such as best.pt of a run, or weights of the MLPerf reference.
    config: recipe or configuration in place of the checkpoint's own; weights of the MLPerf reference need one.
    overrides: changes of the checkpoint's own configuration, "section.key=value" each.
    annotations: COCO JSON with the class names, for weights without names whose classes are not COCO's.
    device: None for the GPU, or the CPU where there is none.
    Raises ValueError that names the file for one that is not a checkpoint or does not fit the configuration.
    """
    from ssd_fast.evaluation.predict import load_image_detector

    given, names = _config(config) if config else None, Path(annotations) if annotations else None
    return load_image_detector(Path(path), config=given, overrides=overrides, annotations=names, device=device)


def train(recipe: str | Path | Config, data: str | Path, output: str | Path, *, resume: bool = False) -> Outcome:
    """Train a detector; checkpoints, records and images go to a folder. Return how the run ended.

    recipe: TOML file, or a configuration.
    data: folder in COCO's layout.
    output: folder of the run, made if missing.
    resume: continue the run in the folder, if there is one.
    Raises ValueError for a recipe, data or a checkpoint that cannot be used, FloatingPointError when the loss stays
    not finite, and OSError.
    """
    from ssd_fast.data.sets import start_reading

    config = _config(recipe)
    reading = start_reading(config, Path(data))  # while torch is imported

    from ssd_fast.training import run

    return run.train(config, Path(data), Path(output), resume=resume, reading=reading)


def evaluate(
    checkpoint: str | Path,
    data: str | Path,
    *,
    config: str | Path | Config | None = None,
    overrides: Sequence[str] = (),
    only_annotated: bool = False,
) -> CocoScores | None:
    """Return COCO's scores of a checkpoint on the validation images of a data set; None on other ranks than 0.

    data: folder in COCO's layout.
    config: recipe or configuration in place of the checkpoint's own.
    overrides: changes of the checkpoint's own configuration, "section.key=value" each.
    only_annotated: leave out images without annotations, as the MLPerf reference does.
    Raises ValueError for a checkpoint, data or a configuration that cannot be used.
    """
    from ssd_fast.evaluation import evaluate as evaluation

    given = _config(config) if config else None
    found = evaluation.evaluate(
        Path(checkpoint), Path(data), config=given, overrides=overrides, only_annotated=only_annotated
    )
    return found.scores if found else None


def _config(recipe: str | Path | Config) -> Config:
    return load_config(recipe) if isinstance(recipe, (str, Path)) else recipe
