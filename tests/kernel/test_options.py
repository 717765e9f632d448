"""The listeners of the slots have the options of gunicorn's own."""

from __future__ import annotations

import contextlib
import logging
import socket
import struct
from collections.abc import Iterator

import pytest
from gunicorn.config import Config
from gunicorn.sock import TCP6Socket, TCPSocket

from hermes_gunicorn.core.errors import Unsupported
from hermes_gunicorn.core.socket_info import waiting
from hermes_gunicorn.kernel.dispatcher import KernelDispatcher
from hermes_gunicorn.kernel.options import OPTIONS, Option
from hermes_gunicorn.kernel.table import KernelTable

IP_FREEBIND, IP_TRANSPARENT = 15, 19
TRUE = 1
# What to set; what is not here is a flag. Never the default.
VALUES: dict[str, int | bytes] = {
    "SO_BINDTODEVICE": b"lo" + bytes(14),
    "IP_TOS": 0x28,
    "IP_TTL": 33,
    "IP_MTU_DISCOVER": 2,
    "IP_MINTTL": 1,
    "IP_UNICAST_IF": socket.htonl(1),
    "IP_LOCAL_PORT_RANGE": 10000 | 20000 << 16,
    "IPV6_UNICAST_HOPS": 33,
    "IPV6_MTU_DISCOVER": 2,
    "IPV6_TCLASS": 0x28,
    "IPV6_AUTOFLOWLABEL": 0,
    "IPV6_ADDR_PREFERENCES": 0x401,
    "IPV6_UNICAST_IF": socket.htonl(1),
    "SO_SNDBUF": 60000,
    "SO_RCVBUF": 50000,
    "SO_BUF_LOCK": 3,
    "SO_PRIORITY": 5,
    "SO_LINGER": struct.pack("ii", 1, 3),
    "SO_RCVLOWAT": 100,
    "SO_RCVTIMEO": struct.pack("qq", 7, 0),
    "SO_SNDTIMEO": struct.pack("qq", 8, 0),
    "SO_MARK": 77,
    "SO_TIMESTAMPING": struct.pack("II", 16, 0),
    "SO_BUSY_POLL": 50,
    "SO_MAX_PACING_RATE": struct.pack("Q", 10**9),
    "SO_TXTIME": struct.pack("iI", 1, 0),
    "SO_BUSY_POLL_BUDGET": 9,
    "SO_TXREHASH": 0,
    "TCP_NODELAY": 0,
    "TCP_MAXSEG": 900,
    "TCP_KEEPIDLE": 123,
    "TCP_KEEPINTVL": 17,
    "TCP_KEEPCNT": 4,
    "TCP_SYNCNT": 3,
    "TCP_LINGER2": 9,
    "TCP_DEFER_ACCEPT": 7,
    "TCP_WINDOW_CLAMP": 20000,
    "TCP_QUICKACK": 0,
    "TCP_CONGESTION": b"reno" + bytes(12),
    "TCP_USER_TIMEOUT": 5000,
    "TCP_FASTOPEN": 16,
    "TCP_NOTSENT_LOWAT": 16384,
    "TCP_FASTOPEN_KEY": bytes(range(16)),
    "TCP_TX_DELAY": 1000,
    "TCP_RTO_MAX_MS": 5000,
    "TCP_RTO_MIN_US": 100000,
    "TCP_DELACK_MAX_US": 50000,
}
BEFORE_BIND = {"IPV6_V6ONLY"}
SET_BY_GUNICORN = {"TCP_NODELAY", "TCP_QUICKACK"}  # the second by way of the first


@pytest.fixture(scope="module")
def table() -> Iterator[KernelTable]:
    """The shared maps."""
    kernel = KernelTable("object", 8)
    yield kernel
    kernel.close()


class Bind:
    """A listener that was opened somewhere else, taken over by a dispatcher."""

    def __init__(self, table: KernelTable, sock: socket.socket, backlog: int = 64) -> None:
        cfg = Config()
        cfg.set("backlog", backlog)
        kind = TCP6Socket if sock.family == socket.AF_INET6 else TCPSocket
        fd = sock.detach()
        self.shared = kind(None, cfg, logging.getLogger(__name__), fd=fd)
        try:
            self.dispatcher = KernelDispatcher(self.shared, table)
        except Unsupported:
            self.shared.close()
            raise
        self.dispatcher.open_slot(1)
        self.dispatcher.open_slot(2)

    @property
    def others(self) -> list[socket.socket]:
        """The listeners beside it."""
        return [listener.sock for listener in self.dispatcher.listeners().values()]


