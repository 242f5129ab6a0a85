"""Which of the parallel processes this one is, and the device that it works on."""

import os
from typing import NamedTuple

import torch


class World(NamedTuple):
    """The processes that train together; not launched in parallel, a world of one."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @property
    def is_main(self) -> bool:
        """Whether this process writes the run's files."""
        return self.rank == 0

    def device(self) -> torch.device:
        """This process's GPU, or the CPU where there is none."""
        return torch.device("cuda", self.local_rank) if torch.cuda.is_available() else torch.device("cpu")


def usable_cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0))
