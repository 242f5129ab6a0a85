"""Devices and threads of the operators' tests."""

import os
from collections.abc import Callable, Iterator

import pytest
import torch
from operator_samples import DEVICES

import kernels


@pytest.fixture(scope="session", autouse=True)
def _is_the_build_that_is_meant() -> None:
    """Of several builds of the operators, the one that SSD_FAST_TESTED_BUILD names by a part of its description."""
    assert os.environ.get("SSD_FAST_TESTED_BUILD", "") in kernels.cuda_build(), kernels.__file__


@pytest.fixture(scope="module", params=DEVICES)
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.param)


@pytest.fixture
def set_num_threads() -> Iterator[Callable[[int], None]]:
    """Sets the number of threads of this test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)
