"""The traffic and the host reads that are counted where calls pass PyTorch's dispatcher."""

import torch
from torch import nn

from ssd_fast.profiling.dispatch import CallCounter


def test_bytes_are_those_of_arguments_and_results_and_views_are_free() -> None:
    left, right = torch.ones(100, 50), torch.ones(50, 20)
    with CallCounter() as counter:
        product = left @ right
        product.view(-1)[:10].add_(1)
        torch.empty(10_000)
    assert counter.num_bytes == 4 * (100 * 50 + 50 * 20 + 100 * 20) + 4 * (10 + 10)
    assert not counter.host_reads


def test_bytes_of_backward_count() -> None:
    layer = nn.Linear(50, 20, bias=False)
    images = torch.ones(100, 50)
    with CallCounter() as forward:
        loss = layer(images).sum()
    with CallCounter() as backward:
        loss.backward()
    assert backward.num_bytes > 0.8 * forward.num_bytes


def test_values_that_are_read_are_counted_by_their_place() -> None:
    values = torch.ones(3)
    with CallCounter() as counter:
        for _ in range(2):
            values.sum().item()
        assert bool(values.any())
    assert {place.rpartition(":")[0] for place in counter.host_reads} == {"tests/profiling/test_dispatch.py"}
    assert list(counter.host_reads.values()) == [2, 1]
