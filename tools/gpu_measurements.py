"""Speeds that only an NVIDIA GPU can show: operators, the step, inference at 1200x1200, the profile, torchvision's."""

import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from gpu_support import Bench, Row, bounded_row, choice_row, failed_row, find_data, repeated, run_command

if TYPE_CHECKING:  # each measurement imports what it needs when it runs
    from dali_pipelines.batch import TrainBatch
    from ssd_fast.profiling.profile import Profile

SSD300_TRAIN_GFLOP = 94.75  # per image, forward and backward
SSD1200_GFLOP = 432.8  # per image


def measure_kernels(bench: Bench, scratch: Path) -> Iterator[Row]:
    """Compare the times of `ssd-fast operators` with their targets."""
    from ssd_fast.config.recipe import load_config
    from ssd_fast.model.anchors import model_anchors

    output = scratch / "operators"
    content, num_anchors = {}, {}
    sizes = {bench.recipe: bench.batch_size, bench.recipe_1200: bench.batch_size_1200}
    for recipe, batch_size in sizes.items():
        num_anchors[recipe] = len(model_anchors(load_config(recipe).model))
        ended = run_command(
            sys.executable, "-m", "ssd_fast", "operators", "--config", recipe, "--output", output,
            "--batch-size", batch_size, "--repeats", bench.repeats, **_environment(bench),
        )  # fmt: skip
        if ended.returncode:
            yield failed_row("times of the operators", ended)
            return
        (report,) = output.glob("*.json")
        content[recipe] = json.loads(report.read_text())
    copy_rate = content[bench.recipe]["environment"]["copy_bytes_per_s"]
    yield Row("memory, read and written", f"{copy_rate / 1e12:.2f} TB/s")
    logits_bytes = bench.batch_size * num_anchors[bench.recipe] * 81 * 2
    for operator, given, recipe, most_ms in (
        ("encode_boxes", "8 boxes an image", bench.recipe, 0.1),
        ("encode_boxes", "60 boxes an image", bench.recipe, 0.2),
        ("multibox_loss", "forward and backward", bench.recipe, 4e3 * 2 * logits_bytes / copy_rate),
        ("decode_nms", "network like", bench.recipe, 0.3),
        ("decode_nms", "network like", bench.recipe_1200, 0.3),
        ("decode_nms", "every anchor", bench.recipe, 1.5),
    ):
        rows = {
            row["implementation"]: row
            for row in content[recipe]["rows"]
            if (row["operator"], row["input"]) == (operator, given)
        }
        what = f"{operator}, {given}, {sizes[recipe]} x {num_anchors[recipe]:,}"
        yield bounded_row(what, 1e3 * rows.pop("kernels")["times"]["median_s"], "{:.3f} ms", at_most=most_ms)
        for name, row in rows.items():
            ratio = row["times"] and row["times"]["ratio"]
            if ratio:
                yield bounded_row(f"{operator}, {given}: {name}", ratio, "{:.1f} times our time", at_least=1)
            else:
                yield Row(f"{operator}, {given}: {name}", "", "", f"not possible: {row['failure']}")


def _environment(bench: Bench) -> dict[str, str]:
    return {"TORCH_COMPILE_DISABLE": "1"} if bench.rehearsal else {}  # on a CPU it takes minutes


