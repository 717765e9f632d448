"""Fuzzing: the control protocol from both ends, the statistics, the readers of the table.

Not a part of the default run. ``HERMES_FUZZ_SECONDS`` is how long each test takes at most.
"""

from __future__ import annotations

import contextlib
import http.client
import io
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rich.console import Console

from hermes_gunicorn.cli import commands, tables
from hermes_gunicorn.core import policy
from hermes_gunicorn.core.binds import Bind
from hermes_gunicorn.core.errors import HermesError
from hermes_gunicorn.core.row import Publisher
from hermes_gunicorn.core.table import Table
from hermes_gunicorn.monitor import answers, control, metrics, web
from hermes_gunicorn.monitor.channel import NAMES
from hermes_gunicorn.monitor.watch import Watch

SECONDS = float(os.environ.get("HERMES_FUZZ_SECONDS", "15"))
SLOTS = 70  # more than a group
FUZZ = settings(
    max_examples=100,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)


class Budget:
    """The time of one test."""

    def __init__(self) -> None:
        self._until = time.monotonic() + SECONDS

    def spend(self, run: Callable[[], None]) -> None:
        """Run a test's examples again, others each time, until the time is up."""
        while time.monotonic() < self._until:
            run()


@pytest.fixture
def budget() -> Budget:
    """The time of one test."""
    return Budget()


def a_watch() -> Watch:
    """Look at a table with two workers that nobody else writes."""
    watch = Watch()
    watch.table = Table(*map(bytearray, Table.sizes(SLOTS)))
    watch.table.slots = 3
    watch._binds = [Bind(*map(bytearray, Bind.sizes()))]
    bind = {"address": "http://[fd00::5]:80", "mode": "kernel", "reason": None}
    watch.about = {
        "arbiter": os.getpid(),
        "name": "shop",
        "gunicorn": "27",
        "worker_class": "hermes",
        "rows": SLOTS,
        "stats": "",
        "uid": 0,
        "gid": 0,
        "binds": [bind],
    }
    for slot in (1, 2):
        watch.table.claim(slot)
        Publisher(watch.table, slot).ready(10)
    watch.sample()
    return watch


def told(watch: Watch) -> dict[str, Any]:
    """Return what the monitor answers to each question, as it arrives."""
    told = {what: getattr(watch, what)() for what in ("status", "events", "points", "raw")}
    return dict(json.loads(json.dumps(told)))


