"""The edges of poll of an asyncio loop, published."""

from __future__ import annotations

from typing import Any

from hermes_gunicorn.core.row import Publisher

__all__ = ["watch_poll"]


def watch_poll(loop: Any, publisher: Publisher) -> None:
    """Have both edges of poll published."""
    selector = getattr(loop, "_selector", None)
    if selector is not None:
        poll = selector.select

        def select(timeout: float | None = None) -> Any:
            publisher.polls()
            # What was taken from a sibling just now is to be served now.
            events = poll(0 if loop._ready else timeout)
            publisher.woke()
            return events

        selector.select = select
    else:
        _watch_calls(loop, publisher)


def _watch_calls(loop: Any, publisher: Publisher) -> None:
    """Do the same for a loop that does not show its poll: uvloop.

    All that takes long there comes by ``call_soon``: the steps of tasks, and the waking
    of those that wait. So the worker is busy from the first such call of a turn until
    after a turn without one.
    """
    call_soon = loop.call_soon
    busy = more = False

    def start() -> None:
        publisher.woke()

    def end() -> None:
        nonlocal busy, more
        if more:
            more = False
            publisher.polls()
            publisher.woke()
            call_soon(end)
        else:
            busy = False
            publisher.polls()

    def call(callback: Any, *args: Any, context: Any = None) -> Any:
        nonlocal busy, more
        if busy:
            more = True
        else:
            busy = True
            call_soon(start)
            handle = call_soon(callback, *args, context=context)
            call_soon(end)
            return handle
        return call_soon(callback, *args, context=context)

    loop.call_soon = call
