"""A small Slurm cluster on this machine: a controller and node daemons from Debian's packages, on loopback ports."""

import getpass
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import NamedTuple, Self

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue", "scancel", "sinfo")
_ENVIRONMENT = {**os.environ, "PATH": f"{os.environ['PATH']}:/usr/sbin:/sbin"}
_START_S = 60.0

# The node daemons share the host's address and have a port each. Nothing here needs cgroups or systemd. Each node
# claims its cores, whatever the machine has. Links to /dev/null pass for the GPUs of one node: Slurm wants a device.
_SLURM_CONF = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge.socket
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
MailProg=/bin/true
ProctrackType=proctrack/linuxproc
TaskPlugin=task/affinity
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=2,batch_sched_delay=0,bf_interval=2
SlurmdParameters=config_overrides
BatchStartTimeout=120
MessageTimeout=60
KillWait=20
ReturnToService=2
GresTypes=gpu
NodeName=DEFAULT Sockets=1 CoresPerSocket={cores} ThreadsPerCore=1 RealMemory=1000
{nodes}
PartitionName=main Nodes=cpu[0-{last}] Default=YES
PartitionName=gpu Nodes=gpu0
"""


class Ended(NamedTuple):
    """The end of a job. state: Slurm's name of it, such as COMPLETED; status: exit status of the script."""

    state: str
    status: int
    restarts: int


