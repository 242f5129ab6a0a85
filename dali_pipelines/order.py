"""The order of training images: which rank trains on which image in which step."""

import numpy as np


class TrainingOrder:
    """The images of one rank's batches, batch after batch.

    Every epoch is a new permutation of the set, drawn from the seed and the epoch's number. It is repeated from its
    start until it fills the global batch of the last step. So the counts of two images in an epoch differ by at most
    one, and an image comes twice in a global batch only if the set is smaller than that.
    The ranks take consecutive parts of a global batch: whatever their number, a step trains on the same images.

    num_images: of the set, at least 1.
    batch_size: of each rank.
    seed: at least 0; the same on all ranks.
    """

    steps_per_epoch: int

    def __init__(self, num_images: int, *, batch_size: int, rank: int, world_size: int, seed: int) -> None:
        self.steps_per_epoch = -(-num_images // (world_size * batch_size))
        self._num_images = num_images
        self._shape = self.steps_per_epoch, world_size, batch_size
        self._rank = rank
        self._seed = seed
        self._epoch = -1
        self._batches = np.empty((0, batch_size), np.int64)

    def positions(self, batch: int) -> np.ndarray:
        """[batch_size] int64, places in the set of a batch's images. batch: counts from the first epoch's start."""
        epoch, step = divmod(batch, self.steps_per_epoch)
        if epoch != self._epoch:
            self._epoch, self._batches = epoch, self._draw(epoch)
        return self._batches[step]

    def _draw(self, epoch: int) -> np.ndarray:
        """[steps_per_epoch, batch_size]: this rank's part of an epoch."""
        # NumPy promises that a bit generator never changes its numbers; it does not promise that of `permutation`.
        keys = np.random.PCG64([self._seed, 0, epoch]).random_raw(self._num_images)
        slots = np.resize(np.argsort(keys, kind="stable"), self._shape)  # repeats the permutation from its start
        return slots[:, self._rank].copy()
