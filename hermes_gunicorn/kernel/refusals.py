"""Why kernel dispatch is not to be had, and what helps: from what the kernel answered.

An errno alone says little: EPERM is a missing capability, a user namespace, a seccomp
filter, a limit of locked memory before Linux 5.11, or a security module. So ``CAUSES``
goes by the step that failed, the errno, and facts about this process, and the first row
that fits is the answer. The server's log and ``hermesctl doctor`` both ask here.
"""

from __future__ import annotations

import contextlib
import errno
import os
import platform
import re
import resource
import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from hermes_gunicorn.core.errors import KernelError, Unsupported
from hermes_gunicorn.kernel import bpf

__all__ = ["CAUSES", "Cause", "Facts", "Problem", "explain"]

_CAPABILITIES: Final = {
    "CAP_NET_BIND_SERVICE": 10,
    "CAP_SYS_ADMIN": 21,
    "CAP_PERFMON": 38,
    "CAP_BPF": 39,
}
_FIRST_USER_NAMESPACE: Final = 0xEFFFFFFD  # its inode; include/linux/proc_ns.h
_ENOTSUPP: Final = 524  # internal to the kernel, and yet returned


@dataclass(frozen=True)
class Facts:
    """What decides between causes that share an errno.

    Attributes:
        kernel: its version, major and minor.
        capabilities: those held of the ones that matter.
        user_namespace: whether the process is in one of its own, where none of them counts.
        seccomp: whether system calls are filtered.
        call_refused: whether it is seccomp, for certain, that refuses bpf(2).
        locked: how many bytes may be locked; None is any number.
        uid: whose listeners this process can open.
    """

    kernel: tuple[int, ...] = (6, 0)
    capabilities: frozenset[str] = frozenset()
    user_namespace: bool = False
    seccomp: bool = False
    call_refused: bool = False
    locked: int | None = None
    uid: int = 0

    @classmethod
    def here(cls) -> Facts:
        """Look at this process."""
        try:
            status = Path("/proc/self/status").read_text()
            bits = int(status.partition("CapEff:")[2].split()[0], 16)
            seccomp = status.partition("Seccomp:")[2].split()[:1] == ["2"]
        except (OSError, IndexError, ValueError):
            bits, seccomp = 0, False
        try:
            namespace = os.stat("/proc/self/ns/user").st_ino
        except OSError:
            namespace = _FIRST_USER_NAMESPACE
        soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
        facts = cls(
            kernel=tuple(map(int, re.findall(r"\d+", platform.release())[:2])),
            capabilities=frozenset(n for n, bit in _CAPABILITIES.items() if bits >> bit & 1),
            user_namespace=namespace != _FIRST_USER_NAMESPACE,
            seccomp=seccomp,
            locked=None if soft == resource.RLIM_INFINITY else soft,
            uid=os.geteuid(),
        )
        if not seccomp:
            return facts
        # With CAP_BPF, or from 6.5 on, the kernel itself finds fault with the command first.
        told = facts.kernel >= (6, 5) or (facts.may_use_bpf and not facts.user_namespace)
        refused = told and bpf.probe() in (errno.EPERM, errno.EACCES, errno.ENOSYS)
        return cls(**{**vars(facts), "call_refused": refused})

    @property
    def may_use_bpf(self) -> bool:
        """Whether the capabilities are enough to be let in."""
        modern = self.kernel >= (5, 8) and "CAP_BPF" in self.capabilities
        return modern or "CAP_SYS_ADMIN" in self.capabilities

    @property
    def may_speculate(self) -> bool:
        """Whether the verifier leaves out what a CPU may do speculatively."""
        return bool(self.capabilities & {"CAP_PERFMON", "CAP_SYS_ADMIN"})


@dataclass(frozen=True)
class Problem:
    """A call that the kernel refused.

    Attributes:
        error: what it answered.
        facts: about this process.
        port: of gunicorn's listener; 0 if none is concerned.
        owner: whose that is, for all of an address must be one user's; None if unknown.
    """

    error: OSError
    facts: Facts
    port: int = 0
    owner: int | None = None

    @property
    def step(self) -> str:
        """What the call was for; empty if that is not known."""
        return self.error.step if isinstance(self.error, KernelError) else ""

    @property
    def log(self) -> str:
        """The verifier's words."""
        return self.error.log.strip() if isinstance(self.error, KernelError) else ""


@dataclass(frozen=True)
class Cause:
    """A row of the table.

    Attributes:
        steps: in which it shows; none is any.
        errnos: by which it shows; none is any.
        when: what else must be so.
        reason: a clause; {error}, {problem} and {facts} are filled in.
        remedy: a clause, in the same way.
        needs: the capabilities that are the remedy.
    """

    name: str
    steps: tuple[str, ...]
    errnos: tuple[int, ...]
    when: Callable[[Problem], bool]
    reason: str
    remedy: str
    needs: tuple[str, ...] = ()

    def fits(self, problem: Problem) -> bool:
        """Say whether it is this."""
        return (
            (not self.steps or problem.step in self.steps)
            and (not self.errnos or problem.error.errno in self.errnos)
            and self.when(problem)
        )

    def unsupported(self, problem: Problem) -> Unsupported:
        """Return it in words."""
        words = {"error": problem.error, "problem": problem, "facts": problem.facts}
        return Unsupported(self.reason.format(**words), self.remedy.format(**words), self.needs)