def measure_step(bench: Bench, _scratch: Path) -> Iterator[Row]:
    """Training speed without input: as it is, and with changes that may make it faster."""
    from dali_pipelines.synthetic import SyntheticTrainLoader
    from ssd_fast.config.recipe import load_config
    from ssd_fast.hardware import matrix_rate
    from ssd_fast.model.ssd import SSD
    from ssd_fast.training.step import TrainStep

    def graphed(trainer: TrainStep, batch: "TrainBatch") -> None:
        with torch.autocast("cuda", trainer.dtype, cache_enabled=False):
            trainer.model = torch.cuda.make_graphed_callables(trainer.model, (batch.images,))  # type: ignore[assignment]

    def compiled(trainer: TrainStep, _batch: "TrainBatch") -> None:
        trainer.model.forward = torch.compile(  # type: ignore[method-assign]
            trainer.model.forward, disable=bench.rehearsal
        )

    config = load_config(bench.recipe, ["model.backbone_weights=none"])
    num_images, device = bench.batch_size, bench.device
    rates: dict[str, float] = {}
    for name, dtype, change in (
        ("bf16", torch.bfloat16, None),
        ("fp16", torch.float16, None),
        ("bf16, torch.compile", torch.bfloat16, compiled),
        ("bf16, CUDA graph of the network", torch.bfloat16, graphed),
    ):
        trainer = TrainStep(SSD(config.model, num_classes=80), config.optimizer, device=device, dtype=dtype)
        batches = SyntheticTrainLoader(
            num_anchors=trainer.model.num_anchors,
            num_classes=80,
            image_size=config.model.image_size,
            batch_size=num_images,
            device=device,
            steps_per_epoch=1000,
            seed=0,
        ).epoch()
        what = f"step alone, batch {num_images}, {name}"
        try:
            if change is not None:
                change(trainer, next(batches))
            rates[name] = rate = _rate(bench, batches, partial(trainer, learning_rate=1e-3))
        except (RuntimeError, AssertionError) as error:  # a change that does not run is no failure of this project
            yield Row(what, "", "", f"not possible: {str(error).splitlines()[0]}")
            continue
        if name == "bf16":
            share = rate * SSD300_TRAIN_GFLOP * 1e9 / matrix_rate(device, dtype)
            yield Row(what, f"{rate:.0f} images/s")
            yield bounded_row(f"{what}: share", share, "{:.0%} of the matrix rate", at_least=0.55)
        else:
            yield choice_row(what, f"{rate:.0f} images/s", rate / rates["bf16"])


