"""Two ways to the same kernel program.

``object`` reads the prebuilt ``hermes.bpf.o`` and needs nothing else; ``bcc``
compiles ``hermes.bpf.c`` with the system's BCC. Either delivers a ``Program``;
one piece of code (``bpf.py``) loads it into the kernel.
"""

from __future__ import annotations

from pathlib import Path

from hermes_gunicorn.core.errors import LoaderError
from hermes_gunicorn.kernel.program import Layout, Program

__all__ = ["LOADERS", "Layout", "Program", "bpf_directory", "load"]

LOADERS = ("auto", "object", "bcc")


def bpf_directory() -> Path:
    """Return the folder with hermes.bpf.c, hermes.h and hermes.bpf.o.

    Raises:
        LoaderError: the installation lacks it.
    """
    package = Path(__file__).parents[1]
    # Installed, it is in the package; in a checkout, beside it.
    for directory in (package / "bpf", package.parent / "bpf"):
        if (directory / "hermes.h").is_file():
            return directory
    raise LoaderError("the package's eBPF files are missing", "reinstall hermes-gunicorn")


def load(choice: str) -> tuple[Program, str]:
    """Get the program from the loader of that name, or from the first that works.

    Args:
        choice: one of ``LOADERS``.

    Returns:
        The program, and the name of the loader that delivered it.

    Raises:
        LoaderError: from the chosen loader, or with ``auto`` from the first.
    """
    if choice == "bcc":
        return _from_bcc(), "bcc"
    try:
        return _from_object(), "object"
    except LoaderError as error:
        if choice != "auto":
            raise
        try:
            return _from_bcc(), "bcc"
        except LoaderError:
            raise error from None


# Imported when used: a server needs one of them, and only at its start.


def _from_object() -> Program:
    from hermes_gunicorn.kernel import object

    return object.load(bpf_directory() / "hermes.bpf.o")


def _from_bcc() -> Program:
    from hermes_gunicorn.kernel import bcc

    return bcc.load(bpf_directory() / "hermes.bpf.c")
