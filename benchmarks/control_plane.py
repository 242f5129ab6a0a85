"""Measure everything that grows with the number of ranks, on one machine, with ranks that compute nothing.

    unshare --net sh -c 'ip link set lo up; exec python benchmarks/control_plane.py --ranks 4 --ranks 64'

The ranks are laid out as on nodes of four GPUs. They are forks of a process that has imported everything, so that 64
fit into the memory of one machine. The rendezvous server is that of run.slurm. In a network namespace of its own, as
above (root), the counted packets are those of the ranks alone.
"""

import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.queues import SimpleQueue
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Annotated, NamedTuple

import horovod.torch as hvd
import numpy as np
import torch
import typer

from ssd_fast.config.sections import DistributedConfig
from ssd_fast.distributed.launch import connect
from ssd_fast.distributed.watch import Board
from ssd_fast.distributed.world import World
from ssd_fast.evaluation.coco_eval import DetectionTable
from ssd_fast.hardware import device_name, usable_cores
from ssd_fast.tables import Row, Table, format_table

PER_NODE = 4
TIMEOUT_S = 300.0
NUM_IMAGES = 5000  # of COCO's validation set
DETECTIONS_PER_IMAGE = 200
NUM_AGREEMENTS = 50
FORKS = multiprocessing.get_context("forkserver")


class Cost(NamedTuple):
    """Of something that all ranks do together."""

    seconds: float
    """From its beginning until it is done on every rank."""
    packets: float
    """TCP segments that all processes sent."""


class Measured(NamedTuple):
    """What rank 0 has seen."""

    start: Cost
    agree: Cost
    gather: Cost
    read_signs: Cost
    open_files: int
    end_began: float
    """Time of day."""


def sent_packets() -> int:
    """Return the number of TCP segments that this network namespace has sent since it was made."""
    names, values = (
        line.split()[1:] for line in Path("/proc/net/snmp").read_text().splitlines() if line.startswith("Tcp:")
    )
    return int(dict(zip(names, values, strict=True))["OutSegs"])


def measure(work: Callable[[], object], barrier: Barrier, times: int = 1) -> Cost:
    """Cost of one of several calls, which all processes make."""
    barrier.wait()
    packets, start = sent_packets(), time.perf_counter()
    barrier.wait()
    for _ in range(times):
        work()
    barrier.wait()
    return Cost((time.perf_counter() - start) / times, (sent_packets() - packets) / times)


def made_up_detections(num_images: int) -> DetectionTable:
    """As many detections as an untrained network finds: the most that an evaluation gathers."""
    number = num_images * DETECTIONS_PER_IMAGE
    image_ids = np.repeat(np.arange(num_images), DETECTIONS_PER_IMAGE)
    return DetectionTable(image_ids, np.zeros((number, 4)), np.zeros(number), np.ones(number, np.int64))


def be_a_rank(rank: int, size: int, address: str, barrier: Barrier, results: "SimpleQueue[Measured]") -> None:
    """Measure as one of the ranks; the first one reports."""
    node, local = divmod(rank, PER_NODE)
    tasks = {"PROCID": rank, "NTASKS": size, "LOCALID": local, "NODEID": node, "NNODES": size // PER_NODE}
    os.environ.update({f"SLURM_{name}": str(value) for name, value in tasks.items()})
    os.environ |= {"SLURMD_NODENAME": f"node{node}", "SSD_FAST_RENDEZVOUS": address, "HOROVOD_GLOO_IFACE": "lo"}
    worlds: list[World] = []
    start = measure(lambda: worlds.append(connect(DistributedConfig(timeout_s=TIMEOUT_S))), barrier)
    with worlds[0] as world:
        world.agree(0)
        agree = measure(lambda: world.agree(0), barrier, NUM_AGREEMENTS)
        table = made_up_detections(NUM_IMAGES // size)
        gather = measure(lambda: world.gather(table), barrier)
        board = Board(f"http://{address}", TIMEOUT_S)
        signs = measure(lambda: board.read_all(size) if world.is_main else None, barrier)
        open_files = len(os.listdir("/proc/self/fd"))
        barrier.wait()
        if world.is_main:
            results.put(Measured(start, agree, gather, signs, open_files, time.time()))
    hvd.shutdown()  # a process of multiprocessing ends without atexit, which else does that


@contextmanager
def rendezvous() -> Iterator[str]:
    """Serve the rendezvous of run.slurm within this context; yields its address."""
    command = (sys.executable, "-m", "ssd_fast.distributed.slurm")
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        yield f"127.0.0.1:{server.stdout.readline().strip()}"
        assert server.stdin is not None
        server.stdin.close()


def measure_ranks(size: int) -> Row:
    """The line of the table for so many ranks."""
    barrier, results = FORKS.Barrier(size), FORKS.SimpleQueue()
    with rendezvous() as address:
        ranks = [FORKS.Process(target=be_a_rank, args=(rank, size, address, barrier, results)) for rank in range(size)]
        for process in ranks:
            process.start()
        measured: Measured = results.get()
        for process in ranks:
            process.join()
        end_s = time.time() - measured.end_began
        if any(process.exitcode for process in ranks):
            sys.exit("a rank failed")
    cells = [str(size)]
    for cost in (measured.start, measured.agree, measured.gather, measured.read_signs):
        cells += [f"{cost.seconds * 1000:,.1f}", f"{cost.packets / size:,.1f}"]
    return Row((*cells, f"{end_s * 1000:,.0f}", str(measured.open_files)))


def main(
    ranks: Annotated[list[int], typer.Option(help=f"Numbers of ranks, each a multiple of {PER_NODE}.")],
) -> None:
    """Print a table of times and packets."""
    FORKS.set_forkserver_preload(["horovod.torch", "ssd_fast.evaluation.coco_eval", "ssd_fast.distributed.horovod"])
    columns = ["ranks"]
    for what in ("start", "agree", "gather", "all signs"):
        columns += [f"{what}, ms", "packets/rank"]
    cpu = device_name(torch.device("cpu"), usable_cores())
    title = f"{cpu}; {NUM_IMAGES} images with {DETECTIONS_PER_IMAGE} detections each"
    rows = [measure_ranks(size) for size in ranks]
    print(format_table(Table(title, (*columns, "end, ms", "open files"), rows)))


if __name__ == "__main__":
    typer.run(main)
