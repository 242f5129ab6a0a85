"""The world of this process: its rank, its device, and the collectives between ranks.

Without a launcher the world has one rank, and Horovod is not imported. With horovodrun or run.slurm there is one rank
for each GPU, or for each share of the CPU cores.
"""

import socket
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import TracebackType
from typing import Self, TypeVar

import torch
from torch import Tensor

from ssd_fast.config.sections import DistributedConfig
from ssd_fast.hardware import usable_cores

T = TypeVar("T")
Optimizer = TypeVar("Optimizer", bound=torch.optim.Optimizer)


class World:
    """A world of one rank, whose collectives return what they are given; the base of worlds with more ranks."""

    def __init__(self, rank: int = 0, size: int = 1, local_rank: int = 0, local_size: int = 1) -> None:
        """local_rank, local_size: rank and number of ranks on this node."""
        self.rank = rank
        self.size = size
        self.local_rank = local_rank
        self.local_size = local_size

    @property
    def cores(self) -> int:
        """CPU cores for this process."""
        return usable_cores(self.local_size)

    @property
    def is_main(self) -> bool:
        """True on the rank that writes the run's files."""
        return self.rank == 0

    def device(self) -> torch.device:
        """Return this process's GPU, or the CPU where no GPU is visible.

        Raises ValueError when the node shows several GPUs, but fewer than it has ranks.
        """
        if not torch.cuda.is_available():
            return torch.device("cpu")
        visible = torch.cuda.device_count()
        if self.local_rank >= visible > 1:
            raise ValueError(
                f"{visible} GPUs for local rank {self.local_rank}: expected one for each process of a node"
            )
        return torch.device("cuda", self.local_rank if visible > 1 else 0)  # a launcher may show each rank one GPU

    def agree(self, *flags: int) -> tuple[int, ...]:
        """Return the maximum of each flag over all ranks, one call late; the first call returns zeros.

        flags: not negative. A world of one returns them at once. The exchange runs during the step between two calls,
        so that no rank waits for it.
        """
        return flags

    def broadcast(self, value: T) -> T:
        """Return rank 0's value on every rank."""
        return value

    def gather(self, value: T) -> list[T]:
        """Return the values of all ranks in their order on rank 0, and an empty list elsewhere."""
        return [value]

    def average_(self, tensor: Tensor) -> Tensor:
        """Replace a contiguous tensor, in place, by its mean over all ranks, and return it."""
        return tensor

    def wrap(
        self, optimizer: Optimizer, named_parameters: Iterable[tuple[str, Tensor]], config: DistributedConfig
    ) -> Optimizer:
        """Return an optimizer that starts to average each gradient as soon as backward has made it."""
        return optimizer

    def averaged_gradients(self, optimizer: torch.optim.Optimizer) -> AbstractContextManager[None]:
        """Wait until every gradient is the mean over all ranks; the optimizer may step within this context."""
        return nullcontext()

    def doing(self, activity: str) -> AbstractContextManager[None]:
        """Name what this process does within this context, for the message of ranks that wait too long for it."""
        return nullcontext()

    def find_slow(self, seconds: float) -> str | None:
        """Return a line on a rank that lets the others wait, on rank 0, once; seconds: the time since the last call.

        All ranks call it. It knows of waiting on the CPU: not of a GPU that is slower than the others.
        """
        return None

    @contextmanager
    def torch_process_group(self) -> Iterator[None]:
        """Connect the ranks by torch.distributed and NCCL, too, for packages that need it, within this context."""
        with socket.socket() as probe:
            probe.bind(("", 0))
            address, port = self.broadcast((socket.gethostname(), probe.getsockname()[1]))
        torch.distributed.init_process_group(
            "nccl", init_method=f"tcp://{address}:{port}", rank=self.rank, world_size=self.size
        )
        try:
            yield
        finally:
            torch.distributed.destroy_process_group()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass
