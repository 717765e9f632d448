"""The commands of hermesctl."""

from __future__ import annotations

import json
import sys
import time
from enum import Enum
from typing import Annotated, Any

import typer
from rich.console import Console, Group
from rich.live import Live

from hermes_gunicorn import policy
from hermes_gunicorn.ctl import doctor as checks
from hermes_gunicorn.ctl import tables
from hermes_gunicorn.errors import HermesError
from hermes_gunicorn.monitor import control
from hermes_gunicorn.table import Row

__all__ = ["app"]

app = typer.Typer(help=__doc__, no_args_is_help=True, add_completion=False)
out = Console(highlight=False, soft_wrap=True)
err = Console(highlight=False, soft_wrap=True, stderr=True)

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


def _servers(chosen: int | None) -> list[int]:
    if chosen is not None:
        return [chosen]
    found = control.servers()
    ours = [each.arbiter for each in found if each.allowed]
    if not ours and found:
        raise _fail("the servers here belong to other users; ask as one of them, or as root")
    if not ours:
        raise _fail("no server found; is it on this host, in this network namespace?")
    return ours


def _one(chosen: int | None) -> int:
    servers = _servers(chosen)
    if len(servers) > 1:
        raise _fail(
            f"there are several servers, say which: --server {' or '.join(map(str, servers))}"
        )
    return servers[0]


def _ask(server: int, what: str, **asked: Any) -> Any:
    try:
        return control.ask(server, what, **asked)
    except HermesError as error:
        raise _fail(str(error)) from error


def _statuses(chosen: int | None) -> list[dict[str, Any]]:
    servers, found = _servers(chosen), []
    for each in servers:
        try:
            found.append(control.ask(each, "status"))
        except HermesError as error:
            # One of several may have ended since they were looked for.
            if len(servers) == 1:
                raise _fail(str(error)) from error
    return found


@app.command()
def top(
    server: Server = None,
    once: Annotated[bool, typer.Option("--once", help="print once and end")] = False,
    as_json: AsJson = False,
    sort: Annotated[Sort, typer.Option(help="by what")] = Sort["slot"],
    interval: Annotated[float, typer.Option(min=0.2, help="seconds between looks")] = 1.0,
) -> None:
    """Show every worker of every server, live."""

    def look() -> list[dict[str, Any]]:
        return _statuses(server)

    if as_json:
        print(json.dumps(look()))
    elif once or not sys.stdout.isatty():
        out.print(Group(*(tables.server(each, sort.value) for each in look())))
    else:
        with Live(console=out, screen=True, auto_refresh=False) as live:
            try:
                while True:
                    shown = (tables.server(each, sort.value) for each in look())
                    live.update(Group(*shown), refresh=True)
                    time.sleep(interval)
            except KeyboardInterrupt:
                return


@app.command()
def status(server: Server = None, as_json: AsJson = False) -> None:
    """Say whether all is well; the exit code is 0 if so, 1 if not, 2 without an answer."""
    found = _statuses(server)
    if as_json:
        print(json.dumps(found))
    else:
        for each in found:
            out.print(tables.headline(each))
    if not all(each["healthy"] for each in found):
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
    which, seen = _one(server), 0.0
    while True:
        new = [each for each in _ask(which, "events") if each["at"] > seen]
        seen = max((each["at"] for each in new), default=seen)
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
    rows = [Row(**row) for row in raw["rows"]]
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
        mark = {True: "[green]ok[/]", False: "[red]no[/]", None: "[yellow]--[/]"}[check.good]
        out.print(f"{mark}  {check.name}: {check.found}")
        if check.remedy:
            out.print(f"      {check.remedy}", style="yellow", markup=False)
    out.print(f"\nhermes_mode = auto chooses: [bold]{report.mode}[/]")
    for title, line in report.lines:
        out.print(f"  {title}: {line}", markup=False)
    if strict and report.mode != "kernel":
        raise typer.Exit(1)
