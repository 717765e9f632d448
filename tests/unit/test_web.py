"""The statistics' own errors, and what they answer then."""

from __future__ import annotations

import contextlib
import http.client
import logging
import socket

import pytest

from hermes_gunicorn.monitor import web
from hermes_gunicorn.monitor.watch import Watch


class Broken(Watch):
    """Cannot say how the workers are."""

    def status(self) -> dict[str, object]:
        """Fail."""
        raise ZeroDivisionError("the cause")


@pytest.fixture
def port() -> int:
    """Where statistics are served that cannot be."""
    listener = socket.create_server(("127.0.0.1", 0))
    number: int = listener.getsockname()[1]
    web.serve(Broken(), listener, f"127.0.0.1:{number}")
    return number


def test_an_error_is_answered_and_logged_once(port, caplog):
    with caplog.at_level(logging.ERROR, "hermes"):
        for _ in range(3):
            for path in ("/stats.json", "/metrics"):
                connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
                with contextlib.closing(connection):
                    connection.request("GET", path)
                    answer = connection.getresponse()
                    assert (answer.status, b"error log" in answer.read()) == (500, True)
    assert [record.getMessage() for record in caplog.records] == [
        "hermes: error in hermes_stats at /stats.json",
        "hermes: error in hermes_stats at /metrics",
    ]
    assert "the cause" in caplog.text
