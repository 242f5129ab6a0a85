"""A whole run, which several test files look at."""

from pathlib import Path

import pytest
from tiny import tiny_config

from ssd_fast.training.run import train


@pytest.fixture(scope="session")
def finished(synthetic_set: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that nothing interrupted."""
    output = tmp_path_factory.mktemp("runs") / "finished"
    outcome = train(tiny_config(), synthetic_set, output, resume=False)
    assert outcome.stopped_by == 0
    return output
