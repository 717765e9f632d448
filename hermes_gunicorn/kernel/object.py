"""The prebuilt program: read bpf/hermes.bpf.o, an ELF relocatable, without a library.

Needed are five things of it: the code, the relocations that name its maps, the
license, the layout it was built for, and the symbols. Sources: elf(5);
Documentation/bpf/llvm_reloc.rst (relocation type 1, R_BPF_64_64).
"""

from __future__ import annotations

import struct
from pathlib import Path

from hermes_gunicorn.core.errors import LoaderError
from hermes_gunicorn.kernel.program import Layout, Program

__all__ = ["load"]

_CODE = "sk_reuseport/migrate"
_LAYOUT = "hermes.layout"
_LICENSE = "license"

_EM_BPF = 247
_R_BPF_64_64 = 1
_LITTLE, _BIG = 1, 2


class _Elf:
    """The sections and symbols of a 64-bit ELF file."""

    def __init__(self, data: bytes) -> None:
        if data[:5] != b"\x7fELF\x02" or data[5] not in (_LITTLE, _BIG):
            raise ValueError("not a 64-bit ELF file")
        self.data = data
        self.order = "<" if data[5] == _LITTLE else ">"
        machine = self.unpack("H", 18)[0]
        if machine != _EM_BPF:
            raise ValueError(f"not an eBPF object (machine {machine})")
        table_offset = self.unpack("Q", 40)[0]
        entry_size, count, names_index = self.unpack("HHH", 58)
        headers = [
            # sh_name, sh_type, sh_flags, sh_addr, sh_offset, sh_size, sh_link, sh_info, ...
            self.unpack("IIQQQQII", table_offset + i * entry_size)
            for i in range(count)
        ]
        names = headers[names_index][4]
        self.links = {self.string(names, header[0]): header[6] for header in headers}
        self.ranges = {self.string(names, header[0]): header[4:6] for header in headers}
        self.headers = headers

    def unpack(self, format: str, offset: int) -> tuple[int, ...]:
        return struct.unpack_from(self.order + format, self.data, offset)

    def string(self, table_offset: int, offset: int) -> str:
        start = table_offset + offset
        return self.data[start : self.data.index(b"\0", start)].decode()

    def section(self, name: str) -> bytes:
        offset, size = self.ranges[name]
        return self.data[offset : offset + size]

    def symbol(self, index: int) -> str:
        strings = self.headers[self.links[".symtab"]][4]
        (name,) = self.unpack("I", self.ranges[".symtab"][0] + index * 24)
        return self.string(strings, name)

    def relocations(self, section: str) -> list[tuple[int, int, int]]:
        """Return (offset, type, symbol index) of each SHT_REL entry."""
        offset, size = self.ranges[".rel" + section]
        entries = (self.unpack("QQ", at) for at in range(offset, offset + size, 16))
        return [(at, info & 0xFFFFFFFF, info >> 32) for at, info in entries]


def load(path: Path) -> Program:
    """Read the compiled program.

    Raises:
        LoaderError: there is no such file, or it is not a usable object.
        OSError: it cannot be read now, as without files or memory.
        LayoutMismatch: it was built for another layout of the table.
    """
    try:
        elf = _Elf(path.read_bytes())
        Layout(*struct.unpack(elf.order + "6I", elf.section(_LAYOUT))).check(path.name)
        references = [
            (offset // 8, elf.symbol(symbol))
            for offset, type, symbol in elf.relocations(_CODE)
            if type == _R_BPF_64_64
        ]
        code, license = elf.section(_CODE), elf.section(_LICENSE)
    except (FileNotFoundError, PermissionError) as error:
        raise LoaderError(
            f"cannot read {path.name}: {error.strerror}", "reinstall hermes-gunicorn"
        ) from error
    except (KeyError, IndexError, ValueError, OverflowError, struct.error) as error:
        raise LoaderError(
            f"{path.name} is damaged: {error!r}", "reinstall hermes-gunicorn"
        ) from error
    return Program("hermes_dispatch", code, references, license.rstrip(b"\0"), path.name)
