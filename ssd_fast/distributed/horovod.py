"""A world of several ranks, connected by Horovod; the owner of Horovod.

Only the rendezvous server, which runs without torch, takes its class from Horovod elsewhere (slurm.py).
"""

import importlib.util
import logging
import os
import pickle
import statistics
import time
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from types import ModuleType, TracebackType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ssd_fast.config.sections import DistributedConfig
from ssd_fast.distributed.slurm import Launch
from ssd_fast.distributed.watch import Watch
from ssd_fast.distributed.world import Optimizer, T, World

_GROUP_BYTES = 4 * 2**20
_POLL_S = 0.001
_LONG_WAIT = 0.3  # share of the time


class HorovodWorld(World):
    """One of several ranks; all of them must make the same calls in the same order."""

    def __init__(self, launch: Launch, timeout_s: float) -> None:
        """timeout_s: seconds after which a lost or hanging rank ends this process.

        Raises ValueError when Horovod is missing, or lacks the NCCL that GPUs need.
        """
        super().__init__(launch.rank, launch.size, launch.local_rank, launch.local_size)
        if importlib.util.find_spec("horovod") is None:
            raise ValueError("started as one of several processes, but Horovod is not installed: make horovod")
        # Gloo's own limit is 30 s, and its message names no rank.
        os.environ.setdefault("HOROVOD_GLOO_TIMEOUT_SECONDS", str(int(2 * timeout_s)))
        os.environ.setdefault("HOROVOD_DISABLE_GROUP_FUSION", "1")  # see _groups
        self._watch = Watch(launch, timeout_s)
        self._hvd = _import_horovod()
        device = self.device()
        if device.type == "cuda":
            if not self._hvd.nccl_built():
                raise ValueError("this Horovod was built without NCCL, which GPUs need: make horovod, with CUDA")
            torch.cuda.set_device(device)
        elif self.cores == 1:
            # In each cycle, 1 ms by default, a thread of every rank asks the others for gradients that are ready.
            os.environ.setdefault("HOROVOD_CYCLE_TIME", "10")
        if not self.is_main:
            logging.disable(logging.WARNING)  # all ranks would log the same; an error still ends each with its message
        if not launch.has_thread_count:
            torch.set_num_threads(self.cores)
        self._agreement: int | None = None
        self._waited_s = 0.0  # for gradients, since find_slow was last called
        self._slowest: int | None = None  # the rank that was last named
        self._watch.start()
        with self._watch.waiting():
            try:
                self._hvd.init()
            except ValueError:  # the connection to a rank broke
                self._watch.give_up()

    def agree(self, *flags: int) -> tuple[int, ...]:
        agreed = torch.zeros(len(flags)) if self._agreement is None else self._wait(self._agreement)
        value = torch.tensor(flags, dtype=torch.int32)
        self._agreement = self._hvd.allreduce_async(value, op=self._hvd.Max, name="agree")
        return tuple(agreed.int().tolist())

    def broadcast(self, value: T) -> T:
        # Horovod's own broadcast_object converts a byte at a time: 100 MB took 7 s on two ranks, against 0.1 s.
        content = bytearray(pickle.dumps(value)) if self.is_main else bytearray()
        size = torch.tensor([len(content)])
        self._wait(self._hvd.broadcast_async_(size, root_rank=0, name="broadcast size"))
        data = torch.frombuffer(content or bytearray(int(size)), dtype=torch.uint8)
        received = self._wait(self._hvd.broadcast_async_(data, root_rank=0, name="broadcast"))
        return value if self.is_main else pickle.loads(received.numpy())

    def gather(self, value: T) -> list[T]:
        data = torch.frombuffer(bytearray(pickle.dumps(value)), dtype=torch.uint8)
        splits = torch.tensor([len(data), *[0] * (self.size - 1)], dtype=torch.int32)  # all of it to rank 0
        received, sizes = self._wait(self._hvd.alltoall_async(data, splits, name="gather"))
        return [pickle.loads(part.numpy()) for part in received.split(sizes.tolist())] if self.is_main else []

    def average_(self, tensor: Tensor) -> Tensor:
        return self._wait(self._hvd.allreduce_async_(tensor, op=self._hvd.Average, name=f"average {tensor.shape}"))

    def wrap(
        self, optimizer: Optimizer, named_parameters: Iterable[tuple[str, Tensor]], config: DistributedConfig
    ) -> Optimizer:
        named_parameters = list(named_parameters)
        # Horovod does not divide the gradients of groups beforehand.
        is_grouped = config.gradient_predivide == 1.0
        wrapped = self._hvd.DistributedOptimizer(
            optimizer,
            named_parameters=named_parameters,
            compression=WireFormat(torch.float16 if config.fp16_compression else None),
            gradient_predivide_factor=config.gradient_predivide,
            groups=_groups([parameter for _, parameter in named_parameters]) if is_grouped else None,
        )
        # Horovod makes a new optimizer from the parameter groups alone. With the second attribute, the gradient scaler
        # passes "gradients are finite" to step() on the device; without it, it would read it back at each step.
        wrapped.state.update(optimizer.state)
        wrapped._step_supports_amp_scaling = getattr(optimizer, "_step_supports_amp_scaling", False)
        return wrapped

    @contextmanager
    def averaged_gradients(self, optimizer: torch.optim.Optimizer) -> Iterator[None]:
        start = time.monotonic()
        with self._watch.waiting():
            for handle, _ in optimizer._handles.values():  # type: ignore[attr-defined]
                self._sleep_until_done(handle)
            optimizer.synchronize()  # type: ignore[attr-defined]
        self._waited_s += time.monotonic() - start
        with optimizer.skip_synchronize():  # type: ignore[attr-defined]
            yield

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        from horovod.common.exceptions import HorovodInternalError

        try:
            if error is None and self._agreement is not None:
                self._wait(self._agreement)  # ranks that have not come to it yet could not agree after this one's end
        except HorovodInternalError as lost:
            error = lost
        if isinstance(error, HorovodInternalError):
            self._watch.give_up()
        self._watch.end(f"ended with: {_first_line(error)}" if error else "ended")

    def doing(self, activity: str) -> AbstractContextManager[None]:
        return self._watch.doing(activity)

    def find_slow(self, seconds: float) -> str | None:
        waited = torch.zeros(self.size, dtype=torch.float64)
        waited[self.rank] = self.size * self._waited_s / seconds
        self._waited_s = 0.0
        shares = self.average_(waited).tolist()
        slowest = min(range(self.size), key=shares.__getitem__)
        others = statistics.median(share for rank, share in enumerate(shares) if rank != slowest)
        is_slow = others >= _LONG_WAIT and shares[slowest] < others / 2
        if not self.is_main or not is_slow or slowest == self._slowest:
            return None
        self._slowest = slowest
        host = self._watch.host_of(slowest)
        return f"rank {slowest} ({host}) is slow: the others wait for it {others:.0%} of the time"

    def _wait(self, handle: int) -> Any:
        with self._watch.waiting():
            self._sleep_until_done(handle)
            return self._hvd.synchronize(handle)

    def _sleep_until_done(self, handle: int | None) -> None:
        """Leave a core to the ranks that share it: Horovod waits in a loop that keeps it busy."""
        while self.cores == 1 and handle is not None and not self._hvd.poll(handle):
            time.sleep(_POLL_S)


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


