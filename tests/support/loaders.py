"""What the tests of the input pipelines share: an augmentation that changes nothing, and the one of SSD."""

from dataclasses import replace

from dali_pipelines.batch import Augmentation

UNCHANGED = Augmentation(
    crop_min_ious=(),
    crop_allow_none=True,
    crop_sides=(0.3, 1.0),
    crop_aspect=(0.5, 2.0),
    crop_attempts=1,
    brightness=(1.0, 1.0),
    contrast=(1.0, 1.0),
    saturation=(1.0, 1.0),
    hue_degrees=0.0,
    flip_probability=0.0,
)
SSD_CROP = replace(UNCHANGED, crop_min_ious=(0.0, 0.1, 0.3, 0.5, 0.7, 0.9))
SSD = replace(
    SSD_CROP,
    brightness=(0.875, 1.125),
    contrast=(0.5, 1.5),
    saturation=(0.5, 1.5),
    hue_degrees=18.0,
    flip_probability=0.5,
)
