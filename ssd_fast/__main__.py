"""The command line: `ssd-fast VERB`, also `python -m ssd_fast VERB`."""

import enum
import os
import sys
import time
from pathlib import Path
from typing import Annotated

import typer

from ssd_fast.config import DistributedConfig
from ssd_fast.recipe import load_config

NOT_REACHED = 3  # exit status of `evaluate --target`; 1 is an error, 2 a mistyped command

# Verbs import what they need when they run: help and a mistyped recipe do not wait for torch.

app = typer.Typer(
    help="SSD-ResNet34 object detection on COCO: train, evaluate, detect, benchmark.",
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
    """Train a detector; checkpoints, records and images go to a folder."""
    recipe = load_config(config, overrides or ())

    from ssd_fast.distributed import world as distributed
    from ssd_fast.training.run import train as train_run

    with distributed.connect(recipe.distributed) as world:
        outcome = train_run(recipe, data, output, resume=resume, world=world)
    if outcome.stopped_by:
        raise typer.Exit(0 if distributed.launched_by_slurm() else 128 + outcome.stopped_by)
    if not world.is_main:
        return
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
    only_annotated: Annotated[
        bool, typer.Option("--only-annotated", help="Leave images without annotations out, as the MLPerf reference.")
    ] = False,
    with_timing: Annotated[bool, typer.Option("--timing", help="Print where the time went, too.")] = False,
    target: Annotated[
        float | None,
        typer.Option(
            min=-1, max=1, help=f"COCO mAP to reach, else the exit status is {NOT_REACHED}.", show_default=False
        ),
    ] = None,
    overrides: SetOption = None,
) -> None:
    """Score a detector on the validation images: COCO's twelve numbers."""
    start_s = time.perf_counter()
    given = load_config(config, overrides or ()) if config else None

    from ssd_fast import hardware, progress, timing
    from ssd_fast.data import coco as dataset
    from ssd_fast.data import loaders
    from ssd_fast.distributed import world as distributed
    from ssd_fast.evaluation import coco_eval
    from ssd_fast.evaluation import detector as inference

    progress.setup_logging(None)
    with distributed.connect(given.distributed if given else DistributedConfig()) as world:
        device = world.device()
        categories = dataset.read_categories(data / given.data.val_annotations) if given else None
        detector, recipe = inference.load_detector(
            checkpoint, device, config=given, overrides=overrides or (), categories=categories
        )
        val_set = dataset.load_coco(
            data / recipe.data.val_annotations,
            data / recipe.data.val_images,
            only_annotated=only_annotated,
            bad_images=recipe.data.bad_images,
            bad_boxes=recipe.data.bad_boxes,
        )
        loader = loaders.make_eval_loader(recipe, val_set.images, device, world=world)
        timeline = timing.Timeline(device, start_s)
        timeline.settle("load")
        batches = progress.track(loader, "evaluating", total=len(loader))
        table = detector.detect_set(batches, val_set, world, timeline)
        timeline.settle("collecting")
    if not world.is_main:
        return
    category_ids = detector.category_ids_in(val_set).tolist()
    scores = coco_eval.score(val_set.annotation_file, table, category_ids=category_ids)
    timeline.settle("scoring")
    if output is not None:
        coco_eval.write_results(table, output)
    if with_timing:
        size = recipe.model.image_size
        name, dtype = hardware.device_name(device, world.cores), str(detector.dtype).removeprefix("torch.")
        print(f"{name}, {dtype}, {size} x {size} pixels")
        report = timing.format_report(
            timeline.parts(), num_images=len(val_set.images.file_names), batch_size=recipe.evaluation.batch_size
        )
        print(report, end="\n\n")
    print(coco_eval.format_scores(scores, per_class=per_class))
    if target is not None:
        reached = scores.map >= target
        print(f"mAP {scores.map:.5f}, target {target:g}: {'reached' if reached else 'not reached'}")
        raise typer.Exit(0 if reached else NOT_REACHED)


