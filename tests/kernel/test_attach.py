"""Whose program a reuseport group has, and who else had or has a hand in it."""

from __future__ import annotations

import ctypes
import logging
import os
import socket
import struct
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from gunicorn.config import Config
from gunicorn.sock import TCPSocket
from kernel_bind import Bind, MakeBind, set_row

import hermes_gunicorn  # noqa: F401  (registers the settings)
from hermes_gunicorn.arbiter.assignment import Assignment
from hermes_gunicorn.core.layout import FREE, READY, SHARED_SLOT
from hermes_gunicorn.kernel.dispatcher import KernelDispatcher
from hermes_gunicorn.kernel.table import KernelTable

SO_LOCK_FILTER = 44
SO_ATTACH_REUSEPORT_CBPF = 51
SO_DETACH_REUSEPORT_BPF = 68

pytestmark = pytest.mark.parametrize("loader", ["object"], indirect=True)


def detach(sock: Any) -> None:
    """Leave the group without a program, as anyone can who has one of its listeners."""
    sock.setsockopt(socket.SOL_SOCKET, SO_DETACH_REUSEPORT_BPF, 0)


def attach_classic(sock: Any, index: int) -> None:
    """Attach a classic program that always chooses the same member of the group."""
    code = ctypes.create_string_buffer(struct.pack("=HBBI", 0x06, 0, 0, index))  # return index
    program = struct.pack("=HxxxxxxQ", 1, ctypes.addressof(code))
    sock.setsockopt(socket.SOL_SOCKET, SO_ATTACH_REUSEPORT_CBPF, program)


@pytest.fixture
def prefers_two(bind: Bind) -> Bind:
    """A bind whose slot 2 is the least loaded, by far."""
    for slot in (1, 3):
        set_row(bind.table, slot, requests=100)
    return bind


def classic(sock: Any) -> None:
    attach_classic(sock, 0)


def classic_and_locked(sock: Any) -> None:
    attach_classic(sock, 0)
    sock.setsockopt(socket.SOL_SOCKET, SO_LOCK_FILTER, 1)


def detached_and_locked(sock: Any) -> None:
    detach(sock)
    sock.setsockopt(socket.SOL_SOCKET, SO_LOCK_FILTER, 1)


@pytest.mark.parametrize("attack", [detach, classic, classic_and_locked, detached_and_locked])
def test_whatever_a_holder_of_the_listener_does_to_the_program_is_undone(
    prefers_two: Bind, attack: Any
):
    bind = prefers_two
    for slot in (SHARED_SLOT, 2):
        attack(bind.listeners[slot])
        before = bind.counter("dispatched")
        bind.sent(2)
        assert bind.counter("dispatched") == before  # the attack works
        assert bind.dispatcher.attach()
        assert bind.sent(5) == {2: 5}


def test_attaching_again_changes_nothing(prefers_two: Bind):
    bind = prefers_two
    bind.connect(3)
    files = len(os.listdir("/proc/self/fd"))
    for _ in range(100):
        assert bind.dispatcher.attach()
    assert len(os.listdir("/proc/self/fd")) == files
    bind.connect(3)
    assert bind.accepted(6) == {2: 6}


@pytest.fixture
def held() -> Iterator[socket.socket]:
    """A listening socket that stays open, whatever servers do to it."""
    with socket.create_server(("127.0.0.1", 0)) as sock:
        yield sock


def given(sock: socket.socket) -> TCPSocket:
    """Make of a held socket what gunicorn makes of it."""
    logger = logging.getLogger(__name__)
    return TCPSocket(sock.getsockname(), Config(), logger, fd=os.dup(sock.fileno()))


def test_a_held_socket_is_dispatched_to_by_each_server_in_turn(
    kernel: KernelTable, held: socket.socket
):
    for _ in range(3):
        dispatcher = KernelDispatcher(shared := given(held), kernel)
        assert dispatcher.attach()  # the shared listener is in the array
        shared.close()


@pytest.mark.parametrize("attack", [classic, classic_and_locked])
def test_a_held_socket_with_a_program_of_another_kind_is_taken_over(
    kernel: KernelTable, held: socket.socket, attack: Any
):
    held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    with socket.socket() as sibling:
        sibling.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        sibling.bind(held.getsockname())
        sibling.listen()  # now there is a group
        attack(held)
    dispatcher = KernelDispatcher(shared := given(held), kernel)
    assert dispatcher.attach()
    with socket.create_connection(held.getsockname(), 5):
        assert dispatcher.bind.counters()["none_eligible"] == 1
    shared.close()


def test_while_another_server_has_the_shared_listener_its_workers_are_dispatched_to(
    kernel: KernelTable, held: socket.socket
):
    other = KernelDispatcher(others := given(held), kernel)
    dispatcher = KernelDispatcher(shared := given(held), kernel)
    assert not dispatcher.attach()
    with socket.create_connection(held.getsockname(), 5):
        assert dispatcher.waiting(1) == 1  # for the first worker, not left to a hash
    listener = dispatcher.open_slot(1)
    listener.accept()[0].close()
    kernel.table.slots = 2
    kernel.table.claim(1)
    for state in (READY, FREE):  # healthy, or nobody is and somebody is better than a hash
        kernel.table.set_state(1, state)
        with socket.create_connection(held.getsockname(), 5):
            listener.sock.settimeout(5)
            listener.accept()[0].close()
    assert other.bind.counters()["dispatched"] == 0
    others.close()
    deadline = time.monotonic() + 10
    while not dispatcher.attach():  # the kernel frees the other's array a little later
        assert time.monotonic() < deadline
        time.sleep(0.01)
    shared.close()


def test_siblings_are_told_by_address_not_by_position(make_bind: MakeBind):
    """One of the worker's own listeners could not be opened."""
    first, second = make_bind(2), make_bind(2)
    dispatchers = {bind.shared: bind.dispatcher for bind in (first, second)}
    worker_sockets = [second.listeners[1], first.shared, second.shared]
    assignment = Assignment(
        SimpleNamespace(dispatchers=dispatchers),  # type: ignore[arg-type]
        slot=1,
        exclusive=[True, False, False],
        contested=[False] * 3,
        binds=[],
        indexes={second.shared: 0, first.shared: 1},
    )
    for index, listener in assignment.siblings()[2]:
        assert listener.getsockname() == worker_sockets[index].getsockname()
