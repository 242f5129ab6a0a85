"""Nodes of a network that can be reached over ssh, as horovodrun's hosts."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import network
from network import Network, Node

PATH = f"{os.environ['PATH']}:/usr/sbin:/sbin"
PROGRAMS = ("sshd", "ssh", "ssh-keygen")
_SEPARATION = Path("/run/sshd")  # an empty folder that sshd wants
_SERVER = """\
ListenAddress {address}
HostKey {folder}/host_key
AuthorizedKeysFile {folder}/key.pub
StrictModes no
UsePAM no
PermitRootLogin yes
PidFile none
ClientAliveInterval 2
ClientAliveCountMax 2
"""
_CLIENT = """\
IdentityFile {folder}/key
IdentitiesOnly yes
UserKnownHostsFile /dev/null
LogLevel ERROR
"""


def on(node: Node, *command: str) -> Sequence[str]:
    """Return a command that runs another one on a node."""
    # `ip netns exec` would make a mount namespace, too, which would hold the disks of other tests.
    return (sys.executable, __file__, node.name, *command)


@contextmanager
def ssh_servers(nodes: Network, folder: Path) -> Iterator[dict[str, str]]:
    """Run an ssh server on each node within this context; yields the environment in which ssh reaches them.

    folder: an empty one for keys and settings. The user's own keys and settings stay out of it.
    """
    for key in ("key", "host_key"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / key], check=True)
    (folder / "client").write_text(_CLIENT.format(folder=folder))
    client = folder / "bin" / "ssh"
    client.parent.mkdir()
    client.write_text(f'#!/bin/sh\nexec {shutil.which("ssh", path=PATH)} -F {folder}/client "$@"\n')
    client.chmod(0o755)
    server = shutil.which("sshd", path=PATH) or "sshd"
    with ExitStack() as servers:
        if not _SEPARATION.exists():
            _SEPARATION.mkdir()
            servers.callback(_SEPARATION.rmdir)
        for node in nodes.nodes:
            settings = folder / node.name
            settings.write_text(_SERVER.format(folder=folder, address=node.address))
            process = subprocess.Popen(on(node, server, "-D", "-e", "-f", str(settings)), stderr=subprocess.DEVNULL)
            servers.callback(process.wait)
            servers.callback(process.terminate)
        yield {**os.environ, "PATH": f"{client.parent}:{PATH}"}


if __name__ == "__main__":
    network.enter(sys.argv[1])
    os.execvp(sys.argv[2], sys.argv[2:])
