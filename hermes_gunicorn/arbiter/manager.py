"""Slots, and a dispatcher for each listener, of one arbiter."""

from __future__ import annotations

import logging
import resource
import zlib
from time import monotonic
from typing import TYPE_CHECKING, Any

import gunicorn
from gunicorn import sock

from hermes_gunicorn.arbiter import configuration, forks, reload, upgrade
from hermes_gunicorn.arbiter.assignment import Assignment
from hermes_gunicorn.arbiter.monitor import Monitor
from hermes_gunicorn.arbiter.statsd import Reporter
from hermes_gunicorn.arbiter.turns import Turns
from hermes_gunicorn.core import shm
from hermes_gunicorn.core.binds import Bind
from hermes_gunicorn.core.errors import StrictError, Unsupported
from hermes_gunicorn.core.layout import (
    ALL_SLOTS,
    GROUP_BY,
    MAX_SLOTS,
    POLICIES,
    SHARED_SLOT,
    SLOTS_PER_GROUP,
)
from hermes_gunicorn.core.shm import Memory
from hermes_gunicorn.core.slots import Slots
from hermes_gunicorn.core.socket_info import address_of, backlog
from hermes_gunicorn.core.table import Table, tuned
from hermes_gunicorn.core.words import count
from hermes_gunicorn.kernel import refusals
from hermes_gunicorn.kernel.dispatcher import KernelDispatcher
from hermes_gunicorn.kernel.table import KernelTable

if TYPE_CHECKING:
    from gunicorn.arbiter import Arbiter
    from gunicorn.config import Config
    from gunicorn.sock import BaseSocket
    from gunicorn.workers.base import Worker

__all__ = ["DispatchManager"]

_MIN_ROWS = 256  # 32 KiB; enough for HUP, which doubles the workers, and many a TTIN
_ROWS_PER_WORKER = 4
_SPARE = 2  # listeners opened in advance beyond those that HUP needs
_GUNICORN_FILES = 16  # that it may open at any time: logs, pid file, control socket
_HANDSHAKE = 130.0  # seconds for which the kernel waits for its end at most, by default
_REMIND = 60.0  # seconds between log lines about the same thing


