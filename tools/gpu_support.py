"""Shared parts of the GPU check: what is measured, rows of the table and the file they are kept in, commands, data."""

import json
import os
import subprocess
from pathlib import Path
from typing import Any, NamedTuple

import torch

REPOSITORY = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")
FAILED = "FAILED"
REHEARSAL = "CPU, a rehearsal"


class Bench(NamedTuple):
    """What is measured, and how much of it.

    device: the GPU; in a rehearsal the CPU takes its place. data: folder that may hold photographs.
    recipe, recipe_1200: of training and of inference, with the batch size at which each is judged.
    num_images: of an evaluation. seconds: of a stage of the profile. steps: in a group that is timed.
    repeats: calls of each operator. learning: overrides of the recipe that learns a few images by heart.
    """

    device: torch.device
    data: Path
    recipe: Path
    recipe_1200: Path
    batch_size: int
    batch_size_1200: int
    num_images: int
    seconds: float
    steps: int
    repeats: int
    learning: tuple[str, ...]

    @property
    def rehearsal(self) -> bool:
        return self.device.type == "cpu"


LEARNING = (
    "augmentation.crop_min_ious=[]",
    "augmentation.brightness=[1.0, 1.0]",
    "augmentation.contrast=[1.0, 1.0]",
    "augmentation.saturation=[1.0, 1.0]",
    "augmentation.hue_degrees=0.0",
    "optimizer.learning_rate=0.01",
    "optimizer.warmup_steps=100",
    "optimizer.decay_epochs=[1000, 1300]",
    "training.epochs=1500",
    "training.batch_size=32",
    "training.checkpoint_every_epochs=1500",
    "evaluation.epochs=[500, 800, 1050, 1200, 1350]",
    "evaluation.target_map=0.6",
)


def gpu_bench(data: Path, batch_size: int) -> Bench:
    configs = REPOSITORY / "configs"
    return Bench(
        device=torch.device("cuda", 0),
        data=data,
        recipe=configs / "ssd300.toml",
        recipe_1200=configs / "ssd1200.toml",
        batch_size=batch_size,
        batch_size_1200=32,
        num_images=5_000,
        seconds=10,
        steps=10,
        repeats=20,
        learning=LEARNING,
    )


def rehearsal_bench(data: Path) -> Bench:
    """The same on a CPU, in small: shows that all of it runs, not how fast."""
    demo = REPOSITORY / "configs" / "demo.toml"
    return Bench(
        device=CPU,
        data=data,
        recipe=demo,
        recipe_1200=demo,
        batch_size=2,
        batch_size_1200=2,
        num_images=6,
        seconds=0.2,
        steps=1,
        repeats=1,
        learning=("training.epochs=2", "training.batch_size=2", "evaluation.epochs=[1]", "evaluation.target_map=0.6"),
    )


class Row(NamedTuple):
    """A row of the table. verdict: begins with FAILED where a check does not hold; empty where nothing is judged."""

    what: str
    measured: str
    target: str = ""
    verdict: str = ""


def bounded_row(
    what: str, value: float | None, text: str, *, at_least: float | None = None, at_most: float | None = None
) -> Row:
    """A row that is judged. text: format of the value, with its unit. value: None where the device cannot tell it."""
    target = f"at least {text.format(at_least)}" if at_least is not None else f"at most {text.format(at_most)}"
    if value is None:
        return Row(what, "", target, "not counted on this device")
    holds = (at_least is None or value >= at_least) and (at_most is None or value <= at_most)
    return Row(what, text.format(value), target, "holds" if holds else FAILED)


def choice_row(what: str, measured: str, ratio: float) -> Row:
    """A row of something that could become a default. ratio: its speed, in units of the default's."""
    return Row(what, f"{measured}, {ratio:.2f} times", "above 1.03 times", "faster" if ratio > 1.03 else "no gain")


class Results:
    """A file of JSON lines, written row by row, so that a check that is cut off keeps what it measured.

    A line begins a section or holds a row of the section begun last. A section that begins again replaces its rows.
    """

    def __init__(self, path: Path) -> None:
        """Read the file if it exists; raise ValueError if it is not one of results."""
        self.path = path
        self.environment: dict[str, str] = {}
        self.sections: dict[str, list[Row]] = {}
        if path.exists():
            for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
                try:
                    self._take(json.loads(line))
                except (ValueError, KeyError, TypeError, IndexError) as error:
                    raise ValueError(f"{path}, line {number}: expected a line of gpu-check's results") from error

    def begin(self, section: str, environment: dict[str, str]) -> None:
        """environment: device and versions that the rows hold for; empty before they are known."""
        self._append({"section": section, "environment": environment})

    def add(self, row: Row) -> None:
        self._append(row._asdict())

    def _append(self, content: dict[str, Any]) -> None:
        self._take(content)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(content, ensure_ascii=False) + "\n")

    def _take(self, content: dict[str, Any]) -> None:
        if "section" in content:
            self.environment = content["environment"] or self.environment
            self.sections.pop(content["section"], None)
            self.sections[content["section"]] = []
        else:
            list(self.sections.values())[-1].append(Row(**content))


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


def failed_row(what: str, ended: subprocess.CompletedProcess[str]) -> Row:
    """The row of a command that ended with an error."""
    lines = ended.stdout.strip().splitlines() or [f"status {ended.returncode}"]
    return Row(what, "", "", f"{FAILED}: {lines[-1]}")


def find_data(bench: Bench, scratch: Path) -> tuple[Path, list[str]]:
    """Return a data folder, and the overrides that train and evaluate on its validation part."""
    overrides = [
        "model.backbone_weights=none",
        "data.train_images=val2017",
        "data.train_annotations=annotations/instances_val2017.json",
    ]
    if (bench.data / "annotations" / "instances_val2017.json").is_file():
        return bench.data, overrides
    from ssd_fast.data.synthesize import synthesize

    if not (scratch / "data").is_dir():
        print(f"no photographs at {bench.data}: synthetic images instead")
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
