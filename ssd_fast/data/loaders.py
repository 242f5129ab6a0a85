"""The loaders of batches for training and evaluation."""

from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

import kernels
from dali_pipelines.batch import LabelledImages
from dali_pipelines.evaluate import EvalLoader
from dali_pipelines.train import Encode, TrainLoader
from kernels.boxes import cxcywh_to_ltrb
from kernels.constants import CENTRE_VARIANCE, SIZE_VARIANCE
from ssd_fast.config.sections import Config
from ssd_fast.data.coco import CocoSet
from ssd_fast.distributed.world import World
from ssd_fast.hardware import input_threads
from ssd_fast.model.anchors import reference_order


def make_train_loader(
    config: Config,
    coco_set: CocoSet,
    anchors_cxcywh: Tensor,
    device: torch.device,
    world: World,
    state: bytes | None = None,
) -> TrainLoader:
    """This rank's training batches of a set. state: of an earlier loader, from whose position this one continues."""
    return TrainLoader(**loader_arguments(config, coco_set, anchors_cxcywh, device, world), state=state)


def loader_arguments(
    config: Config, coco_set: CocoSet, anchors_cxcywh: Tensor, device: torch.device, world: World
) -> dict[str, Any]:
    """Arguments of TrainLoader except its state."""
    return {
        "images": coco_set.images,
        "anchors_ltrb": cxcywh_to_ltrb(anchors_cxcywh).numpy(),
        "variances": (CENTRE_VARIANCE, SIZE_VARIANCE),
        "encode": make_encode(config, anchors_cxcywh.to(device)),
        "image_size": config.model.image_size,
        "batch_size": config.training.batch_size,
        "device": device,
        "num_threads": input_threads(config.data.num_threads, world.cores),
        "prefetch_batches": config.data.prefetch_batches,
        "hw_decoder_load": config.data.hw_decoder_load,
        "seed": config.training.seed,
        "rank": world.rank,
        "world_size": world.size,
        "augmentation": config.augmentation,
    }


def make_encode(config: Config, anchors_cxcywh: Tensor) -> Encode | None:
    """The operator that makes targets on the device of the anchors, or None for DALI's encoder."""
    if box_encoder(config.data.box_encoder, anchors_cxcywh.device) == "dali":
        return None
    model = config.model
    tie_ranks = reference_order(grid_sizes=model.grid_sizes(), anchors_per_cell=model.anchors_per_cell())
    return partial(kernels.encode_boxes, anchors_cxcywh=anchors_cxcywh, tie_ranks=tie_ranks.to(anchors_cxcywh.device))


def box_encoder(setting: str, device: torch.device) -> str:
    """The encoder for the key data.box_encoder on a device, "dali" or "kernels".

    On a CPU "auto" is the operator: DALI's encoder takes ten times its time from the cores that decode images. On a GPU
    it is DALI's, which runs ahead of the training step; there the two have not been compared yet.
    """
    if setting != "auto":
        return setting
    return "kernels" if device.type == "cpu" else "dali"


def make_eval_loader(
    config: Config,
    images: LabelledImages,
    device: torch.device,
    *,
    world: World | None = None,
    orientations: np.ndarray | None = None,
) -> EvalLoader:
    """A loader of images in their order, or of this rank's share of them.

    orientations: how to turn each image. None for a data set, whose boxes refer to the stored pixels.
    """
    world = world or World()
    return EvalLoader(
        images=images,
        image_size=config.model.image_size,
        batch_size=config.evaluation.batch_size,
        device=device,
        num_threads=input_threads(config.data.num_threads, world.cores),
        prefetch_batches=config.data.prefetch_batches,
        rank=world.rank,
        world_size=world.size,
        orientations=orientations,
    )