@app.command()
def detect(
    images: Annotated[list[Path], typer.Argument(help="Images, folders of them, or patterns.", show_default=False)],
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
    """Detect objects on images: annotated copies and one JSON file."""
    given = load_config(config, overrides or ()) if config else None

    from ssd_fast import progress, timing
    from ssd_fast.data import coco as dataset
    from ssd_fast.distributed import world as distributed
    from ssd_fast.evaluation import detector as inference
    from ssd_fast.evaluation.predict import detect_images

    progress.setup_logging(None)
    device = distributed.World().device()
    categories = dataset.read_categories(annotations) if annotations else None
    detector, recipe = inference.load_detector(
        checkpoint, device, config=given, overrides=overrides or (), categories=categories
    )
    found = dataset.find_images(images, bad_images=recipe.data.bad_images)
    timeline = detect_images(detector, recipe, found, output, device=device, drawn_score=drawn_score)
    print(timing.format_line(timeline.parts(), num_images=len(found.file_names)))
    print(f"{len(found.file_names)} images: annotated copies and detections.json are in {output}")


@app.command()
def export(
    checkpoint: CheckpointOption,
    output: Annotated[Path, typer.Option(help="ONNX file to write.", show_default=False)],
    config: OwnConfigOption = None,
    annotations: Annotated[
        Path | None,
        typer.Option(help="COCO JSON with the class names, for weights of the MLPerf reference.", show_default=False),
    ] = None,
    with_decode: Annotated[
        bool, typer.Option("--with-decode", help="With decoding and non-maximum suppression: detections come out.")
    ] = False,
    overrides: SetOption = None,
) -> None:
    """Write a detector as ONNX; where onnxruntime is installed, compare it with PyTorch before."""
    given = load_config(config, overrides or ()) if config else None
    if not output.parent.is_dir():
        raise ValueError(f"--output {output}: expected a file in a folder that exists")

    import torch

    from ssd_fast import files
    from ssd_fast.data import coco as dataset
    from ssd_fast.evaluation import detector as inference
    from ssd_fast.evaluation.export import check_onnx, to_onnx

    categories = dataset.read_categories(annotations) if annotations else None
    detector, _ = inference.load_detector(
        checkpoint, torch.device("cpu"), config=given, overrides=overrides or (), categories=categories
    )
    content = to_onnx(detector, with_decode=with_decode)
    checked = check_onnx(content, detector, with_decode=with_decode)
    files.write_atomically(output, content)
    print(f"{output}: {len(content) / 1e6:.1f} MB; {checked or 'not compared with PyTorch: onnxruntime is missing'}")


class Stage(enum.StrEnum):
    """Stages that `profile` can measure."""

    ALL = "all"
    INPUT = "input"
    STEP = "step"
    BOTH = "both"
    EVALUATION = "evaluation"


@app.command()
def profile(
    config: Annotated[Path | None, typer.Option(help="Recipe (TOML).", show_default=False)] = None,
    data: Annotated[Path | None, typer.Option(help="Data folder in COCO's layout.", show_default=False)] = None,
    stage: Annotated[Stage, typer.Option(help="Stage to measure.")] = Stage.ALL,
    output: Annotated[Path | None, typer.Option(help="Folder for report and traces.", show_default=False)] = None,
    compare: Annotated[
        list[Path] | None,
        typer.Option(help="Earlier profile to compare with; without --config, two of them.", show_default=False),
    ] = None,
    checkpoint: Annotated[
        Path | None, typer.Option(help="Detector to use; left out, random weights.", show_default=False)
    ] = None,
    seconds: Annotated[float, typer.Option(min=0.1, help="Time for each stage; at least six steps are taken.")] = 10.0,
    overrides: SetOption = None,
) -> None:
    """Find what bounds the throughput: the input, the step, both together, or the evaluation."""
    compared = compare or []
    if config is None and len(compared) != 2:
        raise ValueError("expected --config, or two profiles to --compare")
    if config is not None and len(compared) > 1:
        raise ValueError("--compare: expected one earlier profile with --config, or two without")
    if config is not None and data is None and stage is not Stage.STEP:
        raise ValueError(f"--stage {stage}: expected --data; --stage step needs none")
    _check_folder(output)
    recipe = load_config(config, overrides or ()) if config else None

    from ssd_fast import progress
    from ssd_fast.distributed import world as distributed
    from ssd_fast.profiling import report
    from ssd_fast.profiling.profile import STAGES_OF_OPTION, read_profile

    progress.setup_logging(None)
    earlier = [read_profile(path) for path in compared]
    if config is None or recipe is None:
        print(report.format_comparison(*earlier))
        return

    from ssd_fast.profiling.profiler import profile_run, write_files

    before = earlier[0] if earlier else None
    with distributed.connect(recipe.distributed) as world:
        if output is not None and world.is_main:
            output.mkdir(exist_ok=True)
        measured = profile_run(
            recipe,
            data,
            world,
            recipe=config.name,
            stages=STAGES_OF_OPTION[stage],
            seconds=seconds,
            checkpoint=checkpoint,
        )
    if world.is_main:
        print(report.format_profile(measured.profile))
        if before:
            print("\n" + report.format_comparison(before, measured.profile))
    if output is not None:
        write_files(output, measured, world.rank, before)
        if world.is_main:
            print(f"\n{output}: report.html, profile.json, and traces for https://ui.perfetto.dev")


@app.command()
def operators(
    config: Annotated[
        list[Path], typer.Option(help="Recipe (TOML) whose anchors are used; may be repeated.", show_default=False)
    ],
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Images at a time; left out, 8 on a CPU, 128 or 32 on a GPU.")
    ] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Calls of each implementation; slow ones get fewer.")] = 20,
    output: Annotated[Path | None, typer.Option(help="Folder for operators.json.", show_default=False)] = None,
    overrides: SetOption = None,
) -> None:
    """Time the operators beside their plain versions and beside what one would use in their place."""
    recipes = [load_config(path, overrides or ()) for path in config]
    _check_folder(output)

    from ssd_fast import files, progress
    from ssd_fast.distributed import world as distributed
    from ssd_fast.profiling.operators import format_operators, profile_operators

    progress.setup_logging(None)
    measured = profile_operators(recipes, distributed.World().device(), batch_size=batch_size, repeats=repeats)
    print(format_operators(measured))
    if output is not None:
        output.mkdir(exist_ok=True)
        files.write_atomically(output / "operators.json", measured.to_json().encode())


