"""Numbers in messages."""

from __future__ import annotations

__all__ = ["count"]


def count(number: int, noun: str) -> str:
    """Return a number with its noun, such as ``1 worker`` or ``2 workers``."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"
