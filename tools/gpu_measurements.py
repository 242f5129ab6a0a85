"""Speeds that only an NVIDIA GPU can show: operators, the step, inference at 1200x1200, the profile, torchvision's."""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from gpu_support import GPU, RECIPE, RECIPE_1200, Row, bounded_row, find_data, repeated, run_command

if TYPE_CHECKING:  # each measurement imports what it needs when it runs
    from dali_pipelines.batch import TrainBatch
    from ssd_fast.profiling.profile import Profile

SSD300_TRAIN_GFLOP = 94.75  # per image, forward and backward
SSD1200_GFLOP = 432.8  # per image


def measure_kernels(_arguments: argparse.Namespace, scratch: Path) -> Iterator[Row]:
    """Compare the times of `ssd-fast operators` with their targets."""
    output = scratch / "operators"
    recipes = ("--config", RECIPE, "--config", RECIPE_1200)
    ended = run_command(sys.executable, "-m", "ssd_fast", "operators", *recipes, "--output", output)
    if ended.returncode:
        yield "times of the operators", "", f"FAILED: {ended.stdout.strip().splitlines()[-1]}"
        return
    (report,) = output.glob("*.json")
    content = json.loads(report.read_text())
    copy_rate = content["environment"]["copy_bytes_per_s"]
    rows = {
        (row["operator"], row["input"], row["batch_size"], row["num_anchors"], row["implementation"]): row
        for row in content["rows"]
    }
    yield "memory, read and written", f"{copy_rate / 1e12:.2f} TB/s", ""
    for operator, given, batch_size, num_anchors, most_ms in (
        ("encode_boxes", "8 boxes an image", 128, 8_732, 0.1),
        ("encode_boxes", "60 boxes an image", 128, 8_732, None),
        ("multibox_loss", "forward and backward", 128, 8_732, 4e3 * 2 * 128 * 8_732 * 81 * 2 / copy_rate),
        ("decode_nms", "network like", 128, 8_732, 1.0),
        ("decode_nms", "network like", 32, 15_130, 0.6),
        ("decode_nms", "every anchor", 128, 8_732, None),
    ):
        case = (operator, given, batch_size, num_anchors)
        ours_ms = 1e3 * rows[(*case, "kernels")]["times"]["median_s"]
        what = f"{operator}, {given}, {batch_size} x {num_anchors:,}"
        if most_ms is None:
            yield what, f"{ours_ms:.3f} ms", ""
        else:
            yield bounded_row(what, ours_ms, "{:.3f} ms", at_most=most_ms)
        for key, row in rows.items():
            if key[:4] == case and row["implementation"] != "kernels":
                ratio = row["times"] and row["times"]["ratio"]
                found = f"{ratio:.1f} x as long" if ratio else f"failed: {row['failure']}"
                slower = row["implementation"] != "DALI" or not ratio or ratio > 1
                yield f"  {row['implementation']}", found, "" if slower else "FAILED: faster than ours"


def measure_step(arguments: argparse.Namespace, _scratch: Path) -> Iterator[Row]:
    """Training speed without input: as it is, and with changes that may make it faster."""
    from dali_pipelines.synthetic import SyntheticTrainLoader
    from ssd_fast.config.recipe import load_config
    from ssd_fast.model.ssd import SSD
    from ssd_fast.training.step import TrainStep

    def graphed(trainer: TrainStep, batch: "TrainBatch") -> None:
        with torch.autocast("cuda", trainer.dtype, cache_enabled=False):
            trainer.model = torch.cuda.make_graphed_callables(trainer.model, (batch.images,))  # type: ignore[assignment]

    def compiled(trainer: TrainStep, _batch: "TrainBatch") -> None:
        trainer.model.forward = torch.compile(trainer.model.forward)  # type: ignore[method-assign]

    config = load_config(RECIPE, ["model.backbone_weights=none"])
    matrix_rate = None
    for name, dtype, change in (
        ("fp16", torch.float16, None),
        ("bf16", torch.bfloat16, None),
        ("bf16, torch.compile", torch.bfloat16, compiled),
        ("bf16, CUDA graph of the network", torch.bfloat16, graphed),
    ):
        trainer = TrainStep(SSD(config.model, num_classes=80), config.optimizer, device=GPU, dtype=dtype)
        batches = SyntheticTrainLoader(
            num_anchors=trainer.model.num_anchors,
            num_classes=80,
            image_size=config.model.image_size,
            batch_size=arguments.batch_size,
            device=GPU,
            steps_per_epoch=1000,
            seed=0,
        ).epoch()
        what = f"step alone, batch {arguments.batch_size}, {name}"
        try:
            if change is not None:
                change(trainer, next(batches))
            rate = _rate(batches, arguments.batch_size, partial(trainer, learning_rate=1e-3))
        except RuntimeError as error:  # a change that does not run is no failure of this project
            yield what, "", f"not possible: {str(error).splitlines()[0]}"
            continue
        matrix_rate = matrix_rate or _matrix_rate()
        share = rate * SSD300_TRAIN_GFLOP * 1e9 / matrix_rate
        yield what, f"{rate:.0f} images/s", f"{share:.0%} of the measured matrix rate"


def _matrix_rate() -> float:
    """FLOP per second of a large bfloat16 matrix product."""
    from ssd_fast.hardware import matrix_rate

    return matrix_rate(GPU, torch.bfloat16)


