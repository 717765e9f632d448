"""Real gunicorn processes; each test ends what it started."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
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


@pytest.fixture(params=["object", "bcc"])
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
