"""The program, compiled at start by the system's BCC.

BCC is a system package (Debian: python3-bpfcc), never PyPI's ``bcc``, which is
another project. It maps all of LLVM, 124 MB, so it runs in a child that lives
just long enough to compile and hands the instructions back; ``bpf.py`` then
loads them as it loads the prebuilt object's. BCC itself never gets to the kernel.
"""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from pathlib import Path

from hermes_gunicorn.core.errors import LayoutMismatch, LoaderError
from hermes_gunicorn.core.layout import ALLOWED, BIND, CONTROL, GROUP, LAYOUT_VERSION, WORKER
from hermes_gunicorn.kernel.program import Program

__all__ = ["load"]

_FUNCTION = "hermes_dispatch"
_MAPS = (
    "hermes_control",
    "hermes_groups",
    "hermes_workers",
    "hermes_bind",
    "hermes_allowed",
    "hermes_listeners",
)
_FIRST_PSEUDO_FD = 1 << 20  # stands for a map until the real fd is known
_COMPILE = Path(__file__).with_name("bcc_compile.py")
_TIMEOUT = 60.0  # seconds; it takes 0.5 on a laptop
_ASSERTION = "layout: "


def load(source: Path) -> Program:
    """Compile the program.

    Raises:
        LoaderError: there is no BCC here, or it cannot compile the source.
        LayoutMismatch: hermes.h has another layout than ``core/layout.py``.
    """
    request = {
        "text": source.read_text() + "\n" + "\n".join(_layout_assertions()) + "\n",
        "function": _FUNCTION,
        "flags": [
            "-DHERMES_BCC",
            f"-I{source.parent}",
            *(f"-D{name}_FD={_FIRST_PSEUDO_FD + i}" for i, name in enumerate(_MAPS)),
        ],
    }
    try:
        # -I: the child must import BCC, not whatever lies in the current folder.
        child = subprocess.run(
            [sys.executable or "python3", "-I", str(_COMPILE)],
            input=json.dumps(request).encode(),
            capture_output=True,
            timeout=_TIMEOUT,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        reason = f"cannot run the BCC compiler: {error}"
        raise LoaderError(reason, "use --hermes-loader object") from error
    if child.returncode:
        raise _explain(child.stderr.decode(errors="replace"))
    code = child.stdout
    return Program(_FUNCTION, code, _map_references(code), b"Dual MIT/GPL", source.name)


def _layout_assertions() -> list[str]:
    """Make the compiler compare hermes.h with core/layout.py, field by field."""
    version = f'"{_ASSERTION}HERMES_LAYOUT_VERSION"'
    lines = [f"_Static_assert(HERMES_LAYOUT_VERSION == {LAYOUT_VERSION}, {version});"]
    for layout in (CONTROL, GROUP, WORKER, BIND, ALLOWED):
        struct_name = f"struct {layout.name}"
        lines.append(
            f"_Static_assert(sizeof({struct_name}) == {layout.size},"
            f' "{_ASSERTION}size of {struct_name}");'
        )
        lines += [
            f"_Static_assert(__builtin_offsetof({struct_name}, {field})"
            f' == {layout.index(field) * 8}, "{_ASSERTION}{struct_name}.{field}");'
            for field, _ in layout.fields
        ]
    return lines


def _map_references(code: bytes) -> list[tuple[int, str]]:
    references = []
    for index in range(len(code) // 8):
        opcode, registers, _, value = struct.unpack_from("=BBhi", code, index * 8)
        if opcode == 0x18 and registers >> 4 == 1 and value >= _FIRST_PSEUDO_FD:
            references.append((index, _MAPS[value - _FIRST_PSEUDO_FD]))
    return references


def _explain(output: str) -> LoaderError:
    """Turn the child's output into one line."""
    errors = [line for line in output.splitlines() if "error:" in line or "Error:" in line]
    for line in errors:
        if _ASSERTION in line:
            difference = line.split(_ASSERTION, 1)[1].strip().strip('"')
            return LayoutMismatch(
                f"layout mismatch: {difference} differs between hermes.h and hermes_gunicorn",
                "reinstall hermes-gunicorn",
            )
    if any("No module named 'bcc'" in line for line in errors):
        return LoaderError(
            "BCC is not installed",
            "install the system package (Debian: python3-bpfcc), not PyPI's bcc,"
            " or use --hermes-loader object",
        )
    summary = (errors or output.strip().splitlines()[-1:] or ["no output"])[0].strip()
    return LoaderError(f"BCC cannot compile the program: {summary}", "use --hermes-loader object")
