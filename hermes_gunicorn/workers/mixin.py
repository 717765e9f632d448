"""What every worker class has in common: a slot, its life in the table, its siblings."""

from __future__ import annotations

import contextlib
import errno
import socket
from collections.abc import Callable, Iterable, Mapping
from time import monotonic, monotonic_ns
from typing import TYPE_CHECKING, Any, ClassVar, Final

from hermes_gunicorn.arbiter import forks, hooks
from hermes_gunicorn.arbiter.assignment import Assignment
from hermes_gunicorn.core import policy, privileges
from hermes_gunicorn.core.admission import Admission
from hermes_gunicorn.core.cascade import Scheduler
from hermes_gunicorn.core.errors import HermesError
from hermes_gunicorn.core.keepalive import Keeping, round_trip_ns, unread, waited_for_cores
from hermes_gunicorn.core.layout import ALL_SLOTS, SHARED_SLOT, SLOTS_PER_GROUP
from hermes_gunicorn.core.rescue import Rescuer
from hermes_gunicorn.core.row import Publisher
from hermes_gunicorn.core.socket_info import waiting
from hermes_gunicorn.core.words import count
from hermes_gunicorn.workers import closing

if TYPE_CHECKING:
    from gunicorn.config import Config
    from gunicorn.glogging import Logger
    from gunicorn.workers.base import Worker as _Base
else:
    _Base = object

__all__ = ["HermesMixin"]

_MIND_NS: Final = 1_000_000  # between ends of turns at which more than publishing is done
_HELD_NS: Final = 200_000_000  # after a request that held the loop: others may as well
_BOOKED_WITHIN: Final = 0.01  # seconds: the kernel chooses first and books then
_WEIGHS: Final = 1.0  # seconds between decisions whether to keep connections
_WEIGHS_IF_HELD: Final = 0.2  # the same, where requests hold the loop
# Seconds: a sibling that is busy at the very moment of a response is free again when its client
# asks for something else.
_FREE_WITHIN: Final = 0.1
_SELDOM: Final = 1.0  # seconds between looks by a worker that does not help
_REFRESHES: Final = 0.9  # seconds between looks at the own row, by what is called each second
_COMPLAINS: Final = 60.0  # seconds between lines that say the same
_QUIET_NS: Final = 3_000_000_000  # without a dispatch for so long, none is on its way


def _is_from(package: str, this: type) -> bool:
    return this.__module__.partition(".")[0] == package