@contextlib.contextmanager
def taken_over(table: KernelTable, sock: socket.socket, **options: int) -> Iterator[Bind]:
    """Close it again."""
    bind = Bind(table, sock, **options)
    try:
        yield bind
    finally:
        bind.shared.close()


def unbound(family: int = socket.AF_INET, protocol: int = 0) -> socket.socket:
    """Make what a test binds."""
    sock = socket.socket(family, socket.SOCK_STREAM, protocol)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    return sock


def set_all(sock: socket.socket, but: set[str]) -> dict[Option, int | bytes]:
    """Set what is not the default, and return what this kernel has taken."""
    taken = {}
    for option in OPTIONS:
        with contextlib.suppress(OSError):
            if str(option) not in but:
                before = option.read(sock)
                value = VALUES.get(str(option), TRUE)
                sock.setsockopt(option.level, option.number, value)
                if option.read(sock) != before:
                    taken[option] = option.read(sock)
    return taken


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
@pytest.mark.parametrize("early", [True, False], ids=["before it is taken over", "while it serves"])
def test_what_is_set_on_the_listener_is_set_on_the_others(table, host, early):
    with unbound(socket.AF_INET6 if ":" in host else socket.AF_INET) as sock:
        taken = set_all(sock, SET_BY_GUNICORN) if early else {}
        sock.bind((host, 0))
        with taken_over(table, sock) as bind:
            if not early:
                taken = set_all(bind.shared.sock, BEFORE_BIND)
                bind.dispatcher.mirror()
            assert len(taken) > 55, [str(option) for option in OPTIONS if option not in taken]
            expected = {str(option): option.read(bind.shared.sock) for option in taken}
            for other in bind.others:
                assert {str(option): option.read(other) for option in taken} == expected


def test_a_fresh_listeners_buffers_go_on_growing_by_themselves(table):
    """To set a size at all would end that, were it the one that it has."""
    with unbound() as sock:
        sock.bind(("127.0.0.1", 0))
        with taken_over(table, sock) as bind:
            assert [other.getsockopt(socket.SOL_SOCKET, 72) for other in bind.others] == [0, 0]


def test_a_buffer_above_the_systems_limit_is_copied(table):
    """As that of ReceiveBuffer= in a systemd unit is."""
    with unbound() as sock:
        sock.setsockopt(socket.SOL_SOCKET, 33, 8 << 20)
        sock.bind(("127.0.0.1", 0))
        with taken_over(table, sock) as bind:
            sizes = [other.getsockopt(socket.SOL_SOCKET, 8) for other in bind.others]
            assert sizes == [16 << 20, 16 << 20]


@pytest.mark.parametrize("option", [IP_FREEBIND, IP_TRANSPARENT])
def test_an_address_that_no_interface_has(table, option):
    with unbound() as sock:
        sock.setsockopt(socket.IPPROTO_IP, option, 1)
        sock.bind(("192.0.2.7", 0))
        with taken_over(table, sock) as bind:
            address = bind.shared.getsockname()
            assert [other.getsockname() for other in bind.others] == [address, address]


def test_the_backlog_of_a_listener_that_listens_already(table):
    with unbound() as sock:
        sock.bind(("127.0.0.1", 0))
        sock.listen(3)
        with taken_over(table, sock, backlog=3) as bind:
            bind.shared.sock.listen(5)
            bind.dispatcher.mirror()
            for other in bind.others:
                info = other.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 32)
                assert struct.unpack_from("=I", info, 28) == (5,)


def test_gunicorns_backlog_metric_counts_all_that_wait(table):
    with unbound() as sock, contextlib.ExitStack() as clients:
        sock.bind(("127.0.0.1", 0))
        with taken_over(table, sock) as bind:
            for _ in range(20):
                client = socket.create_connection(bind.shared.getsockname(), timeout=5)
                clients.enter_context(client)
            assert bind.shared.get_backlog() == 20
            assert sum(map(waiting, [bind.shared.sock, *bind.others])) == 20


def test_multipath_tcp_is_refused_by_name(table):
    try:
        sock = unbound(protocol=262)
    except OSError as error:
        pytest.skip(f"no Multipath TCP: {error}")
    with sock:
        sock.bind(("127.0.0.1", 0))
        with pytest.raises(Unsupported, match="Multipath TCP") as caught:
            Bind(table, sock)
        assert "plain TCP" in caught.value.remedy
