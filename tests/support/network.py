"""Nodes that are real to the network: namespaces with an address each, and a switch between them that misbehaves.

The switch is a process that carries IP packets from one node's TUN device to another's, so that it can lose and delay
them. Needs root, or the right to make network namespaces.
"""

import contextlib
import ctypes
import fcntl
import heapq
import itertools
import json
import os
import random
import select
import struct
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

INTERFACE = "net0"
_TUNSETIFF, _IFF_TUN, _IFF_NO_PI = 0x400454CA, 0x0001, 0x1000
_CLONE_NEWNET = 0x40000000
_LARGEST_PACKET = 16000
_libc = ctypes.CDLL(None, use_errno=True)


class Weather(NamedTuple):
    """What the switch does to the packets from and to a node."""

    is_cut: bool = False
    delay_s: float = 0.0
    """On each way."""
    loss: float = 0.0
    """Share of the packets."""


class Node(NamedTuple):
    """A host of a network: a name, an address, and a namespace of that name."""

    name: str
    address: str


class Network:
    """Nodes that reach each other through a switch, while the context lasts."""

    def __init__(self, num_nodes: int) -> None:
        unique = f"ssd{os.getpid()}"
        self.nodes = [Node(f"{unique}n{number}", f"10.77.0.{number + 1}") for number in range(num_nodes)]

    def __enter__(self) -> Self:
        """Raises OSError where this user or machine may not do that."""
        try:
            for node in self.nodes:
                _run("ip", "netns", "add", node.name)
            self._switch = subprocess.Popen(
                [sys.executable, __file__, *[part for node in self.nodes for part in node]],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            if self._switch.stdout is None or self._switch.stdout.readline() != "ready\n":
                raise OSError("no TUN devices here")
            for node in self.nodes:
                _run("ip", "-n", node.name, "link", "set", "lo", "up")
                _run("ip", "-n", node.name, "addr", "add", f"{node.address}/24", "dev", INTERFACE)
                _run("ip", "-n", node.name, "link", "set", INTERFACE, "mtu", str(_LARGEST_PACKET), "up")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exc_info: object) -> None:
        if switch := getattr(self, "_switch", None):
            switch.kill()
            switch.wait()
        for node in self.nodes:
            subprocess.run(["ip", "netns", "del", node.name], check=False, capture_output=True)

    def set(self, node: Node, weather: Weather) -> None:
        """Change what happens to the packets from and to a node, from now on."""
        assert self._switch.stdin is not None
        self._switch.stdin.write(json.dumps([self.nodes.index(node), weather]) + "\n")
        self._switch.stdin.flush()


def enter(namespace: str) -> None:
    """Move this process, which has one thread, into a network namespace."""
    with Path("/run/netns", namespace).open() as file:
        if _libc.setns(file.fileno(), _CLONE_NEWNET) != 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), namespace)


def _run(*command: str) -> None:
    result = subprocess.run(command, check=False, capture_output=True, text=True)
    if result.returncode != 0:
        raise OSError(f"{' '.join(command)}: {result.stderr.strip()}")


def _make_device(namespace: str) -> int:
    """The file of a new TUN device in a namespace."""
    enter(namespace)
    device = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(device, _TUNSETIFF, struct.pack("16sH22x", INTERFACE.encode(), _IFF_TUN | _IFF_NO_PI))
    return device


class _Switch:
    """Packets between devices, some of them lost or late."""

    def __init__(self, namespaces: Sequence[str], addresses: Sequence[str]) -> None:
        self._devices = [_make_device(namespace) for namespace in namespaces]
        self._numbers = {bytes(map(int, address.split("."))): number for number, address in enumerate(addresses)}
        self._weather = [Weather() for _ in namespaces]
        self._late: list[tuple[float, int, int, bytes]] = []  # packets by the time to send them
        self._count = itertools.count()
        self._random = random.Random(0)

    def run(self) -> None:
        """Carry packets until standard input ends."""
        while True:
            wait_s = max(0.0, self._late[0][0] - time.monotonic()) if self._late else None
            ready, _, _ = select.select([sys.stdin, *self._devices], [], [], wait_s)
            while self._late and self._late[0][0] <= time.monotonic():
                _, _, target, packet = heapq.heappop(self._late)
                self._send(target, packet)
            for source in ready:
                if isinstance(source, int):
                    self._take(self._devices.index(source))
                elif line := sys.stdin.readline():
                    number, weather = json.loads(line)
                    self._weather[number] = Weather(*weather)
                else:
                    return

    def _take(self, source: int) -> None:
        packet = os.read(self._devices[source], 65536)
        target = self._numbers.get(packet[16:20])
        if packet[0] >> 4 != 4 or target is None:
            return
        ways = self._weather[source], self._weather[target]
        if any(way.is_cut or self._random.random() < way.loss for way in ways):
            return
        if delay_s := sum(way.delay_s for way in ways):
            heapq.heappush(self._late, (time.monotonic() + delay_s, next(self._count), target, packet))
        else:
            self._send(target, packet)

    def _send(self, target: int, packet: bytes) -> None:
        with contextlib.suppress(OSError):  # a full queue, or a device that is down, loses the packet
            os.write(self._devices[target], packet)


def _main(arguments: Sequence[str]) -> Any:
    switch = _Switch(arguments[::2], arguments[1::2])
    print("ready", flush=True)
    switch.run()


if __name__ == "__main__":
    _main(sys.argv[1:])
