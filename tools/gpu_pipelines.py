"""Checks that need DALI on a GPU: its batches equal the CPU's, and training learns."""

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from gpu_support import CPU, Bench, Row, bounded_row, find_data

if TYPE_CHECKING:  # each check imports what it needs when it runs
    from dali_pipelines.evaluate import EvalLoader
    from dali_pipelines.train import TrainLoader
    from ssd_fast.config.sections import Config
    from ssd_fast.data.coco import CocoSet


def check_training(bench: Bench, scratch: Path) -> Iterator[Row]:
    """Check the input pipelines on the GPU, and that training learns."""
    from ssd_fast.config.recipe import load_config
    from ssd_fast.data.coco import load_coco

    data, overrides = find_data(bench, scratch)
    config = load_config(bench.recipe, overrides)
    images = load_coco(data / config.data.val_annotations, data / config.data.val_images)
    yield from _check_pipelines(bench, config, images)
    yield from _check_learning(bench, config, data, scratch / "run")


def _check_pipelines(bench: Bench, config: "Config", images: "CocoSet") -> Iterator[Row]:
    """Compare the GPU's batches with the CPU's: equal targets; pixels within two grey levels on average."""
    from dali_pipelines.batch import IMAGENET_STD

    grey_levels = 255 * sum(IMAGENET_STD) / 3  # of one unit of a normalised image
    levels, same_targets = [], []
    on_cpu, on_gpu = (_train_loader(config, images, device, 16) for device in (CPU, bench.device))
    with on_cpu, on_gpu:
        for expected, found in zip(on_cpu.epoch(), on_gpu.epoch(), strict=True):
            assert np.array_equal(on_cpu.last_image_ids, on_gpu.last_image_ids)
            assert found.images.dtype == (torch.float32 if bench.rehearsal else torch.float16)
            assert found.images.is_contiguous(memory_format=torch.channels_last)
            levels.append((found.images.float().cpu() - expected.images).abs().mean().item() * grey_levels)
            same = (found.labels.cpu() == expected.labels) & torch.isclose(
                found.deltas.cpu(), expected.deltas, atol=1e-3, rtol=1e-3
            ).all(dim=-1)
            same_targets.append(same.float().mean().item())
    yield bounded_row("training pixels, GPU - CPU", float(np.mean(levels)), "{:.2f} grey levels", at_most=2)
    yield bounded_row("training targets alike", float(np.mean(same_targets)), "{:.6f} of anchors", at_least=0.99999)
    batches = zip(_eval_loader(config, images, CPU), _eval_loader(config, images, bench.device), strict=True)
    levels = [(found.images.float().cpu() - expected.images).abs().mean().item() for expected, found in batches]
    yield bounded_row(
        "evaluation pixels, GPU - CPU", float(np.mean(levels)) * grey_levels, "{:.2f} grey levels", at_most=2
    )


def _check_learning(bench: Bench, config: "Config", data: Path, output: Path) -> Iterator[Row]:
    """Check that SSD300 learns 64 images by heart under mixed precision."""
    from ssd_fast.config.recipe import override_config
    from ssd_fast.training.run import train

    recipe = override_config(config, list(bench.learning), source="gpu-check")
    start = time.perf_counter()
    outcome = train(recipe, data, output, resume=False)
    yield bounded_row("mAP on the 64 images learned", outcome.best_map, "{:.3f}", at_least=0.6)
    yield Row("  which took", f"{time.perf_counter() - start:.1f} s")


def _train_loader(config: "Config", images: "CocoSet", device: torch.device, batch_size: int) -> "TrainLoader":
    from dali_pipelines.train import TrainLoader
    from kernels.boxes import cxcywh_to_ltrb
    from kernels.constants import CENTRE_VARIANCE, SIZE_VARIANCE
    from ssd_fast.model.anchors import model_anchors

    return TrainLoader(
        images=images.images,
        anchors_ltrb=cxcywh_to_ltrb(model_anchors(config.model)).numpy(),
        variances=(CENTRE_VARIANCE, SIZE_VARIANCE),
        image_size=config.model.image_size,
        batch_size=batch_size,
        device=device,
        num_threads=len(os.sched_getaffinity(0)),
        prefetch_batches=2,
        seed=3,
        augmentation=config.augmentation,
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