class SlurmCluster:
    """A cluster while its context lasts: partition `main` with nodes cpu0, cpu1, …, and `gpu` with gpu0."""

    def __init__(self, folder: Path, *, num_nodes: int = 2, cores: int = 2) -> None:
        """folder: an empty one for all that the daemons write; its path must fit into the name of a socket.

        num_nodes: of the partition `main`. cores: of a node.
        """
        self.folder = folder
        self.nodes = [*(f"cpu{number}" for number in range(num_nodes)), "gpu0"]
        self._cores = cores
        self.environment = {**_ENVIRONMENT, "SLURM_CONF": str(folder / "slurm.conf")}
        self._daemons = ExitStack()
        self._node_daemons: dict[str, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> Self:
        host = socket.gethostname().partition(".")[0]
        ports = _free_ports(1 + len(self.nodes))
        nodes = "\n".join(
            f"NodeName={node} NodeHostname={host} NodeAddr=127.0.0.1 Port={port}" + " Gres=gpu:2" * (node == "gpu0")
            for node, port in zip(self.nodes, ports[1:], strict=True)
        )
        values = {"folder": self.folder, "host": host, "user": getpass.getuser(), "ports": ports}
        values |= {"nodes": nodes, "cores": self._cores, "last": len(self.nodes) - 2}
        for name in ("state", "dev", *self.nodes):
            (self.folder / name).mkdir()
        for number in range(2):
            (self.folder / "dev" / f"gpu{number}").symlink_to("/dev/null")
        (self.folder / "slurm.conf").write_text(_SLURM_CONF.format(**values))
        (self.folder / "gres.conf").write_text(f"NodeName=gpu0 Name=gpu File={self.folder}/dev/gpu[0-1]\n")
        (self.folder / "cgroup.conf").write_text("CgroupAutomount=no\n")
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o600)
        with ExitStack() as daemons:
            files = ("socket", "key-file", "pid-file", "seed-file", "log-file")
            paths = ("munge.socket", "munge.key", "munge.pid", "munge.seed", "munged.log")
            options = [f"--{option}={self.folder}/{path}" for option, path in zip(files, paths, strict=True)]
            self._start(daemons, "munged", "--foreground", "--force", *options)
            self._wait_for("munged", (self.folder / "munge.socket").exists)
            self._start_controller(daemons)
            for node in self.nodes:
                self._node_daemons[node] = self._start(daemons, "slurmd", *self._conf, "-N", node)
            self._wait_for("slurmd", lambda: set(self.run("sinfo", "-hN", "-o%t").split()) == {"idle"})
            self._daemons = daemons.pop_all()
        return self

    def __exit__(self, *exc_info: object) -> None:
        try:
            for job in self.run("squeue", "-ho%A").split():
                self.run("scancel", "--signal=KILL", "--full", job)
                self.run("scancel", job)
            _wait(lambda: not self.run("squeue", "-ho%A"), 30, lambda: "jobs do not end")
        finally:
            self._daemons.close()

    def run(self, *command: str, environment: Mapping[str, str] | None = None) -> str:
        """Run one of Slurm's commands, and return its standard output and error together."""
        result = subprocess.run(
            command,
            env={**self.environment, **(environment or {})},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=120,
            check=False,
        )
        return result.stdout.strip()

    def submit(
        self, options: Sequence[str], script: Path, arguments: Sequence[str] = (), *, environment: Mapping[str, str]
    ) -> str:
        """Submit a job, and return its number; it writes to slurm-NUMBER.out in the cluster's folder."""
        places = (f"--chdir={self.folder}", f"--output={self.folder}/slurm-%j.out")
        answer = self.run("sbatch", "--parsable", *places, *options, str(script), *arguments, environment=environment)
        assert answer.isdecimal(), answer
        return answer

    def output(self, job: str) -> str:
        """Return what a job has written so far."""
        path = self.folder / f"slurm-{job}.out"
        return path.read_text() if path.exists() else ""

    def field(self, job: str, name: str) -> str:
        """Return a value of `scontrol show job`."""
        fields = self.run("scontrol", "-o", "show", "job", job).split()
        return next((value for key, _, value in (field.partition("=") for field in fields) if key == name), "")

    def start_requeued(self, job: str, seconds: float) -> None:
        """Start a job that requeues itself within so many seconds, without Slurm's delay of two minutes."""
        self.wait(lambda: self.field(job, "Reason") == "BeginTime", seconds, job)
        time.sleep(3)  # earlier, its nodes would take it for the start that they have just ended
        self.run("scontrol", "update", f"jobid={job}", "StartTime=now")

    def wait_for_end(self, job: str, seconds: float) -> Ended:
        """Wait at most so many seconds for the end of a job, and return how it ended."""
        over = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "OUT_OF_MEMORY"}
        self.wait(lambda: self.field(job, "JobState") in over, seconds, job)
        status = int(self.field(job, "ExitCode").partition(":")[0])
        return Ended(self.field(job, "JobState"), status, int(self.field(job, "Restarts")))

    def wait(self, condition: Callable[[], object], seconds: float, job: str) -> None:
        """Wait for a condition. If it does not hold in time, fail with the job's output, and cancel the job."""
        try:
            _wait(condition, seconds, lambda: f"job {job}, {self.field(job, 'JobState')}:\n{self.output(job)}")
        except AssertionError:
            self.run("scancel", job)  # other tests need its nodes
            raise

    def restart_controller(self, seconds: float) -> None:
        """Kill the controller, and start it again after so many seconds."""
        self._controller.kill()
        self._controller.wait()
        time.sleep(seconds)
        self._start_controller(self._daemons)

    def kill_node(self, job: str, node: str) -> None:
        """Kill all processes of a node that runs a job, and tell the controller that the node is down.

        By itself it would notice after five minutes.
        """
        variables = {f"SLURM_JOB_ID={job}".encode(), f"SLURMD_NODENAME={node}".encode()}
        killed = {self._node_daemons[node].pid}
        for folder in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):  # another user's, or ended
                if variables <= set((folder / "environ").read_bytes().split(b"\0")):
                    killed.add(int(folder.name))
                    parent = (folder / "stat").read_text().rpartition(")")[2].split()[1]
                    if Path("/proc", parent, "comm").read_text().startswith("slurmstepd"):
                        killed.add(int(parent))
        for process in killed:
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        self.run("scontrol", "update", f"nodename={node}", "state=down", "reason=killed")

    def _start_controller(self, daemons: ExitStack) -> None:
        self._controller = self._start(daemons, "slurmctld", *self._conf)
        self._wait_for("slurmctld", lambda: "UP" in self.run("scontrol", "ping"))

    @property
    def _conf(self) -> Sequence[str]:
        # an absolute path: the daemons of job steps read the file from other folders
        return ("-D", "-f", str(self.folder / "slurm.conf"))

    def _wait_for(self, daemon: str, ready: Callable[[], bool]) -> None:
        _wait(ready, _START_S, (self.folder / f"{daemon}.out").read_text)

    def _start(self, daemons: ExitStack, program: str, *options: str) -> subprocess.Popen[bytes]:
        with (self.folder / f"{program}.out").open("ab") as output:
            process = subprocess.Popen(
                (program, *options), env=self.environment, stdin=subprocess.DEVNULL, stdout=output, stderr=output
            )
        daemons.callback(_stop, process)
        return process


def _wait(condition: Callable[[], object], seconds: float, state: Callable[[], str]) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds:g} s: {state()}"
        time.sleep(0.2)


def missing_programs() -> list[str]:
    """Return the programs of Slurm and munge that are not installed."""
    return [program for program in PROGRAMS if not shutil.which(program, path=_ENVIRONMENT["PATH"])]


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _free_ports(number: int) -> list[int]:
    with ExitStack() as sockets:
        bound = [sockets.enter_context(socket.socket()) for _ in range(number)]
        for item in bound:
            item.bind(("127.0.0.1", 0))
        return [item.getsockname()[1] for item in bound]
