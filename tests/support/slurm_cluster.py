"""A small Slurm cluster on this machine: a controller and node daemons from Debian's packages, on loopback ports."""

import getpass
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple, Self

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue", "scancel", "sinfo")
_ENVIRONMENT = {**os.environ, "PATH": f"{os.environ['PATH']}:/usr/sbin:/sbin"}
_START_S = 60.0

# The node daemons share the host's address and have a port each. Nothing here needs cgroups or systemd. Each node
# claims two cores, whatever the machine has. Links to /dev/null pass for the GPUs of one node: Slurm wants a device.
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
NodeName=DEFAULT Sockets=1 CoresPerSocket=2 ThreadsPerCore=1 RealMemory=1000
NodeName=cpu0 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]}
NodeName=cpu1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]}
NodeName=gpu0 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[3]} Gres=gpu:2
PartitionName=main Nodes=cpu[0-1] Default=YES
PartitionName=gpu Nodes=gpu0
"""
_NODES = ("cpu0", "cpu1", "gpu0")


class Ended(NamedTuple):
    """The end of a job. state: Slurm's name of it, such as COMPLETED; status: exit status of the script."""

    state: str
    status: int
    restarts: int


class SlurmCluster:
    """A cluster while its context lasts: partition `main` with two nodes, `gpu` with one; two cores a node."""

    def __init__(self, folder: Path) -> None:
        """folder: an empty one for all that the daemons write; its path must fit into the name of a socket."""
        self.folder = folder
        self.environment = {**_ENVIRONMENT, "SLURM_CONF": str(folder / "slurm.conf")}
        self._daemons = ExitStack()

    def __enter__(self) -> Self:
        host = socket.gethostname().partition(".")[0]
        values = {"folder": self.folder, "host": host, "user": getpass.getuser(), "ports": _free_ports(1 + len(_NODES))}
        for name in ("state", "dev", *_NODES):
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
            # an absolute path: the daemons of job steps read the file from other folders
            conf = ("-D", "-f", str(self.folder / "slurm.conf"))
            self._start(daemons, "slurmctld", *conf)
            self._wait_for("slurmctld", lambda: "UP" in self.run("scontrol", "ping"))
            for node in _NODES:
                self._start(daemons, "slurmd", *conf, "-N", node)
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

    def _wait_for(self, daemon: str, ready: Callable[[], bool]) -> None:
        _wait(ready, _START_S, (self.folder / f"{daemon}.out").read_text)

    def _start(self, daemons: ExitStack, program: str, *options: str) -> None:
        with (self.folder / f"{program}.out").open("ab") as output:
            process = subprocess.Popen(
                (program, *options), env=self.environment, stdin=subprocess.DEVNULL, stdout=output, stderr=output
            )
        daemons.callback(_stop, process)


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
