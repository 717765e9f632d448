"""bpf(2) through ctypes: just the commands this project needs.

Sources: include/uapi/linux/bpf.h, kernel/bpf/syscall.c. No library stands in
between, because a server's arbiter should not carry one to make four calls.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import posix
import resource
import signal
import socket
import struct
from collections.abc import Callable
from typing import TYPE_CHECKING

from hermes_gunicorn.core.errors import BpfError, Unsupported, step
from hermes_gunicorn.core.shm import Mapping

if TYPE_CHECKING:
    from hermes_gunicorn.kernel.program import Program

__all__ = [
    "Map",
    "Mapping",
    "ProgramStats",
    "attach_reuseport",
    "enable_stats",
    "load_program",
    "probe",
    "program_stats",
]

# bpf(2) by machine; 64-bit userland only, as the attributes carry 64-bit pointers.
_SYSCALL_NUMBER = {
    "x86_64": 321,
    "aarch64": 280,
    "riscv64": 280,
    "loongarch64": 280,
    "ppc64le": 361,
    "s390x": 351,
}

_MAP_CREATE, _MAP_LOOKUP_ELEM, _MAP_UPDATE_ELEM, _MAP_DELETE_ELEM = range(4)
_PROG_LOAD = 5
_OBJ_GET_INFO_BY_FD = 15
_ENABLE_STATS = 32
_STATS_RUN_TIME = 0
_NO_COMMAND = 9999

_STEPS = {
    _MAP_CREATE: "map",
    _MAP_UPDATE_ELEM: "element",
    _MAP_DELETE_ELEM: "element",
    _PROG_LOAD: "program",
}

MAP_TYPE_ARRAY = 2
MAP_TYPE_REUSEPORT_SOCKARRAY = 20
F_MMAPABLE = 1 << 10
_PROG_TYPE_SK_REUSEPORT = 21
_ATTACH_SK_REUSEPORT_SELECT_OR_MIGRATE = 40

_SO_ATTACH_REUSEPORT_EBPF = getattr(socket, "SO_ATTACH_REUSEPORT_EBPF", 52)

_ATTR_SIZE = 120  # of union bpf_attr as far as we fill it; the kernel takes less or more
_LOG_SIZE = (1 << 24) - 1  # the most that older kernels take
_NAME_MAX = 15
_VERIFIER = (errno.EACCES, errno.EINVAL, errno.E2BIG)  # how it refuses a program


_syscall: Callable[..., int] | None = None


def _bpf(command: int, attributes: bytes, call: str) -> int:
    """Call bpf(2).

    Raises:
        Unsupported: this is no system that has the call.
        BpfError: the kernel refused, or a filter would end this process.
    """
    global _syscall
    if _syscall is None:
        number = _SYSCALL_NUMBER.get(platform.machine())
        if platform.system() != "Linux" or number is None:
            raise Unsupported(
                f"no eBPF on {platform.system()} {platform.machine()}",
                "kernel dispatch needs 64-bit Linux",
            )
        libc = ctypes.CDLL(None, use_errno=True)
        libc.syscall.restype = ctypes.c_long

        def syscall(command: int, buffer: ctypes.Array[ctypes.c_char]) -> int:
            return int(libc.syscall(number, command, buffer, ctypes.c_uint(len(buffer))))

        if _kills(lambda: syscall(_NO_COMMAND, ctypes.create_string_buffer(_ATTR_SIZE))):
            raise BpfError(errno.EPERM, "bpf", "killed")
        _syscall = syscall
    result = _syscall(command, ctypes.create_string_buffer(attributes, _ATTR_SIZE))
    if result < 0:
        raise BpfError(ctypes.get_errno(), call, _STEPS.get(command, "bpf"))
    return result


def probe() -> int:
    """Return the errno for a command that no kernel has: what comes before is a filter."""
    try:
        _bpf(_NO_COMMAND, b"", "probe")
    except BpfError as error:
        return error.errno or 0
    except Unsupported:
        return errno.ENOSYS
    return 0


def _kills(call: Callable[[], object]) -> bool:
    """Say whether a seccomp filter ends a process for the call, by trying it in a child.

    systemd's SystemCallFilter= does that unless told otherwise, and the server would be
    gone without a word.
    """
    try:
        with open("/proc/self/status") as status:
            if "\nSeccomp:\t2\n" not in status.read():
                return False
        # Not by os.fork, which gevent replaces where the configuration has called patch_all.
        pid = posix.fork()
    except OSError:
        return False
    if not pid:
        try:
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            call()
        finally:
            os._exit(0)
    return os.WIFSIGNALED(posix.waitpid(pid, 0)[1])


def _address(buffer: ctypes.Array[ctypes.c_char]) -> int:
    return ctypes.addressof(buffer)


class Map:
    """A BPF array: created, updated by index, mapped into memory.

    Args:
        name: at most 15 characters count, as in the kernel.
        type: ``MAP_TYPE_ARRAY`` or ``MAP_TYPE_REUSEPORT_SOCKARRAY``.
        value_size: bytes.
        entries: number of elements.
        flags: ``F_MMAPABLE`` for ``mmap``.

    Raises:
        BpfError: EPERM without CAP_BPF, EINVAL where the kernel lacks the type.
    """

    def __init__(self, name: str, type: int, value_size: int, entries: int, flags: int = 0) -> None:
        self.name = name
        self.value_size = value_size
        self.entries = entries
        attributes = struct.pack(
            "=IIIIIII16s", type, 4, value_size, entries, flags, 0, 0, name.encode()[:_NAME_MAX]
        )
        self.fd = _bpf(_MAP_CREATE, attributes, f"create map {name}")
        os.set_inheritable(self.fd, False)

    def _element(self, command: int, index: int, value: bytes | None = None) -> bytes:
        key = ctypes.create_string_buffer(struct.pack("=I", index), 4)
        buffer = None if value is None else ctypes.create_string_buffer(value, len(value))
        attributes = struct.pack(
            "=IxxxxQQQ", self.fd, _address(key), _address(buffer) if buffer else 0, 0
        )
        _bpf(command, attributes, f"map {self.name}[{index}]")
        return buffer.raw if buffer else b""

    def lookup(self, index: int) -> bytes:
        """Read one element; of a socket array the socket's cookie, nothing if it is empty."""
        try:
            return self._element(_MAP_LOOKUP_ELEM, index, bytes(self.value_size))
        except BpfError as error:
            if error.errno != errno.ENOENT:
                raise
            return b""

    def update(self, index: int, value: int) -> None:
        """Store a 64-bit value; in a socket array the value is a listener's fd."""
        self._element(_MAP_UPDATE_ELEM, index, struct.pack("=Q", value))

    def delete(self, index: int) -> None:
        """Empty one element of a socket array; nothing happens if it is empty."""
        try:
            self._element(_MAP_DELETE_ELEM, index)
        except BpfError as error:
            if error.errno != errno.ENOENT:
                raise

    def mmap(self) -> Mapping:
        """Map the whole array, shared and writable; elements follow each other."""
        with step("mmap"):
            return Mapping(self.fd, self.value_size * self.entries)

    def close(self) -> None:
        """Give up the fd; the kernel keeps the map while a program uses it."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


def load_program(program: Program, maps: dict[str, Map]) -> tuple[int, bool]:
    """Load a sk_reuseport program with its maps.

    Tries the attach type that also migrates a closing listener's queue (5.14+)
    and does without where the kernel does not know it.

    Returns:
        The program's fd, and whether it migrates.

    Raises:
        BpfError: with the verifier's log.
    """
    instructions = program.relocated({name: map.fd for name, map in maps.items()})
    # A signal that arrives makes the verifier give up (EAGAIN); it takes milliseconds.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    try:
        return _load(program, instructions, _ATTACH_SK_REUSEPORT_SELECT_OR_MIGRATE), True
    except BpfError as error:
        if error.errno != errno.EINVAL or error.log.strip():
            raise
        return _load(program, instructions, 0), False
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _load(program: Program, instructions: bytes, attach_type: int, log_size: int = 0) -> int:
    code = ctypes.create_string_buffer(instructions, len(instructions))
    license = ctypes.create_string_buffer(program.license)
    log = ctypes.create_string_buffer(max(log_size, 1))
    attributes = struct.pack(
        "=IIQQIIQII16sII",
        _PROG_TYPE_SK_REUSEPORT,
        len(instructions) // 8,
        _address(code),
        _address(license),
        1 if log_size else 0,
        log_size,
        _address(log) if log_size else 0,
        0,
        0,
        program.name.encode()[:_NAME_MAX],
        0,
        attach_type,
    )
    try:
        fd = _bpf(_PROG_LOAD, attributes, f"load program {program.name}")
    except BpfError as error:
        error.log = log.value.decode(errors="replace")
        if log_size or error.errno not in _VERIFIER:
            raise
        # Once more for the verifier's words, which cost nothing when all is well.
        try:
            return _load(program, instructions, attach_type, _LOG_SIZE)
        except BpfError as again:
            # Its own number is ENOSPC when it had more to say.
            error.log = again.log
        raise
    os.set_inheritable(fd, False)
    return fd


def attach_reuseport(sock: socket.socket, program_fd: int) -> None:
    """Attach the program to the socket's reuseport group, in place of any other.

    Raises:
        KernelError: EINVAL when the socket has no group yet.
    """
    with step("attach"):
        sock.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_REUSEPORT_EBPF, program_fd)


class ProgramStats:
    """What the kernel counted for a program while statistics were enabled.

    Attributes:
        runs: how often it ran.
        run_time_ns: how long that took together.
        verified_instructions: how many the verifier walked (5.16+, else 0).
    """

    def __init__(self, runs: int, run_time_ns: int, verified_instructions: int) -> None:
        self.runs = runs
        self.run_time_ns = run_time_ns
        self.verified_instructions = verified_instructions


def enable_stats() -> int:
    """Have the kernel time programs for as long as the returned fd is open (5.8+)."""
    fd = _bpf(_ENABLE_STATS, struct.pack("=I", _STATS_RUN_TIME), "enable statistics")
    os.set_inheritable(fd, False)
    return fd


def program_stats(program_fd: int) -> ProgramStats:
    """Read a loaded program's statistics (struct bpf_prog_info)."""
    info = ctypes.create_string_buffer(256)
    attributes = struct.pack("=IIQ", program_fd, len(info), _address(info))
    _bpf(_OBJ_GET_INFO_BY_FD, attributes, "program info")
    run_time_ns, runs = struct.unpack_from("=QQ", info, 192)
    (verified,) = struct.unpack_from("=I", info, 216)
    return ProgramStats(runs, run_time_ns, verified)
