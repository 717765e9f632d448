"""Any worker can store anything in the table: connections are answered all the same."""

from __future__ import annotations

import random
import signal
import time
from typing import Any

import gunicorn
import pytest
from gunicorn_server import Server, ask_server, wait_for

from hermes_gunicorn.core.layout import BIND, CONTROL, GROUP, READY, WORKER

ONES = (1 << 64) - 1
WORDS = {
    "control": CONTROL.words,
    "groups": GROUP.words,
    "allowed": 1,
    "rows": WORKER.words,
    "binds": BIND.words,
}
HAS_ASGI = int(gunicorn.__version__.split(".")[0]) >= 24
CLASSES: dict[str, tuple[str, ...]] = {
    "hermes": (),
    "hermes_sync": (),
    "hermes_gthread": ("--threads", "2"),
    "hermes_asgi": ("--asgi-loop", "asyncio"),
    "hermes_asgi-uvloop": ("--asgi-loop", "uvloop"),
}


def overwrite(server: Server, part: str, word: int, value: int) -> None:
    """Have a worker store a value in a word of the table, of each row or the like."""
    server.get(f"/overwrite?{part},{word},{value}")


def start_class(start: Any, name: str, mode: str) -> Server:
    """Start a server with two workers of that class."""
    worker_class = name.split("-")[0]
    app = "apps:asgi" if worker_class == "hermes_asgi" else "apps:app"
    return start(*CLASSES[name], "--hermes-mode", mode, worker_class=worker_class, app=app)  # type: ignore[no-any-return]


@pytest.mark.parametrize("mode", ["kernel", "shared"])
@pytest.mark.parametrize("name", [name for name in CLASSES if HAS_ASGI or "asgi" not in name])
def test_whatever_a_word_holds_connections_are_answered(start, name, mode):
    server = start_class(start, name, mode)
    values = random.Random(1)
    for part, words in WORDS.items():
        for word in range(words):
            for value in (0, 1, ONES, values.getrandbits(64)):
                overwrite(server, part, word, value)
                server.get("/pid")  # on a connection of its own, as each
    workers = server.worker_pids()
    # A worker that is forked now finds its place, too.
    overwrite(server, "control", CONTROL.index("localities"), 0)
    overwrite(server, "control", CONTROL.index("slots"), 0)
    server.signal(signal.SIGTTIN)
    server.wait_ready(3)
    assert workers < server.worker_pids()
    assert "Traceback" not in server.log
    assert "hermes: error" not in server.log
    assert "unexpected" not in server.log


@pytest.mark.parametrize("mode", ["kernel", "shared"])
def test_nor_does_it_take_an_arbiter_that_restores_it(start, mode):
    server = start("--hermes-mode", mode)
    server.process.send_signal(signal.SIGSTOP)
    for slots in (0, ONES, 1):
        overwrite(server, "control", CONTROL.index("slots"), slots)
        server.get("/pid")
    overwrite(server, "control", CONTROL.index("localities"), 0)
    overwrite(server, "groups", GROUP.index("eligible"), 0)
    overwrite(server, "allowed", 0, 0)
    until = time.monotonic() + 2.5  # who watches the shared listener follows within a second
    while time.monotonic() < until:
        server.get("/pid")
        time.sleep(0.05)
    server.process.send_signal(signal.SIGCONT)
    assert "Traceback" not in server.log


def test_the_arbiter_restores_what_it_decided_and_what_was_tuned(start):
    server = start("--hermes-hang-threshold", "0.5", workers=2)
    arbiter = server.process.pid
    ask_server(arbiter, "set", name="threshold", value=0.25)
    ask_server(arbiter, "set", name="policy", value="cascade")
    (one, other) = (row["slot"] for row in server.rows())
    ask_server(arbiter, "drain", slot=other, drained=True)

    def decided() -> dict[str, Any]:
        told = ask_server(arbiter, "raw")
        return {
            "policy": told["policy"],
            "threshold": told["threshold_ns"],
            "localities": told["localities"],
            "slots": len(told["rows"]),
            "allowed": told["allowed"],
            "states": [row.state for row in told["rows"]],
            "drained": [row.drained for row in told["rows"]],
        }

    wanted = decided()
    assert wanted["threshold"] == 250_000_000
    assert wanted["policy"] == 1
    assert wanted["drained"][other] == 1
    for part in ("control", "allowed", "rows"):
        for word in range(WORDS[part]):
            overwrite(server, part, word, READY if part == "rows" and not word else 1)
        wait_for(lambda: decided() == wanted, f"the decided values of {part}", 5)
    ask_server(arbiter, "drain", slot=other, drained=False)
    wait_for(lambda: decided()["drained"] == [0] * len(wanted["drained"]), "the mark to go", 5)
    assert one != other