def measure_inference(bench: Bench, _scratch: Path) -> Iterator[Row]:
    """Speed at 1200x1200 without input, with random weights, and the share of decoding and NMS in it."""
    from ssd_fast.config.recipe import load_config
    from ssd_fast.data.annotations import Category
    from ssd_fast.evaluation.detector import make_random_detector
    from ssd_fast.timing import DECODING, MODEL, Timeline

    categories = tuple(Category(number, str(number)) for number in range(1, 81))
    device, size = bench.device, load_config(bench.recipe_1200).model.image_size
    most = bench.batch_size_1200
    for precision, batch_size in (("fp16", 1), ("fp16", min(8, most)), ("fp16", most), ("bf16", most)):
        config = load_config(bench.recipe_1200, [f"training.precision={precision}"])
        detector = make_random_detector(config, categories, device)
        images = torch.randn(batch_size, 3, size, size, device=device, dtype=detector.dtype)
        images = images.to(memory_format=torch.channels_last)
        for _ in range(bench.steps // 2):
            detector.detect(images)
        timeline = Timeline(device, time.perf_counter())
        timeline.settle("first batches")
        for _ in range(2 * bench.steps):
            detector.detect(images, timeline)
        timeline.settle("the host's")
        seconds = {part: statistics.median(laps) for part, laps in timeline.parts().items()}
        total = seconds[MODEL] + seconds[DECODING]
        rate = batch_size / total
        measured = f"{rate:.0f} images/s, {1e3 * total:.2f} ms, {rate * SSD1200_GFLOP / 1000:.0f} TFLOP/s"
        yield Row(f"{size}x{size}, batch {batch_size}, {precision}", measured)
        share = seconds[DECODING] / total
        yield bounded_row(
            f"{size}x{size}, batch {batch_size}, {precision}: decoding and NMS", share, "{:.1%}", at_most=0.1
        )


def profile(bench: Bench, scratch: Path) -> Iterator[Row]:
    """Compare `ssd-fast profile` on photographs, repeated to the size of val2017, with the targets."""
    data, overrides = find_data(bench, scratch)
    data = repeated(data, scratch / "repeated", num_images=bench.num_images)
    settings = [*overrides, f"training.batch_size={bench.batch_size}"]
    settings.append(f"evaluation.batch_size={bench.batch_size}")
    command = [sys.executable, "-m", "ssd_fast", "profile", "--config", bench.recipe, "--data", data]

    def run(name: str, stage: str, seconds: float, *more: str) -> "Profile | Row":
        from ssd_fast.profiling.profile import read_profile

        sets = [argument for setting in (*settings, *more) for argument in ("--set", setting)]
        ended = run_command(*command, "--stage", stage, "--seconds", seconds, "--output", scratch / name, *sets)
        return failed_row(f"profile, {name}", ended) if ended.returncode else read_profile(scratch / name)

    report = run("all stages", "all", bench.seconds)
    if isinstance(report, Row):
        yield report
        return
    fed, alone, both, evaluation = report.stages
    work, slower = report.work, min(fed.images_per_s, alone.images_per_s)
    assert work is not None, "the stages with a step count its work"
    share = work.train_flop * alone.images_per_s / report.machine.matrix_flop_per_s
    yield bounded_row("training, end to end", both.images_per_s, "{:.0f} images/s", at_least=4000)
    yield bounded_row("  share of the slower of input and step", both.images_per_s / slower, "{:.3f}", at_least=0.95)
    yield bounded_row("  step alone, of the measured matrix rate", share, "{:.3f}", at_least=0.55)
    yield bounded_row(
        "  input alone, of the step's rate", fed.images_per_s / alone.images_per_s, "{:.2f}", at_least=1.3
    )
    yield bounded_row("  kernels that only convert layouts, a step", work.layout_kernels, "{:.0f}", at_most=0)
    yield bounded_row("  values that the host reads, a step", len(work.host_reads), "{:.0f}", at_most=0)
    yield bounded_row("  GPU busy", work.gpu_busy, "{:.1%}", at_least=0.95)
    seconds = bench.num_images / evaluation.images_per_s
    yield bounded_row(f"evaluation of {bench.num_images:,} images", seconds, "{:.2f} s", at_most=3)
    yield Row("  " + report.findings[0].name, "", "", report.findings[0].sentence)
    choices = (
        "data.prefetch_batches=4",
        "data.box_encoder=kernels",
        "data.hw_decoder_load=0.0",
        "data.hw_decoder_load=0.5",
        "data.hw_decoder_load=1.0",
    )
    for setting in choices[: 1 if bench.rehearsal else None]:
        changed = run(setting, "input", bench.seconds / 2, setting)
        if isinstance(changed, Row):
            yield changed
        else:
            rate = changed.stages[0].images_per_s
            yield choice_row(f"input alone, {setting}", f"{rate:.0f} images/s", rate / fed.images_per_s)


def compare_with_peer(bench: Bench, scratch: Path) -> Iterator[Row]:
    """Run benchmarks/torchvision_peer.py at full size."""
    data, overrides = find_data(bench, scratch)
    data = repeated(data, scratch / "repeated", num_images=bench.num_images)
    report = scratch / "peer.json"
    sets = [word for key in (*overrides, f"training.batch_size={bench.batch_size}") for word in ("--set", key)]
    steps = 2 * bench.steps
    turns = ("--steps", steps, "--input-steps", steps, "--rounds", 2, "--json", report)
    ended = run_command(
        sys.executable, "benchmarks/torchvision_peer.py", "--config", bench.recipe, "--data", data, *sets, *turns
    )
    if ended.returncode:
        yield failed_row("beside torchvision", ended)
        return
    for row in json.loads(report.read_text())["rows"]:
        what = f"beside torchvision, {row['measure']}"
        yield bounded_row(what, row["ratio_of_medians"], "{:.2f} times as fast", at_least=1)


def _rate(bench: Bench, batches: Iterator["TrainBatch"], use: Callable[["TrainBatch"], object]) -> float:
    """Images per second: the median over groups of batches, after two groups of warm-up. A rehearsal has one group."""
    from ssd_fast.hardware import synchronize

    seconds = []
    for _ in range(1 if bench.rehearsal else 6):
        synchronize(bench.device)
        start = time.perf_counter()
        for batch in islice(batches, bench.steps):
            use(batch)
        synchronize(bench.device)
        seconds.append(time.perf_counter() - start)
    return bench.steps * bench.batch_size / statistics.median(seconds[2:] or seconds)
