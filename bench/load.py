"""The load of ``classes.py``, from a process of its own: open loop, by a plan.

Reads a plan as JSON from its argument and writes what came of it as JSON. Latency counts
from the moment a request should have been sent, so that a server which does not answer
does not slow its own test down.
"""

from __future__ import annotations

import asyncio
import collections
import dataclasses
import json
import random
import ssl
import sys
from dataclasses import dataclass

ANSWERED_WITHIN = 20.0
OPENED_PER_SECOND = 400.0


@dataclass
class Plan:
    """What to send.

    Attributes:
        port: of 127.0.0.1.
        seed: of arrivals and choices.
        seconds: how long.
        rate: requests a second.
        path: what most ask for.
        other_path: what a share of them asks for; those are not measured.
        other_share: 0 to 1.
        connections: kept-alive ones to use; 0: a new one for each request.
        fixed: whether requests come at fixed intervals; else as a Poisson process.
        tls: whether to speak TLS, with a new session for each connection.
    """

    port: int
    seed: int
    seconds: float
    rate: float
    path: str
    other_path: str = "/"
    other_share: float = 0.0
    connections: int = 0
    fixed: bool = False
    tls: bool = False


@dataclass
class Outcome:
    """What came of it: latencies in seconds, failures, connections by worker and in all."""

    latencies: list[float] = dataclasses.field(default_factory=list)
    failed: int = 0
    by_worker: list[int] = dataclasses.field(default_factory=list)
    sent: int = 0
    opened: int = 0
    seconds: float = 0.0  # from the first arrival to the last answer


class Connection:
    """One connection that carries one request at a time.

    When the server says that it closes it, the next request opens another, as clients do.
    """

    def __init__(self, plan: Plan, outcome: Outcome) -> None:
        self.plan = plan
        self.outcome = outcome
        self.turn = asyncio.Lock()
        self.closed = False

    async def open(self) -> None:
        """Connect."""
        self.outcome.opened += 1
        context = ssl._create_unverified_context() if self.plan.tls else None
        self.reader, self.writer = await asyncio.open_connection(
            "127.0.0.1", self.plan.port, ssl=context
        )

    async def ask(self, path: str, keep: bool) -> bytes:
        """Send a request and return the body of the answer."""
        if self.closed:
            await self.open()
        close = "" if keep else "Connection: close\r\n"
        self.writer.write(f"GET {path} HTTP/1.1\r\nHost: bench\r\n{close}\r\n".encode())
        head = (await self.reader.readuntil(b"\r\n\r\n")).lower()
        if b" 200 " not in head[:15]:
            raise ConnectionError(head[:40])
        length = int(head.partition(b"content-length: ")[2].partition(b"\r\n")[0])
        body = await self.reader.readexactly(length)
        self.closed = b"\r\nconnection: close\r\n" in head
        if self.closed:
            self.close()
        return body

    def close(self) -> None:
        """Close it."""
        self.writer.close()


async def run(plan: Plan) -> Outcome:
    """Send what the plan says."""
    chance, outcome = random.Random(plan.seed), Outcome()
    loop = asyncio.get_running_loop()
    kept: list[Connection] = []
    workers: collections.Counter[bytes] = collections.Counter()

    async def opened(connection: Connection) -> None:
        await connection.open()
        workers[await connection.ask("/pid", True)] += 1

    opening = []
    for _ in range(plan.connections):
        kept.append(Connection(plan, outcome))
        opening.append(asyncio.ensure_future(opened(kept[-1])))
        await asyncio.sleep(chance.expovariate(OPENED_PER_SECOND))
    await asyncio.gather(*opening)
    outcome.by_worker = sorted(workers.values())

    async def send(due: float, path: str, measured: bool, connection: Connection | None) -> None:
        await asyncio.sleep(max(0.0, due - loop.time()))
        try:
            async with asyncio.timeout(ANSWERED_WITHIN):
                if connection:
                    async with connection.turn:
                        await connection.ask(path, True)
                else:
                    connection = Connection(plan, outcome)
                    await connection.open()
                    await connection.ask(path, False)
        except (OSError, TimeoutError, asyncio.IncompleteReadError):
            outcome.failed += 1
        else:
            if measured:
                outcome.latencies.append(loop.time() - due)

    start, at, sending = loop.time() + 0.2, 0.0, []

    def gap() -> float:
        return 1 / plan.rate if plan.fixed else chance.expovariate(plan.rate)

    while (at := at + gap()) < plan.seconds:
        other = chance.random() < plan.other_share
        path = plan.other_path if other else plan.path
        connection = chance.choice(kept) if kept else None
        sending.append(asyncio.ensure_future(send(start + at, path, not other, connection)))
    outcome.sent = len(sending)
    await asyncio.gather(*sending)
    outcome.seconds = loop.time() - start
    for connection in kept:
        connection.close()
    return outcome


if __name__ == "__main__":
    json.dump(dataclasses.asdict(asyncio.run(run(Plan(**json.loads(sys.argv[1]))))), sys.stdout)
