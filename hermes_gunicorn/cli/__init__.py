"""hermesctl: look at running servers, and tune them.

__init__.py  the entry point: needs nothing
commands.py  the command line (extra ``ctl``: typer and rich)
tables.py    how things look
doctor.py    what this host and this user can do
"""

from __future__ import annotations

import io
import sys

__all__ = ["main"]


def main() -> None:
    """Run the command line, if what it is made with is installed."""
    try:
        from hermes_gunicorn.cli.commands import app
    except ModuleNotFoundError as error:
        if error.name not in ("typer", "rich"):
            raise
        sys.exit(f"hermesctl needs {error.name}: pip install 'hermes-gunicorn[ctl]'")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a name that this terminal cannot show
    app(prog_name="hermesctl")
