"""The verbs that use a trained network: evaluate, detect, export, quantize, benchmark."""

import time
from pathlib import Path
from typing import Annotated

import typer

from ssd_fast import exit_status
from ssd_fast.config.recipe import load_config
from ssd_fast.files import check_writable
from ssd_fast.loadgen.settings import Scenario
from ssd_fast.options import AnnotationsOption, CheckpointOption, DataOption, OwnConfigOption, SetOption

# Verbs import their modules when they run, so that help and a mistyped recipe do not wait for torch.

app = typer.Typer()


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


@app.command()
def quantize(
    checkpoint: CheckpointOption,
    data: DataOption,
    config: OwnConfigOption = None,
    images: Annotated[int, typer.Option(min=1, help="Training images that give the ranges of int8.")] = 500,
    image_list: Annotated[
        Path | None, typer.Option(help="Text file that names these images, one in each line.", show_default=False)
    ] = None,
    overrides: SetOption = None,
) -> None:
    """Make a network in int8 for CPUs, beside its checkpoint, if it is as accurate as in float32."""
    given = load_config(config, overrides or ()) if config else None

    from ssd_fast import progress
    from ssd_fast.evaluation import quantize as quantization

    progress.setup_logging(None)
    made = quantization.quantize(
        checkpoint, data, config=given, overrides=overrides or (), num_images=images, image_list=image_list
    )
    print(quantization.format_quantized(made))
    if made.path is None:
        raise typer.Exit(exit_status.NOT_REACHED)


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
