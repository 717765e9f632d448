"""What this host and this user can do: by doing it, not by guessing from versions."""

from __future__ import annotations

import logging
import os
import platform
import pwd
import resource
import socket
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from gunicorn.config import Config
from gunicorn.sock import TCPSocket

from hermes_gunicorn import loader
from hermes_gunicorn.dispatch.kernel import KernelDispatcher, KernelTable
from hermes_gunicorn.errors import LoaderError, Unsupported

__all__ = ["Check", "Report", "examine"]

_CAPABILITIES: Final = {"CAP_BPF": 39, "CAP_PERFMON": 38, "CAP_SYS_ADMIN": 21}
_CONTAINERS: Final = {"/.dockerenv": "Docker", "/run/.containerenv": "Podman"}
_LINES: Final = (
    ("systemd unit", "AmbientCapabilities=CAP_BPF"),
    ("docker run, as root inside", "--cap-add BPF"),
    (
        "Dockerfile, for another USER as well",
        'RUN setcap cap_bpf+ep "$(readlink -f "$(which python3)")"',
    ),
    ("Kubernetes container", 'securityContext: {capabilities: {add: ["BPF"]}}'),
)


@dataclass(frozen=True)
class Check:
    """Something that was looked at.

    Attributes:
        good: None where it does not decide anything.
        found: what there is.
        remedy: what would help; empty if nothing is wrong.
    """

    name: str
    good: bool | None
    found: str
    remedy: str = ""


@dataclass
class Report:
    """All of it.

    Attributes:
        mode: what ``hermes_mode = auto`` chooses for a TCP address.
        lines: where a line is to be added to have kernel mode, and the line.
    """

    checks: list[Check] = field(default_factory=list)
    mode: str = "shared"
    lines: tuple[tuple[str, str], ...] = ()


def examine() -> Report:
    """Look at everything and try the real thing."""
    report = Report([_user(), _kernel(), _capabilities(), _container(), _memlock(), *_loaders()])
    dispatch = _dispatch()
    report.checks += [dispatch, _unix_sockets()]
    if dispatch.good:
        report.mode = "kernel"
    elif "permission" in dispatch.found:
        report.lines = _LINES
    return report


def _user() -> Check:
    try:
        name = pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:
        name = "without a name"
    return Check("user", None, f"{name} (uid {os.geteuid()})")


def _kernel() -> Check:
    release = platform.release().split("-")[0]
    if platform.system() != "Linux":
        return Check("kernel", False, platform.system(), "kernel mode is for Linux")
    version = tuple(int(part) for part in release.split(".")[:2] if part.isdecimal())
    if version < (5, 5):
        return Check("kernel", False, release, "Linux 5.5 or later is needed")
    return Check("kernel", True, release)


def _capabilities() -> Check:
    try:
        text = Path("/proc/self/status").read_text()
        bits = int(text.partition("CapEff:")[2].split()[0], 16)
    except (OSError, IndexError, ValueError):
        return Check("capabilities", None, "unknown")
    held = [name for name, bit in _CAPABILITIES.items() if bits >> bit & 1]
    enough = "CAP_BPF" in held or "CAP_SYS_ADMIN" in held
    found = ", ".join(held) or "none that matter"
    return Check("capabilities", enough, found, "" if enough else "CAP_BPF is all it takes")


def _container() -> Check:
    found = [name for path, name in _CONTAINERS.items() if Path(path).exists()]
    if "KUBERNETES_SERVICE_HOST" in os.environ:
        found.append("Kubernetes")
    return Check("container", None, ", ".join(found) or "none seen")


def _memlock() -> Check:
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    found = "unlimited" if soft == resource.RLIM_INFINITY else f"{soft // 1024} KiB"
    return Check("locked memory", None, f"{found} (counts before Linux 5.11 only)")


def _loaders() -> list[Check]:
    checks = []
    for name in ("object", "bcc"):
        try:
            loader.load(name)
            checks.append(Check(f"loader {name}", True, "works"))
        except LoaderError as error:
            good = False if name == "object" else None  # one is enough
            checks.append(Check(f"loader {name}", good, error.reason, error.remedy))
    return checks


def _dispatch() -> Check:
    """Load the program, attach it to a listener of our own, send it a connection."""
    name = "kernel dispatch"
    cfg = Config()
    try:
        kernel = KernelTable("auto", 2)
    except Unsupported as error:
        return Check(name, False, error.reason, error.remedy)
    try:
        shared = TCPSocket(("127.0.0.1", 0), cfg, logging.getLogger(__name__))
        dispatcher = KernelDispatcher(shared, kernel)
    except Unsupported as error:
        return Check(name, False, error.reason, error.remedy)
    except OSError as error:
        return Check(name, False, f"no listener on 127.0.0.1: {error}", "is loopback up?")
    finally:
        kernel.close()
    try:
        with socket.create_connection(shared.sock.getsockname(), timeout=5):
            ran = dispatcher.bind.counters()["none_eligible"] == 1
        migrates = "on" if dispatcher.migrates else "off: needs Linux 5.14"
    finally:
        shared.close()
    if not ran:
        return Check(name, False, "the program was attached and did not run", "please report it")
    return Check(name, True, f"tried, works (loader {kernel.loader}, migration {migrates})")


def _unix_sockets() -> Check:
    return Check("Unix sockets", None, "always in shared mode; the kernel chooses for TCP only")
