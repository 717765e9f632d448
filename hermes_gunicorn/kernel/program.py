"""What a loader delivers: the program's instructions, not yet bound to any map."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from hermes_gunicorn.core import layout
from hermes_gunicorn.core.errors import LayoutMismatch, LoaderError

__all__ = ["Layout", "Program"]

_INSTRUCTION_SIZE = 8
_LD_IMM64 = 0x18  # the only instruction that carries a map
_PSEUDO_MAP_FD = 1


@dataclass(frozen=True)
class Layout:
    """struct hermes_layout: what the program thinks the shared structs look like."""

    version: int
    control_size: int
    worker_size: int
    bind_size: int
    group_size: int
    allowed_size: int

    @classmethod
    def of_table(cls) -> Layout:
        """Return the layout this package is written for."""
        structs = (layout.CONTROL, layout.WORKER, layout.BIND, layout.GROUP, layout.ALLOWED)
        return cls(layout.LAYOUT_VERSION, *(struct.size for struct in structs))

    def check(self, source: str) -> None:
        """Refuse a program that was built for another layout.

        Raises:
            LayoutMismatch: naming what differs.
        """
        ours = Layout.of_table()
        for field in self.__dataclass_fields__:
            theirs, expected = getattr(self, field), getattr(ours, field)
            if theirs != expected:
                raise LayoutMismatch(
                    f"layout mismatch: {field} is {theirs} in {source}"
                    f" and {expected} in hermes_gunicorn",
                    "reinstall hermes-gunicorn, or run `make -C bpf` after a change",
                )


@dataclass(frozen=True)
class Program:
    """A sk_reuseport program.

    Attributes:
        name: as the kernel will list it.
        instructions: eBPF, 8 bytes each.
        map_references: (instruction index, map name) for every load of a map.
        license: decides which helpers the kernel grants.
        source: where it came from, for messages.
    """

    name: str
    instructions: bytes
    map_references: Sequence[tuple[int, str]]
    license: bytes
    source: str

    def relocated(self, fds: Mapping[str, int]) -> bytes:
        """Return the instructions with the maps' fds filled in.

        Raises:
            LoaderError: the program uses a map this package does not know.
        """
        code = bytearray(self.instructions)
        for index, name in self.map_references:
            at = index * _INSTRUCTION_SIZE
            if name not in fds or code[at] != _LD_IMM64:
                raise LoaderError(
                    f"{self.source} refers to the unknown map {name!r}",
                    "reinstall hermes-gunicorn",
                )
            registers = code[at + 1] & 0x0F | _PSEUDO_MAP_FD << 4
            struct.pack_into("=BBhi", code, at, _LD_IMM64, registers, 0, fds[name])
        return bytes(code)
