"""The order of training images: how often each comes, on which rank, in which epoch."""

from typing import Any

import numpy as np
import pytest

from dali_pipelines.order import TrainingOrder

TRIPLES = [  # images, batch size of a rank, ranks
    (16, 15, 1),
    (16, 16, 1),
    (16, 32, 1),
    (16, 5, 3),
    (23, 4, 2),
    (100, 3, 8),
    (100, 16, 64),
    (7, 30, 3),
    (3, 2, 4),
    (1, 1, 2),
]


def epoch_of(num_images: int, batch_size: int, world_size: int, *, epoch: int = 0, seed: int = 1) -> np.ndarray:
    """[steps, world_size * batch_size]: the global batches of an epoch."""
    ranks = []
    for rank in range(world_size):
        order = TrainingOrder(num_images, batch_size=batch_size, rank=rank, world_size=world_size, seed=seed)
        steps = range(epoch * order.steps_per_epoch, (epoch + 1) * order.steps_per_epoch)
        ranks.append(np.stack([order.positions(step) for step in steps]))
    return np.concatenate(ranks, axis=1)


@pytest.mark.parametrize(("num_images", "batch_size", "world_size"), TRIPLES)
def test_in_every_epoch_no_image_comes_more_than_once_more_than_another(
    num_images: int, batch_size: int, world_size: int
) -> None:
    for epoch in range(3):
        batches = epoch_of(num_images, batch_size, world_size, epoch=epoch)
        assert batches.size - num_images < world_size * batch_size  # no more steps than the set needs
        counts = np.bincount(batches.ravel(), minlength=num_images)
        assert len(counts) == num_images
        assert counts.min() >= 1
        assert counts.max() - counts.min() <= 1


@pytest.mark.parametrize(("num_images", "batch_size", "world_size"), TRIPLES)
def test_a_global_batch_repeats_an_image_only_if_the_set_is_smaller(
    num_images: int, batch_size: int, world_size: int
) -> None:
    for batch in epoch_of(num_images, batch_size, world_size):
        counts = np.bincount(batch, minlength=num_images)
        assert counts.max() == -(-world_size * batch_size // num_images)


def test_ranks_share_no_image_of_an_epoch_that_needs_no_filling() -> None:
    assert sorted(epoch_of(24, 2, 4).ravel().tolist()) == list(range(24))


@pytest.mark.parametrize("num_images", [5, 16, 23, 64])
def test_a_step_trains_on_the_same_images_however_many_ranks_share_it(num_images: int) -> None:
    for epoch in range(3):
        alone = epoch_of(num_images, 8, 1, epoch=epoch)
        for world_size in (2, 4, 8):
            assert np.array_equal(epoch_of(num_images, 8 // world_size, world_size, epoch=epoch), alone)


def test_epochs_and_seeds_have_unrelated_orders() -> None:
    orders = [epoch_of(100, 100, 1, epoch=epoch, seed=seed)[0] for epoch in range(6) for seed in (0, 1, 2, 2**31 - 1)]
    orders.append(np.arange(100))
    for number, one in enumerate(orders):
        for other in orders[:number]:
            assert (one == other).sum() < 10  # one on average


def test_every_image_is_equally_likely_at_every_place() -> None:
    order = TrainingOrder(4, batch_size=4, rank=0, world_size=1, seed=5)
    places = np.stack([order.positions(epoch) for epoch in range(2000)])
    counts = np.stack([np.bincount(column, minlength=4) for column in places.T])
    assert np.abs(counts - 500).max() < 80  # four standard deviations


def test_any_batch_can_be_asked_for_at_any_time() -> None:
    arguments: dict[str, Any] = {"batch_size": 3, "rank": 1, "world_size": 2, "seed": 3}
    one_by_one, at_random = (TrainingOrder(20, **arguments) for _ in range(2))
    expected = [one_by_one.positions(batch).tolist() for batch in range(12)]
    for batch in np.random.default_rng(0).permutation(12).tolist():
        assert at_random.positions(batch).tolist() == expected[batch]


def test_the_order_of_a_seed_never_changes() -> None:
    """A saved run continues with another version of NumPy."""
    order = TrainingOrder(8, batch_size=4, rank=0, world_size=1, seed=1)
    expected = [[2, 4, 7, 5], [0, 6, 3, 1], [3, 1, 7, 4], [5, 0, 2, 6]]
    assert [order.positions(batch).tolist() for batch in range(4)] == expected
