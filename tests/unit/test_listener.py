"""What is asked of a listening socket."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from gunicorn.sock import TCPSocket

from hermes_gunicorn.core.socket_info import waiting


@pytest.fixture
def listener() -> TCPSocket:
    """One of gunicorn's."""
    conf = SimpleNamespace(reuse_port=False, backlog=8, is_ssl=False)
    return TCPSocket(("127.0.0.1", 0), conf, None)


def test_a_closed_listener_has_nobody_waiting(listener: TCPSocket):
    """Uvicorn closes its listeners before its last requests are done."""
    listener.close()
    assert waiting(listener) == 0
