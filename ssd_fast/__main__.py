"""The command line: `ssd-fast VERB`, also `python -m ssd_fast VERB`."""

import enum
import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from ssd_fast.config import load_config

# Verbs import what they need when they run: help and a mistyped recipe do not wait for torch.

app = typer.Typer(
    help="SSD-ResNet34 object detection on COCO: train, evaluate, detect.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Change a key of the recipe; may be repeated."),
]
OwnConfigOption = Annotated[
    Path | None, typer.Option("--config", help="Recipe (TOML); left out, the checkpoint's own.", show_default=False)
]
CheckpointOption = Annotated[
    Path, typer.Option("--checkpoint", help="Checkpoint, or weights of the MLPerf reference.", show_default=False)
]


@app.command()
def train(
    config: Annotated[Path, typer.Option(help="Recipe (TOML).", show_default=False)],
    data: Annotated[Path, typer.Option(help="Data folder in COCO's layout.", show_default=False)],
    output: Annotated[Path, typer.Option(help="Folder of the run.", show_default=False)],
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the run in the folder, if there is one.")
    ] = False,
    overrides: SetOption = None,
) -> None:
    """Train a detector; checkpoints, records and pictures go to a folder."""
    recipe = load_config(config, overrides or ())

    from ssd_fast.train import train as train_run

    outcome = train_run(recipe, data, output, resume=resume)
    if outcome.stopped_by:
        raise typer.Exit(128 + outcome.stopped_by)
    target = recipe.evaluation.target_map
    reached = f" (target {target:g} {'reached' if outcome.reached_target else 'not reached'})" if target < 1 else ""
    print(f"best mAP {outcome.best_map:.4f}{reached}; everything about the run is in {output}")


@app.command()
def evaluate(
    checkpoint: CheckpointOption,
    data: Annotated[Path, typer.Option(help="Data folder in COCO's layout.", show_default=False)],
    config: OwnConfigOption = None,
    output: Annotated[
        Path | None, typer.Option(help="JSON file for the detections, in COCO's result format.", show_default=False)
    ] = None,
    per_class: Annotated[
        bool, typer.Option("--per-class", help="Print the average precision of each class, too.")
    ] = False,
    overrides: SetOption = None,
) -> None:
    """Score a detector on the validation pictures: COCO's twelve numbers."""
    given = load_config(config, overrides or ()) if config else None

    from ssd_fast import coco_eval, dataset, distributed, inference, progress

    progress.setup_logging(None)
    device = distributed.World().device()
    categories = dataset.read_categories(data / given.data.val_annotations) if given else None
    detector, recipe = inference.load_detector(
        checkpoint, device, config=given, overrides=overrides or (), categories=categories
    )
    val_set = dataset.load_coco(
        data / recipe.data.val_annotations,
        data / recipe.data.val_images,
        bad_images=recipe.data.bad_images,
        bad_boxes=recipe.data.bad_boxes,
    )
    loader = inference.make_eval_loader(recipe, val_set.images, device)
    scores, table = detector.evaluate(progress.track(loader, "evaluating", total=len(loader)), val_set)
    if output is not None:
        coco_eval.write_results(table, output)
    print(coco_eval.format_scores(scores, per_class=per_class))


@app.command()
def detect(
    pictures: Annotated[list[Path], typer.Argument(help="Pictures, or folders of them.", show_default=False)],
    checkpoint: CheckpointOption,
    output: Annotated[Path, typer.Option(help="Folder for annotated copies and detections.json.", show_default=False)],
    config: OwnConfigOption = None,
    annotations: Annotated[
        Path | None,
        typer.Option(help="COCO JSON with the class names, for weights of the MLPerf reference.", show_default=False),
    ] = None,
    drawn_score: Annotated[
        float, typer.Option(min=0, max=1, help="Draw detections of at least this probability.")
    ] = 0.3,
    overrides: SetOption = None,
) -> None:
    """Detect objects on pictures: annotated copies and one JSON file."""
    given = load_config(config, overrides or ()) if config else None

    from ssd_fast import dataset, distributed, inference, progress
    from ssd_fast.detect import detect_pictures

    progress.setup_logging(None)
    device = distributed.World().device()
    categories = dataset.read_categories(annotations) if annotations else None
    detector, recipe = inference.load_detector(
        checkpoint, device, config=given, overrides=overrides or (), categories=categories
    )
    found = dataset.find_pictures(pictures, bad_images=recipe.data.bad_images)
    detect_pictures(detector, recipe, found, output, device=device, drawn_score=drawn_score)
    print(f"{len(found.file_names)} pictures: annotated copies and detections.json are in {output}")


class Stage(enum.StrEnum):
    """What `profile` can measure."""

    KERNELS = "kernels"


@app.command()
def profile(
    config: Annotated[Path, typer.Option(help="Recipe (TOML).", show_default=False)],
    stage: Annotated[Stage, typer.Option(help="What to measure.")] = Stage.KERNELS,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Pictures at a time; left out, 8 on a CPU, 128 (32) on a GPU.")
    ] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Calls of each implementation; fewer of slow ones.")] = 20,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="JSON file for every single time.", show_default=False)
    ] = None,
    overrides: SetOption = None,
) -> None:
    """Time the operators beside plain PyTorch, torchvision and DALI, on the same input."""
    recipe = load_config(config, overrides or ())
    if json_file is not None and not json_file.parent.is_dir():
        raise ValueError(f"--json {json_file}: expected a file in a folder that exists")

    from ssd_fast import distributed, files, kernel_profile

    assert stage is Stage.KERNELS
    environment, measured = kernel_profile.profile_kernels(
        recipe, distributed.World().device(), batch_size=batch_size, repeats=repeats
    )
    print(kernel_profile.format_environment(environment), kernel_profile.format_header(), sep="\n\n")
    rows = []
    for row in measured:
        print(kernel_profile.format_row(row), flush=True)
        rows.append(row)
    print("\n" + kernel_profile.format_legend())
    if json_file is not None:
        files.write_atomically(json_file, kernel_profile.to_json(environment, rows).encode())


@app.command()
def synthesize(
    directory: Annotated[Path, typer.Argument(help="Folder to make.", show_default=False)],
    images: Annotated[int, typer.Option(min=2, help="Number of pictures, a fifth of them for validation.")] = 1000,
    seed: Annotated[int, typer.Option(min=0, help="The same seed gives the same pictures.")] = 0,
) -> None:
    """Make a COCO-format data set of textured shapes, to try everything without COCO."""
    from ssd_fast import progress
    from ssd_fast.synthesize import synthesize as make

    progress.setup_logging(None)
    shown = progress.track(range(images), "making pictures")
    make(directory, num_images=images, seed=seed, on_progress=lambda _: next(shown))
    next(shown, None)
    print(f"{images} pictures in {directory}")


@app.callback()
def options(
    show_traceback: Annotated[bool, typer.Option("--traceback", help="Show where in the code an error arose.")] = False,
) -> None:
    """What holds for all verbs."""
    # read by main(), which catches the error after this has returned


def main() -> None:
    """Runs the command line; an error that its user can mend is one line on stderr and exit status 1."""
    # Before torch is imported. Waiting threads that spin take the cores from the input pipeline: with a busy loop on
    # each of two cores, a step of the demo's model took 0.56 s (median of 7) without this, 0.35 s with it.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        app()
    except (ValueError, OSError, FloatingPointError) as error:
        if "--traceback" in sys.argv[1:2]:
            raise
        if isinstance(error, OSError) and error.filename and error.strerror:
            sys.exit(f"error: {error.filename}: {error.strerror}")
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
