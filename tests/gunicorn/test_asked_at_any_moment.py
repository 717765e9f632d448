"""Whatever the server does just now, hermesctl is answered, and the log has no error."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any

import psutil
import pytest
from gunicorn_server import Server, ask_server, free_port, wait_for

from hermes_gunicorn.core.errors import HermesError


class Asker:
    """Asks an arbiter all the time."""

    def __init__(self, arbiter: int) -> None:
        self.arbiter = arbiter
        self.answers: list[tuple[float, dict[str, Any]]] = []
        self.refusals: list[tuple[float, str]] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._ask)
        self._thread.start()

    def _ask(self) -> None:
        while not self._stop.is_set():
            began = time.monotonic()
            try:
                self.answers.append((began, ask_server(self.arbiter, "status")))
            except HermesError as error:
                self.refusals.append((began, str(error)))
            time.sleep(0.005)

    def stop(self) -> None:
        """End."""
        self._stop.set()
        self._thread.join()

    def binds(self) -> int:
        """Say how many addresses the last answer told of."""
        return len(self.answers[-1][1]["binds"])

    def states(self) -> set[str]:
        """Say which states of workers the last answer told of."""
        return {worker["state"] for worker in self.answers[-1][1]["workers"]}

    def wait_answered(self) -> dict[str, Any]:
        """Wait for the answer to a question that is asked from now on."""
        now = time.monotonic()
        wait_for(lambda: self.answers and self.answers[-1][0] > now, "an answer")
        return self.answers[-1][1]


@contextlib.contextmanager
def asked(arbiter: int) -> Iterator[Asker]:
    """Ask an arbiter all the time, as long as this lasts."""
    asker = Asker(arbiter)
    try:
        yield asker
    finally:
        asker.stop()


def assert_no_errors(server: Server) -> None:
    """Nothing of all that is worth an error."""
    for word in ("Traceback", "ERROR", "no monitor", "CRITICAL"):
        assert not server.lines(word)


@pytest.mark.parametrize("mode", ["kernel", "shared"])
def test_it_is_answered_while_it_starts_reloads_and_drains(launch, mode):
    ports = [free_port() for _ in range(3)]

    def conf(*used: int) -> str:
        return f"bind = {[f'127.0.0.1:{port}' for port in used]!r}\n"

    flags = ("--hermes-mode", mode, "--threads", "4")
    server = launch(
        *flags, bind=[], port=ports[0], worker_class="hermes_gthread", conf=conf(*ports[:2])
    )
    with asked(server.process.pid) as asker:
        server.wait_ready()
        assert len(asker.wait_answered()["binds"]) == 2
        for used in (ports, ports[:1], ports[:2]):
            path = server.folder / "gunicorn.conf.py"
            path.write_text("from apps import post_worker_init\n" + conf(*used))
            server.signal(signal.SIGHUP)
            wait_for(lambda: asker.binds() == len(used), "the reload")  # noqa: B023
        server.wait_ready()
        with server.connect() as client:
            client.send("/sleep?3")
            wait_for(lambda: sum(row["requests"] for row in server.rows()) > 1, "the request")
            server.signal(signal.SIGTERM)
            wait_for(lambda: "draining" in asker.states(), "the drain to be told")
            client.receive()
        server.wait_ended()
    assert_no_errors(server)


def test_it_is_answered_during_an_upgrade(start):
    server = start("--pid", "pid", workers=1)
    with asked(server.process.pid) as old:
        server.signal(signal.SIGUSR2)
        second = server.folder / "pid.2"
        wait_for(second.exists, "the next arbiter")
        with asked(int(second.read_text())) as new:
            assert new.wait_answered()["binds"]
            assert old.wait_answered()["binds"]
            server.signal(signal.SIGTERM)
            server.wait_ended()
            new.wait_answered()
    assert {text for _, text in new.refusals} <= {f"there is no server with pid {new.arbiter}"}
    assert_no_errors(server)
    psutil.Process(new.arbiter).terminate()