def _check_folder(output: Path | None) -> None:
    if output is not None and not output.parent.is_dir():
        raise ValueError(f"--output {output}: expected a folder, or a new one in a folder that exists")


@app.command()
def scaling(
    timeline: Annotated[Path, typer.Option(help="File that HOROVOD_TIMELINE named in a run.", show_default=False)],
    cluster: Annotated[str, typer.Option(help="Cluster to assume: c4140, dgx_a100 or h200.")] = "c4140",
    recipes: Annotated[Path, typer.Option(help="Folder with the recipes of the cluster.")] = Path("configs"),
    run: Annotated[
        list[str] | None,
        typer.Option(metavar="GPUSxBATCH", help="GPUs and images per GPU in place of the cluster's own; repeatable."),
    ] = None,
    fp16_compression: Annotated[
        bool, typer.Option("--fp16-compression", help="Assume gradients of 2 bytes per element.")
    ] = False,
    assume: Annotated[
        list[str] | None, typer.Option(metavar="FIGURE=VALUE", help="Replace an assumed figure; may be repeated.")
    ] = None,
) -> None:
    """Estimate the speed of many GPUs, and the term that limits it, from gradients measured in a small run."""
    from ssd_fast.profiling import scaling as model

    assumed = model.change_cluster(model.load_cluster(cluster, recipes), assume or ())
    runs = [model.parse_run(text) for text in run or ()] or assumed.runs
    print(model.format_scaling(timeline, assumed, runs, bytes_per_element=2 if fp16_compression else 4))


