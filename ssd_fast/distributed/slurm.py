"""Read what a launcher says: the rank of this process, and where the ranks meet.

This is the only module that reads a launcher's environment. horovodrun sets Horovod's variables itself. Under Slurm's
srun they follow from Slurm's own and from SSD_FAST_RENDEZVOUS=ADDRESS:PORT, which names the server that
`python -m ssd_fast.distributed.slurm` runs in the batch script.
"""

import os
import socket
import sys
from collections.abc import Mapping
from typing import NamedTuple

_RENDEZVOUS = "SSD_FAST_RENDEZVOUS"


class Launch(NamedTuple):
    """This process among those that a launcher started."""

    rank: int
    size: int
    local_rank: int
    """Rank among the processes of this node."""
    local_size: int
    host: str
    """Name of this node."""
    rendezvous: str
    """Base URL of the key-value store that all ranks reach."""
    has_thread_count: bool
    """OMP_NUM_THREADS sets the number of threads."""


def read_launch() -> Launch | None:
    """Return what the launcher says, or None where there is no launcher.

    Slurm's variables are exported as Horovod's, which its library reads.
    Raises ValueError as slurm_variables does.
    """
    if launched_by_slurm():
        os.environ.update(slurm_variables(os.environ))
    if "HOROVOD_RANK" not in os.environ:
        return None
    rank, size, local_rank, local_size = (
        int(os.environ[f"HOROVOD_{name}"]) for name in ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE")
    )
    address, port = (os.environ[f"HOROVOD_GLOO_RENDEZVOUS_{name}"] for name in ("ADDR", "PORT"))
    return Launch(
        rank=rank,
        size=size,
        local_rank=local_rank,
        local_size=local_size,
        host=os.environ.get("HOROVOD_HOSTNAME") or socket.gethostname(),
        rendezvous=f"http://{address}:{port}",
        has_thread_count="OMP_NUM_THREADS" in os.environ,
    )


def launched_by_slurm() -> bool:
    """Return True in a task of run.slurm, which learns of an interruption from the run's folder, not from a status."""
    return _RENDEZVOUS in os.environ


def slurm_variables(environ: Mapping[str, str]) -> dict[str, str]:
    """Horovod's variables for a task of a Slurm step.

    Raises ValueError outside a step, and when the step's tasks are not laid out in equal blocks, node by node.
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
        "HOROVOD_HOSTNAME": environ["SLURMD_NODENAME"],  # without it all nodes would share one local scope
        "HOROVOD_GLOO_RENDEZVOUS_ADDR": address,
        "HOROVOD_GLOO_RENDEZVOUS_PORT": port,
        "HOROVOD_CONTROLLER": "gloo",
        "HOROVOD_CPU_OPERATIONS": "gloo",
    }


def serve_rendezvous() -> None:
    """Print the port of a new rendezvous server, and serve it until standard input closes."""
    from horovod.runner.http.http_server import RendezvousServer

    server = RendezvousServer()
    print(server.start(), flush=True)
    server.init([])
    sys.stdin.buffer.read()


if __name__ == "__main__":
    serve_rendezvous()