class HermesMixin(_Base):  # type: ignore[misc]
    """Goes before a gunicorn worker class.

    The class calls ``begin`` when it accepts, ``publisher`` at its events, ``leave`` when it
    is told to stop; and it does not wait in poll for longer than ``until_look`` says.

    Attributes:
        assignment: the place the arbiter gave it; None if that failed.
        publisher: the pen for its row, from ``init_process`` on.
        holds: whether requests hold the loop for so long that siblings would help; then more
            than one should not be accepted at a time, as nobody else can serve it any more.
            Not where cores are short, for then siblings are held up as well.
        keeping: whether responses may close their connection.
        never_called: methods of the gunicorn class that are not called under this one.
    """

    assignment: Assignment | None = None
    publisher: Publisher
    keeping: Keeping
    handshake_grace = 1.0  # seconds: a connection sent here may still be on its way
    serves_inline = False  # accepting a connection is serving it
    may_close = True  # obeys ``keeping``
    holds = False
    never_called: ClassVar[tuple[str, ...]] = ()
    _held_at = -_HELD_NS
    _wakes_ns = policy.NEVER
    _rescuer: Rescuer | None = None
    _paused_rescuer: Rescuer | None = None
    _rescue_failed = float("-inf")  # when that was told last
    _admissions: Mapping[int, Admission] = {}
    _refreshed = 0.0
    _weighed = float("inf")
    _left = 0.0
    _accepted = 0  # ``publisher.accepted`` at the last look at the own queue
    _reported: frozenset[str] = frozenset()
    _stops_at_once = False
    _others = 0  # slots of siblings that could serve what this worker does, as bits
    _seen_free = -_FREE_WITHIN  # when one of those was free, as far as this worker saw
    _owed = 0  # ``publisher.accepted`` when all is taken that waited at ``leave``

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # In the arbiter, before the fork; HUP may have brought a new configuration.
        hooks.install(self.cfg)

    @classmethod
    def check_config(cls, cfg: Config, log: Logger) -> None:
        """Install the server hooks; gunicorn calls this just before ``when_ready``."""
        check = getattr(super(), "check_config", None)
        if check is not None:
            check(cfg, log)
        cls._refuse_overrides_in_vain()
        hooks.install(cfg)

    @classmethod
    def _refuse_overrides_in_vain(cls) -> None:
        """Raise for a method in a class of the user's that would never be called."""
        for name in cls.never_called:
            defining = [each for each in cls.__mro__ if name in vars(each)]
            ours = [i for i, each in enumerate(defining) if _is_from("hermes_gunicorn", each)]
            for each in defining[ours[-1] + 1 :] if ours else defining:
                if not _is_from("gunicorn", each):
                    raise HermesError(
                        f"{each.__module__}.{each.__qualname__}.{name} is never called under"
                        f" {cls.__name__}, as hermes workers wait and accept themselves; remove it,"
                        " or use the stock worker class"
                    )

    def init_process(self) -> None:
        """Run the worker, from just after the fork to its end."""
        self.publisher = self.assignment.take_up() if self.assignment else Publisher.unseen()
        forks.in_foreign_child(self.abandon)
        always = self.cfg.hermes_keepalive == "always" or not closing.is_cheap(self.cfg)
        self.keeping = Keeping(always or not self.may_close)
        self._refreshed = monotonic()
        try:
            super().init_process()
        finally:
            self.publisher.dead()

    def init_signals(self) -> None:
        """Take the signals over, and obey what came before that was possible.

        From the fork until here they run the arbiter's handlers, which put them into
        the child's copy of a queue that nobody reads. A TERM lost there leaves a worker
        that must be killed after graceful_timeout, with the requests it serves.
        """
        super().init_signals()
        # After the user was changed, which takes some sets of capabilities only, and before
        # the application is loaded.
        privileges.drop()
        if self.assignment and self.assignment.told_to_stop():
            self.alive = False

    def abandon(self) -> None:
        """In a child that the application forked: let go of what is this worker's alone."""
        self._rescuer = self._paused_rescuer = None
        for sock, exclusive in zip(self.sockets, self.exclusive(), strict=False):
            if exclusive:
                with contextlib.suppress(AttributeError, OSError):  # it is closed already
                    socket.close(sock.detach())  # gevent's os.close would wait for the loop

    def handle_quit(self, sig: int, frame: Any) -> None:
        """Stop at once, on INT or QUIT; an application may catch the exit."""
        self._stops_at_once = True
        super().handle_quit(sig, frame)

    def handle_abort(self, sig: int, frame: Any) -> None:
        """Stop at once, on ABRT: the heartbeat was late, and KILL is next."""
        self._stops_at_once = True
        super().handle_abort(sig, frame)

    def exclusive(self) -> list[bool]:
        """Say for each of ``sockets`` whether it is this worker's alone."""
        return self.assignment.exclusive if self.assignment else [False] * len(self.sockets)

    def serves(self, index: int) -> bool:
        """Say whether to watch ``sockets[index]`` now; it may change."""
        if self.assignment is None:
            return True
        admission = self._admissions.get(index)
        return self.assignment.serves(index) and not (admission and admission.until())

    def admits(self, index: int) -> bool:
        """Say whether to accept what waits on ``sockets[index]``, or leave it to others.

        Then ``serves`` denies it as well, until ``until_served`` is over.
        """
        admission = self._admissions.get(index)
        try:
            return admission is None or admission.admits()
        except Exception as error:
            self._report(error)
            return True

    def _report(self, error: Exception) -> None:
        """Log an error of ours, once: it may come back at every turn of the loop."""
        if repr(error) not in self._reported:
            self._reported |= {repr(error)}
            self.log.error("hermes: unexpected error; the worker keeps serving", exc_info=error)

    def until_served(self) -> float:
        """Return in how many seconds to ask ``serves`` again; 0 is no such time.

        To be called before ``serves``, or a pause that ends in between is never seen to end.
        """
        pauses = (admission.until() for admission in self._admissions.values())
        return min(filter(None, pauses), default=0.0)

    def begin(
        self, capacity: int, take: Callable[[int, Any], bool], room: Callable[[], bool]
    ) -> None:
        """Accept from now on, for oneself and for siblings in need.

        Args:
            capacity: how many requests can run at once.
            take: accepts from a sibling's listener; gets the index in ``sockets`` of the
                own listener for that address, and it. Returns whether there was one.
            room: whether there is room for one more.
        """
        self._schedule = Scheduler(self.publisher.table)
        self._rescue_after_ns = round(self.cfg.hermes_rescue_after * 1e9)
        if self.assignment and self.assignment.slot is not None:
            self._admissions = {
                index: Admission(self.publisher, self.assignment.binds[index], self.sockets[index])
                for index, contested in enumerate(self.assignment.contested)
                if contested
            }
            siblings = self.assignment.siblings()
            allowed = self.assignment.may_rescue
            if siblings:
                self._rescuer = Rescuer(
                    self.publisher,
                    self._rescue_after_ns,
                    siblings,
                    lambda index, listener: allowed(index) and take(index, listener),
                    room,
                )
        self._weighed = monotonic()
        self.keeping.start(waited_for_cores())
        self.publisher.at_turn(self._turned)
        self.publisher.ready(capacity)

    def alone(self) -> bool:
        """Tell whether there is no other worker, ready or booting. TTIN, TTOU change that."""
        slot = self.publisher.slot
        return slot != SHARED_SLOT and not self.publisher.table.has_others(slot)

    def until_look(self) -> float:
        """Return for how many seconds the siblings need not be looked after."""
        if self._rescuer is None or self.publisher.drained:
            return _SELDOM
        return max(self._rescuer.next_ns - monotonic_ns(), 0) / 1e9

    def look(self) -> None:
        """Help siblings in need."""
        if self._rescuer is None:
            return
        if not self.publisher.drained:
            try:
                self._rescuer.look(self.serves_inline or self.holds, self.keeping.starved)
            except Exception as error:
                self._pause_rescue(error)
                return
        if self._rescuer.next_ns < self._wakes_ns:
            self._wakes_ns = self._rescuer.next_ns
            self.wake_in(max(self.until_look(), 0.001))

    def _pause_rescue(self, error: Exception) -> None:
        """Leave siblings alone for a second or two; whatever this was, it may pass."""
        self._paused_rescuer, self._rescuer = self._rescuer, None
        now = monotonic()
        if now - self._rescue_failed < _COMPLAINS:
            return
        self._rescue_failed = now
        text = "hermes: cannot take over other workers' pending connections: %s. This worker keeps"
        text += " serving its own and tries again every second"
        if isinstance(error, OSError):
            remedy = ""
            if error.errno in (errno.EMFILE, errno.ENFILE):
                remedy = ". Allow more open files (ulimit -n, systemd: LimitNOFILE=)"
            self.log.warning(text + remedy, error.strerror)
        else:
            self.log.exception(text, error)

    def wake_in(self, seconds: float) -> None:
        """Have ``look_again`` called; replaces what was wanted before.

        For classes whose poll does not obey ``until_look``.
        """

    def look_again(self) -> None:
        """Look, and go on looking."""
        self._wakes_ns = policy.NEVER
        self.look()

    def leave(self) -> None:
        """Be chosen no more; what was sent here already is still to be taken."""
        self._rescuer = self._paused_rescuer = None
        self._left = monotonic()
        self.publisher.draining()
        self._owed = self.publisher.accepted + self._waiting()
        if self.assignment:
            self.assignment.leave_siblings()

    def awaits(self, own: Iterable[Any]) -> bool:
        """After ``leave``: whether to accept what was sent here before, or is on its way still.

        No more than that: with nobody else left, as at a stop, all that is new comes here. And
        nothing at the end of a life (``max_requests``): the siblings and the slot's next owner
        go on, as with gunicorn's one listener.

        Args:
            own: the exclusive listeners it is accepted from.
        """
        if self._stops_at_once or self.nr >= self.max_requests:
            return False
        since = monotonic() - self._left
        if since < _BOOKED_WITHIN:
            return True
        if self.in_grace():
            self.settle()  # siblings take what they find, and are not waited for
            if self.publisher.expects:
                return True
        owes = self.publisher.accepted < self._owed and since < self.cfg.graceful_timeout
        return owes and any(map(waiting, own))

    def in_grace(self) -> bool:
        """After ``leave``: whether it is too early to give up those who say nothing."""
        grace = min(self.handshake_grace, float(self.cfg.graceful_timeout))
        return not self._stops_at_once and monotonic() - self._left < grace

    def _turned(self, woke_ns: int) -> int:
        """At the end of a turn of the loop: what was lost meanwhile, who needs help."""
        busy_ns = monotonic_ns() - woke_ns
        if busy_ns > self._rescue_after_ns:
            self._held_at = woke_ns
            self.held(busy_ns)
        recently = woke_ns - self._held_at < _HELD_NS
        self.holds = recently and not self.keeping.short_of_cores
        if self.publisher.lost and self.publisher.drifted:
            if busy_ns >= policy.REMARKABLE_NS:  # at their peak workers help each other often
                self._tell(busy_ns)
            self.settle()
        elif self.publisher.has_overdue():
            self.settle()
        self.look()
        return 0 if self.serves_inline else min(self._schedule(woke_ns), woke_ns + _MIND_NS)

    def _tell(self, busy_ns: int) -> None:
        lost = self.publisher.queued - self._waiting()
        if lost > 0:
            self.log.info(
                "hermes: busy for %.3f s (slot %d); other workers took over %s",
                busy_ns / 1e9,
                self.publisher.slot,
                count(lost, "pending connection"),
            )

    def _waiting(self) -> int:
        own = zip(self.sockets, self.exclusive(), strict=True)
        return sum(waiting(sock) for sock, exclusive in own if exclusive)

    def settle(self) -> None:
        """Write off connections that were sent here but never came."""
        if self.publisher.drifted:
            self.publisher.settle(_QUIET_NS, self._waiting())

    def held(self, ns: int) -> None:
        """Nothing else could be served for so many nanoseconds."""
        self.keeping.held(ns)
        self._weigh(_WEIGHS_IF_HELD)

    def _weigh(self, after: float) -> None:
        """Decide anew whether to keep connections, if so many seconds are over."""
        now = monotonic()
        elapsed = now - self._weighed
        if elapsed < after:
            return
        self._weighed = now
        self._others = self._siblings_alike()
        self.keeping.weigh(elapsed * 1e9, waited_for_cores(), alone=not self._others)

    def _siblings_alike(self) -> int:
        """Return the slots of ready siblings that get the connections this worker gets."""
        table, slot = self.publisher.table, self.publisher.slot
        alike = table.eligible() & ~(1 << slot)
        if self.assignment and alike:
            for bind in self.assignment.binds:
                if bind.allows(slot):
                    alike &= bind.allowed or ALL_SLOTS
        if table.localities > 1:  # what comes back goes to the same locality
            own = slot // SLOTS_PER_GROUP
            first = own % table.localities * SLOTS_PER_GROUP
            group = (1 << SLOTS_PER_GROUP) - 1
            step = table.localities * SLOTS_PER_GROUP
            alike &= sum(group << at for at in range(first, ALL_SLOTS.bit_length(), step))
        return alike

    def closes(self, sock: Any) -> bool:
        """Decide whether the response that is about to be sent closes its connection.

        To be asked only while ``keeping.closing``, and if nothing that was read from the
        connection waits to be served. To answer yes is to close it.
        """
        table = self.publisher.table
        columns = table.group(0, table.in_use)
        now = monotonic()
        if policy.free_sibling(columns, self.publisher.slot, self._others):
            self._seen_free = now
        pays = (
            now - self._seen_free < _FREE_WITHIN
            and not policy.has_its_own(columns, self.publisher.slot, self._others)
            and self.keeping.pays(round_trip_ns(sock))
            and not unread(sock.fileno())
        )
        if pays and not table.closing_since_ns:  # one line for all workers
            table.closing_since_ns = monotonic_ns()
            self.log.info(
                "hermes: requests are blocking workers; sending 'Connection: close' on some"
                " responses so that those clients reconnect to an idle worker (hermes_keepalive)"
            )
        return pays

    def keepalive_failed(self) -> None:
        """Log an error in that decision, once; the connection is kept."""
        if not self.keeping.failed:
            self.keeping.failed = True
            self.log.exception("hermes: error in hermes_keepalive; the connection is kept")

    def notify(self) -> None:
        """Tell the arbiter that the loop turns."""
        super().notify()
        self.mend()

    def is_heartbeat_due(self) -> bool:
        """Tell whether a second has passed since the last ``notify``, or nearly one."""
        return monotonic() - self._refreshed >= _REFRESHES

    def mend(self) -> None:
        """Once a second see to the row; to be called as often or more."""
        self._weigh(_WEIGHS)
        if self.is_heartbeat_due():
            self._refreshed = monotonic()
            self.publisher.refresh()
            self.settle()
            if self._paused_rescuer is not None:
                self._rescuer, self._paused_rescuer = self._paused_rescuer, None
            self._look_at_own()

    def _look_at_own(self) -> None:
        """Accept what waits without having been reported by poll.

        Kernels without a fix of 2026 move connections to this queue without waking anybody,
        and with a single worker no sibling finds them. If poll works, something was accepted.
        """
        stuck = self.publisher.accepted == self._accepted
        self._accepted = self.publisher.accepted
        if not stuck or self._left:
            return
        for index, (sock, exclusive) in enumerate(zip(self.sockets, self.exclusive(), strict=True)):
            count = waiting(sock) if exclusive else 0
            for _ in range(min(count, 1) if self.holds else count):
                if not self.accept_own(index):
                    break

    def accept_own(self, index: int) -> bool:
        """Accept from ``sockets[index]`` if there is room; return whether there was something.

        For classes whose poll tells only what it was woken for.
        """
        return False
