"""A real gunicorn in a folder and a session of its own, and a small client."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gunicorn
import psutil
from ports import free_port

from hermes_gunicorn.core.errors import HermesError
from hermes_gunicorn.monitor import control

# Seconds. They end a test that hangs and judge nothing: far more than a busy machine needs.
READY_WITHIN = 60.0
GONE_WITHIN = 60.0
ANSWERED_WITHIN = 60.0
APPS = Path(__file__).with_name("apps.py")
# Where the scripts of this environment are; not `python -m gunicorn`, which breaks
# USR2: the re-executed server finds gunicorn's own modules before the standard ones.
GUNICORN = Path(sys.executable).with_name("gunicorn")
# gunicorn 25.1 and later open a control socket in the home directory.
HAS_CONTROL_SOCKET = tuple(map(int, gunicorn.__version__.split(".")[:2])) >= (25, 1)


def wait_for(condition: Callable[[], Any], what: str, seconds: float = READY_WITHIN) -> Any:
    """Wait until the condition holds and return its value."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, f"waited {seconds:g} s for {what}"
        time.sleep(0.02)
    return value


def find_server(pid: int) -> control.Found:
    """Find a server as hermesctl does.

    Raises:
        HermesError: there is none.
    """
    for found in control.servers(pid):
        if found.pid == pid:
            return found
    raise HermesError(f"there is no server with pid {pid}")


def ask_server(pid: int, what: str, **asked: Any) -> Any:
    """Ask a server as hermesctl does.

    Raises:
        HermesError: it does not answer, or refuses.
    """
    return control.ask(find_server(pid), what, **asked)


def listens(port: int) -> bool:
    """Say whether somebody listens on a port of 127.0.0.1."""
    with contextlib.suppress(OSError):
        socket.create_connection(("127.0.0.1", port), 1).close()
        return True
    return False


def unprivileged() -> list[str]:
    """Return the command prefix that makes a server run without any privilege."""
    return as_nobody() if os.geteuid() == 0 else []


def as_nobody(*capabilities: str, uid: int = 65534) -> list[str]:
    """Return the command prefix that makes a server run as user nobody, or another.

    It may read any file, as nobody knows where this checkout lies, but has no other
    capability than the given ones.
    """
    wanted = ",".join(["-all", "+dac_read_search", *capabilities])
    return [
        *("setpriv", f"--reuid={uid}", f"--regid={uid}", "--clear-groups"),
        *(f"--inh-caps={wanted}", f"--ambient-caps={wanted}"),
    ]


