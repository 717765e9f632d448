"""The ``hermes_*`` settings, for gunicorn.conf.py and as ``--hermes-*`` flags.

Defining a subclass of gunicorn's ``Setting`` registers it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

from gunicorn import util
from gunicorn.config import KNOWN_SETTINGS, Setting, validate_bool

from hermes_gunicorn.core.layout import BY_DESTINATION, GROUP_BY, LEAST_LOADED, MAX_GROUPS, POLICIES
from hermes_gunicorn.kernel.loader import LOADERS

__all__ = ["SETTINGS"]

SECTION = "Hermes"
MODES = ("auto", "kernel", "shared")
KEEPALIVE = ("auto", "always")


def _number(value: Any) -> float:
    """Return a number, or NaN, which is in no range, for what is none."""
    try:
        return math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        return math.nan


def _validate_threshold(value: Any) -> float:
    seconds = _number(value)
    # The paper's and our own range: below a millisecond every request is a hang.
    if not (seconds == 0 or 0.001 <= seconds <= 3600):
        raise ValueError(
            f"hermes_hang_threshold must be 0 (off) or 0.001 to 3600 seconds, not {value!r}"
        )
    return seconds


def _one_of(name: str, choices: Sequence[str]) -> Callable[[Any], str]:
    def validate(value: Any) -> str:
        if value in choices:
            return str(value)
        raise ValueError(f"{name} must be one of {', '.join(choices)}, not {value!r}")

    return validate


def _validate_rescue_after(value: Any) -> float:
    seconds = _number(value)
    if not 0 <= seconds <= 3600:
        raise ValueError(f"hermes_rescue_after must be 0 to 3600 seconds, not {value!r}")
    return seconds


def _validate_theta(value: Any) -> float:
    theta = _number(value)
    if not 0 <= theta <= 1000:
        raise ValueError(f"hermes_theta must be 0 to 1000, not {value!r}")
    return theta


def _validate_groups(value: Any) -> int:
    try:
        groups = int(value)
    except (TypeError, ValueError):
        groups = 0
    if isinstance(value, bool) or groups != float(value) or not 1 <= groups <= MAX_GROUPS:
        raise ValueError(f"hermes_groups must be 1 to {MAX_GROUPS}, not {value!r}")
    return groups


def _validate_bind_workers(value: Any) -> dict[str, float]:
    if not isinstance(value, dict):
        raise ValueError(
            f'hermes_bind_workers must be a dict such as {{"127.0.0.1:8001": 0.5}}, not {value!r}'
        )
    for address, share in value.items():
        fits = isinstance(share, (int, float)) and not isinstance(share, bool) and 0 < share <= 1
        if not isinstance(address, str) or not fits:
            raise ValueError(
                "hermes_bind_workers takes a bind address and a share above 0, up to 1,"
                f" not {address!r}: {share!r}"
            )
        try:
            util.parse_address(address)
        except RuntimeError as error:
            raise ValueError(f"hermes_bind_workers: {address!r}: {error}") from error
    return {address: float(share) for address, share in value.items()}


def _validate_stats(value: Any) -> str:
    text = str(value or "").strip()
    if text.startswith("unix:/") or not text:
        return text
    host, colon, port = text.rpartition(":")
    if not (port.isdecimal() and 0 < int(port) < 65536 and (host or not colon)):
        raise ValueError(f"hermes_stats must be a port, host:port or unix:/path, not {value!r}")
    return f"{host.strip('[]') or '127.0.0.1'}:{port}"


class HermesLoader(Setting):  # type: ignore[misc]
    name = "hermes_loader"
    section = SECTION
    cli = ("--hermes-loader",)
    meta = "STRING"
    validator = _one_of("hermes_loader", LOADERS)
    default = "auto"
    desc = """\
        Where the eBPF program comes from: auto, object or bcc.

        ``object`` is the prebuilt program, ``bcc`` compiles it with the system's BCC
        when the server starts, ``auto`` uses the first that works. A reload does not
        change it.
        """


class HermesMode(Setting):  # type: ignore[misc]
    name = "hermes_mode"
    section = SECTION
    cli = ("--hermes-mode",)
    meta = "STRING"
    validator = _one_of("hermes_mode", MODES)
    default = "auto"
    desc = """\
        What assigns connections to workers: the kernel, or the workers themselves.

        ``kernel``: an eBPF program chooses the worker. It needs TCP and CAP_BPF; other
        addresses are served in shared mode, with a warning. ``shared``: all workers
        share one socket, and a worker leaves a connection to those with less load; it
        needs nothing. ``auto``: for each address the first that works. A reload does
        not change it.
        """


class HermesStrict(Setting):  # type: ignore[misc]
    name = "hermes_strict"
    section = SECTION
    cli = ("--hermes-strict",)
    validator = validate_bool
    action = "store_true"
    default = False
    desc = """\
        Refuse to start without kernel dispatch on every bind address.

        Checked at the start; a reload only warns. Otherwise an address that the kernel
        cannot dispatch (a Unix socket, no CAP_BPF, an old kernel) is served in shared
        mode.
        """


class HermesHangThreshold(Setting):  # type: ignore[misc]
    name = "hermes_hang_threshold"
    section = SECTION
    cli = ("--hermes-hang-threshold",)
    meta = "SECONDS"
    validator = _validate_threshold
    default = 0.01
    desc = """\
        Seconds without a turn of its loop after which a worker gets no new connections.

        They go to other workers until its loop turns again. 0 disables the check.
        """


class HermesRescueAfter(Setting):  # type: ignore[misc]
    name = "hermes_rescue_after"
    section = SECTION
    cli = ("--hermes-rescue-after",)
    meta = "SECONDS"
    validator = _validate_rescue_after
    default = 0.005
    desc = """\
        Seconds of being busy after which others take over a worker's pending connections.

        They do so at once if it has no room, hangs in poll, or has exited.
        """


class HermesPolicy(Setting):  # type: ignore[misc]
    name = "hermes_policy"
    section = SECTION
    cli = ("--hermes-policy",)
    meta = "STRING"
    validator = _one_of("hermes_policy", POLICIES)
    default = POLICIES[LEAST_LOADED]
    desc = """\
        Which worker gets a connection: least_loaded or cascade.

        ``least_loaded``: the one with the fewest requests. ``cascade``: by hash,
        one of those that have not clearly more connections and requests than the
        average. docs/policies.md compares them. Changed by a reload.
        """


class HermesTheta(Setting):  # type: ignore[misc]
    name = "hermes_theta"
    section = SECTION
    cli = ("--hermes-theta",)
    meta = "NUMBER"
    validator = _validate_theta
    default = 0.5
    desc = """\
        Policy cascade: how far above the average load still counts as low (0.5: by half).
        """


class HermesGroups(Setting):  # type: ignore[misc]
    name = "hermes_groups"
    section = SECTION
    cli = ("--hermes-groups",)
    meta = "INT"
    validator = _validate_groups
    default = 1
    desc = """\
        Divide the workers into this many locality groups.

        Connections that belong together (see hermes_group_by) go to the same
        group's workers, which have their data in cache, and to the least loaded
        of those. If the group has no healthy worker, another group serves them.
        """


class HermesGroupBy(Setting):  # type: ignore[misc]
    name = "hermes_group_by"
    section = SECTION
    cli = ("--hermes-group-by",)
    meta = "STRING"
    validator = _one_of("hermes_group_by", GROUP_BY)
    default = GROUP_BY[BY_DESTINATION]
    desc = """\
        What connections of a locality group have in common.

        ``destination``: the address and port they were sent to; ``client``: the
        address they come from (behind a proxy that is the proxy's); ``bind``: the
        bind address as configured.
        """


class HermesBindWorkers(Setting):  # type: ignore[misc]
    name = "hermes_bind_workers"
    section = SECTION
    validator = _validate_bind_workers
    default: ClassVar[dict[str, float]] = {}
    desc = """\
        Confine bind addresses to a share of the workers.

        For example ``{"0.0.0.0:8001": 0.5}``: half of the workers serve that address,
        and the others never do. Shares are allocated side by side in the order given,
        so two halves have no worker in common. Restarts do not change which worker
        serves what. Only in the configuration file.
        """


class HermesKeepalive(Setting):  # type: ignore[misc]
    name = "hermes_keepalive"
    section = SECTION
    cli = ("--hermes-keepalive",)
    meta = "STRING"
    validator = _one_of("hermes_keepalive", KEEPALIVE)
    default = KEEPALIVE[0]
    desc = """\
        Whether to keep connections open while requests block their worker.

        Only the worker that has a kept connection can serve its next request. ``auto``:
        while requests block a worker for a third of the time or more (computing, or a
        driver that does not yield), a response closes its connection if the expected wait
        clearly exceeds what a new connection costs the client and another worker is idle;
        the next request goes there. Connections with TLS or the PROXY protocol, and those
        with unread data, are kept. ``always``: keep them for as long as ``keepalive`` says,
        as stock gunicorn does; use it behind a proxy that terminates TLS at layer 4 without
        the PROXY protocol.
        """


class HermesStats(Setting):  # type: ignore[misc]
    name = "hermes_stats"
    section = SECTION
    cli = ("--hermes-stats",)
    meta = "ADDRESS"
    validator = _validate_stats
    default = ""
    desc = """\
        Where to serve a live page, /metrics for Prometheus, and /stats.json.

        A port of this machine (``9091`` or ``127.0.0.1:9091``), another address, or
        ``unix:`` and a path. A separate process serves it, so it answers while all workers
        hang. Anyone who can connect can read it; nothing can be changed through it.
        Without it, ``hermesctl`` shows the same to root and to the server's own user.
        """


SETTINGS = tuple(setting for setting in KNOWN_SETTINGS if setting.section == SECTION)
