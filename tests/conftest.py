"""Settings of all tests, and data that several test files share."""

import os
from pathlib import Path

import pytest
from hypothesis import settings
from repository import REPOSITORY

# Tests are small and run side by side. Set before torch is imported, and inherited by processes that tests start.
os.environ["OMP_NUM_THREADS"] = "1"

# pytest --hypothesis-profile=few: for runs that look for memory errors, where more values of the same kind add nothing.
settings.register_profile("few", max_examples=10)
settings.register_profile("some", max_examples=40)


@pytest.fixture(scope="session")
def coco_ccby() -> Path:
    """A COCO-format folder of real photographs: SSD_FAST_COCO_CCBY, or one beside the repository."""
    directory = Path(os.environ.get("SSD_FAST_COCO_CCBY", REPOSITORY.parent / "shared" / "data" / "coco_ccby"))
    if not (directory / "annotations" / "instances_val2017.json").is_file():
        pytest.skip(f"no photographs at {directory}; SSD_FAST_COCO_CCBY names a COCO-format folder")
    return directory


@pytest.fixture(scope="session")
def synthetic_set(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small synthetic COCO-format folder: 64 training and 16 validation images."""
    from ssd_fast.data.synthesize import synthesize

    directory = tmp_path_factory.mktemp("synthetic") / "data"
    synthesize(directory, num_images=80, seed=0)
    return directory
