"""What the worker status table holds for one bind address."""

from __future__ import annotations

import mmap
import struct
from typing import Final, TypeAlias

from hermes_gunicorn.core.layout import (
    ALL_SLOTS,
    ALLOWED,
    BIND,
    COUNTERS,
    MAX_GROUPS,
    SLOTS_PER_GROUP,
    WORD_MASK,
)

__all__ = ["Bind", "Buffer", "read_bitmap"]

_GROUP_BY: Final = BIND.index("group_by")
_SEED: Final = BIND.index("seed")

Buffer: TypeAlias = mmap.mmap | memoryview | bytearray


def read_bitmap(words: memoryview) -> int:
    """Read a bitmap of several words as one number, bit s for slot s."""
    return int.from_bytes(struct.pack(f"<{len(words)}Q", *words), "little")


class Bind:
    """What the table holds for one bind address: counters, and who may serve it.

    Args:
        memory: writable buffer of ``BIND.size`` bytes or more.
        allowed: writable buffer of ``MAX_GROUPS * ALLOWED.size`` bytes or more.
    """

    def __init__(self, memory: Buffer, allowed: Buffer) -> None:
        self._words = memoryview(memory).cast("B")[: BIND.size].cast("Q")
        self._allowed = memoryview(allowed).cast("B")[: MAX_GROUPS * ALLOWED.size].cast("Q")
        self._decided: int | None = None
        self._grouping: tuple[int, int] | None = None
        if not any(self._allowed):  # new memory
            self.allowed = ALL_SLOTS

    @staticmethod
    def sizes() -> tuple[int, int]:
        """Return how much memory the parts need, in bytes."""
        return BIND.size, MAX_GROUPS * ALLOWED.size

    def restore(self) -> None:
        """Store what this process decided once more, where somebody has overwritten it."""
        if self._decided is not None and self.allowed != self._decided:
            self.allowed = self._decided
        if self._grouping is not None:
            self.group_by(*self._grouping)

    def release(self) -> None:
        """Let go of the memory."""
        self._words.release()
        self._allowed.release()

    def counters(self) -> dict[str, int]:
        """Read the counters by name."""
        return dict(zip(COUNTERS, self._words, strict=False))

    @property
    def allowed(self) -> int:
        """The slots that may serve this address, bit s for slot s."""
        return read_bitmap(self._allowed)

    @allowed.setter
    def allowed(self, bits: int) -> None:
        self._decided = bits
        for group in range(MAX_GROUPS):
            self._allowed[group] = bits >> group * SLOTS_PER_GROUP & WORD_MASK

    def allows(self, slot: int) -> bool:
        """Tell whether a slot may serve this address.

        An empty bitmap allows all slots: it is never decided, only written by mistake.
        """
        group, bit = divmod(slot, SLOTS_PER_GROUP)
        return bool(self._allowed[group] >> bit & 1) or not any(self._allowed)

    def group_by(self, what: int, seed: int) -> None:
        """Say what a connection's locality group depends on.

        Args:
            what: an index into ``GROUP_BY``.
            seed: 32 bits that tell this address from others.
        """
        self._grouping = what, seed
        self._words[_GROUP_BY] = what
        self._words[_SEED] = seed
