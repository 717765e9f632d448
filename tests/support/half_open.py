"""Half-open handshakes, as of scanners and cheap health checks: SYN, SYN-ACK, RST."""

from __future__ import annotations

import contextlib
import random
import socket
import struct
import threading
from collections.abc import Iterator

_SYN = 0x02


def _checksum(data: bytes) -> int:
    total = sum(struct.unpack(f"!{len(data) // 2}H", data))
    total = (total & 0xFFFF) + (total >> 16)
    return ~(total + (total >> 16)) & 0xFFFF


def send_syn(raw: socket.socket, port: int) -> None:
    """Send a SYN to a port of 127.0.0.1; the kernel, which knows of none, resets the answer."""
    source = random.randrange(1024, 10_000)
    header = [source, port, random.getrandbits(32), 0, 5 << 4, _SYN, 65535, 0, 0]
    address = socket.inet_aton("127.0.0.1")
    segment = struct.pack("!HHIIBBHHH", *header)
    header[7] = _checksum(address * 2 + struct.pack("!BBH", 0, 6, len(segment)) + segment)
    raw.sendto(struct.pack("!HHIIBBHHH", *header), ("127.0.0.1", 0))


@contextlib.contextmanager
def scanner(port: int, rate: float) -> Iterator[None]:
    """Have so many half-open handshakes a second."""
    stop = threading.Event()

    def run() -> None:
        with socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_TCP) as raw:
            while not stop.wait(1 / rate):
                send_syn(raw, port)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
