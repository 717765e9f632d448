"""What the monitor answers, and how an answer is checked by those who asked for it.

hermesctl may be root and the one who answers anybody, so nothing of an answer is used before
it has been read here: each value has the type that is declared below, each number can be
computed with, each text can be printed, and nothing else is left.
"""

from __future__ import annotations

import functools
import math
import types
from dataclasses import is_dataclass
from typing import (
    Any,
    Final,
    NewType,
    TypedDict,
    Union,
    get_args,
    get_origin,
    get_type_hints,
    is_typeddict,
)

from hermes_gunicorn.core.errors import HermesError
from hermes_gunicorn.core.layout import MAX_SLOTS, Row

__all__ = ["ANSWERS", "Refusal", "Status", "plain", "read"]

Bitmap = NewType("Bitmap", int)  # bit s for slot s

_LARGEST: Final = 1 << 64
_MALFORMED: Final = "malformed answer"


class Worker(TypedDict):
    """A slot in use; seconds and bytes."""

    slot: int
    pid: int
    state: str
    busy: float
    hung: bool
    frozen: bool
    drained: bool
    eligible: bool
    requests: int
    capacity: int
    connections: int
    queued: int
    dispatched: int
    dispatched_per_s: float
    rescued: int
    hangs: int
    lives: int
    cpu_percent: float
    cpu_seconds: float
    rss: int


class BindAddress(TypedDict):
    """A bind address and its counters."""

    address: str
    mode: str
    reason: str | None
    dispatched: int
    hung_skipped: int
    none_eligible: int
    select_failed: int
    shared_failed: int
    no_table: int
    spilled: int


class Status(TypedDict):
    """All there is to see now."""

    arbiter: int
    name: str
    gunicorn: str
    worker_class: str
    rows: int
    stats: str
    binds: list[BindAddress]
    workers: list[Worker]
    policy: str
    threshold: float
    theta: float
    at: float
    watched_since: float
    healthy: bool
    problems: list[str]


class _Happened(TypedDict):
    number: int
    at: float
    kind: str
    slot: int | None
    text: str


class Event(_Happened, total=False):
    """Something that has happened; those that last have seconds, those that repeat a count."""

    seconds: float
    count: int


class Point(TypedDict):
    """The server as a whole at some second."""

    at: float
    requests: int
    connections: int
    queued: int
    accepted: int
    rescued: int
    hung: int


class Raw(TypedDict):
    """What the kernel program would read."""

    rows: list[Row]
    eligible: Bitmap
    selected: Bitmap
    allowed: list[Bitmap]
    policy: int
    threshold_ns: int
    localities: int
    now_ns: int


class Refusal(TypedDict):
    """What is answered to a request that cannot be met."""

    error: str


# By what is asked.
ANSWERS: Final[dict[str, Any]] = {
    "status": Status,
    "events": list[Event],
    "points": list[Point],
    "raw": Raw,
    "set": type(None),
    "drain": type(None),
}


def plain(text: str) -> str:
    """Make a text of somebody else's safe to print: no control characters, on one line."""
    return "".join(char if char.isprintable() else "?" for char in text)


def read(kind: Any, value: Any, where: str = "") -> Any:
    """Take from a decoded answer what is declared of it, and check that.

    Args:
        kind: one of ``ANSWERS``, or a part of it.
        value: as JSON has it.
        where: which part of the answer this is, for the error.

    Raises:
        HermesError: it is something else.
    """
    if get_origin(kind) is list:
        if isinstance(value, list):
            (item,) = get_args(kind)
            return [read(item, each, f"{where}[{i}]") for i, each in enumerate(value)]
    elif get_origin(kind) in (Union, types.UnionType):
        chosen, _ = get_args(kind)  # X | None
        return None if value is None else read(chosen, value, where)
    elif is_typeddict(kind) or is_dataclass(kind):
        if isinstance(value, dict):
            return _read_fields(kind, value, where)
    elif kind is str:
        if isinstance(value, str):
            return plain(value)
    elif _is_number(kind, value):
        return value
    raise HermesError(f"{_MALFORMED}{where and f' ({where})'}")


_hints = functools.cache(get_type_hints)


def _read_fields(kind: Any, value: dict[str, Any], where: str) -> Any:
    """Take a dictionary, or a dataclass such as ``Row``, field by field."""
    required = getattr(kind, "__required_keys__", None)
    fields = {}
    for name, field in _hints(kind).items():
        if name in value:
            fields[name] = read(field, value[name], f"{where}.{name}" if where else name)
        elif required is None or name in required:
            raise HermesError(f"{_MALFORMED} ({where and f'{where}.'}{name} is missing)")
    if kind is Raw:
        _check_table(fields)
    return kind(**fields)


def _check_table(raw: dict[str, Any]) -> None:
    """Refuse what no table can be, so that the model in ``core/policy.py`` can be asked."""
    slots = [row.slot for row in raw["rows"]]
    if not slots or slots != list(range(len(slots))) or len(slots) > MAX_SLOTS:
        raise HermesError(f"{_MALFORMED} (rows)")
    if raw["localities"] < 1:
        raise HermesError(f"{_MALFORMED} (localities)")


def _is_number(kind: Any, value: Any) -> bool:
    """Say whether a value is a number, a truth value or nothing, as its kind says."""
    if kind is float:
        return type(value) in (int, float) and abs(value) <= 1e30 and not math.isnan(value)
    if kind is int:
        return type(value) is int and 0 <= value < _LARGEST
    if kind is Bitmap:
        return type(value) is int and 0 <= value < 1 << MAX_SLOTS
    return type(value) is kind
