"""The load of ``chaos.py``, from a process of its own, until its input ends.

New connections by an open loop, and kept-alive clients that may repeat what HTTP lets them
repeat: a request on a connection that had carried one before and was closed without a
byte of an answer. Writes what became of all as JSON.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import random
import resource
import sys
import time
from dataclasses import dataclass, field

ANSWERED_WITHIN = 15.0  # seconds
PAUSE = 1.0  # mean seconds between a kept-alive client's requests
LATE = 0.25  # seconds; a new connection that is due for longer is not made any more


@dataclass
class Outcome:
    """What became of all requests.

    Attributes:
        answered: with a 200.
        repeated: by kept-alive clients, as HTTP allows.
        lost: how, from which local port, when (CLOCK_MONOTONIC).
        slowest: seconds.
        slowest_at: when that one was sent (CLOCK_MONOTONIC).
        left_out: connections not made, as this process had no core when they were due. Made
            later they would be a burst of thousands at once, as no client sends it.
    """

    answered: int = 0
    repeated: int = 0
    lost: list[tuple[str, int, float]] = field(default_factory=list)
    slowest: float = 0.0
    slowest_at: float = 0.0
    left_out: int = 0


class Lost(Exception):
    """A request got no answer; whether it might be repeated."""

    def __init__(self, how: str, fresh: bool) -> None:
        super().__init__(how)
        self.fresh = fresh


class Client:
    """One connection at a time to the server."""

    def __init__(self, port: int) -> None:
        self.server = port
        self.port = 0
        self.writer: asyncio.StreamWriter | None = None

    async def ask(self, path: str, keep: bool) -> None:
        """Send a request and read the answer; raise ``Lost``."""
        fresh = self.writer is None
        try:
            async with asyncio.timeout(ANSWERED_WITHIN):
                if self.writer is None:
                    self.port = 0
                    self.reader, self.writer = await asyncio.open_connection(
                        "127.0.0.1", self.server
                    )
                    self.port = self.writer.get_extra_info("sockname")[1]
                close = "" if keep else "Connection: close\r\n"
                self.writer.write(f"GET {path} HTTP/1.1\r\nHost: chaos\r\n{close}\r\n".encode())
                await self._answer(keep)
        except ConnectionRefusedError:
            self.close()
            raise Lost("refused", fresh) from None
        except TimeoutError:
            self.close()
            raise Lost("unanswered", True) from None
        except asyncio.IncompleteReadError as error:
            self.close()
            raise Lost("closed", fresh or bool(error.partial)) from None
        except ConnectionError:
            self.close()
            raise Lost("reset", fresh) from None

    async def _answer(self, keep: bool) -> None:
        head = (await self.reader.readuntil(b"\r\n\r\n")).lower()
        length = int(head.partition(b"content-length: ")[2].partition(b"\r\n")[0])
        await self.reader.readexactly(length)
        if b" 200 " not in head[:15]:
            self.close()
            raise Lost("error", True)
        if not keep or b"connection: close" in head:
            self.close()

    def close(self) -> None:
        """Close the connection."""
        if self.writer is not None:
            self.writer.close()
        self.writer = None


async def run(port: int, rate: float, kept: int, seed: int) -> Outcome:
    """Load the server until standard input ends."""
    chance, outcome = random.Random(seed), Outcome()
    loop = asyncio.get_running_loop()
    over = asyncio.Event()
    loop.add_reader(sys.stdin.fileno(), over.set)

    async def asked(client: Client, path: str, keep: bool) -> None:
        started = time.monotonic()
        try:
            try:
                await client.ask(path, keep)
            except Lost as error:
                if error.fresh:
                    raise
                outcome.repeated += 1
                await client.ask(path, keep)
        except Lost as error:
            outcome.lost.append((str(error), client.port, time.monotonic()))
        else:
            outcome.answered += 1
            took = time.monotonic() - started
            if took > outcome.slowest:
                outcome.slowest, outcome.slowest_at = took, started

    async def keep_alive() -> None:
        client = Client(port)
        while not over.is_set():
            await asked(client, "/", True)
            await asyncio.sleep(chance.expovariate(1 / PAUSE))
        client.close()

    clients = [asyncio.ensure_future(keep_alive()) for _ in range(kept)]
    requests: set[asyncio.Task[None]] = set()
    due = loop.time()
    while not over.is_set():
        due += chance.expovariate(rate)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(over.wait(), max(due - loop.time(), 0))
        if loop.time() - due > LATE:
            outcome.left_out += 1
            continue
        path = "/hold/5" if chance.random() < 0.2 else "/"
        requests.add(task := asyncio.ensure_future(asked(Client(port), path, False)))
        task.add_done_callback(requests.discard)
    await asyncio.gather(*clients, *requests)
    return outcome


if __name__ == "__main__":
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))  # clients may have to wait
    result = asyncio.run(run(**json.loads(sys.argv[1])))
    json.dump(dataclasses.asdict(result), sys.stdout)
