"""Builds nothing, needs an NVIDIA GPU: checks and measures what only a GPU can run, and prints a table last.

`make gpu-check`, or `python tests/gpu_check.py [--data DIR]` with the dependencies installed. DIR is a COCO-format
folder with 64 photographs in its validation part; without one, synthetic pictures stand in. Exit status: 0 when every
check holds, 1 when one does not, 2 without a GPU.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))

from dali_pipelines.batch import TrainBatch  # noqa: E402
from dali_pipelines.evaluate import EvalLoader  # noqa: E402
from dali_pipelines.synthetic import SyntheticTrainLoader  # noqa: E402
from dali_pipelines.train import Augmentation, TrainLoader  # noqa: E402
from kernels.reference import cxcywh_to_ltrb  # noqa: E402
from ssd_fast.anchors import model_anchors  # noqa: E402
from ssd_fast.config import Config, load_config, override_config  # noqa: E402
from ssd_fast.dataset import CocoSet, load_coco  # noqa: E402
from ssd_fast.model import SSD  # noqa: E402
from ssd_fast.step import Trainer  # noqa: E402
from ssd_fast.train import train  # noqa: E402

GPU = torch.device("cuda", 0)
CPU = torch.device("cpu")
GREY_LEVELS = 255 * np.mean([0.229, 0.224, 0.225])  # of one unit of a normalised image
SSD300_TRAIN_GFLOP = 94.75  # per image, forward and backward

Row = tuple[str, str, str]  # what, measured, expected or verdict


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = Path(os.environ.get("SSD_FAST_COCO_CCBY", REPOSITORY.parent / "shared" / "data" / "coco_ccby"))
    parser.add_argument("--data", type=Path, default=default)
    parser.add_argument("--batch-size", type=int, default=128)
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("gpu-check: no CUDA device here: nothing was checked", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as scratch:
        data, overrides = _find_data(arguments.data, Path(scratch))
        config = load_config(REPOSITORY / "configs" / "ssd300.toml", overrides)
        pictures = load_coco(data / config.data.val_annotations, data / config.data.val_images)
        rows = [
            ("device", torch.cuda.get_device_name(GPU), f"torch {torch.__version__}"),
            *_check_pipelines(config, pictures),
            *_check_learning(config, data, Path(scratch) / "run"),
            *_measure(config, pictures, arguments.batch_size),
        ]
    width = max(len(what) for what, *_ in rows)
    for what, measured, verdict in rows:
        print(f"{what:<{width}}  {measured:<28}  {verdict}")
    return 1 if any(verdict.startswith("FAILED") for *_, verdict in rows) else 0


def _find_data(directory: Path, scratch: Path) -> tuple[Path, list[str]]:
    """A data folder and the overrides that train and evaluate on its validation part."""
    overrides = [
        "model.backbone_weights=none",
        "data.train_images=val2017",
        "data.train_annotations=annotations/instances_val2017.json",
    ]
    if (directory / "annotations" / "instances_val2017.json").is_file():
        return directory, overrides
    from ssd_fast.synthesize import synthesize

    print(f"no photographs at {directory}: synthetic pictures instead", file=sys.stderr)
    synthesize(scratch / "data", num_images=320, seed=0)
    return scratch / "data", overrides


def _train_loader(config: Config, pictures: CocoSet, device: torch.device, batch_size: int) -> TrainLoader:
    return TrainLoader(
        images=pictures.images,
        anchors_ltrb=cxcywh_to_ltrb(model_anchors(config.model)).numpy(),
        image_size=config.model.image_size,
        batch_size=batch_size,
        device=device,
        num_threads=len(os.sched_getaffinity(0)),
        prefetch_batches=2,
        seed=3,
        augmentation=Augmentation(**config.augmentation.model_dump()),
    )


def _eval_loader(config: Config, pictures: CocoSet, device: torch.device) -> EvalLoader:
    return EvalLoader(
        images=pictures.images,
        image_size=config.model.image_size,
        batch_size=16,
        device=device,
        num_threads=len(os.sched_getaffinity(0)),
        prefetch_batches=2,
    )


def _check_pipelines(config: Config, pictures: CocoSet) -> Iterator[Row]:
    """The GPU's batches against the CPU's: same pictures, crops and targets; pixels to two grey levels on average."""
    levels, same_targets = [], []
    on_cpu, on_gpu = (_train_loader(config, pictures, device, 16) for device in (CPU, GPU))
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
    batches = zip(_eval_loader(config, pictures, CPU), _eval_loader(config, pictures, GPU), strict=True)
    levels = [(found.images.float().cpu() - expected.images).abs().mean().item() for expected, found in batches]
    yield _row("evaluation pixels, GPU - CPU", np.mean(levels) * GREY_LEVELS, "{:.2f} grey levels", at_most=2)


def _check_learning(config: Config, data: Path, output: Path) -> Iterator[Row]:
    """SSD300 learns 64 pictures by heart under mixed precision."""
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
    yield _row("mAP on the 64 pictures learned", outcome.best_map, "{:.3f}", at_least=0.6)
    yield ("  which took", f"{time.perf_counter() - start:.1f} s", "")


def _measure(config: Config, pictures: CocoSet, batch_size: int) -> Iterator[Row]:
    """Images per second of the step alone, of the input alone, and of both together."""
    for dtype in (torch.float16, torch.bfloat16):
        trainer = Trainer(SSD(config.model, num_classes=80), config.optimizer, device=GPU, dtype=dtype)
        synthetic = SyntheticTrainLoader(
            num_anchors=trainer.model.num_anchors,
            num_classes=80,
            image_size=config.model.image_size,
            batch_size=batch_size,
            device=GPU,
            steps_per_epoch=60,
            seed=0,
        )
        rate = _rate(synthetic.epoch(), batch_size, partial(_step, trainer))
        name = str(dtype).removeprefix("torch.")
        teraflops = rate * SSD300_TRAIN_GFLOP / 1000
        yield (f"step alone, batch {batch_size}, {name}", f"{rate:.0f} images/s", f"{teraflops:.0f} TFLOP/s")
    loader = _train_loader(config, pictures, GPU, batch_size)
    rate = _rate(_endless(loader), batch_size, lambda batch: None)
    yield (f"input alone, batch {batch_size}", f"{rate:.0f} images/s", "")
    rate = _rate(_endless(loader), batch_size, partial(_step, trainer))
    yield (f"input and step, batch {batch_size}, {name}", f"{rate:.0f} images/s", "")
    loader.close()


def _step(trainer: Trainer, batch: TrainBatch) -> None:
    trainer.train_step(batch, 1e-3)


def _endless(loader: TrainLoader) -> Iterator[TrainBatch]:
    for _ in range(60):
        yield from loader.epoch()


def _rate(batches: Iterator[TrainBatch], batch_size: int, use: Callable[[TrainBatch], None]) -> float:
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
