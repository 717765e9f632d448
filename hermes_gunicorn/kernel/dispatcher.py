"""Kernel dispatch: a reuseport group per bind address, with our program on it.

gunicorn's own listener stays what it is, the first member of the group and the
one that all workers share (slot 0). Every other slot has a listener of its own,
bound beside it by the arbiter and kept open by it from owner to owner, so what
waits on a crashed worker's listener is still there for the next.

A slot's listener is in the socket array exactly while the slot has an owner.
The table is writable by all workers, the array is not: whatever the table says,
the program can only select a listener that somebody serves.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import sys
import time

from hermes_gunicorn.core.binds import Bind
from hermes_gunicorn.core.errors import KernelError, Unsupported, step
from hermes_gunicorn.core.layout import (
    ALLOWED,
    BIND,
    SHARED_SLOT,
)
from hermes_gunicorn.core.shm import Mapping
from hermes_gunicorn.core.socket_info import waiting
from hermes_gunicorn.kernel import bpf, refusals
from hermes_gunicorn.kernel.listener import Listener
from hermes_gunicorn.kernel.options import Option, Snapshot
from hermes_gunicorn.kernel.table import KernelTable

__all__ = ["KernelDispatcher"]

_FREED_WITHIN = 1.0  # seconds
_SO_REUSEPORT = getattr(socket, "SO_REUSEPORT", 15)
_SO_PROTOCOL = 38
_SO_COOKIE = getattr(socket, "SO_COOKIE", 57)
_SO_NETNS_COOKIE = 71
_IPPROTO_MPTCP = 262


class KernelDispatcher:
    """One bind address: its listeners, its socket array, its program.

    Args:
        shared: the server's own listener.
        kernel: the shared part.

    Attributes:
        migrates: whether the kernel moves a closing listener's queue to others.
        bind: the address's counters, and who may serve it.

    Raises:
        Unsupported: not for this listener; it is then as it was before.
    """

    def __init__(self, shared: Listener, kernel: KernelTable) -> None:
        self._shared = shared
        self._listeners: dict[int, Listener] = {}
        self._maps: list[bpf.Map] = []
        self._mappings: list[Mapping] = []
        self.program_fd = -1
        self._options = Snapshot(shared.sock)
        self._missed: set[Option] = set()
        reuseport = shared.sock.getsockopt(socket.SOL_SOCKET, _SO_REUSEPORT)
        try:
            _check(shared.sock)
            self._load(kernel)
            self._attach()
        except (OSError, Unsupported) as error:
            self.close()
            with contextlib.suppress(OSError):
                shared.sock.setsockopt(socket.SOL_SOCKET, _SO_REUSEPORT, reuseport)
            raise refusals.explain(error, shared.sock) from error
        self._speak_through_shared()

    def _speak_through_shared(self) -> None:
        """Have what the arbiter asks of its listener concern those beside it as well."""
        close_shared = self._shared.close

        def close() -> None:
            self.close()
            close_shared()

        self._shared.close = close  # type: ignore[method-assign]
        if hasattr(self._shared, "get_backlog"):  # gunicorn 24 and later
            self._shared.get_backlog = self.backlog

    def _load(self, kernel: KernelTable) -> None:
        maps = kernel.bind_maps()
        self._maps += maps.values()
        self._array = maps["hermes_listeners"]
        for name in (BIND.name, ALLOWED.name):
            self._mappings.append(maps[name].mmap())
        self.bind = Bind(*(mapping.memory for mapping in self._mappings))
        self.program_fd, self.migrates = bpf.load_program(kernel.program, kernel.maps() | maps)

    def _attach(self) -> None:
        """Make gunicorn's listener the first of a group and hand the group to the program.

        A listener that was bound alone has no group until a sibling listens, and
        until then attaching answers EINVAL. For the moment between the two, the
        kernel hashes over both; the sibling belongs to the first worker to be. It is
        also what the program sends everything to as long as gunicorn's own listener is
        in another's array.
        """
        first = SHARED_SLOT + 1
        self._shared.sock.setsockopt(socket.SOL_SOCKET, _SO_REUSEPORT, 1)
        self._listeners[first] = self._open_sibling()
        self._fill(first, self._listeners[first])
        if self.take_over():
            self.close_slot(first)

    def _open_sibling(self) -> Listener:
        """Bind one more listener to the address, as gunicorn's own is bound.

        Raises:
            OSError: the kernel refuses.
        """
        own = self._shared.sock
        with step("socket"):
            sibling = socket.socket(own.family, own.type)
        try:
            sibling.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sibling.setsockopt(socket.SOL_SOCKET, _SO_REUSEPORT, 1)
            # Before bind and listen, as some options count only then.
            self._copy_options(sibling)
            address = own.getsockname()
            with step("bind"):
                sibling.bind(address)
        except OSError:
            sibling.close()
            raise
        # gunicorn's class sets its options, the backlog, and makes it listen.
        shared = self._shared
        with step("listen"):
            listener = type(shared)(address, shared.conf, shared.log, fd=sibling.detach())
        listener.sock.set_inheritable(False)  # not across USR2's exec; forks have it anyway
        try:
            self._copy_options(listener.sock)
        except OSError:
            listener.close()
            raise
        return listener

    def _copy_options(self, sock: socket.socket) -> None:
        """Give a listener the options of gunicorn's own; say once what cannot be copied."""
        refused = self._options.apply(sock)
        for option, error in refused.items():
            if option not in self._missed:
                self._missed.add(option)
                self._shared.log.warning(
                    "hermes: %s of %s cannot be copied to the workers' own listeners (%s);"
                    " connections that the kernel dispatches do not have it. %s, or set"
                    " hermes_mode to shared",
                    option,
                    self._shared,
                    error.strerror,
                    "Run gunicorn with CAP_NET_ADMIN"
                    if error.errno in (errno.EPERM, errno.EACCES)
                    else "Set it to a value that the kernel takes",
                )

    def mirror(self) -> None:
        """Copy what has changed on gunicorn's own listener, as by a hook, to all others."""
        if self._shared.sock is None:
            return  # closed, as the server stops
        now = self._options.again(self._shared.sock)
        if now == self._options:
            return
        self._options = now
        for listener in self._listeners.values():
            try:
                self._copy_options(listener.sock)
            except KernelError as error:
                self._shared.log.warning(
                    "hermes: %s of %s has changed and cannot be copied to the workers' own"
                    " listeners (%s); restart the server",
                    error.call,
                    self._shared,
                    error.strerror,
                )
                return

    def backlog(self) -> int:
        """Count the connections that wait on all listeners of the address."""
        return sum(map(waiting, [self._shared, *self._listeners.values()]))

    def fds(self) -> list[int]:
        """Return the descriptors of the bind's parts, for another process to map."""
        return [map.fd for map in self._maps if map is not self._array]

    def open_slot(self, slot: int, files: int = sys.maxsize) -> Listener:
        """Return the slot's listener, opened if need be, and dispatch to it.

        Args:
            slot: a slot that gets an owner.
            files: as for ``reserve``.
        """
        self.reserve(slot, files)
        listener = self._listeners[slot]
        self._fill(slot, listener)
        return listener

    def _fill(self, slot: int, listener: Listener) -> None:
        """Put a listener into the socket array, unless it is there.

        Raises:
            OSError: EBUSY when it is in another array, or anything else.
        """
        cookie = listener.sock.getsockopt(socket.SOL_SOCKET, _SO_COOKIE, 8)
        # hand_over() has changed the array in another process: ask the array.
        if self._array.lookup(slot) != cookie:
            self._array.update(slot, listener.fileno())

    def close_slot(self, slot: int) -> None:
        """Stop dispatching to the slot; its listener keeps what waits there."""
        if self._maps:  # not when gunicorn has closed the address already
            self._array.delete(slot)

    def waiting(self, slot: int) -> int:
        """Count the connections that wait on the slot's listener."""
        listener = self._listeners.get(slot)
        return waiting(listener) if listener else 0

    def reserve(self, slot: int, files: int) -> None:
        """Open the slot's listener, so that workers forked from here on have it.

        Args:
            slot: any slot.
            files: how many files may be open then; the rest is for gunicorn, which ends when
                it cannot open one.

        Raises:
            OSError: no more files can be opened.
        """
        if slot in self._listeners:
            return
        listener = self._open_sibling()
        if listener.fileno() >= files:
            listener.close()
            raise KernelError(errno.EMFILE, "listener", "reserve")
        self._listeners[slot] = listener

    def listeners(self) -> dict[int, Listener]:
        """Return the listeners that are open, by slot."""
        return dict(self._listeners)

    def leave_to_arbiter(self) -> None:
        """In a worker: close what only the arbiter needs."""
        self._close_kernel_side()
        # Here closing gunicorn's listener closes that alone.
        for name in ("close", "get_backlog"):
            vars(self._shared).pop(name, None)

    def leave_siblings(self, slot: int) -> None:
        """In a worker that stops: close the listeners of other slots."""
        for other in [other for other in self._listeners if other != slot]:
            self._listeners.pop(other).close()

    def hand_over(self) -> None:
        """Let another arbiter put the shared listener into its socket array.

        A socket can be in one array only.
        """
        self.close_slot(SHARED_SLOT)

    def take_over(self) -> bool:
        """Attach, and wait until the shared listener can be in our socket array.

        A program that was attached before lives on for a grace period or two, and with it
        its array. It may be that of an arbiter which is gone: a socket that systemd holds
        keeps its group, program and array from start to start. Where something else holds
        that array as well (another server, a child that an arbiter has forked), it lives
        longer; then ``attach``, called again, puts the listener in when it can.

        Returns:
            As for ``attach``.

        Raises:
            OSError: the kernel refuses.
        """
        deadline = time.monotonic() + _FREED_WITHIN
        while not (complete := self.attach()) and time.monotonic() < deadline:
            time.sleep(0.01)
        return complete

    def attach(self) -> bool:
        """Make our program that of the group, whatever is attached to it; any number of times.

        Whoever has a listener, as all workers do, can detach the program or attach another.
        The kernel does not tell which one is attached, so this costs a system call or two
        instead. Connections on their way do not notice, and our own program is not freed in
        between, as we hold it (not so a classic one: see docs/architecture.md).

        Returns:
            Whether the shared listener is in our socket array. A socket can be in one only.

        Raises:
            OSError: the kernel refuses.
            Unsupported: where another member is needed, and cannot be had.
        """
        if self.program_fd < 0:
            return True  # gunicorn has closed the address
        try:
            bpf.attach_reuseport(self._shared.sock, self.program_fd)
        except KernelError as error:
            if error.errno != errno.EPERM:
                raise
            # A worker has set SO_LOCK_FILTER, which nobody can undo. Any member will do.
            member = self._open_sibling()
            try:
                bpf.attach_reuseport(member.sock, self.program_fd)
            finally:
                member.close()
        try:
            self._fill(SHARED_SLOT, self._shared)
        except OSError as error:
            if error.errno != errno.EBUSY:
                raise
            return False
        return True

    def close(self) -> None:
        """Give up the siblings, the program and the maps."""
        for listener in self._listeners.values():
            listener.close()
        self._listeners.clear()
        self._close_kernel_side()
        if self._mappings:
            self.bind.release()
        while self._mappings:
            self._mappings.pop().close()

    def _close_kernel_side(self) -> None:
        # The reuseport group keeps the program, the program keeps the maps.
        for map in self._maps:
            map.close()
        self._maps.clear()
        if self.program_fd >= 0:
            os.close(self.program_fd)
            self.program_fd = -1


def _check(sock: socket.socket) -> None:
    """Refuse a listener that no other can be bound beside.

    Raises:
        Unsupported: saying why.
    """
    if sock.getsockopt(socket.SOL_SOCKET, _SO_PROTOCOL) == _IPPROTO_MPTCP:
        raise Unsupported(
            "the kernel cannot choose between listeners of Multipath TCP",
            "listen with plain TCP (systemd: SocketProtocol=)",
        )
    with contextlib.suppress(OSError), socket.socket(sock.family, sock.type) as here:
        cookies = {each.getsockopt(socket.SOL_SOCKET, _SO_NETNS_COOKIE, 8) for each in (sock, here)}
        if len(cookies) > 1:
            raise Unsupported(
                "the listener belongs to another network namespace than gunicorn",
                "run gunicorn in that one (systemd: JoinsNamespaceOf=, NetworkNamespacePath=)",
            )
