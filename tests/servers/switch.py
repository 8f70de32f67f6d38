"""Two networks on this machine and a switch between them: turned off, packets are lost and nobody is told."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass


class NetworkMissingError(Exception):
    """Networks of our own cannot be made here."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Side:
    """One of the two networks. name : of its namespace; address : in it, which the other one reaches"""

    name: str
    address: str

    @property
    def enter(self) -> list[str]:
        """Words before a command that runs in it."""
        return ["ip", "netns", "exec", self.name]


@dataclass(frozen=True, slots=True, kw_only=True)
class Switch:
    """The two sides, and what joins them. name : of the namespace in between"""

    name: str
    left: Side
    right: Side

    def turn(self, state: str) -> None:
        """Turn it "down" or "up"; the interfaces of both sides notice nothing."""
        _ip("-n", self.name, "link", "set", "sw0", state)


@contextlib.contextmanager
def switch() -> Iterator[Switch]:
    """Make the networks. Raises NetworkMissingError where this is not permitted."""
    if sys.platform != "linux" or os.geteuid() != 0:
        raise NetworkMissingError("networks of our own need Linux and root")
    middle = f"sc-{os.getpid()}"
    sides = [Side(name=f"{middle}-{n}", address=f"10.77.0.{n}") for n in (1, 2)]
    made = Switch(name=middle, left=sides[0], right=sides[1])
    try:
        try:
            _build(made)
        except (OSError, subprocess.CalledProcessError) as error:
            told = getattr(error, "stderr", "") or str(error)
            raise NetworkMissingError(f"networks of our own cannot be made here: {told.strip()}") from None
        yield made
    finally:
        for name in (middle, *(side.name for side in sides)):
            with contextlib.suppress(OSError):
                subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)


def _build(made: Switch) -> None:
    _ip("netns", "add", made.name)
    _ip("-n", made.name, "link", "add", "name", "sw0", "type", "bridge")
    _ip("-n", made.name, "link", "set", "sw0", "up")
    for side in (made.left, made.right):
        port = f"p{side.address[-1]}"
        _ip("netns", "add", side.name)
        _ip("-n", side.name, "link", "set", "lo", "up")
        _ip(*f"-n {side.name} link add name e0 type veth peer name {port} netns {made.name}".split())
        _ip("-n", side.name, "addr", "add", f"{side.address}/24", "dev", "e0")
        _ip("-n", side.name, "link", "set", "e0", "up")
        _ip("-n", made.name, "link", "set", port, "master", "sw0")
        _ip("-n", made.name, "link", "set", port, "up")


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)