class WireContext(NamedTuple):
    """Information that decompress needs to restore a gradient."""

    is_permuted: bool
    dtype: torch.dtype


class WireFormat:
    """Gradients as Horovod takes them: contiguous, in the type that travels. Horovod calls it a compression.

    A gradient in channels_last travels as its contiguous view, so that nothing is copied.
    """

    def __init__(self, dtype: torch.dtype | None) -> None:
        """dtype: type in which values travel; None keeps their own."""
        self._dtype = dtype

    def compress(self, gradient: Tensor) -> tuple[Tensor, WireContext]:
        is_permuted = not gradient.is_contiguous()
        wire = gradient.permute(0, 2, 3, 1) if is_permuted else gradient
        return wire.to(self._dtype or wire.dtype), WireContext(is_permuted, gradient.dtype)

    def decompress(self, wire: Tensor, context: WireContext) -> Tensor:
        gradient = wire.to(context.dtype)
        return gradient.permute(0, 3, 1, 2) if context.is_permuted else gradient


def _groups(parameters: list[Tensor]) -> list[list[Tensor]]:
    """Parameters whose gradients travel together, in the order in which backward makes the gradients.

    Without groups, Horovod joins the gradients that are ready. The order of additions, hence the last bits of a mean
    over more than two ranks, would then depend on timing.
    """
    groups: list[list[Tensor]] = [[]]
    for parameter in reversed(parameters):
        if sum(member.nbytes for member in groups[-1]) >= _GROUP_BYTES:
            groups.append([])
        groups[-1].append(parameter)
    return groups


def _import_horovod() -> ModuleType:
    import horovod.torch

    return horovod.torch
