"""What the monitor knows: a snapshot of the table, what has happened, the last minutes."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final

from hermes_gunicorn.core import policy
from hermes_gunicorn.core.binds import Bind
from hermes_gunicorn.core.layout import DRAINING, FREE, POLICIES, READY, SHARED_SLOT, STATES, Row
from hermes_gunicorn.core.shm import Mapping
from hermes_gunicorn.core.table import Table, tuned
from hermes_gunicorn.core.words import count

try:
    import psutil
except Exception:  # missing, or broken: CPU time and memory are not shown then
    psutil = None

__all__ = ["EVERY", "Watch"]

EVERY: Final = 0.25  # seconds between samples
_LASTS: Final = 600.0  # seconds of history
_MAX_EVENTS: Final = 1000
_POINT: Final = 1.0  # seconds between points of the series
_PAUSE: Final = 5.0  # seconds; what happens again within them is the same event


@dataclass
class _Process:
    """A worker's process, and what it used when it was looked at last."""

    process: Any = None
    at: float = 0.0
    used: float = 0.0
    percent: float = 0.0
    rss: int = 0


@dataclass
class _Slot:
    """What is remembered of a slot."""

    generation: int = -1
    state: int = FREE
    rescued: int = 0
    hang: dict[str, Any] | None = None
    hangs: int = 0
    busy_since_ns: int = 0
    dispatched: int = 0
    dispatched_per_s: float = 0.0
    at: float = field(default_factory=time.monotonic)


