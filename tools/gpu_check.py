"""Builds, checks and measures what only an NVIDIA GPU can run, and prints a table last.

`make gpu-check`, or `python tools/gpu_check.py [--data DIR]` wherever PyTorch is: what needs something else that is not
installed is skipped, and its row says what. DIR is a COCO-format folder with 64 photographs in its validation part;
without one, synthetic images stand in. Exit status: 0 when every check that ran holds, 1 when one does not, 2 without
a GPU.
"""

import argparse
import importlib.util
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple
from xml.etree import ElementTree

import numpy as np
import torch

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))

if TYPE_CHECKING:  # the sections import what they need when they run
    from dali_pipelines.batch import TrainBatch
    from dali_pipelines.evaluate import EvalLoader
    from dali_pipelines.train import TrainLoader
    from ssd_fast.config import Config
    from ssd_fast.data.coco import CocoSet
    from ssd_fast.profiling.profile import Profile

GPU = torch.device("cuda", 0)
CPU = torch.device("cpu")
GREY_LEVELS = 255 * np.mean([0.229, 0.224, 0.225])  # of one unit of a normalised image
SSD300_TRAIN_GFLOP = 94.75  # per image, forward and backward
SSD1200_GFLOP = 432.8  # per image
RECIPE = REPOSITORY / "configs" / "ssd300.toml"
RECIPE_1200 = REPOSITORY / "configs" / "ssd1200.toml"

Row = tuple[str, str, str]  # what, measured, expected or verdict


class Section(NamedTuple):
    """Rows of the table, and the modules without which there are none."""

    name: str
    rows: Callable[[argparse.Namespace, Path], Iterator[Row]]
    modules: tuple[str, ...] = ()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = Path(os.environ.get("SSD_FAST_COCO_CCBY", REPOSITORY.parent / "shared" / "data" / "coco_ccby"))
    parser.add_argument("--data", type=Path, default=default)
    parser.add_argument("--batch-size", type=int, default=128)
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("gpu-check: no CUDA device here: nothing was checked", file=sys.stderr)
        return 2
    recipes = ("pydantic", "tomli_w")
    sections = (
        Section("kernels, build", _build_kernels),
        Section("kernels, tests", _test_kernels, ("pytest", "hypothesis")),
        Section("kernels, compute-sanitizer", _sanitize_kernels),
        Section("kernels, times", _measure_kernels, (*recipes, "typer")),
        Section("step alone", _measure_step, recipes),
        Section(
            "profile",
            _profile,
            (*recipes, "nvidia.dali", "msgspec", "pycocotools", "hotcoco", "typer", "rich", "jinja2", "matplotlib"),
        ),
        Section(
            "beside torchvision",
            _compare_with_peer,
            (*recipes, "nvidia.dali", "msgspec", "pycocotools", "hotcoco", "typer", "rich"),
        ),
        Section(
            "inference at 1200",
            _measure_inference,
            (*recipes, "nvidia.dali", "msgspec", "pycocotools", "hotcoco"),
        ),
        Section(
            "pipelines, training",
            _check_training,
            (*recipes, "nvidia.dali", "msgspec", "pycocotools", "hotcoco", "mlperf_logging", "rich"),
        ),
    )
    rows = [("device", torch.cuda.get_device_name(GPU), f"torch {torch.__version__}")]
    try:
        with tempfile.TemporaryDirectory() as scratch:
            for section in sections:
                print(f"==== {section.name}", flush=True)
                for row in _rows(section, arguments, Path(scratch)):
                    print("  ".join(row), flush=True)
                    rows.append(row)
    finally:  # where a section breaks off, what was measured before is not lost
        width = max(len(what) for what, *_ in rows)
        print()
        for what, measured, verdict in rows:
            print(f"{what:<{width}}  {measured:<28}  {verdict}")
    return 1 if any(verdict.startswith("FAILED") for *_, verdict in rows) else 0


