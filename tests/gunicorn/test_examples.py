"""The example apps, served as their README says."""

from __future__ import annotations

import contextlib
import json
import select
import subprocess
import sys
from pathlib import Path

import pytest
from gunicorn_server import Server, wait_for

EXAMPLES = Path(__file__).parents[2] / "example_app"


@pytest.fixture(params=["flask", "django"])
def server(request: pytest.FixtureRequest, launch) -> Server:
    """Each example in turn, with the configuration file that they share."""
    flags, app = {
        "flask": ([], "flask_app:app"),
        "django": (["--pythonpath", "django_project"], "example.wsgi"),
    }[request.param]
    server: Server = launch("-w", "2", *flags, worker_class=None, app=app, files=EXAMPLES)
    wait_for(lambda: len(server.worker_pids()) == 2 and server.lines("hermes: "), "workers")

    def answers() -> bool:
        try:
            return server.get("/").startswith(b"ok pid=")
        except OSError:
            return False

    wait_for(answers, "an answer")
    return server


def test_every_endpoint(server: Server):
    assert server.get("/").startswith(b"ok pid=")
    assert int(server.get("/pid")) in server.worker_pids()
    assert server.get("/cpu?ms=5").startswith(b"ok")
    assert server.get("/sleep?ms=5").startswith(b"ok")
    assert server.get("/stream?chunks=3&ms=1") == b"chunk 0\nchunk 1\nchunk 2\n"
    assert server.get("/echo", body=b"a body") == b"a body"
    with server.connect() as client:
        client.send("/cpu?ms=-1")
        assert client.receive() == (400, b"ms must be a whole number from 0 to 60000, not '-1'\n")


def test_block_blocks_the_loop_and_sleep_does_not(server: Server):
    def serves(pid: int) -> bool:
        return any(w["pid"] == pid and w["requests"] for w in server.status()["workers"])

    def is_answered_first(path: str) -> bool | None:
        """Say whether a worker that serves this answers it before another request."""
        with contextlib.suppress(ConnectionError):  # hermes_keepalive: blocked workers close
            return try_it(path)
        return None

    def try_it(path: str) -> bool:
        with contextlib.ExitStack() as stack:
            one = other = stack.enter_context(server.connect())
            pid = one.get("/pid")
            # Kept open, they are spread evenly: one of the next few meets that worker.
            while other is one or other.get("/pid") != pid:
                other = stack.enter_context(server.connect())
            server.settle()
            one.send(path)
            wait_for(lambda: serves(int(pid)), "the request to be served")
            other.get("/pid")
            answered = bool(select.select([one.sock], [], [], 0)[0])
            assert one.receive()[0] == 200
        return answered

    # More than once if need be: a busy machine may take as long over the other one.
    wait_for(lambda: is_answered_first("/sleep?ms=1000") is False, "another answer meanwhile")
    wait_for(lambda: is_answered_first("/block?ms=1000"), "no answer meanwhile")


@pytest.mark.ebpf
def test_the_demo_compares_and_ends(tmp_path):
    result = tmp_path / "demo.json"
    run = subprocess.run(
        [
            *(sys.executable, EXAMPLES / "demo.py", "--only", "hermes", "gevent"),
            *("--seconds", "1", "--rate", "50", "--workers", "2", "--json", result),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert "hermes: kernel dispatch" in run.stdout
    outcomes = json.loads(result.read_text())
    assert [outcome["server"] for outcome in outcomes] == [
        "gunicorn -k hermes",
        "gunicorn -k gevent",
    ]
    assert not outcomes[0]["failed"]
