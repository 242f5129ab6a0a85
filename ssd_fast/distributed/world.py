"""The processes that train together: which one this is, what they tell each other, what happens when one is lost.

Owner of Horovod, and the only module that reads what a launcher says. Without a launcher there is one process, and
Horovod is not even imported. With horovodrun, or Slurm's srun and the rendezvous that `python -m
ssd_fast.distributed.world` serves (SSD_FAST_RENDEZVOUS=ADDRESS:PORT), there is one process for each GPU, or for each
share of the CPU cores.
"""

import importlib.util
import logging
import os
import pickle
import socket
import sys
import threading
import time
import urllib.request
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import ModuleType, TracebackType
from typing import Any, Self, TypeVar

import torch
from torch import Tensor

from ssd_fast.config import DistributedConfig
from ssd_fast.hardware import usable_cores

T = TypeVar("T")
Optimizer = TypeVar("Optimizer", bound=torch.optim.Optimizer)

_RENDEZVOUS = "SSD_FAST_RENDEZVOUS"
_GROUP_BYTES = 4 * 2**20


class World:
    """A world of one: what it is told by all ranks is what it has said itself."""

    def __init__(self, rank: int = 0, size: int = 1, local_rank: int = 0, local_size: int = 1) -> None:
        """local_rank, local_size: number of this process and of all of them on this node."""
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
        """Whether this process writes the run's files."""
        return self.rank == 0

    def device(self) -> torch.device:
        """This process's GPU, or the CPU where there is none."""
        if not torch.cuda.is_available():
            return torch.device("cpu")
        visible = torch.cuda.device_count()
        if self.local_rank >= visible > 1:
            raise ValueError(
                f"{visible} GPUs for local rank {self.local_rank}: expected one for each process of a node"
            )
        return torch.device("cuda", self.local_rank if visible > 1 else 0)  # a launcher may show each its own alone

    def agree(self, *flags: int) -> tuple[int, ...]:
        """Of each flag (not negative) the largest that any rank gave; with others, in the call before (first: zeros).

        So nobody waits: by the next step, in which it is read, the exchange is over.
        """
        return flags

    def broadcast(self, value: T) -> T:
        """Rank 0's value."""
        return value

    def gather(self, value: T) -> list[T]:
        """All ranks' values on rank 0, in their order; elsewhere an empty list."""
        return [value]

    def average_(self, tensor: Tensor) -> Tensor:
        """The tensor, contiguous, turned into the mean of all ranks'."""
        return tensor

    def wrap(
        self, optimizer: Optimizer, named_parameters: Iterable[tuple[str, Tensor]], config: DistributedConfig
    ) -> Optimizer:
        """The optimizer that starts to average each gradient as soon as backward has made it."""
        return optimizer

    def averaged_gradients(self, optimizer: torch.optim.Optimizer) -> AbstractContextManager[None]:
        """Waits until every gradient is the mean of all ranks'; within it, the optimizer may step."""
        return nullcontext()

    @contextmanager
    def torch_process_group(self) -> Iterator[None]:
        """Within it torch.distributed connects the ranks too, by NCCL: for packages that know only that."""
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


def connect(config: DistributedConfig) -> World:
    """The world that a launcher has made this process part of, or a world of one; a context, in which it lasts.

    Within it, a rank that is lost or hangs ends this process after config.timeout_s at the latest, with a line on
    stderr that names that rank and exit status 1.
    Raises ValueError when what the launcher says, the GPUs and Horovod's build do not go together.
    """
    if launched_by_slurm():
        os.environ.update(slurm_variables(os.environ))
    if "HOROVOD_RANK" not in os.environ:
        return World()
    if importlib.util.find_spec("horovod") is None:
        raise ValueError("started as one of several processes, but Horovod is not installed: make horovod")
    return _HorovodWorld(config.timeout_s)


def launched_by_slurm() -> bool:
    """Whether a batch script waits for this process, which learns of an interruption from the run's folder."""
    return _RENDEZVOUS in os.environ


