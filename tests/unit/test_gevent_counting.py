"""What the gevent worker's server counts, and how much it accepts at a time."""

from __future__ import annotations

import socket
from types import SimpleNamespace

import pytest

from hermes_gunicorn.core.layout import DRAINING
from hermes_gunicorn.core.row import Publisher
from hermes_gunicorn.core.table import Table
from hermes_gunicorn.workers.ggevent import PublishingServer
from hermes_gunicorn.workers.mixin import HermesMixin


def no_greenlet(*_: object) -> None:
    raise RuntimeError("cannot start")


def test_a_rescued_connection_that_cannot_be_handed_over_is_counted_down_once():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = PublishingServer(("127.0.0.1", 0), handle=print, spawn=no_greenlet)
        server.publisher = Publisher.unseen()
        for _ in range(2):
            server.publisher.opened(own=False)
        with socket.create_connection(listener.getsockname()):
            with pytest.raises(RuntimeError):
                server.take_from(SimpleNamespace(sock=listener))
            assert (server.publisher.connections, server.publisher.requests) == (2, 2)


def test_how_many_are_accepted_at_a_time_follows_the_table_and_not_the_start():
    table = Table(*map(bytearray, Table.sizes(3)))
    table.slots = 3
    worker = HermesMixin.__new__(HermesMixin)
    worker.cfg = SimpleNamespace(workers=1)
    table.claim(1)
    worker.publisher = Publisher(table, 1)
    server = PublishingServer(("127.0.0.1", 0), handle=no_greenlet)
    server.worker, server.index = worker, 0

    def at_a_time() -> int:
        server.follow()
        return int(server.max_accept)

    assert at_a_time() == 100  # gevent's own
    table.claim(2)  # TTIN
    assert at_a_time() == 1
    table.set_state(2, DRAINING)  # TTOU
    assert at_a_time() == 100