class Client:
    """One connection that speaks HTTP/1.1."""

    def __init__(self, address: tuple[str, int] | str, tls: bool = False) -> None:
        if isinstance(address, str):
            self.sock = socket.socket(socket.AF_UNIX)
            self.sock.settimeout(ANSWERED_WITHIN)
            try:
                self.sock.connect(address)
            except OSError:
                self.sock.close()
                raise
        else:
            self.sock = socket.create_connection(address, timeout=ANSWERED_WITHIN)
        if tls:
            context = ssl._create_unverified_context()
            self.sock = context.wrap_socket(self.sock)
        self.buffer = b""

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection."""
        self.sock.close()

    def send(self, path: str, body: bytes | None = None, extra: str = "", method: str = "") -> None:
        """Send a request and do not wait for the answer."""
        method = method or ("GET" if body is None else "POST")
        length = "" if body is None else f"Content-Length: {len(body)}\r\n"
        head = f"{method} {path} HTTP/1.1\r\nHost: localhost\r\n{length}{extra}\r\n"
        self.sock.sendall(head.encode() + (body or b""))

    def _until(self, mark: bytes) -> bytes:
        while mark not in self.buffer:
            self._more()
        part, _, self.buffer = self.buffer.partition(mark)
        return part

    def _more(self) -> None:
        data = self.sock.recv(65536)
        if not data:
            raise ConnectionError(f"closed by the server after {self.buffer!r}")
        self.buffer += data

    def _exactly(self, length: int) -> bytes:
        while len(self.buffer) < length:
            self._more()
        part, self.buffer = self.buffer[:length], self.buffer[length:]
        return part

    def receive(self, head_only: bool = False) -> tuple[int, bytes]:
        """Read one answer: its status and its body."""
        head = self._until(b"\r\n\r\n").decode().lower()
        status = int(head.split()[1])
        length = re.search(r"content-length: (\d+)", head)
        if head_only:
            return status, b""
        if length:
            return status, self._exactly(int(length[1]))
        if "transfer-encoding: chunked" not in head:
            return status, b""
        body = b""
        while size := int(self._until(b"\r\n"), 16):
            body += self._exactly(size)
            self._until(b"\r\n")
        self._until(b"\r\n")
        return status, body

    def get(self, path: str = "/pid", **options: Any) -> bytes:
        """Send a request and return the body of its answer, which must be a 200."""
        self.send(path, **options)
        status, body = self.receive()
        assert status == 200, (status, body)
        return body


class Server:
    """A running gunicorn.

    Attributes:
        port: of 127.0.0.1, unless ``bind`` was given.
        process: the arbiter.
    """

    def __init__(self, folder: Path, *arguments: str, **options: Any) -> None:
        self.folder = folder
        self.port: int = options.pop("port", None) or free_port()
        self.log_path = folder / "gunicorn.log"
        self.control = str(folder / "ctl")
        self.tls = "--certfile" in arguments
        bind: list[str] = options.pop("bind", [f"127.0.0.1:{self.port}"])
        workers: int = options.pop("workers", 2)
        conf: str = options.pop("conf", "")
        worker_class: str | None = options.pop("worker_class", "hermes")
        environ: dict[str, str] = options.pop("environ", {})
        prefix: list[str] = options.pop("prefix", [])
        app: str = options.pop("app", "apps:app")
        files: Path | None = options.pop("files", None)
        unix: bool = options.pop("unix", False)
        control: bool = options.pop("control", False)
        if unix:
            bind = [f"unix:{folder / 'sock'}"]
        if prefix:
            folder.chmod(0o777)  # for a server that runs as somebody else
        assert not options
        # Copies, so that servers import nothing from the checkout beside them.
        if files:
            shutil.copytree(files, folder, dirs_exist_ok=True)
        else:
            (folder / "apps.py").write_text(APPS.read_text())
            (folder / "gunicorn.conf.py").write_text("from apps import post_worker_init\n" + conf)
        command = [*prefix, str(GUNICORN), "--graceful-timeout", "10"]
        if worker_class:
            command += ["-k", worker_class]
        for address in bind:
            command += ["-b", address]
        if HAS_CONTROL_SOCKET:
            command += ["--control-socket", self.control] if control else ["--no-control-socket"]
        with self.log_path.open("w") as log:
            self.process = subprocess.Popen(
                [*command, *arguments, app],
                cwd=folder,
                # The number of workers in a way that the file can overrule.
                env={
                    **os.environ,
                    "PYTHONDONTWRITEBYTECODE": "1",
                    "WEB_CONCURRENCY": str(workers),
                    **environ,
                },
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self.workers_wanted = workers
        self._asked: control.Found | None = None
        self.unix = str(folder / "sock") if unix else None

    @property
    def address(self) -> tuple[str, int] | str:
        """The default bind address."""
        return self.unix or ("127.0.0.1", self.port)

    @property
    def log(self) -> str:
        """All that gunicorn and the application wrote so far."""
        return self.log_path.read_text()

    def lines(self, *words: str) -> list[str]:
        """Return the log's lines that hold all of the words."""
        return [line for line in self.log.splitlines() if all(word in line for word in words)]

    def connect(self) -> Client:
        """Open a connection."""
        return Client(self.address, self.tls)

    def get(self, path: str = "/pid", **options: Any) -> bytes:
        """Send one request on a connection of its own."""
        with self.connect() as client:
            return client.get(path, **options)

    def release(self, name: str) -> None:
        """Let requests that wait for that name go on: /hold, /burn, /hold-the-gil and /wait."""
        (self.folder / f"release-{name}").touch()
        fifo = self.folder / f"gil-{name}"

        def opened() -> bool:
            with contextlib.suppress(OSError):  # not opened at the other end yet
                os.close(os.open(fifo, os.O_WRONLY | os.O_NONBLOCK))
                return True
            return False

        if fifo.exists():
            wait_for(opened, "the one that holds the GIL")

    def held(self, name: str) -> list[int]:
        """Return the process of each request that has come to wait for that release."""
        return [int(path.suffix[1:]) for path in self.folder.glob(f"held-{name}.*.*")]

    def forget_requests(self) -> None:
        """Remove the files that requests and their releases have left."""
        for pattern in ("blocked-*", "held-*", "release-*", "gil-*"):
            for path in self.folder.glob(pattern):
                path.unlink()

    def tune(self, threshold: float) -> None:
        """Set the hang threshold of the running server, in seconds; 0 is never."""
        self._ask("set", name="threshold", value=threshold)

    def keeps(self, path: str) -> bool:
        """Say whether a connection is open after a few such requests."""
        with self.connect() as client:
            try:
                for _ in range(5):
                    client.get(path)
            except (ConnectionError, OSError):
                return False
        return True

    def table(self) -> dict[str, Any]:
        """Ask a worker for the table: ``eligible``, and ``rows`` by slot."""
        answer: dict[str, Any] = json.loads(self.get("/table"))
        return answer

    def rows(self, *states: int) -> list[dict[str, int]]:
        """Return the rows of workers that are ready, or in the given states."""
        wanted = states or (2,)
        return [row for row in self.table()["rows"] if row["state"] in wanted]

    def status(self) -> dict[str, Any]:
        """Ask the monitor, from outside: no worker has a request for it."""
        answer: dict[str, Any] = self._ask("status")
        return answer

    def _ask(self, what: str, **asked: Any) -> Any:
        def answered() -> tuple[Any] | None:
            with contextlib.suppress(HermesError):  # it does not wait as long as we do
                if self._asked is None:
                    self._asked = find_server(self.process.pid)
                return (control.ask(self._asked, what, **asked),)
            return None

        return wait_for(answered, f"the monitor's answer to {what}")[0]

    def settle(self, connections: int | None = None, requests: int = 0) -> None:
        """Wait until all workers are in poll and nothing is on its way.

        Args:
            connections: as many are open then, on all workers together.
            requests: as many are in flight then.
        """

        def settled() -> bool:
            workers = self.status()["workers"]
            opened = sum(worker["connections"] for worker in workers)
            return (
                not any(worker["queued"] or worker["busy"] for worker in workers)
                and sum(worker["requests"] for worker in workers) == requests
                and connections in (None, opened)
            )

        wait_for(settled, "the server to settle")

    def worker_pids(self) -> set[int]:
        """Return the arbiter's children."""
        with contextlib.suppress(psutil.Error):
            return {child.pid for child in psutil.Process(self.process.pid).children()}
        return set()

    def wait_ready(self, workers: int | None = None, seconds: float = READY_WITHIN) -> Server:
        """Wait until that many workers accept."""
        wanted = self.workers_wanted if workers is None else workers

        def ready() -> bool:
            assert self.process.poll() is None, f"gunicorn ended:\n{self.log}"
            with contextlib.suppress(OSError, ConnectionError, AssertionError, ValueError):
                if "hermes" in self.table():
                    return len(self.rows()) == wanted
                return len(self.worker_pids()) == wanted
            return False

        try:
            wait_for(ready, f"{wanted} ready workers", seconds)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.log[-5000:]}") from None
        return self

    def signal(self, number: signal.Signals) -> None:
        """Send the arbiter a signal."""
        self.process.send_signal(number)

    def wait_ended(self) -> int:
        """Wait for the arbiter's end and return its exit status."""
        return self.process.wait(GONE_WITHIN)

    def kill(self) -> None:
        """End all that belongs to the server, whatever its state."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGCONT)
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(GONE_WITHIN)


@contextlib.contextmanager
def under_load(server: Server, rate: float = 100, clients: int = 2) -> Iterator[list[str]]:
    """Have each client send requests on new connections all the time; collect what fails."""
    import threading

    failures: list[str] = []
    stop = threading.Event()

    def run() -> None:
        while not stop.wait(1 / rate):
            try:
                server.get("/pid")
            except (OSError, ConnectionError, AssertionError) as error:
                failures.append(repr(error))

    threads = [threading.Thread(target=run) for _ in range(clients)]
    for thread in threads:
        thread.start()
    try:
        yield failures
    finally:
        stop.set()
        for thread in threads:
            thread.join()
