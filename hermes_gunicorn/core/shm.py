"""Memory that several processes share."""

from __future__ import annotations

import ctypes
import mmap
import os
import weakref
from typing import Final

__all__ = ["Mapping", "Memory", "make_private"]

_MAP_FIXED: Final = 0x10  # Linux
_mapped: dict[int, int] = {}  # sizes by address


def _libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    size_t, integer, offset = ctypes.c_size_t, ctypes.c_int, ctypes.c_long
    libc.mmap.argtypes = (ctypes.c_void_p, size_t, *(integer,) * 3, offset)
    libc.munmap.argtypes = (ctypes.c_void_p, size_t)
    return libc


def _unmap(libc: ctypes.CDLL, address: int, size: int) -> None:
    _mapped.pop(address, None)
    libc.munmap(address, size)


def make_private() -> None:
    """In a child that shall not speak for its parent: put empty memory in place of the shared.

    What refers to it stays valid, and neither sees nor changes what others share.
    """
    libc = _libc()
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_FIXED
    for address, size in _mapped.items():
        libc.mmap(address, size, mmap.PROT_READ | mmap.PROT_WRITE, flags, -1, 0)
    _mapped.clear()


class Mapping:
    """Memory shared through a file descriptor, without keeping that open.

    Python's own mmap keeps a duplicate, so every worker would hold one of each map. It is
    unmapped when it is closed, or when nothing refers to its bytes any more.

    Attributes:
        memory: the bytes, writable.

    Raises:
        OSError: from mmap(2).
    """

    def __init__(self, fd: int, size: int) -> None:
        self._libc = _libc()
        protection = mmap.PROT_READ | mmap.PROT_WRITE
        address = self._libc.mmap(None, size, protection, mmap.MAP_SHARED, fd, 0)
        if address == ctypes.c_void_p(-1).value:
            raise OSError(ctypes.get_errno(), "mmap")
        self.size = size
        _mapped[address] = size
        held = (ctypes.c_char * size).from_address(address)
        self._unmap = weakref.finalize(held, _unmap, self._libc, address, size)
        self._unmap.atexit = False  # some of it may be in use until the very end
        self.memory = memoryview(held).cast("B")

    def close(self) -> None:
        """Unmap it; an error while views of it are in use."""
        self.memory.release()
        self._unmap()


class Memory:
    """Memory that forked children share, and that can be shown to another process.

    Attributes:
        memory: the bytes, writable, zero at first.
        fd: what another process maps; -1 where the system has no such descriptors.
    """

    def __init__(self, size: int) -> None:
        self.memory: memoryview
        try:
            self.fd = os.memfd_create("hermes", os.MFD_CLOEXEC)
        except (AttributeError, OSError):
            self.fd = -1
            self.memory = memoryview(mmap.mmap(-1, size))
            return
        os.ftruncate(self.fd, size)
        self.memory = Mapping(self.fd, size).memory

    def close(self) -> None:
        """Give up the descriptor; the memory stays."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
