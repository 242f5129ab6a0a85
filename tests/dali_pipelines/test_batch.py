"""The augmentation's ranges, and what importing the module loads."""

import subprocess
import sys
from typing import Any

import pytest
from pipelines import UNCHANGED, changed
from repository import REPOSITORY


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"crop_min_ious": (0.1, 1.5)}, r"crop_min_ious.1\n.* less than or equal to 1"),
        ({"crop_allow_none": False}, r"crop_min_ious = \[\] with crop_allow_none = false: expected at least one"),
        ({"crop_sides": (0.5, 0.3)}, r"crop_sides = \[0\.5, 0\.3\]: expected \[low, high\] with low <= high"),
        ({"crop_sides": (0.5, 1.1)}, r"crop_sides.1\n.* less than or equal to 1"),
        ({"crop_aspect": (0.0, 2.0)}, r"crop_aspect.0\n.* greater than 0"),
        ({"brightness": (2.0, 1.0)}, r"brightness = \[2, 1\]: expected \[low, high\]"),
        ({"contrast": (-1.0, 1.0)}, r"contrast.0\n.* greater than 0"),
        ({"saturation": (float("nan"), 1.0)}, r"saturation.0\n.* finite"),
        ({"crop_attempts": 0}, r"crop_attempts\n.* greater than 0"),
        ({"hue_degrees": 181.0}, r"hue_degrees\n.* less than or equal to 180"),
        ({"flip_probability": -0.5}, r"flip_probability\n.* greater than or equal to 0"),
    ],
)
def test_augmentation_refuses_values_outside_their_ranges(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        changed(UNCHANGED, **changes)


def test_importing_the_types_loads_neither_dali_nor_torch() -> None:
    code = "import sys, dali_pipelines.batch; assert not {'torch', 'nvidia.dali'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=REPOSITORY)