class Scenario(enum.StrEnum):
    """MLPerf's scenarios, by LoadGen's names."""

    OFFLINE = "Offline"
    SINGLE_STREAM = "SingleStream"
    SERVER = "Server"
    MULTI_STREAM = "MultiStream"


@app.command()
def benchmark(
    scenario: Annotated[Scenario, typer.Option(help="What LoadGen measures.", show_default=False)],
    output: Annotated[Path, typer.Option(help="Folder for LoadGen's logs.", show_default=False)],
    config: OwnConfigOption = None,
    checkpoint: Annotated[
        Path | None,
        typer.Option(
            help="Checkpoint, or weights of the MLPerf reference; left out, random weights.", show_default=False
        ),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(help="Data folder in COCO's layout; left out, random images.", show_default=False),
    ] = None,
    accuracy: Annotated[
        bool, typer.Option("--accuracy", help="Detect every image, and score what LoadGen logs.")
    ] = False,
    find_load: Annotated[
        bool, typer.Option("--find-load", help="Search for the highest load of Server, from benchmark.server_qps up.")
    ] = False,
    overrides: SetOption = None,
) -> None:
    """Measure a detector with MLPerf LoadGen; the exit status is 1 if the result is not valid."""
    if accuracy and (data is None or checkpoint is None):
        raise ValueError("--accuracy: expected --data and --checkpoint, too")
    if find_load and (accuracy or scenario is not Scenario.SERVER):
        raise ValueError("--find-load: expected --scenario Server without --accuracy")
    given = load_config(config, overrides or ()) if config else None

    from ssd_fast import progress
    from ssd_fast.data import coco as dataset
    from ssd_fast.distributed import world as distributed
    from ssd_fast.evaluation import coco_eval
    from ssd_fast.evaluation import detector as inference
    from ssd_fast.loadgen import run as loadgen

    progress.setup_logging(None)
    device = distributed.World().device()
    categories = dataset.NUMBERED_CATEGORIES
    if data is not None and given is not None:
        categories = dataset.read_categories(data / given.data.val_annotations)
    if checkpoint is not None:
        detector, recipe = inference.load_detector(
            checkpoint, device, config=given, overrides=overrides or (), categories=categories
        )
    elif given is not None:
        detector, recipe = inference.make_random_detector(given, categories, device), given
    else:
        raise ValueError("expected --checkpoint, or --config for a network of random weights")
    val_set = None
    if data is not None:
        val_set = dataset.load_coco(
            data / recipe.data.val_annotations,
            data / recipe.data.val_images,
            bad_images=recipe.data.bad_images,
            bad_boxes=recipe.data.bad_boxes,
        )
    mode: loadgen.Mode = "accuracy" if accuracy else "find-load" if find_load else "performance"
    measured = loadgen.run(
        detector, recipe, scenario=scenario.value, mode=mode, coco_set=val_set, output=output, device=device
    )
    print(loadgen.format_measured(measured, recipe.benchmark))
    if accuracy and val_set is not None:
        table = loadgen.read_accuracy_log(output / loadgen.ACCURACY_LOG, val_set)
        category_ids = detector.category_ids_in(val_set).tolist()
        print(coco_eval.format_scores(coco_eval.score(val_set.annotation_file, table, category_ids=category_ids)))
    if not measured.is_valid():
        raise typer.Exit(1)


@app.command()
def synthesize(
    directory: Annotated[Path, typer.Argument(help="Folder to make.", show_default=False)],
    images: Annotated[int, typer.Option(min=2, help="Number of images, a fifth of them for validation.")] = 1000,
    seed: Annotated[int, typer.Option(min=0, help="The same seed gives the same images.")] = 0,
) -> None:
    """Make a COCO-format data set of textured shapes, to try everything without COCO."""
    from ssd_fast import progress
    from ssd_fast.data.synthesize import synthesize as make

    progress.setup_logging(None)
    shown = progress.track(range(images), "making images")
    make(directory, num_images=images, seed=seed, on_progress=lambda _: next(shown))
    next(shown, None)
    print(f"{images} images in {directory}")


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
