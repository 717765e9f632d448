"""How hermesctl shows things on a terminal."""

from __future__ import annotations

import contextlib
import os
import time
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from hermes_gunicorn.monitor import control

__all__ = ["SORTS", "events", "server"]

_STYLES = {"ready": "", "hung": "bold red", "frozen": "bold red", "draining": "yellow"}
SORTS = (
    *("slot", "pid", "busy", "requests", "connections", "queued", "dispatched_per_s"),
    *("rescued", "hangs", "cpu_percent", "rss"),
)


def seconds(value: float) -> str:
    """Write a duration in four characters or so."""
    if value == 0:
        return "-"
    if value < 0.001:
        return f"{value * 1e6:.0f} us"
    return f"{value * 1e3:.0f} ms" if value < 1 else f"{value:.1f} s"


def condition(worker: dict[str, Any]) -> str:
    """Say in a word how a worker is."""
    if worker["state"] != "ready":
        return str(worker["state"])
    for word in ("frozen", "hung", "drained"):
        if worker[word]:
            return word
    return "busy" if worker["busy"] else "in poll"


def _table(*names: str) -> Table:
    """Make a table; a name with a colon is that of a column of text."""
    table = Table(box=None, header_style="dim", padding=(0, 1, 0, 0))
    for name in names:
        table.add_column(
            name.rstrip(":"), justify="left" if name.endswith(":") else "right", no_wrap=True
        )
    return table


def server(status: dict[str, Any], sort: str) -> Group:
    """Show a server: a headline, its workers, its bind addresses."""
    workers = _table(
        *("slot", "pid", "state:", "busy", "req", "conn", "wait", "new/s", "resc", "hang"),
        *("cpu %", "MiB"),
    )
    descending = sort not in ("slot", "pid")
    for each in sorted(status["workers"], key=lambda w: w[sort], reverse=descending):
        word = condition(each)
        workers.add_row(
            *(str(each["slot"]), str(each["pid"]), word, seconds(each["busy"])),
            *(str(each["requests"]), str(each["connections"]), str(each["queued"])),
            *(f"{each['dispatched_per_s']:.1f}", str(each["rescued"]), str(each["hangs"])),
            *(f"{each['cpu_percent']:.0f}", f"{each['rss'] / 2**20:.0f}"),
            style=_STYLES.get(word, ""),
        )
    binds = _table("bind:", "mode:", "dispatched", "all hung", "skipped as hung")
    for each in status["binds"]:
        binds.add_row(
            *(each["address"], each["mode"], str(each["dispatched"])),
            *(str(each["none_eligible"]), str(each["hung_skipped"])),
        )
    return Group(headline(status), workers, Text(), binds)


def headline(status: dict[str, Any]) -> Text:
    """Show a server in a line or two."""
    ours = status["user"] == control.user_name(os.geteuid())
    user = "" if ours else f" of user {status['user']}"
    text = Text.assemble(
        (f"{status['name']} ", "bold"),
        f"(pid {status['arbiter']}{user}, {status['worker_class']}, gunicorn {status['gunicorn']},"
        f" policy {status['policy']}, hang threshold {seconds(status['threshold'])})  ",
    )
    if status["healthy"]:
        text.append("healthy", "green")
    for problem in status["problems"]:
        text.append(f"\n{problem}", "bold red")
    return text


def events(listed: list[dict[str, Any]]) -> Table:
    """Show what has happened, the oldest first."""
    table = _table("time:", "what:", "slot", ":")
    for each in listed:
        at = "?"
        with contextlib.suppress(OverflowError, ValueError, OSError):
            at = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(each["at"]))
        text = each["text"]
        if each.get("seconds"):
            text += f" for {seconds(each['seconds'])}"
        table.add_row(at, each["kind"], "" if each["slot"] is None else str(each["slot"]), text)
    return table
