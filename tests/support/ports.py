"""Ports for servers under test, each given out once on this machine."""

from __future__ import annotations

import contextlib
import functools
import random
import socket
from collections.abc import Iterator

# Below those that the kernel gives to clients.
FIRST, LAST = 10_000, 32_767
BLOCK = 64


@functools.cache
def _reserved() -> Iterator[int]:
    """Yield ports out of blocks that belong to this process until it ends.

    The lock is a socket in the abstract namespace: it belongs to the network namespace as
    ports do, holds between users, and the kernel drops it with the process.
    """
    while True:
        block = random.randrange(FIRST, LAST + 2 - BLOCK, BLOCK)
        lock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        try:
            lock.bind(f"\0hermes-tests-ports-{block}")
        except OSError:
            lock.close()  # another process has it, or this one had it before
            continue
        lock.detach()  # stays open
        yield from range(block, block + BLOCK)


def free_port(host: str = "127.0.0.1") -> int:
    """Return a port that nobody uses, and that no other test is given."""
    for port in _reserved():
        with (
            socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as sock,
            contextlib.suppress(OSError),
        ):
            sock.bind((host, port))
            return port
    raise AssertionError("unreachable: ports do not run out")
