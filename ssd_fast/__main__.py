"""The command line: `ssd-fast VERB`, also `python -m ssd_fast VERB`."""

import enum
import sys
from pathlib import Path
from typing import Annotated

import typer

from ssd_fast import exit_status, inference_verbs
from ssd_fast.config.recipe import load_config, recipe_folder
from ssd_fast.files import check_folder
from ssd_fast.openmp import wait_briefly
from ssd_fast.options import (
    DataOption,
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


app.add_typer(inference_verbs.app)


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
def synthesize(
    directory: Annotated[Path, typer.Argument(help="Folder to make.", show_default=False)],
    images: Annotated[int, typer.Option(min=2, help="Number of images, a fifth of them for validation.")] = 1000,
    seed: Annotated[int, typer.Option(min=0, help="The same seed gives the same images.")] = 0,
    other_classes: Annotated[
        bool, typer.Option("--other-classes", help="Five other classes, of the same shapes and textures.")
    ] = False,
) -> None:
    """Make a COCO-format data set of textured shapes, to try everything without COCO."""
    from ssd_fast import progress
    from ssd_fast.data.synthesize import KINDS, OTHER_KINDS
    from ssd_fast.data.synthesize import synthesize as make

    progress.setup_logging(None)
    shown = progress.track(range(images), "making images")
    kinds = OTHER_KINDS if other_classes else KINDS
    make(directory, num_images=images, seed=seed, kinds=kinds, on_progress=lambda _: next(shown))
    next(shown, None)
    print(f"{images} images in {directory}")


@app.callback()
def options(
    show_traceback: Annotated[bool, typer.Option("--traceback", help="Show where in the code an error arose.")] = False,
) -> None:
    """Options of all verbs; main() reads them from the command line."""


def main() -> None:
    """Run the command line. An error that the user can correct is one line on stderr and exit status 1."""
    wait_briefly()
    try:
        app()
    except (ValueError, OSError, FloatingPointError, MemoryError) as error:
        if "--traceback" in sys.argv[1:2]:
            raise
        if isinstance(error, MemoryError):
            sys.exit(f"error: this process was refused more memory{f': {error}' if str(error) else ''}")
        if isinstance(error, OSError) and error.filename and error.strerror:
            sys.exit(f"error: {error.filename}: {error.strerror}")
        sys.exit(f"error: {error}")
    finally:
        flush_output()


if __name__ == "__main__":
    main()