def slurm_variables(environ: Mapping[str, str]) -> dict[str, str]:
    """Horovod's variables of a task of a Slurm step.

    Raises ValueError when it is not one, or when the step's tasks are not laid out in equal blocks, node by node.
    """
    address, _, port = environ[_RENDEZVOUS].rpartition(":")
    try:
        rank, size, local_rank, node, num_nodes = (
            int(environ[f"SLURM_{name}"]) for name in ("PROCID", "NTASKS", "LOCALID", "NODEID", "NNODES")
        )
    except KeyError as error:
        raise ValueError(f"{_RENDEZVOUS} is set, but {error.args[0]} is not: expected to be started by srun") from None
    block = size // num_nodes
    if size % num_nodes or (node, local_rank) != divmod(rank, block):
        raise ValueError(
            f"task {rank} of {size} is number {local_rank} on node {node} of {num_nodes} (tasks per node: "
            f"{environ.get('SLURM_STEP_TASKS_PER_NODE')}): expected equal blocks; srun --ntasks-per-node with "
            "--distribution=block gives them"
        )
    return {
        "HOROVOD_RANK": str(rank),
        "HOROVOD_SIZE": str(size),
        "HOROVOD_LOCAL_RANK": str(local_rank),
        "HOROVOD_LOCAL_SIZE": str(block),
        "HOROVOD_CROSS_RANK": str(node),
        "HOROVOD_CROSS_SIZE": str(num_nodes),
        "HOROVOD_HOSTNAME": environ["SLURMD_NODENAME"],  # left out, all nodes would share one local scope
        "HOROVOD_GLOO_RENDEZVOUS_ADDR": address,
        "HOROVOD_GLOO_RENDEZVOUS_PORT": port,
        "HOROVOD_CONTROLLER": "gloo",
        "HOROVOD_CPU_OPERATIONS": "gloo",
    }


class _HorovodWorld(World):
    """One of the processes that Horovod connects; all of them must make the same calls in the same order."""

    def __init__(self, timeout_s: float) -> None:
        names = ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE")
        rank, size, local_rank, local_size = (int(os.environ[f"HOROVOD_{name}"]) for name in names)
        super().__init__(rank, size, local_rank, local_size)
        # Gloo's own limit is 30 s, and its message names nobody.
        os.environ.setdefault("HOROVOD_GLOO_TIMEOUT_SECONDS", str(int(2 * timeout_s)))
        os.environ.setdefault("HOROVOD_DISABLE_GROUP_FUSION", "1")  # see _groups
        self._watch = _Watch(rank, size, timeout_s)
        self._hvd = _import_horovod()
        device = self.device()
        if device.type == "cuda":
            if not self._hvd.nccl_built():
                raise ValueError("this Horovod was built without NCCL, which GPUs need: make horovod, with CUDA")
            torch.cuda.set_device(device)
        if not self.is_main:
            logging.disable(logging.WARNING)  # every rank says the same; an error still ends each with its message
        if "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(self.cores)
        self._agreement: int | None = None
        self._watch.start()
        with self._watch.waiting():
            self._hvd.init()

    def agree(self, *flags: int) -> tuple[int, ...]:
        agreed = torch.zeros(len(flags)) if self._agreement is None else self._wait(self._agreement)
        value = torch.tensor(flags, dtype=torch.int32)
        self._agreement = self._hvd.allreduce_async(value, op=self._hvd.Max, name="agree")
        return tuple(agreed.int().tolist())

    def broadcast(self, value: T) -> T:
        with self._watch.waiting():
            return self._hvd.broadcast_object(value, root_rank=0, name="broadcast")

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
        predivided = config.gradient_predivide != 1.0  # which Horovod does not do for groups
        wrapped = self._hvd.DistributedOptimizer(
            optimizer,
            named_parameters=named_parameters,
            compression=_Wire(torch.float16 if config.fp16_compression else None),
            gradient_predivide_factor=config.gradient_predivide,
            groups=None if predivided else _groups([parameter for _, parameter in named_parameters]),
        )
        # It is made anew from the parameter groups alone. Without the mark the scaler would ask the device at each
        # step whether the gradients are finite; with it, step() is told so on the device.
        wrapped.state.update(optimizer.state)
        wrapped._step_supports_amp_scaling = getattr(optimizer, "_step_supports_amp_scaling", False)
        return wrapped

    @contextmanager
    def averaged_gradients(self, optimizer: torch.optim.Optimizer) -> Iterator[None]:
        with self._watch.waiting():
            optimizer.synchronize()  # type: ignore[attr-defined]
        with optimizer.skip_synchronize():  # type: ignore[attr-defined]
            yield

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        from horovod.common.exceptions import HorovodInternalError

        if isinstance(error, HorovodInternalError):
            self._watch.give_up()
        self._watch.end(f"ended with: {error}" if error else "ended")

    def _wait(self, handle: int) -> Any:
        with self._watch.waiting():
            return self._hvd.synchronize(handle)


def _groups(parameters: list[Tensor]) -> list[list[Tensor]]:
    """Parameters whose gradients travel together, in the order in which backward makes these.

    Left to itself, Horovod joins what happens to be there, which makes the order of additions, hence the last bits of a
    mean over more than two ranks, a matter of timing.
    """
    groups: list[list[Tensor]] = [[]]
    for parameter in reversed(parameters):
        if sum(member.nbytes for member in groups[-1]) >= _GROUP_BYTES:
            groups.append([])
        groups[-1].append(parameter)
    return groups


