"""What this host and this user can do: by doing it, not by guessing from versions."""

from __future__ import annotations

import os
import platform
import pwd
import socket
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from hermes_gunicorn.core.errors import KernelError, LoaderError, Unsupported
from hermes_gunicorn.kernel import loader, refusals
from hermes_gunicorn.kernel.dispatcher import KernelDispatcher
from hermes_gunicorn.kernel.listener import TcpListener
from hermes_gunicorn.kernel.refusals import Facts
from hermes_gunicorn.kernel.table import KernelTable

__all__ = ["Check", "Report", "examine"]

_CONTAINERS: Final = {"/.dockerenv": "Docker", "/run/.containerenv": "Podman"}
_ROWS: Final = 256  # as in a server: memory may be what is short


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
    facts = Facts.here()
    report = Report([_user(), _kernel(facts), *_permission(facts), _container(), _memlock(facts)])
    dispatch, refused = _dispatch()
    report.checks += [*_loaders(), dispatch, *_low_ports(), _unix_sockets()]
    if dispatch.good:
        report.mode = "kernel"
    elif refused is not None and refused.needs:
        report.lines = _lines(refused.needs)
    return report


def _lines(capabilities: tuple[str, ...]) -> tuple[tuple[str, str], ...]:
    """Say how to give a server capabilities, for each way to run it."""
    short = [each.removeprefix("CAP_") for each in capabilities]
    quoted = ", ".join(f'"{each}"' for each in short)
    return (
        ("systemd unit", f"AmbientCapabilities={' '.join(capabilities)}"),
        ("docker run, as root inside", " ".join(f"--cap-add {each}" for each in short)),
        (
            "Dockerfile, for another USER as well",
            f'RUN setcap {",".join(capabilities).lower()}+ep "$(readlink -f "$(which python3)")"',
        ),
        ("Kubernetes container", f"securityContext: {{capabilities: {{add: [{quoted}]}}}}"),
    )


def _user() -> Check:
    try:
        name = pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:
        name = "without a name"
    return Check("user", None, f"{name} (uid {os.geteuid()})")


def _kernel(facts: Facts) -> Check:
    release = platform.release()
    if platform.system() != "Linux":
        return Check("kernel", False, platform.system(), "kernel mode is for Linux")
    if facts.kernel < (5, 5):
        return Check("kernel", False, release, "Linux 5.5 or later is needed")
    return Check("kernel", True, release)


def _permission(facts: Facts) -> list[Check]:
    """Show what decides; whether it is enough, and the remedy, is what trying it says."""
    held = ", ".join(sorted(facts.capabilities)) or "none that matter"
    seccomp = "off" if not facts.seccomp else "on"
    if facts.call_refused:
        seccomp += ", and refuses bpf(2)"
    own = "one of its own, where no capability is enough" if facts.user_namespace else "the first"
    return [
        Check("capabilities", facts.may_use_bpf, held),
        Check("user namespace", not facts.user_namespace, own),
        Check("seccomp filter", False if facts.call_refused else None, seccomp),
    ]


def _container() -> Check:
    found = [name for path, name in _CONTAINERS.items() if Path(path).exists()]
    if "KUBERNETES_SERVICE_HOST" in os.environ:
        found.append("Kubernetes")
    return Check("container", None, ", ".join(found) or "none seen")


def _memlock(facts: Facts) -> Check:
    found = "unlimited" if facts.locked is None else f"{facts.locked // 1024} KiB"
    return Check("locked memory", None, f"{found} (counts before Linux 5.11 only)")


def _loaders() -> list[Check]:
    checks = []
    for name in ("object", "bcc"):
        try:
            loader.load(name)
            checks.append(Check(f"loader {name}", True, "works"))
        except (OSError, LoaderError) as error:
            good = False if name == "object" else None  # one is enough
            why = refusals.explain(error)
            checks.append(Check(f"loader {name}", good, why.reason, why.remedy))
    return checks


def _dispatch() -> tuple[Check, Unsupported | None]:
    """Load the program, attach it to a listener of our own, send it a connection."""
    name = "kernel dispatch"
    try:
        kernel = KernelTable("auto", _ROWS)
    except Unsupported as error:
        return Check(name, False, error.reason, error.remedy), error
    try:
        shared = TcpListener(("127.0.0.1", 0))
        dispatcher = KernelDispatcher(shared, kernel)
    except Unsupported as error:
        return Check(name, False, error.reason, error.remedy), error
    except OSError as error:
        why = Check(name, False, f"no listener on 127.0.0.1: {error}", "is loopback up?")
        return why, None
    finally:
        kernel.close()
    try:
        with socket.create_connection(shared.sock.getsockname(), timeout=5):
            ran = dispatcher.bind.counters()["none_eligible"] == 1
        migrates = "on" if dispatcher.migrates else "off: needs Linux 5.14"
    finally:
        shared.close()
    if not ran:
        found = "the program was attached and did not run"
        return Check(name, False, found, "please report it"), None
    found = f"tried, works (loader {kernel.loader}, migration {migrates})"
    return Check(name, True, found), None


def _low_ports() -> list[Check]:
    """Say whether a second listener could be bound where gunicorn was given the first."""
    with socket.socket() as sock:
        try:
            sock.bind(("127.0.0.1", 1023))
        except PermissionError as error:
            cause = refusals.explain(KernelError(error.errno or 0, "bind", "bind"), port=1023)
            return [Check("ports below 1024", None, cause.reason, cause.remedy)]
        except OSError:
            pass  # somebody has it
    return []


def _unix_sockets() -> Check:
    return Check("Unix sockets", None, "always in shared mode; the kernel chooses for TCP only")
