"""The command line: `ssd-fast VERB`, also `python -m ssd_fast VERB`."""

import enum
import os
import sys
import time
from pathlib import Path
from typing import Annotated

import typer

from ssd_fast import exit_status
from ssd_fast.config.recipe import load_config, recipe_folder
from ssd_fast.files import check_folder, check_writable
from ssd_fast.loadgen.settings import Scenario
from ssd_fast.options import (
    AnnotationsOption,
    CheckpointOption,
    DataOption,
    OwnConfigOption,
    RecipeFolderOption,
    RecipeOption,
    SetOption,
)
from ssd_fast.streams import flush_output

# Verbs import their modules when they run, so that help and a mistyped recipe do not wait for torch.

app = typer.Typer(
    help="SSD-ResNet34 object detection on COCO: train, evaluate, detect, benchmark.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.command()
def train(
    config: RecipeOption,
    data: DataOption,
    output: Annotated[Path, typer.Option(help="Folder of the run.", show_default=False)],
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in the folder, if there is one.")] = False,
    overrides: SetOption = None,
) -> None:
    """Train a detector. Checkpoints, records and images go to a folder."""
    recipe = load_config(config, overrides or ())

    import ssd_fast
    from ssd_fast.distributed import slurm

    outcome = ssd_fast.train(recipe, data, output, resume=resume)
    if outcome.stopped_by:
        raise typer.Exit(0 if slurm.launched_by_slurm() else exit_status.SIGNALLED + outcome.stopped_by)
    if not outcome.is_main:
        return
    target = recipe.evaluation.target_map
    reached = f" (target {target:g} {'reached' if outcome.reached_target else 'not reached'})" if target < 1 else ""
    print(f"best mAP {outcome.best_map:.4f}{reached}; everything about the run is in {output}")


@app.command()
def evaluate(
    checkpoint: CheckpointOption,
    data: DataOption,
    config: OwnConfigOption = None,
    output: Annotated[
        Path | None, typer.Option(help="JSON file for the detections, in COCO's result format.", show_default=False)
    ] = None,
    per_class: Annotated[bool, typer.Option("--per-class", help="Also print the precision of each class.")] = False,
    only_annotated: Annotated[
        bool, typer.Option("--only-annotated", help="Skip images without annotations, like the MLPerf reference.")
    ] = False,
    with_timing: Annotated[bool, typer.Option("--timing", help="Also print where the time went.")] = False,
    target: Annotated[
        float | None,
        typer.Option(
            min=-1,
            max=1,
            help=f"COCO mAP to reach; a lower one gives exit status {exit_status.NOT_REACHED}.",
            show_default=False,
        ),
    ] = None,
    overrides: SetOption = None,
) -> None:
    """Print COCO's twelve numbers of a detector on the validation images."""
    start_s = time.perf_counter()
    given = load_config(config, overrides or ()) if config else None

    from ssd_fast import progress
    from ssd_fast.evaluation import coco_eval
    from ssd_fast.evaluation import evaluate as evaluation

    if output is not None:
        check_writable(output, "--output", coco_eval.is_results_file)
    progress.setup_logging(None)
    found = evaluation.evaluate(
        checkpoint,
        data,
        config=given,
        overrides=overrides or (),
        only_annotated=only_annotated,
        needs_scores=output is None or target is not None,
        start_s=start_s,
    )
    if found is None:
        return
    if with_timing:
        print(evaluation.format_timing(found), end="\n\n")
    print(evaluation.format_evaluation(found, per_class=per_class))
    if output is not None:
        coco_eval.write_results(found.table, output)
    if target is not None and found.scores is not None:
        reached = found.scores.map >= target
        print(f"mAP {found.scores.map:.5f}, target {target:g}: {'reached' if reached else 'not reached'}")
        raise typer.Exit(0 if reached else exit_status.NOT_REACHED)


@app.command()
def detect(
    images: Annotated[
        list[Path], typer.Argument(help="Image files, folders of images, or patterns.", show_default=False)
    ],
    checkpoint: CheckpointOption,
    output: Annotated[Path, typer.Option(help="Folder for annotated copies and detections.json.", show_default=False)],
    config: OwnConfigOption = None,
    annotations: AnnotationsOption = None,
    drawn_score: Annotated[
        float, typer.Option(min=0, max=1, help="Lowest probability of a detection that is drawn.")
    ] = 0.3,
    overrides: SetOption = None,
) -> None:
    """Detect objects on images; write annotated copies and one JSON file."""
    given = load_config(config, overrides or ()) if config else None

    from ssd_fast import progress, timing
    from ssd_fast.evaluation.predict import detect_files

    progress.setup_logging(None)
    found = detect_files(
        checkpoint,
        images,
        output,
        config=given,
        overrides=overrides or (),
        annotations=annotations,
        drawn_score=drawn_score,
    )
    print(timing.format_line(found.parts, num_images=found.num_images))
    print(f"{found.num_images} images: annotated copies and detections.json are in {output}")


@app.command()
def export(
    checkpoint: CheckpointOption,
    output: Annotated[Path, typer.Option(help="ONNX file to write.", show_default=False)],
    config: OwnConfigOption = None,
    annotations: AnnotationsOption = None,
    with_decode: Annotated[
        bool,
        typer.Option(
            "--with-decode", help="Include decoding and non-maximum suppression, so that the outputs are detections."
        ),
    ] = False,
    overrides: SetOption = None,
) -> None:
    """Write a detector as ONNX; before that, compare it with PyTorch if onnxruntime is installed."""
    given = load_config(config, overrides or ()) if config else None

    from ssd_fast.evaluation.export import export_onnx

    made = export_onnx(
        checkpoint, output, config=given, overrides=overrides or (), annotations=annotations, with_decode=with_decode
    )
    agreement = made.agreement or "not compared with PyTorch: onnxruntime is missing"
    print(f"{output}: {made.num_bytes / 1e6:.1f} MB; {agreement}")


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
    recipe = load_config(config, overrides or ()) if config else None

    from ssd_fast import progress
    from ssd_fast.profiling import report
    from ssd_fast.profiling.profile import RESULT_FILES, STAGES_OF_OPTION, is_result, read_profile

    if output is not None:
        check_folder(output, "--output", RESULT_FILES, is_result)
    progress.setup_logging(None)
    earlier = [read_profile(path) for path in compared]
    if config is None or recipe is None:
        print(report.format_comparison(*earlier))
        return

    from ssd_fast.profiling.profiler import profile_run, write_files

    before = earlier[0] if earlier else None
    measured = profile_run(
        recipe, data, recipe=config.name, stages=STAGES_OF_OPTION[stage], seconds=seconds, checkpoint=checkpoint
    )
    is_main = measured.rank == 0
    if is_main:
        print(report.format_profile(measured.profile))
        if before:
            print("\n" + report.format_comparison(before, measured.profile))
    if output is not None:
        write_files(output, measured, before)
        if is_main:
            print(f"\n{output}: report.html, profile.json, and traces for https://ui.perfetto.dev")


@app.command()
def operators(
    config: Annotated[
        list[Path], typer.Option(help="Recipe (TOML) whose anchors are used. Repeatable.", show_default=False)
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

    from ssd_fast import progress
    from ssd_fast.profiling import operators as profiled

    if output is not None:
        check_folder(output, "--output", (profiled.OPERATORS_FILE,), profiled.is_result)
    progress.setup_logging(None)
    measured = profiled.profile_operators(recipes, batch_size=batch_size, repeats=repeats)
    print(profiled.format_operators(measured))
    if output is not None:
        profiled.write_operators(output, measured)


@app.command()
def scaling(
    timeline: Annotated[Path, typer.Option(help="File that HOROVOD_TIMELINE named in a run.", show_default=False)],
    cluster: Annotated[str, typer.Option(help="Cluster to assume: c4140, dgx_a100 or h200.")] = "c4140",
    recipes: RecipeFolderOption = None,
    run: Annotated[
        list[str] | None,
        typer.Option(metavar="GPUSxBATCH", help="GPUs and images per GPU in place of the cluster's own; repeatable."),
    ] = None,
    fp16_compression: Annotated[
        bool, typer.Option("--fp16-compression", help="Assume gradients of 2 bytes per element.")
    ] = False,
    assume: Annotated[
        list[str] | None, typer.Option(metavar="FIGURE=VALUE", help="Replace an assumed figure. Repeatable.")
    ] = None,
) -> None:
    """Estimate the speed of many GPUs, and the term that limits it, from gradients measured in a small run."""
    from ssd_fast.profiling import scaling as model

    assumed = model.change_cluster(model.load_cluster(cluster, recipes or recipe_folder()), assume or ())
    runs = [model.parse_run(text) for text in run or ()] or assumed.runs
    print(model.format_scaling(timeline, assumed, runs, bytes_per_element=2 if fp16_compression else 4))


@app.command()
def benchmark(
    scenario: Annotated[Scenario, typer.Option(help="Scenario of MLPerf Inference.", show_default=False)],
    output: Annotated[Path, typer.Option(help="Folder for LoadGen's logs.", show_default=False)],
    config: OwnConfigOption = None,
    checkpoint: Annotated[
        Path | None,
        typer.Option(
            help="Checkpoint, or weights of the MLPerf reference. Default: random weights.", show_default=False
        ),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(help="Data folder in COCO's layout. Default: random images.", show_default=False),
    ] = None,
    accuracy: Annotated[
        bool, typer.Option("--accuracy", help="Detect on every image once and score the detections in LoadGen's log.")
    ] = False,
    find_load: Annotated[
        bool,
        typer.Option("--find-load", help="Search for the highest load of Server, starting at benchmark.server_qps."),
    ] = False,
    overrides: SetOption = None,
) -> None:
    """Measure a detector with MLPerf LoadGen; an invalid result gives exit status 1."""
    if accuracy and (data is None or checkpoint is None):
        raise ValueError("--accuracy: expected --data and --checkpoint with it")
    if find_load and (accuracy or scenario is not Scenario.SERVER):
        raise ValueError("--find-load: expected --scenario Server without --accuracy")
    given = load_config(config, overrides or ()) if config else None

    from ssd_fast import progress
    from ssd_fast.evaluation import coco_eval
    from ssd_fast.loadgen import logs
    from ssd_fast.loadgen.run import benchmark as run_benchmark

    progress.setup_logging(None)
    measured = run_benchmark(
        checkpoint,
        data,
        output,
        scenario=scenario,
        mode="accuracy" if accuracy else "find-load" if find_load else "performance",
        config=given,
        overrides=overrides or (),
    )
    print(logs.format_measured(measured))
    if measured.scores is not None:
        print(coco_eval.format_scores(measured.scores))
    if not measured.is_valid():
        raise typer.Exit(exit_status.INVALID)


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
    """Options of all verbs; main() reads them from the command line."""


def main() -> None:
    """Run the command line. An error that the user can correct is one line on stderr and exit status 1."""
    # Set before torch is imported. Waiting threads that spin take cores from the input pipeline: with a busy loop on
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
    finally:
        flush_output()


if __name__ == "__main__":
    main()
