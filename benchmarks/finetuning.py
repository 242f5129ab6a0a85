"""Fine-tune a detector with few images of other classes, beside training from nothing for as long.

    python benchmarks/finetuning.py output/demo/run/checkpoints/best.pt

The detector is that of `make demo`; the other classes are those of `ssd-fast synthesize --other-classes`. Training from
nothing takes the demo's recipe, and as many epochs as the fine-tuning came to. What has been trained is kept.
"""

import json
from pathlib import Path
from typing import Annotated

import torch
import typer
from recipes import train

from ssd_fast.config.recipe import dump_toml, load_config
from ssd_fast.data.synthesize import OTHER_KINDS, synthesize
from ssd_fast.hardware import device_name, usable_cores
from ssd_fast.tables import Row, Table, format_table

NUM_IMAGES = 1500  # of which 300 are held out
CONFIGS = Path(__file__).resolve().parents[1] / "configs"
COLUMNS = (
    "images",
    "epochs",
    "training, s",
    "AP50, fine-tuned",
    "AP50, from nothing",
    "mAP, fine-tuned",
    "from nothing",
)


def make_recipe(path: Path) -> None:
    """Write the fine-tuning recipe with the demo's network, as its first line asks for."""
    demo = load_config(CONFIGS / "demo.toml")
    lines = (CONFIGS / "finetune.toml").read_text().replace('base = "ssd300.toml"', 'base = "base.toml"')
    path.with_name("base.toml").write_text(dump_toml(demo))
    path.write_text(lines)


def first_images(annotations: Path, num_images: int) -> Path:
    """Write the annotations of the first images of a set beside those of all, and return the new file."""
    content = json.loads(annotations.read_text())
    if num_images > len(content["images"]):
        raise typer.BadParameter(f"{num_images}: expected at most {len(content['images'])} images")
    content["images"] = content["images"][:num_images]
    ids = {image["id"] for image in content["images"]}
    content["annotations"] = [truth for truth in content["annotations"] if truth["image_id"] in ids]
    path = annotations.with_name(f"first_{num_images}.json")
    path.write_text(json.dumps(content))
    return path


def main(
    detector: Annotated[Path, typer.Argument(help="Checkpoint of the detector.")],
    images: Annotated[list[int], typer.Option(help="Numbers of images to train on.")] = [50, 200, 1000],  # noqa: B006
    change: Annotated[list[str], typer.Option(help="Changes of the fine-tuning recipe, as --set takes them.")] = [],  # noqa: B006
    results: Annotated[Path, typer.Option(help="Folder for the data and the runs.")] = Path("output/recipes"),
) -> None:
    """Print a table."""
    data, recipe = results / "other_classes", results / "finetune.toml"
    if not data.exists():
        synthesize(data, num_images=NUM_IMAGES, seed=2, kinds=OTHER_KINDS)
    make_recipe(recipe)
    rows = []
    for number in images:
        few = first_images(data / "annotations" / "instances_train2017.json", number)
        own_data = f"data.train_annotations=annotations/{few.name}"
        tuned = train(recipe, data, (own_data, f"model.initial_checkpoint={detector.resolve()}", *change), results)
        as_long = (f"training.epochs={tuned.epochs}", "optimizer.schedule=cosine", "optimizer.warmup_steps=20")
        fresh = train(CONFIGS / "demo.toml", data, (own_data, *as_long, "evaluation.epochs=[]"), results)
        scores = (tuned.ap50, fresh.ap50, tuned.map, fresh.map)
        cells = (str(number), str(tuned.epochs), f"{tuned.seconds:.0f}", *(f"{score:.3f}" for score in scores))
        print(" ".join(cells), flush=True)
        rows.append(Row(cells))
    title = f"{device_name(torch.device('cpu'), usable_cores())}; PyTorch {torch.__version__}; {' '.join(change)}"
    print(format_table(Table(title, COLUMNS, rows)))


if __name__ == "__main__":
    typer.run(main)
