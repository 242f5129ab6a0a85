"""Shared parts of the GPU check: rows of the table, commands of this checkout, and data to run on."""

import json
import os
import subprocess
from pathlib import Path

import torch

REPOSITORY = Path(__file__).resolve().parent.parent
RECIPE = REPOSITORY / "configs" / "ssd300.toml"
RECIPE_1200 = REPOSITORY / "configs" / "ssd1200.toml"
GPU = torch.device("cuda", 0)
CPU = torch.device("cpu")

Row = tuple[str, str, str]  # what was measured, the value, the verdict or what was expected


def bounded_row(
    what: str, value: float, text: str, *, at_least: float | None = None, at_most: float | None = None
) -> Row:
    holds = (at_least is None or value >= at_least) and (at_most is None or value <= at_most)
    bound = f"at least {at_least:g}" if at_least is not None else f"at most {at_most:g}"
    return what, text.format(value), f"{'holds' if holds else 'FAILED'}: {bound}"


def run_command(*command: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a command of this checkout to its end and show its output."""
    run = subprocess.run(
        [str(part) for part in command],
        cwd=REPOSITORY,
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")]),
            **environment,
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    print(run.stdout, flush=True)
    return run


def find_data(directory: Path, scratch: Path) -> tuple[Path, list[str]]:
    """Return a data folder, and the overrides that train and evaluate on its validation part."""
    overrides = [
        "model.backbone_weights=none",
        "data.train_images=val2017",
        "data.train_annotations=annotations/instances_val2017.json",
    ]
    if (directory / "annotations" / "instances_val2017.json").is_file():
        return directory, overrides
    from ssd_fast.data.synthesize import synthesize

    if not (scratch / "data").is_dir():
        print(f"no photographs at {directory}: synthetic images instead")
        synthesize(scratch / "data", num_images=320, seed=0)
    return scratch / "data", overrides


def repeated(data: Path, target: Path, *, num_images: int) -> Path:
    """Return a data folder whose validation part repeats the images of another one."""
    if target.is_dir():
        return target
    content = json.loads((data / "annotations" / "instances_val2017.json").read_text())
    images, boxes = content["images"], content["annotations"]
    first = 1 + max(image["id"] for image in images)
    copies = range(-(-num_images // len(images)))
    content["images"] = [image | {"id": image["id"] + first * copy} for copy in copies for image in images]
    del content["images"][num_images:]
    kept = {image["id"] for image in content["images"]}
    content["annotations"] = [
        box | {"id": number, "image_id": image_id}
        for number, (box, image_id) in enumerate(
            ((box, box["image_id"] + first * copy) for copy in copies for box in boxes), start=1
        )
        if image_id in kept
    ]
    (target / "annotations").mkdir(parents=True)
    (target / "annotations" / "instances_val2017.json").write_text(json.dumps(content))
    (target / "val2017").symlink_to((data / "val2017").resolve())
    return target
