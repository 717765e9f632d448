"""The capabilities that eBPF needs: the arbiter keeps them, no other process has them.

With systemd's ``AmbientCapabilities=CAP_BPF`` every process that the server forks or
executes would hold the capability, the application's own subprocesses included.
"""

from __future__ import annotations

import ctypes
import os
from typing import Final

__all__ = ["drop"]

_CAP_PERFMON: Final = 38
_CAP_BPF: Final = 39
_VERSION_3: Final = 0x20080522  # _LINUX_CAPABILITY_VERSION_3: two 32-bit words for each set
_PR_CAPBSET_DROP: Final = 24


def drop() -> None:
    """Give up CAP_BPF and CAP_PERFMON in every set; other capabilities stay as they are.

    What leaves the permitted set also leaves the ambient one, so executed programs do not
    get it either. The bounding set follows where that is permitted (CAP_SETPCAP). Root keeps
    all, as it could take everything back.
    """
    if os.geteuid() == 0:
        return
    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "capset"):
        return  # another system
    header = (ctypes.c_uint32 * 2)(_VERSION_3, 0)
    sets = (ctypes.c_uint32 * 6)()  # effective, permitted, inheritable; then their high words
    if libc.capget(header, sets):
        return
    for capability in (_CAP_PERFMON, _CAP_BPF):
        libc.prctl(_PR_CAPBSET_DROP, capability, 0, 0, 0)
        word, bit = divmod(capability, 32)
        for which in range(3):
            sets[3 * word + which] &= ~(1 << bit)
    libc.capset(header, sets)