class DispatchManager:
    """Slots and dispatchers of one arbiter.

    Args:
        server: gunicorn's arbiter, with its listeners open.

    Attributes:
        table: the worker status table, the kernel's or an anonymous one.
        dispatchers: by listener; one without is in shared mode.
        binds: by listener, what the table holds for it.
    """

    def __init__(self, server: Arbiter) -> None:
        self.server = server
        self.dispatchers: dict[BaseSocket, KernelDispatcher] = {}
        self.binds: dict[BaseSocket, Bind] = {}
        self._memory: list[Memory] = []
        self._bind_memory: dict[BaseSocket, list[Memory]] = {}
        self._reasons: dict[BaseSocket, str] = {}
        self._listeners: list[BaseSocket] = []
        self._lacks_files = False
        self._incomplete: set[BaseSocket] = set()
        self._reserved_for = (0, 0)  # workers, locality groups
        self._to_reserve: tuple[list[int], list[int]] = ([], [])
        self._left: dict[int, float] = {}  # when a slot's last owner did
        self._hashed = 0
        self._told_of_strays = -_REMIND
        self._names: dict[BaseSocket, str] = {}
        self._drained: set[int] = set()
        self._configured: Config | None = None
        self._mirror_failed = False
        self._kernel: KernelTable | Unsupported
        wanted = max(
            _MIN_ROWS,
            _ROWS_PER_WORKER * server.cfg.workers,
            SLOTS_PER_GROUP * server.cfg.hermes_groups,
        )
        rows = min(MAX_SLOTS, wanted)
        # For good: what exists now cannot be changed by a reload.
        self._mode: str = server.cfg.hermes_mode
        self._at_start = {
            name: server.cfg.settings[name].get() for name in ("hermes_mode", "hermes_loader")
        }
        try:
            if self._mode == "shared":
                raise Unsupported("hermes_mode is shared", "set it to auto and start anew")
            self._kernel = KernelTable(server.cfg.hermes_loader, rows)
            self.table = self._kernel.table
        except Unsupported as error:
            self._kernel = error  # why not, for each listener that asks
            self._memory = [Memory(size) for size in Table.sizes(rows)]
            self.table = Table(*(each.memory for each in self._memory))
        self.table.slots = 1
        self._slots = Slots(rows)
        reload.keep_configuration(server)
        upgrade.keep_for_upgrade(server)
        upgrade.after_failed_upgrade(server, self.take_back)
        forks.in_foreign_child(self.abandon)
        self._monitor = Monitor(server, self._shown)
        self._statsd = Reporter(self.table)
        self._turns = Turns(server)
        self._turns.add(
            self._monitor.turn,
            self._rescue_strays,
            self._keep_attached,
            self._report_metrics,
            self.mirror,
            self._maintain,
        )

    def prepare(self, strict: bool = False) -> None:
        """Make the dispatchers fit the arbiter's listeners, its settings and its workers.

        Raises:
            StrictError: ``strict``, and a listener cannot be dispatched to.
        """
        reconfigured = self._configure()
        self.mirror()
        self._dispatch(strict, reconfigured)
        self._turns.call_safely(self._keep_attached)
        if self.dispatchers:
            self._reserve()

    def _dispatch(self, strict: bool, reconfigured: bool) -> None:
        if self._listeners == self.server.LISTENERS:
            if reconfigured:
                self._monitor.update()
            return
        # Those of an address that HUP took away were closed with their listener.
        self._listeners = list(self.server.LISTENERS)
        self._names = {listener: str(listener) for listener in self._listeners}
        self.dispatchers = {
            listener: dispatcher
            for listener, dispatcher in self.dispatchers.items()
            if listener in self._listeners
        }
        for listener in self._listeners:
            if listener in self.dispatchers:
                continue
            if self._mode == "shared":
                self._report_shared(listener)
                continue
            try:
                self.dispatchers[listener] = self._dispatcher(listener)
            except Unsupported as error:
                if strict:
                    raise StrictError(
                        f"no kernel dispatch on {listener}: {error} (hermes_strict is set)"
                    ) from error
                self._report_shared(listener, error)
        self.binds = {listener: self._bind(listener) for listener in self._listeners}
        for gone in self._bind_memory.keys() - self.binds.keys():
            for each in self._bind_memory.pop(gone):
                each.close()
        self._report()
        self._monitor.update()

    def mirror(self) -> None:
        """Make what was set on the arbiter's listeners hold for those beside them as well."""
        try:
            for dispatcher in self.dispatchers.values():
                dispatcher.mirror()
        except Exception:
            if not self._mirror_failed:
                self._mirror_failed = True
                self.server.log.exception(
                    "hermes: cannot copy socket options to the workers' listeners; options that"
                    " have changed apply to the shared listener only"
                )

    def _reserve(self) -> None:
        """Open the listeners of the workers to come, so that there are twice as many as workers.

        Workers have the listeners that exist when they are forked; what waits on others
        they cannot rescue. HUP doubles the workers for a while. So before each fork, as the
        number of workers may have changed.

        First those of the workers that are wanted now, at every address; then spare ones.
        """
        wanted = (self.server.num_workers, self.table.decided("localities"))
        if self._reserved_for != wanted:  # it is much to work out at each fork
            workers, owned = self.server.num_workers, len(self._slots.owned())
            present = max(workers - owned, 0)
            count = max(2 * workers + _SPARE - owned, present)
            slots = self._slots.preview(count, *wanted)
            self._reserved_for, self._to_reserve = wanted, (slots[:present], slots[present:])
        for slots, spare in zip(self._to_reserve, (False, True), strict=True):
            files = self._files(spare)
            for slot in slots:
                for listener, dispatcher in self.dispatchers.items():
                    try:
                        dispatcher.reserve(slot, files)
                    except (OSError, Unsupported) as error:
                        self._tell_what_is_lacking(listener, error)
                        return
        self._lacks_files = False

    def _tell_what_is_lacking(self, listener: BaseSocket, error: OSError | Unsupported) -> None:
        if self._lacks_files:
            return
        self._lacks_files = True
        why = refusals.explain(error, listener.sock)
        self.server.log.warning(
            "hermes: cannot open listeners in advance on %s: %s. New workers cannot take over each"
            " other's pending connections until they are replaced. To fix it: %s",
            listener,
            why.reason,
            why.remedy,
        )

    def _files(self, spare: bool) -> int:
        """Return how many files may be open once there is one more listener.

        gunicorn ends when it cannot open a file, and needs one for each worker; after HUP
        there are twice as many. Spare listeners leave half of the files, to workers too.
        """
        limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        to_come: int = max(2 * self.server.num_workers - len(self.server.WORKERS), 0)
        files = limit - to_come - _GUNICORN_FILES
        return min(files, limit // 2) if spare else files

    def _configure(self) -> bool:
        """Publish the settings, once for each configuration; a running server may be tuned."""
        cfg = self.server.cfg
        if cfg is self._configured:
            return False
        self._configured = cfg
        self._warn_of_ignored(cfg)
        self._obey()  # what was changed before lasts until now
        self.table.hang_threshold_ns = round(cfg.hermes_hang_threshold * 1e9)
        self.table.policy = POLICIES.index(cfg.hermes_policy)
        self.table.theta = cfg.hermes_theta
        # After a reload there may not be rows for as many groups.
        self.table.localities = min(cfg.hermes_groups, -(-self.table.capacity // SLOTS_PER_GROUP))
        return True

    def _warn_of_ignored(self, cfg: Config) -> None:
        """Say which settings have no effect, that their author may not be misled."""
        for name in configuration.unknown(cfg):
            self.server.log.warning(
                "hermes: %s is not a setting and has no effect; did you mean %s?",
                name,
                configuration.nearest(name),
            )
        for name, value in self._at_start.items():
            if cfg.settings[name].get() != value:
                self.server.log.warning(
                    "hermes: %s stays %s: a reload cannot change it. To change it to %s, restart or"
                    " upgrade (USR2) the server",
                    name,
                    value,
                    cfg.settings[name].get(),
                )

    def _bind(self, listener: BaseSocket) -> Bind:
        if listener in self.dispatchers:
            return self.dispatchers[listener].bind
        if listener not in self._bind_memory:
            self._bind_memory[listener] = [Memory(size) for size in Bind.sizes()]
            return Bind(*(each.memory for each in self._bind_memory[listener]))
        return self.binds[listener]

    def _describe_binds(self) -> None:
        """Publish for each address how it is grouped and which slots may serve it."""
        cfg = self.server.cfg
        group_by = GROUP_BY.index(cfg.hermes_group_by)
        shares = configuration.bind_shares(cfg)
        for listener, bind in self.binds.items():
            if listener.sock is None:
                continue  # closed, as the server stops
            bind.group_by(group_by, zlib.crc32(str(listener).encode()))
            for addresses, start, end in shares:
                if address_of(listener) in addresses:
                    bind.allowed = self._slots.share(start, end, max(self.server.num_workers, 1))
                    break
            else:
                bind.allowed = ALL_SLOTS

    def _dispatcher(self, listener: BaseSocket) -> KernelDispatcher:
        if not isinstance(listener, sock.TCPSocket):
            raise Unsupported(
                "the kernel can choose between listeners of TCP only",
                "bind a TCP address beside or instead of it",
            )
        if isinstance(self._kernel, Unsupported):
            raise self._kernel
        return KernelDispatcher(listener, self._kernel)

    def _report_shared(self, listener: BaseSocket, error: Unsupported | None = None) -> None:
        reason = f"{error.reason}; {error.remedy}" if error else "hermes_mode is shared"
        self._reasons[listener] = reason
        # Nobody needs to hear that for a Unix socket it is the best there is.
        wanted = error and (self._mode == "kernel" or isinstance(listener, sock.TCPSocket))
        self.server.log.log(
            logging.WARNING if wanted else logging.INFO,
            "hermes: shared mode on %s (policy %s, hang threshold %g s, %s): %s",
            listener,
            self.server.cfg.hermes_policy,
            self.server.cfg.hermes_hang_threshold,
            count(self.server.num_workers, "worker"),
            reason,
        )

    def _report(self) -> None:
        if isinstance(self._kernel, Unsupported) or not self.dispatchers:
            return
        migrates = all(dispatcher.migrates for dispatcher in self.dispatchers.values())
        self.server.log.info(
            "hermes: kernel dispatch on %s (loader %s, policy %s, hang threshold %g s,"
            " migration %s, %s, %d slots)",
            ", ".join(map(str, self.dispatchers)),
            self._kernel.loader,
            self.server.cfg.hermes_policy,
            self.server.cfg.hermes_hang_threshold,
            "on" if migrates else "off",
            count(self.server.num_workers, "worker"),
            self.table.capacity - 1,
        )

    def _maintain(self) -> None:
        """Once a second restore what the arbiter decides: any worker can write to the table."""
        self._obey()
        self.table.restore()
        for listener, bind in self.binds.items():
            if listener.sock is not None:
                bind.restore()
        self.table.restore_rows(self._slots.owned(), self._drained)
        self._obey()  # what came meanwhile and was just overwritten

    def _obey(self) -> None:
        """Decide what somebody has changed through the control socket."""
        for change in self._monitor.heard():
            if "set" in change:
                setattr(self.table, *tuned(change["set"], change["value"]))
            elif (slot := change["drain"]) in self._slots.owned():
                (self._drained.add if change["drained"] else self._drained.discard)(slot)
                self.table.drain(slot, slot in self._drained)

    def _report_metrics(self) -> None:
        self._statsd.report(self.server.log, self.binds.values(), self._backlog)

    def _backlog(self) -> int:
        """Count the connections that wait on all listeners, those of shared mode included."""
        return sum(
            self.dispatchers[each].backlog() if each in self.dispatchers else backlog(each)
            for each in self._listeners
            if each.sock is not None
        )

    def _shown(self) -> tuple[dict[str, Any], list[int]]:
        """Return what the monitor is to know, and the descriptors of what it is to see.

        It may be asked at any moment, also while listeners are closed.
        """
        if isinstance(self._kernel, KernelTable):
            fds = self._kernel.fds()
        else:
            fds = [each.fd for each in self._memory]
        binds = []
        for listener in self._listeners:
            dispatcher = self.dispatchers.get(listener)
            own = self._bind_memory.get(listener, [])
            parts = dispatcher.fds() if dispatcher else [each.fd for each in own]
            if len(parts) != len(Bind.sizes()):
                continue  # it is closed, or not set up yet
            fds += parts
            reason = None if dispatcher else self._reasons.get(listener)
            mode = "kernel" if dispatcher else "shared"
            binds.append({"address": self._names[listener], "mode": mode, "reason": reason})
        cfg = self.server.cfg
        about = {
            "arbiter": self.server.pid,
            "name": self.server.proc_name,
            "gunicorn": gunicorn.__version__,
            "worker_class": cfg.worker_class_str,
            "rows": self.table.capacity,
            "stats": cfg.hermes_stats,
            "uid": cfg.uid,
            "gid": cfg.gid,
            "binds": binds,
        }
        return about, fds

    def assign(self, worker: Worker) -> Assignment:
        """Give a worker a slot and its listeners, before it is forked."""
        self._sweep()
        localities = self.table.decided("localities")
        slot = self._slots.take(worker, self.server.num_workers, localities, self._waiting)
        own: dict[BaseSocket, BaseSocket] = {}
        if slot is None:
            self.server.log.warning(
                "hermes: worker table full (%d slots): this worker accepts from the shared"
                " listener only",
                self.table.capacity - 1,
            )
        else:
            self.table.slots = max(self.table.decided("slots"), slot + 1)
            self.table.claim(slot, self._waiting(slot))
            try:
                for listener, dispatcher in self.dispatchers.items():
                    if slot not in dispatcher.listeners():
                        self._reserved_for = (0, 0)  # it came otherwise than was worked out
                    own[listener] = dispatcher.open_slot(slot, self._files(spare=False))
            except (OSError, Unsupported) as error:
                why = refusals.explain(error, listener.sock)
                self.server.log.warning(
                    "hermes: no listener for slot %d on %s: %s. This worker accepts from the shared"
                    " listener only. To fix it: %s",
                    slot,
                    listener,
                    why.reason,
                    why.remedy,
                )
        self._describe_binds()
        # Behind a slot's own listeners all that workers share, to be used as well.
        shared = self._listeners
        worker.sockets = [*own.values(), *shared]
        addresses = [*own, *shared]
        return Assignment(
            self,
            slot,
            exclusive=[True] * len(own) + [False] * len(shared),
            contested=[False] * len(own) + [sock not in self.dispatchers for sock in shared],
            binds=[self.binds[listener] for listener in addresses],
            indexes={listener: addresses.index(listener) for listener in addresses},
        )

    def release(self, worker: Worker) -> None:
        """Take a dead worker's slot back."""
        for slot, owner in self._slots.owned().items():
            if owner is worker:
                self._slots.give_back(slot, self.server.num_workers)
                for dispatcher in self.dispatchers.values():
                    dispatcher.close_slot(slot)
                self.table.release(slot, self._waiting(slot))
                self._drained.discard(slot)
                self._left[slot] = monotonic()
                self._describe_binds()

    def leave_to_arbiter(self) -> None:
        """In a worker: close what only the arbiter needs."""
        self._monitor.leave_to_arbiter()
        for dispatcher in self.dispatchers.values():
            dispatcher.leave_to_arbiter()
        for parts in (self._memory, *self._bind_memory.values()):
            for each in parts:
                each.close()
        if isinstance(self._kernel, KernelTable):
            self._kernel.close()

    def abandon(self) -> None:
        """In a child that is not a hermes worker: let go of everything, and share nothing."""
        self.leave_to_arbiter()
        for dispatcher in self.dispatchers.values():
            dispatcher.leave_siblings(SHARED_SLOT)  # which is all slots' listeners
        shm.make_private()

    def hand_over(self) -> None:
        """Make way for the arbiter that is about to be executed."""
        self._monitor.hand_over()
        for dispatcher in self.dispatchers.values():
            dispatcher.hand_over()

    def take_back(self) -> None:
        """Go on after all, as that arbiter has gone."""
        for listener, dispatcher in self.dispatchers.items():
            try:
                dispatcher.take_over()
            except Exception as error:
                self.server.log.warning(
                    "hermes: cannot restore kernel dispatch on %s after the upgrade: %s. Its"
                    " workers share one queue meanwhile; trying again every second",
                    listener,
                    error,
                )
            else:
                self.server.log.info(
                    "hermes: kernel dispatch on %s restored after the upgrade", listener
                )

    def _keep_attached(self) -> None:
        """Once a second and at each fork: see that new connections go where our program says.

        Workers can detach it or attach another, as they have listeners.
        """
        if self.server.reexec_pid:
            return  # the addresses are the next arbiter's
        for listener, dispatcher in self.dispatchers.items():
            try:
                complete = dispatcher.attach()
            except (OSError, Unsupported) as error:
                if listener not in self._incomplete:
                    self.server.log.warning(
                        "hermes: cannot attach the eBPF program to %s: %s. Until it is attached, a"
                        " hash spreads the connections over the workers. Trying again every second",
                        listener,
                        error,
                    )
                complete = False
            else:
                if not complete and listener not in self._incomplete:
                    self.server.log.warning(
                        "hermes: another server, or a process that an earlier one has forked, also"
                        " listens on %s. While all workers are busy, a connection waits for one"
                        " worker instead of the first idle one. Trying again every second",
                        listener,
                    )
            (self._incomplete.discard if complete else self._incomplete.add)(listener)

    def _rescue_strays(self) -> None:
        """Once a second: have workers take what waits where our program did not send it.

        Most of it waits on listeners of no worker. Our program sends nothing there, but the
        kernel's hash does, so this is also how it shows that our program was not attached.
        """
        now, strays, owned = monotonic(), 0, self._slots.owned()
        for slot in {slot for each in self.dispatchers.values() for slot in each.listeners()}:
            if not (waiting := self._waiting(slot)):
                continue
            unbooked = self.table.book(slot, waiting)
            # What was sent to an owner that has left may complete its handshake only now.
            if slot not in owned and now - self._left.get(slot, -_HANDSHAKE) >= _HANDSHAKE:
                strays += unbooked
        # Nor is it news where the program itself left the choice to the hash.
        counters = [each.bind.counters() for each in self.dispatchers.values()]
        hashed = sum(each["shared_failed"] + each["no_table"] for each in counters)
        explained, self._hashed = hashed != self._hashed, hashed
        if strays and not explained and now - self._told_of_strays >= _REMIND:
            self._told_of_strays = now
            self.server.log.warning(
                "hermes: the eBPF program was detached from %s: %s went to listeners without a"
                " worker. Workers take them over, and the program is attached again. Code in a"
                " worker, or another server on the same socket, has detached it",
                " or ".join(map(str, self.dispatchers)),
                count(strays, "connection"),
            )

    def _waiting(self, slot: int) -> int:
        return sum(dispatcher.waiting(slot) for dispatcher in self.dispatchers.values())

    def _sweep(self) -> None:
        """Take back the slots of workers that gunicorn dropped without calling child_exit."""
        alive = {id(worker) for worker in self.server.WORKERS.values()}
        for owner in self._slots.owned().values():
            if id(owner) not in alive:
                self.release(owner)
