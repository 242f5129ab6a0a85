"""The training and the validation set of a recipe, which another process reads while this one still starts."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from ssd_fast.background import BackgroundCall
from ssd_fast.config.sections import Config, DataConfig
from ssd_fast.data.coco import CocoSet, ReadSet, check_images, find_ids, is_large, read_set
from ssd_fast.data.policy import DataError
from ssd_fast.distributed.slurm import read_launch

if TYPE_CHECKING:
    from ssd_fast.distributed.world import World

logger = logging.getLogger(__name__)


class TrainAndVal(NamedTuple):
    """The two sets of a recipe."""

    train: CocoSet
    val: CocoSet


class ReadSets(NamedTuple):
    """The two sets of a recipe, whose images have not been looked at."""

    train: ReadSet
    val: ReadSet


Reading = BackgroundCall[ReadSets]


def start_reading(config: Config, data_dir: Path) -> Reading | None:
    """Begin to read both sets, if this is the first rank, which reads for all. Call it before torch is imported."""
    launch = read_launch()
    return None if launch and launch.rank else BackgroundCall("read the annotations", read_sets, config.data, data_dir)


def read_sets(data: DataConfig, data_dir: Path) -> ReadSets:
    """Both sets of the section `data` of a recipe. Raises DataError when one cannot be used."""
    train = read_set(
        data_dir / data.train_annotations,
        data_dir / data.train_images,
        classes=data.classes,
        with_crowds=data.train_on_crowds,
    )
    val = read_set(data_dir / data.val_annotations, data_dir / data.val_images)
    find_ids(train.categories, val.categories, val.annotation_file)
    return ReadSets(train, val)


def load_sets(config: Config, data_dir: Path, world: World, reading: Reading | None = None) -> TrainAndVal:
    """Both sets of a recipe, with their images looked at by all ranks.

    reading: of these sets, where it has been started.
    Raises DataError when one cannot be used.
    """
    found: ReadSets | Exception | None = None
    if world.is_main:
        reading = reading or BackgroundCall("read the annotations", read_sets, config.data, data_dir)
        if is_large(data_dir / config.data.train_annotations) and not reading.is_done():
            logger.info("reading %s", data_dir / config.data.train_annotations)
        try:
            found = reading.result()
        except (ValueError, OSError) as error:
            found = error
    found = world.broadcast(found)
    if isinstance(found, Exception):
        raise found
    assert found
    data, augmentation = config.data, config.augmentation
    shortest = augmentation.crop_sides[0] if augmentation.crop_min_ious else 1.0
    smallest_side = math.ceil(1 / shortest) if shortest else 1  # so that a crop holds a pixel
    policies = data.bad_images, data.bad_boxes
    most = data.max_image_pixels
    train = check_images(found.train, *policies, smallest_side=smallest_side, max_pixels=most, world=world)
    val = check_images(found.val, *policies, max_pixels=most, world=world)
    if len(train.images.boxes_ltrb) == 0:
        raise DataError(f"{train.annotation_file}: no image has a box to learn from")
    if not val.has_boxes_of(train.categories):
        raise DataError(f"{val.annotation_file}: no image has a box of these classes to score detections by")
    return TrainAndVal(train, val)
