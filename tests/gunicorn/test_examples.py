"""The example apps, served as their README says."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import time
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
    wait_for(lambda: len(server.worker_pids()) == 2 and server.lines("hermes: kernel"), "workers")

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
    def others(path: str) -> float:
        """Return how long a request on a worker takes while it serves another."""
        with contextlib.ExitStack() as stack:
            one = other = stack.enter_context(server.connect())
            pid = one.get("/pid")
            # Kept open, they are spread evenly: one of the next few meets that worker.
            while other is one or other.get("/pid") != pid:
                other = stack.enter_context(server.connect())
            one.send(path)
            time.sleep(0.1)  # the request is on its way; the order is what matters
            start = time.monotonic()
            other.get("/pid")
            took = time.monotonic() - start
            assert one.receive()[0] == 200
        return took

    assert others("/sleep?ms=1500") < 0.7
    assert others("/block?ms=1500") > 0.7


def test_the_demo_compares_and_ends(tmp_path):
    result = tmp_path / "demo.json"
    run = subprocess.run(
        [
            *(sys.executable, EXAMPLES / "demo.py", "--only", "hermes", "gevent"),
            *("--seconds", "2", "--rate", "50", "--workers", "2", "--json", result),
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
