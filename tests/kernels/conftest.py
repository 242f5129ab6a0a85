"""Devices and threads of the operators' tests."""

from collections.abc import Callable, Iterator

import pytest
import torch
from operator_samples import DEVICES


@pytest.fixture(scope="module", params=DEVICES)
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.param)


@pytest.fixture
def set_num_threads() -> Iterator[Callable[[int], None]]:
    """Sets the number of threads of this test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)