def show(what: str, answer: Any) -> str:
    """Return what hermesctl prints of an answer, all of it."""
    file = io.StringIO()
    console = Console(file=file, **commands._PLAIN, force_terminal=False, width=200)
    if what == "status":
        for sort in tables.SORTS:
            console.print(tables.server(answer | {"user": "root"}, sort))
    elif what == "events":
        console.print(tables.events(answer))
    elif what == "raw":
        for allowed in answer["allowed"]:
            view = policy.View(
                **{key: answer[key] for key in ("rows", "eligible", "selected", "policy")},
                **{key: answer[key] for key in ("threshold_ns", "localities")},
                allowed=allowed,
            )
            chosen = set().union(*policy.candidates(view, answer["now_ns"]))
            for row in view.rows:
                console.print(commands._why(view, row, answer["now_ns"], row.slot in chosen))
    return file.getvalue()


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(0, (1 << 64) + 1)
    | st.integers(-(10**400), 10**400)
    | st.floats()
    | st.text(max_size=20)
    | st.sampled_from(["\x1b[2J", "[red]", "\ud800", "\u202e", "\n", ":smile:"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=6,
)


def places(value: Any, here: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """List the ways to all parts of an answer."""
    inner: Any = []
    if isinstance(value, dict):
        inner = value.items()
    elif isinstance(value, list):
        inner = enumerate(value)
    return [here, *(way for key, each in inner for way in places(each, (*here, key)))]


def replaced(value: Any, way: tuple[Any, ...], new: Any) -> Any:
    """Return an answer with another part in one place."""
    if not way:
        return new
    result = dict(value) if isinstance(value, dict) else list(value)
    result[way[0]] = replaced(value[way[0]], way[1:], new)
    return result


@pytest.mark.parametrize("what", ["status", "events", "points", "raw"])
def test_whatever_is_answered_can_be_printed_or_is_refused(budget, what):
    watch = a_watch()
    for slot in (1, 2):
        Publisher(watch.table, slot).rescued()
    watch.sample()
    right = told(watch)[what]
    ways = places(right)
    kind = answers.ANSWERS[what]
    assert answers.read(kind, right) is not None

    @FUZZ
    @given(changes=st.lists(st.tuples(st.sampled_from(ways), JSON), min_size=1, max_size=3))
    def run(changes):
        answer = right
        for way, new in changes:
            with contextlib.suppress(KeyError, IndexError, TypeError, AttributeError):
                answer = replaced(answer, way, new)
        try:
            line = json.dumps({"ok": answer})
            read = answers.read(kind, json.loads(line)["ok"])
        except (HermesError, ValueError):  # more digits than Python reads
            return
        shown = show(what, read)
        assert [char for char in shown if not (char.isprintable() or char == "\n")] == []
        shown.encode()

    budget.spend(run)


@contextlib.contextmanager
def listening() -> Iterator[tuple[socket.socket, control.Found]]:
    """Listen as a server does; and what hermesctl finds."""
    name = f"{NAMES}{os.getpid()}/{secrets.token_hex(16)}"
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(name)
        sock.listen()
        yield sock, control.Found(name.encode(), os.getpid(), os.geteuid())


BYTES = st.one_of(
    st.binary(max_size=200),
    JSON.map(lambda value: json.dumps(value).encode() + b"\n"),
    st.dictionaries(st.sampled_from(["ok", "error"]), JSON).map(
        lambda value: json.dumps(value).encode() + b"\n"
    ),
    st.integers(1, 100_000).map(lambda depth: b'{"ok":' + b"[" * depth + b"\n"),
)


def test_any_bytes_are_an_answer_or_an_error(budget):
    with listening() as (sock, server):

        @FUZZ
        @given(said=BYTES)
        def run(said):

            def answer() -> None:
                connection, _ = sock.accept()
                with connection, contextlib.suppress(OSError):
                    connection.recv(4096)
                    connection.sendall(said)

            thread = threading.Thread(target=answer)
            thread.start()
            # Nobody answers with a status by chance.
            with pytest.raises(HermesError) as error:
                control.ask(server, "status")
            thread.join()
            assert str(error.value).isprintable()

        budget.spend(run)


REQUESTS = st.one_of(
    st.binary(max_size=200),
    JSON.map(lambda value: json.dumps(value).encode() + b"\n"),
    st.fixed_dictionaries(
        {"do": st.sampled_from(sorted(answers.ANSWERS)) | JSON},
        optional={
            "name": st.sampled_from(["policy", "threshold", "theta"]) | JSON,
            "value": st.sampled_from(["cascade", 0.5]) | JSON,
            "slot": st.integers(-2, 300) | JSON,
            "drained": JSON,
        },
    ).map(lambda value: json.dumps(value).encode() + b"\n"),
)


def test_any_request_is_answered_and_the_next_one_too(budget):
    with listening() as (sock, server):
        control.Server(sock, a_watch(), {os.geteuid()}).start()

        @FUZZ
        @given(said=REQUESTS)
        def run(said):
            with socket.socket(socket.AF_UNIX) as client, contextlib.suppress(OSError):
                client.settimeout(10)
                client.connect(server.name)
                client.sendall(said)
                client.shutdown(socket.SHUT_WR)
                line = client.makefile("rb").readline()
                assert not line or isinstance(json.loads(line), dict)
            assert control.ask(server, "status")["name"] == "shop"

        budget.spend(run)


HEADS = st.one_of(
    st.binary(max_size=300),
    st.builds(
        lambda method, path, version, headers: "".join(
            [f"{method} {path} {version}\r\n", *(f"{k}: {v}\r\n" for k, v in headers), "\r\n"]
        ).encode(errors="replace"),
        st.sampled_from(["GET", "HEAD", "POST", "get", "G"]) | st.text(max_size=5),
        st.sampled_from(["/", "/metrics", "/stats.json", "//", "*"]) | st.text(max_size=20),
        st.sampled_from(["HTTP/1.1", "HTTP/1.0", "HTTP/9.9", "", "x"]),
        st.lists(
            st.tuples(
                st.sampled_from(["Host", "Accept", "Accept-Encoding", "Content-Length"])
                | st.text(max_size=8),
                st.sampled_from(["localhost", "application/openmetrics-text; version=1.0.0"])
                | st.from_regex(r"application/openmetrics-text;[a-z=.0-9;, ]{0,20}")
                | st.text(max_size=30),
            ),
            max_size=4,
        ),
    ),
)


def test_any_request_to_the_statistics_harms_nobody(budget, caplog):
    listener = socket.create_server(("127.0.0.1", 0), backlog=64)
    host, port = listener.getsockname()
    web.serve(a_watch(), listener, f"{host}:{port}")

    @FUZZ
    @given(said=HEADS)
    def run(said):
        with (
            socket.create_connection((host, port), 20) as client,
            contextlib.suppress(ConnectionError),
        ):
            client.sendall(said)
            client.shutdown(socket.SHUT_WR)
            while client.recv(1 << 16):
                pass
        connection = http.client.HTTPConnection(host, port, timeout=20)
        with contextlib.closing(connection):
            connection.request("HEAD", "/stats.json")
            assert connection.getresponse().status == 200

    budget.spend(run)
    assert caplog.records == []


WORDS = st.one_of(
    st.sampled_from([0, 1, 2, 3, 64, (1 << 64) - 1, 1 << 63, time.monotonic_ns()]),
    st.integers(0, (1 << 64) - 1),
)
STORES = st.lists(
    st.tuples(
        st.sampled_from(["_control", "_groups", "_rows", "_words", "_allowed"]),
        st.integers(0, 1 << 16),
        WORDS,
    ),
    max_size=40,
)


def test_any_table_can_be_read_and_shown(budget):
    watch = a_watch()

    @FUZZ
    @given(stores=STORES, slots=st.integers(0, 2 * SLOTS))
    def run(stores, slots):
        watch.table.slots = slots
        for part, at, word in stores:
            owner = watch._binds[0] if part in ("_words", "_allowed") else watch.table
            words = getattr(owner, part)
            words[at % len(words)] = word
        watch.sample()
        for what, answer in told(watch).items():
            show(what, answers.read(answers.ANSWERS[what], answer))
        for accept in ("", "application/openmetrics-text; version=1.0.0"):
            metrics.render(watch, accept)

    budget.spend(run)