def measure_inference(_arguments: argparse.Namespace, _scratch: Path) -> Iterator[Row]:
    """Speed at 1200x1200 without input, with random weights, and the share of decoding and NMS in it."""
    from ssd_fast.config.recipe import load_config
    from ssd_fast.data.annotations import Category
    from ssd_fast.evaluation.detector import make_random_detector
    from ssd_fast.timing import DECODING, MODEL, Timeline

    categories = tuple(Category(number, str(number)) for number in range(1, 81))
    for precision, batch_size in (("fp16", 1), ("fp16", 8), ("fp16", 32), ("bf16", 32)):
        config = load_config(RECIPE_1200, [f"training.precision={precision}"])
        detector = make_random_detector(config, categories, GPU)
        images = torch.randn(batch_size, 3, 1200, 1200, device=GPU, dtype=torch.float16)
        images = images.to(memory_format=torch.channels_last)
        for _ in range(5):
            detector.detect(images)
        timeline = Timeline(GPU, time.perf_counter())
        timeline.settle("first batches")
        for _ in range(20):
            detector.detect(images, timeline)
        timeline.settle("the host's")
        seconds = {part: statistics.median(laps) for part, laps in timeline.parts().items()}
        rate = batch_size / (seconds[MODEL] + seconds[DECODING])
        share = seconds[DECODING] / (seconds[MODEL] + seconds[DECODING])
        verdict = f"{rate * SSD1200_GFLOP / 1000:.0f} TFLOP/s; decoding and NMS {share:.1%}"
        yield f"1200x1200, batch {batch_size}, {precision}", f"{rate:.0f} images/s", verdict


def profile(arguments: argparse.Namespace, scratch: Path) -> Iterator[Row]:
    """Compare `ssd-fast profile` on photographs, repeated to the size of val2017, with the targets."""
    data, overrides = find_data(arguments.data, scratch)
    data = repeated(data, scratch / "repeated", num_images=5_000)
    settings = [*overrides, f"training.batch_size={arguments.batch_size}", "evaluation.batch_size=128"]
    command = [sys.executable, "-m", "ssd_fast", "profile", "--config", RECIPE, "--data", data]

    def run(name: str, stage: str, seconds: float, *more: str) -> "Profile | None":
        from ssd_fast.profiling.profile import read_profile

        sets = [argument for setting in (*settings, *more) for argument in ("--set", setting)]
        ended = run_command(*command, "--stage", stage, "--seconds", str(seconds), "--output", scratch / name, *sets)
        return None if ended.returncode else read_profile(scratch / name)

    report = run("profile", "all", 10)
    if report is None:
        yield "profile", "", "FAILED: the command did not end well"
        return
    fed, alone, both, evaluation = report.stages
    work, slower = report.work, min(fed.images_per_s, alone.images_per_s)
    assert work is not None, "the stages with a step count its work"
    assert work.layout_kernels is not None, "they are counted on a GPU"
    share = work.train_flop * alone.images_per_s / report.machine.matrix_flop_per_s
    yield bounded_row("training, end to end", both.images_per_s, "{:.0f} images/s", at_least=4000)
    yield bounded_row("  share of the slower of input and step", both.images_per_s / slower, "{:.3f}", at_least=0.95)
    yield bounded_row("  step alone, of the measured matrix rate", share, "{:.3f}", at_least=0.55)
    yield bounded_row(
        "  input alone, of the step's rate", fed.images_per_s / alone.images_per_s, "{:.2f}", at_least=1.3
    )
    yield bounded_row("  kernels that only convert layouts, a step", work.layout_kernels, "{:.0f}", at_most=0)
    yield bounded_row("  values that the host reads, a step", len(work.host_reads), "{:.0f}", at_most=0)
    yield "  GPU busy", f"{work.gpu_busy:.1%}", ""
    yield bounded_row("evaluation of 5,000 images", 5_000 / evaluation.images_per_s, "{:.2f} s", at_most=3)
    yield "  " + report.findings[0].name, "", report.findings[0].sentence
    for setting in ("data.hw_decoder_load=0.0", "data.hw_decoder_load=0.5", "data.hw_decoder_load=1.0",
                    "data.prefetch_batches=4", "data.box_encoder=kernels"):  # fmt: skip
        changed = run(setting, "input", 5, setting)
        if changed is None:
            yield f"input alone, {setting}", "", "FAILED: the command did not end well"
        else:
            ratio = changed.stages[0].images_per_s / fed.images_per_s
            yield f"input alone, {setting}", f"{changed.stages[0].images_per_s:.0f} images/s", f"{ratio:.2f} times"


def compare_with_peer(arguments: argparse.Namespace, scratch: Path) -> Iterator[Row]:
    """Run benchmarks/torchvision_peer.py at full size."""
    data, overrides = find_data(arguments.data, scratch)
    data = repeated(data, scratch / "repeated", num_images=5_000)
    report = scratch / "peer.json"
    sets = [word for key in (*overrides, f"training.batch_size={arguments.batch_size}") for word in ("--set", key)]
    turns = ("--steps", "20", "--input-steps", "20", "--rounds", "2", "--json", report)
    ended = run_command(
        sys.executable, "benchmarks/torchvision_peer.py", "--config", RECIPE, "--data", data, *sets, *turns
    )  # fmt: skip
    if ended.returncode:
        yield "beside torchvision", "", f"FAILED: {ended.stdout.strip().splitlines()[-1]}"
        return
    for row in json.loads(report.read_text())["rows"]:
        yield f"beside torchvision, {row['measure']}", f"{row['ratio_of_medians']:.2f} x as fast", ""


def _rate(batches: Iterator["TrainBatch"], batch_size: int, use: Callable[["TrainBatch"], object]) -> float:
    """Images per second: the median over groups of ten batches, after two groups of warm-up."""
    seconds = []
    iterator = iter(batches)
    for _ in range(6):
        torch.cuda.synchronize(GPU)
        start = time.perf_counter()
        for _ in range(10):
            use(next(iterator))
        torch.cuda.synchronize(GPU)
        seconds.append(time.perf_counter() - start)
    return 10 * batch_size / statistics.median(seconds[2:])