def _rows(section: Section, arguments: argparse.Namespace, scratch: Path) -> Iterator[Row]:
    missing = [name for name in section.modules if not _is_installed(name)]
    if missing:
        yield section.name, "", f"skipped: {', '.join(missing)} not installed"
    else:
        yield from section.rows(arguments, scratch)


def _is_installed(module: str) -> bool:
    packages = accumulate(module.split("."), "{}.{}".format)  # a package is sought only where its parent is
    return all(importlib.util.find_spec(name) is not None for name in packages)


def _run(*command: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs a command of this checkout to its end and shows what it writes."""
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


def _build_kernels(_arguments: argparse.Namespace, _scratch: Path) -> Iterator[Row]:
    """The kernels, built in place if they are not there."""
    start = time.perf_counter()
    if not list((REPOSITORY / "kernels").glob("_C*.so")):
        _run(sys.executable, "setup.py", "build_ext", "--inplace")
        yield "kernels built", f"{time.perf_counter() - start:.0f} s", ""
    import kernels

    build = kernels.cuda_build()
    yield "kernels", "CUDA", f"FAILED: {build}" if build.startswith("CUDA not built") else build


def _test_kernels(_arguments: argparse.Namespace, scratch: Path) -> Iterator[Row]:
    """tests/kernels/test_operators.py, on this GPU and on the CPU."""
    report = scratch / "report.xml"
    start = time.perf_counter()
    run = _run(sys.executable, "-m", "pytest", "tests/kernels/test_operators.py", f"--junit-xml={report}")
    seconds = f"{time.perf_counter() - start:.0f} s"
    if not report.is_file():
        yield "tests of the operators", seconds, f"FAILED: pytest ended with status {run.returncode}"
        return
    cases = [
        (case.get("name", ""), {child.tag for child in case}) for case in ElementTree.parse(report).iter("testcase")
    ]
    failed = [name for name, marks in cases if marks & {"failure", "error"}]
    num_passed = sum(not marks for _, marks in cases)
    num_on_gpu = sum(not marks for name, marks in cases if "cuda" in name)
    counts = f"{num_passed} passed, {len(failed)} failed"
    if failed:
        yield "tests of the operators", counts, f"FAILED: {failed[0]}"
    else:
        yield "tests of the operators", counts, f"{'holds' if num_on_gpu else 'FAILED'}: {num_on_gpu} on the GPU"
    yield "  which took", seconds, ""


def _sanitize_kernels(_arguments: argparse.Namespace, _scratch: Path) -> Iterator[Row]:
    """NVIDIA's sanitizers over a call of every operator."""
    places = [os.environ.get("CUDA_HOME", ""), "/usr/local/cuda"]
    tool = shutil.which("compute-sanitizer") or shutil.which(
        "compute-sanitizer", path=os.pathsep.join(f"{place}/bin" for place in places if place)
    )
    if tool is None:
        yield "compute-sanitizer", "", "skipped: compute-sanitizer not installed"
        return
    for check in ("memcheck", "racecheck", "synccheck"):
        # without PyTorch's cache every tensor is an allocation of its own, whose end is watched
        run = _run(
            tool, "--tool", check, "--error-exitcode", "9", sys.executable, "tools/gpu_exercise.py",
            PYTORCH_NO_CUDA_MEMORY_CACHING="1",
        )  # fmt: skip
        summary = [line.strip("= ") for line in run.stdout.splitlines() if "SUMMARY" in line]
        if "Device not supported" in run.stdout:
            verdict = "skipped: this machine refuses compute-sanitizer (Device not supported)"
        else:
            verdict = "holds" if run.returncode == 0 and summary else f"FAILED: status {run.returncode}"
        yield f"compute-sanitizer, {check}", summary[-1] if summary else "", verdict


def _measure_kernels(_arguments: argparse.Namespace, scratch: Path) -> Iterator[Row]:
    """Times of the operators by `ssd-fast profile`, against their targets."""
    report = scratch / "kernels.json"
    recipes = ("--config", RECIPE, "--config", RECIPE_1200)
    run = _run(sys.executable, "-m", "ssd_fast", "profile", *recipes, "--stage", "kernels", "--output", scratch)
    if run.returncode:
        yield "times of the operators", "", f"FAILED: {run.stdout.strip().splitlines()[-1]}"
        return
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
        ours = rows[(*case, "kernels")]
        what = f"{operator}, {given}, {batch_size} x {num_anchors:,}"
        if most_ms is None:
            yield what, f"{1e3 * ours['median_s']:.3f} ms", ""
        else:
            yield _row(what, 1e3 * ours["median_s"], "{:.3f} ms", at_most=most_ms)
        for key, row in rows.items():
            if key[:4] == case and row["implementation"] != "kernels":
                ratio = f"{row['ratio']:.1f} x as long" if row["ratio"] else f"failed: {row['failure']}"
                slower = row["implementation"] != "DALI" or not row["ratio"] or row["ratio"] > 1
                yield f"  {row['implementation']}", ratio, "" if slower else "FAILED: faster than ours"


def _measure_step(arguments: argparse.Namespace, _scratch: Path) -> Iterator[Row]:
    """Images per second of training without input: as it is, and with what may make it faster."""
    from dali_pipelines.synthetic import SyntheticTrainLoader
    from ssd_fast.model.ssd import SSD
    from ssd_fast.recipe import load_config
    from ssd_fast.training.step import TrainStep

    def graphed(trainer: TrainStep, batch: "TrainBatch") -> None:
        with torch.autocast("cuda", trainer.dtype, cache_enabled=False):
            trainer.model = torch.cuda.make_graphed_callables(trainer.model, (batch.images,))

    def compiled(trainer: TrainStep, _batch: "TrainBatch") -> None:
        trainer.model.forward = torch.compile(trainer.model.forward)

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
            if change:
                change(trainer, next(batches))
            rate = _rate(batches, arguments.batch_size, lambda batch, trainer=trainer: trainer(batch, 1e-3))
        except RuntimeError as error:  # a candidate that does not run is no failure of what is there
            yield what, "", f"not possible: {str(error).splitlines()[0]}"
            continue
        matrix_rate = matrix_rate or _matrix_rate()
        share = rate * SSD300_TRAIN_GFLOP * 1e9 / matrix_rate
        yield what, f"{rate:.0f} images/s", f"{share:.0%} of the measured matrix rate"


def _matrix_rate() -> float:
    """FLOP per second of a large matrix product in bfloat16."""
    from ssd_fast.hardware import matrix_rate

    return matrix_rate(GPU, torch.bfloat16)


def _measure_inference(_arguments: argparse.Namespace, _scratch: Path) -> Iterator[Row]:
    """Images per second at 1200x1200 without input, with random weights, and the share of what is not the network."""
    from ssd_fast.data.coco import Category
    from ssd_fast.evaluation.detector import make_random_detector
    from ssd_fast.recipe import load_config
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


def _check_training(arguments: argparse.Namespace, scratch: Path) -> Iterator[Row]:
    """What needs DALI: the input on the GPU, and learning."""
    from ssd_fast.data.coco import load_coco
    from ssd_fast.recipe import load_config

    data, overrides = _find_data(arguments.data, scratch)
    config = load_config(RECIPE, overrides)
    images = load_coco(data / config.data.val_annotations, data / config.data.val_images)
    yield from _check_pipelines(config, images)
    yield from _check_learning(config, data, scratch / "run")


def _find_data(directory: Path, scratch: Path) -> tuple[Path, list[str]]:
    """A data folder and the overrides that train and evaluate on its validation part."""
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


def _train_loader(config: "Config", images: "CocoSet", device: torch.device, batch_size: int) -> "TrainLoader":
    from dali_pipelines.train import Augmentation, TrainLoader
    from kernels.boxes import cxcywh_to_ltrb
    from ssd_fast.model.anchors import model_anchors

    return TrainLoader(
        images=images.images,
        anchors_ltrb=cxcywh_to_ltrb(model_anchors(config.model)).numpy(),
        image_size=config.model.image_size,
        batch_size=batch_size,
        device=device,
        num_threads=len(os.sched_getaffinity(0)),
        prefetch_batches=2,
        seed=3,
        augmentation=Augmentation(**config.augmentation.model_dump()),
    )


def _eval_loader(config: "Config", images: "CocoSet", device: torch.device) -> "EvalLoader":
    from dali_pipelines.evaluate import EvalLoader

    return EvalLoader(
        images=images.images,
        image_size=config.model.image_size,
        batch_size=16,
        device=device,
        num_threads=len(os.sched_getaffinity(0)),
        prefetch_batches=2,
    )


def _check_pipelines(config: "Config", images: "CocoSet") -> Iterator[Row]:
    """The GPU's batches against the CPU's: same images, crops and targets; pixels to two grey levels on average."""
    levels, same_targets = [], []
    on_cpu, on_gpu = (_train_loader(config, images, device, 16) for device in (CPU, GPU))
    with on_cpu, on_gpu:
        for expected, found in zip(on_cpu.epoch(), on_gpu.epoch(), strict=True):
            assert np.array_equal(on_cpu.last_image_ids, on_gpu.last_image_ids)
            assert found.images.dtype == torch.float16
            assert found.images.is_contiguous(memory_format=torch.channels_last)
            levels.append((found.images.float().cpu() - expected.images).abs().mean().item() * GREY_LEVELS)
            same = (found.labels.cpu() == expected.labels) & torch.isclose(
                found.deltas.cpu(), expected.deltas, atol=1e-3, rtol=1e-3
            ).all(dim=-1)
            same_targets.append(same.float().mean().item())
    yield _row("training pixels, GPU - CPU", np.mean(levels), "{:.2f} grey levels", at_most=2)
    yield _row("training targets alike", np.mean(same_targets), "{:.6f} of anchors", at_least=0.99999)
    batches = zip(_eval_loader(config, images, CPU), _eval_loader(config, images, GPU), strict=True)
    levels = [(found.images.float().cpu() - expected.images).abs().mean().item() for expected, found in batches]
    yield _row("evaluation pixels, GPU - CPU", np.mean(levels) * GREY_LEVELS, "{:.2f} grey levels", at_most=2)


def _check_learning(config: "Config", data: Path, output: Path) -> Iterator[Row]:
    """SSD300 learns 64 images by heart under mixed precision."""
    from ssd_fast.recipe import override_config
    from ssd_fast.training.run import train

    recipe = override_config(
        config,
        [
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
        ],
        source="gpu-check",
    )
    start = time.perf_counter()
    outcome = train(recipe, data, output, resume=False)
    yield _row("mAP on the 64 images learned", outcome.best_map, "{:.3f}", at_least=0.6)
    yield ("  which took", f"{time.perf_counter() - start:.1f} s", "")


def _profile(arguments: argparse.Namespace, scratch: Path) -> Iterator[Row]:
    """`ssd-fast profile` on photographs, repeated to make a set of COCO's size for evaluation, against the targets."""
    data, overrides = _find_data(arguments.data, scratch)
    data = _repeated(data, scratch / "repeated", num_images=5_000)
    settings = [*overrides, f"training.batch_size={arguments.batch_size}", "evaluation.batch_size=128"]
    command = [sys.executable, "-m", "ssd_fast", "profile", "--config", RECIPE, "--data", data]

    def run(name: str, stage: str, seconds: float, *more: str) -> "Profile | None":
        from ssd_fast.profiling.profile import read_profile

        sets = [argument for setting in (*settings, *more) for argument in ("--set", setting)]
        ended = _run(*command, "--stage", stage, "--seconds", str(seconds), "--output", scratch / name, *sets)
        return None if ended.returncode else read_profile(scratch / name)

    report = run("profile", "all", 10)
    if report is None:
        yield "profile", "", "FAILED: the command did not end well"
        return
    fed, alone, both, evaluation = report.stages
    share = report.work.train_flop * alone.images_per_s / report.machine.matrix_flop_per_s
    yield _row("training, end to end", both.images_per_s, "{:.0f} images/s", at_least=4000)
    yield _row("  share of the slower of input and step", both.images_per_s / min(fed.images_per_s, alone.images_per_s),
               "{:.3f}", at_least=0.95)  # fmt: skip
    yield _row("  step alone, of the measured matrix rate", share, "{:.3f}", at_least=0.55)
    yield _row("  input alone, of the step's rate", fed.images_per_s / alone.images_per_s, "{:.2f}", at_least=1.3)
    yield _row("  kernels that only convert layouts, a step", report.work.layout_kernels, "{:.0f}", at_most=0)
    yield _row("  values that the host reads, a step", len(report.work.host_reads), "{:.0f}", at_most=0)
    yield "  GPU busy", f"{report.work.gpu_busy:.1%}", ""
    yield _row("evaluation of 5,000 images", 5_000 / evaluation.images_per_s, "{:.2f} s", at_most=3)
    yield "  " + report.findings[0].name, "", report.findings[0].sentence
    for setting in ("data.hw_decoder_load=0.0", "data.hw_decoder_load=0.5", "data.hw_decoder_load=1.0",
                    "data.prefetch_batches=4", "data.box_encoder=kernels"):  # fmt: skip
        changed = run(setting, "input", 5, setting)
        if changed is None:
            yield f"input alone, {setting}", "", "FAILED: the command did not end well"
        else:
            ratio = changed.stages[0].images_per_s / fed.images_per_s
            yield f"input alone, {setting}", f"{changed.stages[0].images_per_s:.0f} images/s", f"{ratio:.2f} times"


def _compare_with_peer(arguments: argparse.Namespace, scratch: Path) -> Iterator[Row]:
    """benchmarks/torchvision_peer.py at full size."""
    data, overrides = _find_data(arguments.data, scratch)
    data = _repeated(data, scratch / "repeated", num_images=5_000)
    report = scratch / "peer.json"
    sets = [word for key in (*overrides, f"training.batch_size={arguments.batch_size}") for word in ("--set", key)]
    turns = ("--steps", "20", "--input-steps", "20", "--rounds", "2", "--json", report)
    ended = _run(
        sys.executable, "benchmarks/torchvision_peer.py", "--config", RECIPE, "--data", data, *sets, *turns
    )  # fmt: skip
    if ended.returncode:
        yield "beside torchvision", "", f"FAILED: {ended.stdout.strip().splitlines()[-1]}"
        return
    for row in json.loads(report.read_text())["rows"]:
        yield f"beside torchvision, {row['measure']}", f"{row['ratio_of_medians']:.2f} x as fast", ""


def _repeated(data: Path, target: Path, *, num_images: int) -> Path:
    """A data folder whose validation part holds the images of another's again and again."""
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


def _rate(batches: Iterator["TrainBatch"], batch_size: int, use: Callable[["TrainBatch"], None]) -> float:
    """Images per second over the median of groups of ten batches, after two groups of warm-up."""
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


def _row(what: str, value: float, text: str, *, at_least: float | None = None, at_most: float | None = None) -> Row:
    holds = (at_least is None or value >= at_least) and (at_most is None or value <= at_most)
    bound = f"at least {at_least:g}" if at_least is not None else f"at most {at_most:g}"
    return what, text.format(value), f"{'holds' if holds else 'FAILED'}: {bound}"


if __name__ == "__main__":
    sys.exit(main())
