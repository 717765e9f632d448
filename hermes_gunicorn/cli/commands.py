"""The commands of hermesctl."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from enum import Enum
from typing import Annotated, Any

import typer
from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from hermes_gunicorn.cli import doctor as checks
from hermes_gunicorn.cli import tables
from hermes_gunicorn.core import policy
from hermes_gunicorn.core.errors import HermesError
from hermes_gunicorn.core.layout import Row
from hermes_gunicorn.monitor import control
from hermes_gunicorn.monitor.control import Found

__all__ = ["app"]

app = typer.Typer(
    help=__doc__,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,  # which may hold what others have said
)
# Texts are shown as they are: "[fd00::5]" is an address.
_PLAIN: Any = {"markup": False, "emoji": False, "highlight": False, "soft_wrap": True}
out = Console(**_PLAIN)
err = Console(**_PLAIN, stderr=True)
_LIVE: Any = {"screen": True, "auto_refresh": False}
_PER_USER = 16  # servers of another user that are asked, and errors that are shown
_ASKED_AGAIN = 10.0  # seconds

Sort = Enum("Sort", [(name, name) for name in tables.SORTS], type=str)  # type: ignore[misc]
Tunable = Enum(
    "Tunable", [("policy", "policy"), ("threshold", "threshold"), ("theta", "theta")], type=str
)
Server = Annotated[
    int | None, typer.Option("--server", "-s", help="pid of its arbiter, if there are several")
]
AsJson = Annotated[bool, typer.Option("--json", help="as JSON")]


def _fail(text: str, code: int = 2) -> typer.Exit:
    err.print(text, style="red")
    return typer.Exit(code)


def _servers(chosen: int | None) -> list[Found]:
    found = control.servers(chosen)
    if chosen is not None:
        found = [each for each in found if each.pid == chosen]
        if not found:
            raise _fail(f"there is no server with pid {chosen}")
        if not found[0].allowed:
            raise _fail(f"{found[0]} belongs to another user; ask as that user or as root")
        return found
    if not found:
        raise _fail("no server found; is it on this host, in this network namespace?")
    ours = [each for each in found if each.allowed and each.pid]
    if ours:
        return ours
    if any(each.allowed for each in found):
        raise _fail("the servers here are in other pid namespaces; ask in there (docker exec)")
    raise _fail("the servers here belong to other users; ask as one of them, or as root")


def _one(chosen: int | None) -> Found:
    servers = _servers(chosen)
    if len(servers) > 1:
        which = " or ".join(str(each).removeprefix("server ") for each in servers[:_PER_USER])
        raise _fail(f"there are several servers, say which: --server {which}")
    return servers[0]


def _ask(server: Found, what: str, **asked: Any) -> Any:
    try:
        return control.ask(server, what, **asked)
    except HermesError as error:
        raise _fail(str(error)) from error


@dataclass
class _Look:
    """What a look at the servers has shown.

    Attributes:
        statuses: of those that answered.
        errors: a line for each that did not, by the server.
    """

    statuses: list[dict[str, Any]] = field(default_factory=list)
    errors: dict[Found, str] = field(default_factory=dict)


def _look(servers: list[Found]) -> _Look:
    """Ask servers how they are, all at the same time; none of them can hide another."""
    seen = _Look()
    users: Counter[int] = Counter()
    asked = []
    for each in servers:
        users[each.uid] += 1
        if each.uid == os.geteuid() or users[each.uid] <= _PER_USER:
            asked.append(each)
        else:
            seen.errors[each] = f"{each} is not asked: that user has {_PER_USER} already"

    def ask(server: Found) -> dict[str, Any] | HermesError:
        try:
            status = dict(control.ask(server, "status"))
        except HermesError as error:
            return error
        return status | {"arbiter": server.pid, "user": server.user}

    with ThreadPoolExecutor(max(len(asked), 1)) as pool:
        for each, answer in zip(asked, pool.map(ask, asked), strict=True):
            if isinstance(answer, HermesError):
                seen.errors[each] = str(answer)
            else:
                seen.statuses.append(answer)
    return seen


def _complain(seen: _Look) -> None:
    for error in list(seen.errors.values())[:_PER_USER]:
        err.print(error, style="red")
    if len(seen.errors) > _PER_USER:
        err.print(f"and {len(seen.errors) - _PER_USER} more without an answer", style="red")


@app.command()
def top(
    server: Server = None,
    once: Annotated[bool, typer.Option("--once", help="print once and end")] = False,
    as_json: AsJson = False,
    sort: Annotated[Sort, typer.Option(help="by what")] = Sort["slot"],
    interval: Annotated[float, typer.Option(min=0.2, help="seconds between looks")] = 1.0,
) -> None:
    """Show every worker of every server, live."""
    if as_json or once or not sys.stdout.isatty():
        seen = _look(_servers(server))
        if as_json:
            print(json.dumps(seen.statuses))
        else:
            out.print(Group(*(tables.server(each, sort.value) for each in seen.statuses)))
        _complain(seen)
        if not seen.statuses:
            raise typer.Exit(2)
        return
    silent: dict[Found, tuple[float, str]] = {}  # not asked again until then: it takes seconds
    with contextlib.suppress(KeyboardInterrupt), Live(console=out, **_LIVE) as live:
        while True:
            silent = {each: late for each, late in silent.items() if late[0] > time.monotonic()}
            found = _servers(server)
            seen = _look([each for each in found if each not in silent])
            for each, error in seen.errors.items():
                silent[each] = time.monotonic() + _ASKED_AGAIN, error
            shown: list[Any] = [tables.server(each, sort.value) for each in seen.statuses]
            shown += [Text(error, "red") for _, error in list(silent.values())[:_PER_USER]]
            live.update(Group(*shown), refresh=True)
            time.sleep(interval)


@app.command()
def status(server: Server = None, as_json: AsJson = False) -> None:
    """Say whether all is well; the exit code is 0 if so, 1 if not, 2 without an answer."""
    seen = _look(_servers(server))
    if as_json:
        print(json.dumps(seen.statuses))
    else:
        for each in seen.statuses:
            out.print(tables.headline(each))
    _complain(seen)
    if seen.errors:
        raise typer.Exit(2)
    if not all(each["healthy"] for each in seen.statuses):
        raise typer.Exit(1)


@app.command()
def events(
    server: Server = None,
    as_json: AsJson = False,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="go on with new ones")] = False,
) -> None:
    """Show hangs, rescues, fall-backs and reloads, with times.

    Since the first question to this server in a row, or since its start with hermes_stats.
    """
    which, seen = _one(server), 0
    while True:
        new = [each for each in _ask(which, "events") if each["number"] > seen]
        seen = max((each["number"] for each in new), default=seen)
        if as_json:
            print("".join(json.dumps(each) + "\n" for each in new), end="", flush=True)
        elif new:
            out.print(tables.events(new))
        if not follow:
            return
        time.sleep(1)


@app.command("set")
def set_(
    what: Annotated[Tunable, typer.Argument(help="policy, threshold or theta")],
    value: Annotated[str, typer.Argument(help="a policy's name, seconds, a number")],
    server: Server = None,
) -> None:
    """Change a setting of a running server, until its next reload."""
    number: float | str = value
    if what.value != "policy":
        try:
            number = float(value)
        except ValueError:
            raise _fail(f"{what.value} must be a number, not {value!r}") from None
    _ask(_one(server), "set", name=what.value, value=number)


@app.command()
def drain(slot: int, server: Server = None) -> None:
    """Send a worker nothing more; what it has it serves to the end."""
    _ask(_one(server), "drain", slot=slot, drained=True)


@app.command()
def undrain(slot: int, server: Server = None) -> None:
    """Send a worker connections again."""
    _ask(_one(server), "drain", slot=slot, drained=False)


@app.command()
def explain(server: Server = None) -> None:
    """Say why a worker would be chosen just now, or not."""
    which = _one(server)
    about, raw = _ask(which, "status"), _ask(which, "raw")
    rows = raw["rows"]
    for bind, allowed in zip(about["binds"], raw["allowed"], strict=False):
        view = policy.View(
            rows=rows,
            eligible=raw["eligible"],
            selected=raw["selected"],
            allowed=allowed,
            policy=raw["policy"],
            threshold_ns=raw["threshold_ns"],
            localities=raw["localities"],
        )
        chosen = set().union(*policy.candidates(view, raw["now_ns"]))
        out.print(f"{bind['address']} ({bind['mode']}, {about['policy']}):")
        for row in rows[1:]:
            if row.state:
                out.print(
                    f"  slot {row.slot}: {_why(view, row, raw['now_ns'], row.slot in chosen)}"
                )
        if 0 in chosen:
            out.print("  nobody: the shared listener, for the first who turns to it")


def _why(view: policy.View, row: Row, now_ns: int, chosen: bool) -> str:
    if not view.allowed >> row.slot & 1:
        return "does not serve this address (hermes_bind_workers)"
    if row.drained == 1:
        return "drained"
    if not view.eligible >> row.slot & 1:
        return "not ready"
    if row.frozen_since_ns:
        return "frozen: it waits in poll although connections wait for it"
    if policy.is_hung(row.busy_since_ns, now_ns, view.threshold_ns):
        busy = tables.seconds((now_ns - row.busy_since_ns) / 1e9)
        return f"hung: busy for {busy}, threshold {tables.seconds(view.threshold_ns / 1e9)}"
    load, busy_now, connections = policy.rank(row)
    told = (
        f"load {load / 2**20:.3f} ({row.requests} requests, {row.queued} queued of"
        f" {row.capacity}), {'busy' if busy_now else 'in poll'}, {connections} connections"
    )
    return f"{told}  <- would be chosen" if chosen else told


@app.command()
def doctor(
    strict: Annotated[bool, typer.Option("--strict", help="exit 1 without kernel mode")] = False,
) -> None:
    """Say what this host and this user can do, why not, and what would help."""
    report = checks.examine()
    for check in report.checks:
        mark = {True: ("ok", "green"), False: ("no", "red"), None: ("--", "yellow")}[check.good]
        out.print(Text.assemble(mark, f"  {check.name}: {check.found}"))
        if check.remedy:
            out.print(f"      {check.remedy}", style="yellow")
    out.print(Text.assemble("\nhermes_mode = auto chooses: ", (report.mode, "bold")))
    for title, line in report.lines:
        out.print(f"  {title}: {line}")
    if strict and report.mode != "kernel":
        raise typer.Exit(1)
