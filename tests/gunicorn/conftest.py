"""Real gunicorn processes; each test ends what it started."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import pytest
from gunicorn_server import Server

Start = Callable[..., Server]


@pytest.fixture
def launch(tmp_path: Path) -> Iterator[Start]:
    """Start servers without waiting for them."""
    servers: list[Server] = []

    def start(*arguments: str, **options: Any) -> Server:
        folder = tmp_path / f"server{len(servers)}"
        folder.mkdir()
        server = Server(folder, *arguments, **options)
        servers.append(server)
        return server

    yield start
    for server in servers:
        server.kill()
        print(server.log[-5000:])  # shown if the test fails


@pytest.fixture
def start(launch: Start) -> Start:
    """Start servers and wait until all their workers accept."""
    return lambda *arguments, **options: launch(*arguments, **options).wait_ready()


class SharedServers:
    """Servers that several tests use, one after the other; the last few are kept.

    Args:
        folders: where they run.
    """

    MOST = 4

    def __init__(self, folders: pytest.TempPathFactory) -> None:
        self._folders = folders
        self._servers: dict[str, Server] = {}
        self._workers: dict[str, set[int]] = {}

    def get(self, arguments: tuple[str, ...], options: dict[str, Any]) -> Server:
        """Return a server that runs with these arguments."""
        key = repr((arguments, sorted(options.items())))
        server = self._servers.pop(key, None)
        if server is None or server.worker_pids() != self._workers[key]:
            self._end(server)
            server = Server(self._folders.mktemp("shared"), *arguments, **options).wait_ready()
            self._workers[key] = server.worker_pids()
        self._servers[key] = server  # the last one used
        while len(self._servers) > self.MOST:
            self._end(self._servers.pop(next(iter(self._servers))))
        return server

    def drop(self, server: Server) -> None:
        """End a server that a test may have spoilt."""
        self._servers = {key: each for key, each in self._servers.items() if each is not server}
        self._end(server)

    def close(self) -> None:
        """End all of them."""
        for server in self._servers.values():
            self._end(server)

    @staticmethod
    def _end(server: Server | None) -> None:
        if server:
            server.kill()


@pytest.fixture(scope="session")
def shared_servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SharedServers]:
    """The servers that tests share."""
    servers = SharedServers(tmp_path_factory)
    yield servers
    servers.close()


_PASSED = pytest.StashKey[bool]()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Remember how the test went, for the fixtures' end."""
    report = yield
    item.stash[_PASSED] = report.passed
    return report


@pytest.fixture
def share(request: pytest.FixtureRequest, shared_servers: SharedServers) -> Iterator[Start]:
    """Use a server that other tests use as well; for tests that leave it as it was."""
    used: list[Server] = []

    def share(*arguments: str, **options: Any) -> Server:
        server = shared_servers.get(arguments, options)
        used.append(server)
        return server

    yield share
    for server in used:
        if request.node.stash.get(_PASSED, False):
            server.forget_requests()
        else:
            print(server.log[-5000:])
            shared_servers.drop(server)


@pytest.fixture(params=["object", pytest.param("bcc", marks=pytest.mark.bcc)])
def loader(request: pytest.FixtureRequest) -> list[str]:
    """The flags for each loader in turn."""
    return ["--hermes-loader", str(request.param)]


@pytest.fixture(scope="session")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The flags for TLS with a certificate of our own."""
    folder = tmp_path_factory.mktemp("tls")
    key, cert = folder / "key.pem", folder / "cert.pem"
    subprocess.run(
        f"openssl req -x509 -newkey rsa:2048 -nodes -days 1 -subj /CN=localhost"
        f" -keyout {key} -out {cert}".split(),
        check=True,
        capture_output=True,
        timeout=60,
    )
    return ["--certfile", str(cert), "--keyfile", str(key)]