def _always(problem: Problem) -> bool:
    return True


_BPF: Final = ("map", "mmap", "element", "program", "bpf")
_DENIED: Final = (errno.EPERM, errno.EACCES)
_REPORT: Final = "please report it, with what hermesctl doctor says"

CAUSES: Final = (
    Cause(
        *("seccomp kills", ("killed",), (), _always),
        "a seccomp filter ends every process that calls bpf(2)",
        "allow bpf in it (systemd: SystemCallFilter=bpf beside the other lines)",
    ),
    Cause(
        *("old kernel", _BPF, (errno.EINVAL, errno.ENOSYS, errno.E2BIG)),
        lambda p: p.facts.kernel < (5, 5),
        "Linux {facts.kernel[0]}.{facts.kernel[1]} is too old ({error})",
        "Linux 5.5 or later is needed",
    ),
    Cause(
        *("seccomp", _BPF, (errno.EPERM, errno.EACCES, errno.ENOSYS)),
        lambda p: p.facts.call_refused or (p.facts.seccomp and p.error.errno == errno.ENOSYS),
        "a seccomp filter refuses bpf(2) ({error})",
        "allow bpf(2) in it and add CAP_BPF (docker, podman, Kubernetes: adding the capability BPF"
        " does both under the default profile; systemd: SystemCallFilter=bpf)",
        ("CAP_BPF",),
    ),
    Cause(
        *("user namespace", _BPF, (errno.EPERM,), lambda p: p.facts.user_namespace),
        "no permission to use eBPF in a user namespace, where no capability gives it ({error})",
        "run it outside of one: not in a rootless container (podman and docker: a rootful one;"
        " Kubernetes: hostUsers: true; systemd: without PrivateUsers=), with CAP_BPF",
    ),
    Cause(
        *("locked memory", ("map", "program"), (errno.EPERM, errno.ENOMEM)),
        lambda p: p.facts.kernel < (5, 11) and p.facts.may_use_bpf and p.facts.locked is not None,
        "eBPF maps count as locked memory before Linux 5.11, and {facts.locked} bytes are too few"
        " ({error})",
        "raise the limit (systemd: LimitMEMLOCK=infinity; docker: --ulimit memlock=-1)",
    ),
    Cause(
        *("capability before 5.8", _BPF, _DENIED),
        lambda p: not p.log and not p.facts.may_use_bpf and p.facts.kernel < (5, 8),
        "no permission to use eBPF ({error})",
        "run it with CAP_SYS_ADMIN, as there is no CAP_BPF before Linux 5.8 (systemd:"
        " AmbientCapabilities=CAP_SYS_ADMIN LimitMEMLOCK=infinity; docker: --cap-add SYS_ADMIN"
        " --ulimit memlock=-1)",
        ("CAP_SYS_ADMIN",),
    ),
    Cause(
        *("capability", _BPF, _DENIED, lambda p: not p.log and not p.facts.may_use_bpf),
        "no permission to use eBPF ({error})",
        "run it with CAP_BPF (systemd: AmbientCapabilities=CAP_BPF; docker: --cap-add BPF)",
        ("CAP_BPF",),
    ),
    Cause(
        *("security module", _BPF, _DENIED, lambda p: not p.log),
        "no permission to use eBPF, though the capability is there ({error})",
        "allow it in the security module that refuses (SELinux, AppArmor; see the audit log)",
    ),
    Cause(
        *("perfmon", ("program",), ()),
        lambda p: bool(p.log) and not p.facts.may_speculate,
        "the verifier of this kernel ({facts.kernel[0]}.{facts.kernel[1]}) refuses the program to"
        " who has not CAP_PERFMON ({error})",
        "add CAP_PERFMON to CAP_BPF (systemd: AmbientCapabilities=CAP_BPF CAP_PERFMON; docker:"
        " --cap-add BPF --cap-add PERFMON); from Linux 6.12.43 on it is not needed",
        ("CAP_BPF", "CAP_PERFMON"),
    ),
    Cause(
        *("too long", ("program",), (errno.E2BIG,), _always),
        "the program is too long for the verifier of this kernel ({error})",
        "a later kernel is needed; Linux 6.1 takes it",
    ),
    Cause(
        *("verifier", ("program",), (), lambda p: bool(p.log)),
        "the verifier of this kernel refuses the program ({error})",
        _REPORT,
    ),
    Cause(
        *("no such feature", _BPF, (errno.EINVAL, _ENOTSUPP), lambda p: p.step != "element"),
        "this kernel was built without a part of eBPF ({error})",
        "take a kernel with CONFIG_BPF_SYSCALL and CONFIG_INET",
    ),
    Cause(
        *("no eBPF", _BPF, (errno.ENOSYS,), _always),
        "this kernel has no eBPF, or this is a sandbox such as gVisor ({error})",
        "take a kernel with CONFIG_BPF_SYSCALL, and no such sandbox",
    ),
    Cause(
        *("files that are left", ("reserve",), (), _always),
        "the files that gunicorn may still open are left to it, as it ends without one",
        "allow more open files (ulimit -n, systemd: LimitNOFILE=)",
    ),
    Cause(
        *("files", (), (errno.EMFILE,), _always),
        "gunicorn has as many files open as it may ({error})",
        "allow more open files (ulimit -n, systemd: LimitNOFILE=)",
    ),
    Cause(
        *("files of the system", (), (errno.ENFILE,), _always),
        "the system has as many files open as it may ({error})",
        "allow more (sysctl fs.file-max), or find who holds them",
    ),
    Cause(
        *("memory", (), (errno.ENOMEM, errno.ENOBUFS), _always),
        "there is not enough memory ({error})",
        "raise the limit (systemd: MemoryMax=; docker: --memory; sysctl net.core.optmem_max)",
    ),
    Cause(
        *("other server", ("element",), (errno.EBUSY,), _always),
        "another server dispatches to this socket ({error})",
        "end that one first; one that was killed lets go of it within a second",
    ),
    Cause(
        *("owner", ("bind",), (errno.EADDRINUSE, errno.EACCES)),
        lambda p: p.owner not in (None, p.facts.uid),
        "the listener must belong to the user that runs gunicorn: it is owned by uid"
        " {problem.owner}, gunicorn runs as uid {facts.uid}",
        "start gunicorn as the listener's user, and have its user setting change the workers'",
    ),
    Cause(
        *("in use", ("bind",), (errno.EADDRINUSE,), _always),
        "cannot bind a second listener to the address: it is in use by another socket",
        "find that one (ss -tanp) and end it",
    ),
    Cause(
        *("privileged port", ("bind",), (errno.EACCES,)),
        lambda p: 0 < p.port < 1024 and "CAP_NET_BIND_SERVICE" not in p.facts.capabilities,
        "no permission to bind a second listener to port {problem.port}",
        "add CAP_NET_BIND_SERVICE (systemd: AmbientCapabilities=CAP_BPF CAP_NET_BIND_SERVICE;"
        " docker: --cap-add NET_BIND_SERVICE), or lower sysctl net.ipv4.ip_unprivileged_port_start",
        ("CAP_BPF", "CAP_NET_BIND_SERVICE"),
    ),
    Cause(
        *("bind denied", ("bind", "listen", "socket"), _DENIED, _always),
        "no permission to open a second listener ({error})",
        "allow it where it is refused (systemd: SocketBindAllow=; SELinux, AppArmor: see the audit"
        " log)",
    ),
    Cause(
        *("address gone", ("bind",), (errno.EADDRNOTAVAIL,), _always),
        "cannot bind a second listener: no interface has the address any more ({error})",
        "add it to one, or set IP_FREEBIND on the listener (systemd: FreeBind=yes)",
    ),
    Cause(
        *("address family", ("socket",), (errno.EAFNOSUPPORT, errno.EPROTONOSUPPORT), _always),
        "gunicorn may not open a socket of the listener's family ({error})",
        "allow it (systemd: RestrictAddressFamilies=AF_INET AF_INET6 AF_UNIX)",
    ),
    Cause(
        *("option", ("option",), _DENIED, _always),
        "the listener has an option that gunicorn may not set on a second one ({error})",
        "add CAP_NET_ADMIN, or open the listener without it",
        ("CAP_BPF", "CAP_NET_ADMIN"),
    ),
    Cause(
        *("filter locked", ("attach",), (errno.EPERM,), _always),
        "whoever opened the listener has locked its filters (SO_LOCK_FILTER)",
        "open it without that lock",
    ),
    Cause(
        *("not plain TCP", ("attach", "element"), (errno.EOPNOTSUPP, _ENOTSUPP), _always),
        "the kernel can choose between listeners of plain TCP only ({error})",
        "listen with plain TCP",
    ),
    Cause(
        *("no group", ("attach", "element"), (errno.EINVAL,), _always),
        "the listeners of the address do not form a group ({error})",
        "open the listener in the network namespace of gunicorn, for the same address",
    ),
    Cause("unknown", (), (), _always, "the kernel refuses it ({error})", _REPORT),
)


def explain(
    error: OSError | Unsupported,
    listener: socket.socket | None = None,
    facts: Facts | None = None,
    port: int = 0,
) -> Unsupported:
    """Say why the kernel refused, and what would help.

    Args:
        error: what it answered.
        listener: gunicorn's, where one is concerned.
        facts: about the process; this one's by default.
        port: the listener's, where there is none yet.
    """
    if isinstance(error, Unsupported):
        return error
    owner = None
    if listener is not None:
        with contextlib.suppress(OSError, IndexError, ValueError):
            owner = os.fstat(listener.fileno()).st_uid
            port = int(listener.getsockname()[1])
    problem = Problem(error, facts or Facts.here(), port, owner)
    return next(cause for cause in CAUSES if cause.fits(problem)).unsupported(problem)