class Watch:
    """Samples the table; all methods may be called from any thread.

    Times are CLOCK_MONOTONIC in here, and those of the wall clock in what is told: as it goes
    now, so that a clock that has been set moves what has happened along with it.

    Attributes:
        table: the worker status table.
        about: what the arbiter has told.
        tell: tells the arbiter what somebody has changed.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.tell: Callable[[dict[str, Any]], object] = lambda change: None
        self.table = Table.private()
        self.about: dict[str, Any] = {"binds": []}
        self._binds: list[Bind] = []
        self._slots: dict[int, _Slot] = {}
        self._processes: dict[int, _Process] = {}
        self._events: deque[dict[str, Any]] = deque(maxlen=_MAX_EVENTS)
        self._series: dict[tuple[str, int | None], dict[str, Any]] = {}
        self._points: deque[dict[str, Any]] = deque(maxlen=int(_LASTS / _POINT))
        self._started = time.monotonic()
        self._happened = 0
        self._shared = 0

    def show(self, about: dict[str, Any], fds: list[int], sizes: list[int]) -> None:
        """Look at another table, or at other binds."""
        with self._lock:
            if about == self.about:
                return
            memory = [Mapping(fd, size).memory for fd, size in zip(fds, sizes, strict=True)]
            told = bool(self._binds)
            self.about = about
            self.table = Table(*memory[:3])
            pairs = zip(memory[3::2], memory[4::2], strict=True)
            self._binds = [Bind(*pair) for pair in pairs]
            if told:
                self._event("reload", "the arbiter has a new configuration")
            for bind in about["binds"]:
                if bind["reason"]:
                    self._event("fall-back", f"{bind['address']}: {bind['reason']}")

    def _event(self, kind: str, text: str, slot: int | None = None) -> dict[str, Any]:
        self._happened += 1
        event = {"number": self._happened, "at": time.monotonic(), "kind": kind}
        event |= {"slot": slot, "text": text}
        self._events.append(event)
        return event

    def _again(self, kind: str, count: int, text: str, slot: int | None = None) -> None:
        """Count what at high load happens all the time; the last event grows while it goes on."""
        now, event = time.monotonic(), self._series.get((kind, slot))
        if event is None or now > event["at"] + event["seconds"] + _PAUSE:
            event = self._series[kind, slot] = self._event(kind, "", slot)
            event.update(count=0, seconds=0.0)
        event["count"] += count
        event["seconds"] = round(now - event["at"], 3)
        event["text"] = text.format(event["count"])

    def sample(self) -> None:
        """Look at the table; to be called every ``EVERY`` seconds."""
        with self._lock:
            now = time.monotonic_ns()
            rows = self.table.rows()[1:]
            for row in rows:
                self._follow(row, now)
            shared = sum(bind.counters()["none_eligible"] for bind in self._binds)
            if shared > self._shared and self._points:
                self._again("no worker", shared - self._shared, "{} connections found none")
            self._shared = shared
            if not self._points or time.monotonic() - self._points[-1]["at"] >= _POINT:
                self._points.append(self._point(rows))

    def _follow(self, row: Row, now: int) -> None:
        slot = self._slots.setdefault(row.slot, _Slot(rescued=row.rescued))
        if (slot.generation, slot.state) != (row.generation, row.state):
            if slot.generation >= 0 or row.state != READY:
                state = STATES[row.state] if row.state < len(STATES) else "unknown"
                self._event("worker", f"{state} (pid {row.pid})", row.slot)
            if slot.generation != row.generation:
                slot.rescued = row.rescued
            slot.generation, slot.state = row.generation, row.state
        if row.rescued > slot.rescued:
            more = row.rescued - slot.rescued
            self._again("rescue", more, "took {} connections from siblings", row.slot)
        slot.rescued = row.rescued
        self._follow_hang(slot, row, now)
        elapsed = time.monotonic() - slot.at
        if elapsed >= _POINT:
            slot.dispatched_per_s = max(row.dispatched - slot.dispatched, 0) / elapsed
            slot.dispatched, slot.at = row.dispatched, time.monotonic()

    def _follow_hang(self, slot: _Slot, row: Row, now: int) -> None:
        threshold_ns = max(self.table.hang_threshold_ns, policy.REMARKABLE_NS)
        hung = row.state == READY and policy.is_hung(row.busy_since_ns, now, threshold_ns)
        since = row.busy_since_ns if hung else row.frozen_since_ns
        if not since:
            slot.hang = None
        elif slot.hang is None or slot.busy_since_ns != since:
            how = "busy" if hung else "frozen in poll"
            slot.hangs += 1
            slot.busy_since_ns = since
            slot.hang = self._event("hang", f"{how} (pid {row.pid})", row.slot)
        if slot.hang is not None:
            slot.hang["seconds"] = round((now - since) / 1e9, 3)

    def _point(self, rows: list[Row]) -> dict[str, Any]:
        live = [row for row in rows if row.state in (READY, DRAINING)]
        return {
            "at": time.monotonic(),
            "requests": sum(row.requests for row in live),
            "connections": sum(row.connections for row in live),
            "queued": sum(row.queued for row in live),
            "accepted": sum(row.dispatched for row in rows),
            "rescued": sum(row.rescued for row in rows),
            "hung": sum(slot.hang is not None for slot in self._slots.values()),
        }

    def status(self) -> dict[str, Any]:
        """Return all there is to see now; seconds, bytes and counts."""
        with self._lock:
            now = time.monotonic_ns()
            eligible = self.table.eligible()
            workers = [
                self._worker(row, now, bool(eligible >> row.slot & 1))
                for row in self.table.rows()[1:]
                if row.state != FREE
            ]
            binds = [
                told | bind.counters()
                for told, bind in zip(self.about["binds"], self._binds, strict=False)
            ]
            pids = {worker["pid"] for worker in workers}
            for gone in self._processes.keys() - pids:
                del self._processes[gone]
            problems = _problems(workers, binds)
            return {
                **{key: value for key, value in self.about.items() if key not in ("uid", "gid")},
                "binds": binds,
                "workers": workers,
                "policy": _name(POLICIES, self.table.policy),
                "threshold": self.table.hang_threshold_ns / 1e9,
                "theta": self.table.theta,
                "at": time.time(),
                "watched_since": _wall(self._started),
                "healthy": not problems,
                "problems": problems,
            }

    def _worker(self, row: Row, now: int, eligible: bool) -> dict[str, Any]:
        slot = self._slots.get(row.slot) or _Slot()
        process = self._look_at(row.pid)
        return {
            "slot": row.slot,
            "pid": row.pid,
            "state": _name(STATES, row.state),
            "busy": max(round((now - row.busy_since_ns) / 1e9, 6), 0) if row.busy_since_ns else 0,
            "hung": policy.is_hung(row.busy_since_ns, now, self.table.hang_threshold_ns),
            "frozen": row.frozen_since_ns > 0,
            "drained": row.drained == 1,
            "eligible": eligible,
            "requests": row.requests,
            "capacity": row.capacity,
            "connections": row.connections,
            "queued": row.queued,
            "dispatched": row.dispatched,
            "dispatched_per_s": round(slot.dispatched_per_s, 1),
            "rescued": row.rescued,
            "hangs": slot.hangs,
            "lives": row.generation,
            "cpu_percent": process.percent,
            "cpu_seconds": process.used,
            "rss": process.rss,
        }

    def _look_at(self, pid: int) -> _Process:
        if psutil is None:
            return _Process()
        known = self._processes.get(pid)
        # The number is what a worker wrote there.
        with contextlib.suppress(psutil.Error, ValueError, OverflowError):
            if known is None:
                known = self._processes[pid] = _Process(psutil.Process(pid))
            now = time.monotonic()
            if now - known.at >= _POINT:
                times = known.process.cpu_times()
                used = times.user + times.system
                if not known.at:  # the first time, since it was started
                    age = time.time() - known.process.create_time()
                    # Longer than that if the clock has been set back.
                    known.at = now - max(age, used / (os.cpu_count() or 1), 0.01)
                known.percent = round(100 * (used - known.used) / (now - known.at), 1)
                known.at, known.used = now, used
                known.rss = known.process.memory_info().rss
            return known
        self._processes.pop(pid, None)
        return _Process()

    def events(self) -> list[dict[str, Any]]:
        """Return what has happened, the oldest first."""
        with self._lock:
            return [event | {"at": _wall(event["at"])} for event in self._events]

    def points(self) -> list[dict[str, Any]]:
        """Return a point for each second of the last minutes."""
        with self._lock:
            return [point | {"at": _wall(point["at"])} for point in self._points]

    def raw(self) -> dict[str, Any]:
        """Return what the kernel program would read now, for the model in ``core/policy.py``."""
        with self._lock:
            table = self.table
            return {
                "rows": [vars(row) for row in table.rows() or [table.row(SHARED_SLOT)]],
                "eligible": table.eligible(),
                "selected": table.selected(),
                "allowed": [bind.allowed for bind in self._binds],
                "policy": table.policy,
                "threshold_ns": table.hang_threshold_ns,
                "localities": max(table.localities, 1),
                "now_ns": time.monotonic_ns(),
            }

    def tune(self, name: str, value: float | str) -> None:
        """Change a setting of the running server, until its next reload.

        Raises:
            ValueError: saying what is wrong.
        """
        with self._lock:
            attribute, number = tuned(name, value)
            self.tell({"set": name, "value": value})  # first, or the arbiter may undo it
            setattr(self.table, attribute, number)
            self._event("set", f"{name} is {value}")

    def drain(self, slot: int, drained: bool) -> None:
        """Have a worker be sent nothing more, or something again.

        Raises:
            ValueError: there is no such worker.
        """
        with self._lock:
            if not SHARED_SLOT < slot < self.table.in_use or self.table.row(slot).state != READY:
                raise ValueError(f"slot {slot} has no worker that is ready")
            self.tell({"drain": slot, "drained": drained})
            self.table.drain(slot, drained)
            self._event("set", "drained" if drained else "no more drained", slot)


def _wall(at: float) -> float:
    """Return when something has happened by the wall clock, as that goes now."""
    return round(time.time() - time.monotonic() + at, 2)


def _name(names: tuple[str, ...], index: int) -> str:
    return names[index] if index < len(names) else "unknown"


def _problems(workers: list[dict[str, Any]], binds: list[dict[str, Any]]) -> list[str]:
    """Say what is not as it should be, one line each."""
    ready = [worker for worker in workers if worker["state"] == "ready"]
    stuck = [
        w for w in ready if w["frozen"] or (w["hung"] and w["busy"] > policy.REMARKABLE_NS / 1e9)
    ]
    problems = []
    if not ready:
        problems.append("no worker is ready")
    elif len(stuck) == len(ready):
        problems.append(
            "the only worker hangs" if len(ready) == 1 else f"all {len(ready)} workers hang"
        )
    elif stuck:
        slots = ", ".join(str(worker["slot"]) for worker in stuck)
        hang = "workers hangs (slot" if len(stuck) == 1 else "workers hang (slots"
        problems.append(f"{len(stuck)} of {len(ready)} {hang} {slots})")
    for bind in binds:
        lost = bind["shared_failed"] + bind["no_table"]
        if lost:
            left = f"{count(lost, 'connection')} left to the kernel's hash"
            problems.append(f"{bind['address']}: {left}")
    return problems
