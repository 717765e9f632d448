"""What the example apps' endpoints do; both frameworks call the same functions."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator

MAX = 60_000


class BadNumber(ValueError):
    """A query parameter is not a number the endpoint takes; the message is the answer."""


def number(values: object, name: str, default: int) -> int:
    """Read a whole number from 0 to 60000 from a query string.

    Args:
        values: the request's query parameters, a mapping with ``get``.
        name: of the parameter.
        default: its value when it is missing.

    Raises:
        BadNumber: it is something else.
    """
    text = values.get(name, str(default))  # type: ignore[attr-defined]
    if not (text.isascii() and text.isdigit() and int(text) <= MAX):
        raise BadNumber(f"{name} must be a whole number from 0 to {MAX}, not {text!r}\n")
    return int(text)


def burn(ms: int) -> None:
    """Use the CPU for that long, as costly Python code does."""
    end = time.thread_time_ns() + ms * 1_000_000
    while time.thread_time_ns() < end:
        pass


def block(ms: int) -> None:
    """Keep the whole worker from doing anything else, as a driver written in C does.

    In a gevent worker ``time.sleep`` is patched and would let others run.
    """
    sleep = time.sleep
    if "gevent.monkey" in sys.modules:
        sleep = sys.modules["gevent.monkey"].get_original("time", "sleep")
    sleep(ms / 1000)


def wait(ms: int) -> None:
    """Wait as for a database: in a gevent worker others run meanwhile."""
    time.sleep(ms / 1000)


def chunks(count: int, ms: int) -> Iterator[bytes]:
    """Yield numbered lines with a pause between them."""
    for i in range(count):
        if i:
            wait(ms)
        yield b"chunk %d\n" % i