class _Wire:
    """What Horovod calls a compression: gradients as it takes them, contiguous, and back.

    A gradient in channels_last goes as the view that is contiguous, so that nothing is copied.
    """

    def __init__(self, dtype: torch.dtype | None) -> None:
        """dtype: of the values on the way; None for their own."""
        self._dtype = dtype

    def compress(self, gradient: Tensor) -> tuple[Tensor, tuple[bool, torch.dtype]]:
        permuted = not gradient.is_contiguous()
        wire = gradient.permute(0, 2, 3, 1) if permuted else gradient
        return wire.to(self._dtype or wire.dtype), (permuted, gradient.dtype)

    def decompress(self, wire: Tensor, context: tuple[bool, torch.dtype]) -> Tensor:
        permuted, dtype = context
        gradient = wire.to(dtype)
        return gradient.permute(0, 3, 1, 2) if permuted else gradient


class _Watch(threading.Thread):
    """Tells the other ranks that this one lives, and ends the process when they keep it waiting.

    Horovod does not do it: it waits without end for a process that was stopped, and names nobody when one dies. The
    place where ranks leave word is the key-value store of the launcher's rendezvous.
    """

    _LEADERS = 8  # of those that give up, the first says why

    def __init__(self, rank: int, size: int, timeout_s: float) -> None:
        super().__init__(name="watch", daemon=True)
        self._rank, self._size = rank, size
        self._patience_s = 0.8 * timeout_s  # what is left is for finding out who is missing
        self._interval_s = min(timeout_s / 20, 5.0)
        address, port = (os.environ[f"HOROVOD_GLOO_RENDEZVOUS_{name}"] for name in ("ADDR", "PORT"))
        self._url = f"http://{address}:{port}/ssd_fast"
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # clusters have proxies set
        self._who = f"{os.environ.get('HOROVOD_HOSTNAME') or socket.gethostname()}, process {os.getpid()}"
        self._beats = 0
        self._waiting_since: float | None = None
        self._last_word: str | None = None
        self._ended = threading.Event()
        self._lock = threading.Lock()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """While this lasts, the process waits for others."""
        self._waiting_since = time.monotonic()
        try:
            yield
        finally:
            self._waiting_since = None

    def run(self) -> None:
        self._beat()
        while not self._ended.wait(self._interval_s):
            self._beat()
            since = self._waiting_since
            if since is not None and time.monotonic() - since > self._patience_s:
                self.give_up()

    def end(self, word: str) -> None:
        """Stops watching; word: what others are told of this rank from now on."""
        self._last_word = word
        self._ended.set()
        self._beat()

    def give_up(self) -> None:
        """Ends the process, at once: Horovod's own end would wait for the others."""
        with self._lock:  # the other thread, if it comes here too, waits for its end
            self.end("gave up")
            message = self._find_missing()
            if message:
                print(f"error: {message}", file=sys.stderr)
            else:
                time.sleep(self._interval_s)  # a launcher kills the others as soon as one ends: let the leader speak
            logging.shutdown()
            sys.stderr.flush()
            os._exit(1)

    def _find_missing(self) -> str | None:
        """One line on the ranks that keep the others waiting; None where another rank says it."""
        before = [self._word_of(rank) for rank in range(self._size)]
        time.sleep(2.5 * self._interval_s)
        leaders = range(min(self._rank, self._LEADERS))
        if any((self._word_of(rank) or "").endswith("gave up") for rank in leaders):
            return None
        lost, late = [], []
        for rank in range(self._size):
            word = self._word_of(rank)
            if word is None:
                lost.append(f"rank {rank} has not started")
                continue
            _, who, state = word.split("|", 2)
            if state.startswith("ended"):
                lost.append(f"rank {rank} ({who}) {state}")
            elif state == "gave up":
                continue
            elif word == before[rank]:
                lost.append(f"rank {rank} ({who}) gives no sign of life: killed, stopped or cut off")
            elif state == "works":
                late.append(f"rank {rank} ({who}) lives, but hangs: it has not come to where the others wait")
        return "; ".join(lost or late) or "all ranks wait for each other: the network between them may be the reason"

    def _beat(self) -> None:
        self._beats += 1
        state = self._last_word or ("works" if self._waiting_since is None else "waits")
        self._request(self._rank, f"{self._beats}|{self._who}|{state}".encode())

    def _word_of(self, rank: int) -> str | None:
        word = self._request(rank)
        return word.decode() if word else None

    def _request(self, rank: int, word: bytes | None = None) -> bytes | None:
        request = urllib.request.Request(f"{self._url}/{rank}", data=word, method="PUT" if word else "GET")
        try:
            with self._opener.open(request, timeout=self._interval_s) as response:
                return response.read()
        except OSError:  # that of a rank that has said nothing, or a launcher that is gone
            return None


def _import_horovod() -> ModuleType:
    import horovod.torch

    return horovod.torch


def serve_rendezvous() -> None:
    """Prints the port of a new rendezvous, and serves it until standard input closes."""
    from horovod.runner.http.http_server import RendezvousServer

    server = RendezvousServer()
    print(server.start(), flush=True)
    server.init([])
    sys.stdin.buffer.read()


if __name__ == "__main__":
    serve_rendezvous()
