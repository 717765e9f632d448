"""Memory that several processes share."""

from __future__ import annotations

import ctypes
import mmap
import os
import weakref

__all__ = ["Mapping", "Memory"]


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
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._libc.mmap.restype = ctypes.c_void_p
        size_t, integer, offset = ctypes.c_size_t, ctypes.c_int, ctypes.c_long
        self._libc.mmap.argtypes = (ctypes.c_void_p, size_t, *(integer,) * 3, offset)
        self._libc.munmap.argtypes = (ctypes.c_void_p, size_t)
        protection = mmap.PROT_READ | mmap.PROT_WRITE
        address = self._libc.mmap(None, size, protection, mmap.MAP_SHARED, fd, 0)
        if address == ctypes.c_void_p(-1).value:
            raise OSError(ctypes.get_errno(), "mmap")
        self.size = size
        held = (ctypes.c_char * size).from_address(address)
        self._unmap = weakref.finalize(held, self._libc.munmap, address, size)
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
