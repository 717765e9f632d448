"""Build backend: setuptools, plus one file at the top of site-packages.

setuptools has no way to put ``hermes_gunicorn.pth`` there, neither for a wheel nor
for an editable install, so this wraps both hooks of PEP 517 / PEP 660 and adds the
file to the finished wheel. hermes_gunicorn/registration.py says what it is for.

The wheel is reproducible: with SOURCE_DATE_EPOCH set, the same source gives the same
bytes whatever the umask and the files' times were.
"""

from __future__ import annotations

import base64
import hashlib
import os
import time
import zipfile
from pathlib import Path

from setuptools import build_meta
from setuptools.build_meta import (  # noqa: F401  (the rest of the backend's interface)
    build_sdist,
    get_requires_for_build_editable,
    get_requires_for_build_sdist,
    get_requires_for_build_wheel,
    prepare_metadata_for_build_editable,
    prepare_metadata_for_build_wheel,
)

_PTH = "hermes_gunicorn.pth"


def build_wheel(wheel_directory, config_settings=None, metadata_directory=None):
    """Build a wheel with the start-up hook in it."""
    name = build_meta.build_wheel(wheel_directory, config_settings, metadata_directory)
    return _add_pth(Path(wheel_directory, name))


def build_editable(wheel_directory, config_settings=None, metadata_directory=None):
    """Build an editable wheel with the start-up hook in it."""
    name = build_meta.build_editable(wheel_directory, config_settings, metadata_directory)
    return _add_pth(Path(wheel_directory, name))


def _add_pth(wheel: Path) -> str:
    """Append the file to the wheel and to its RECORD, and make the wheel reproducible."""
    data = Path(_PTH).read_bytes()
    digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
    rebuilt = wheel.with_suffix(".tmp")
    with zipfile.ZipFile(wheel) as old, zipfile.ZipFile(rebuilt, "w") as new:
        for item in old.infolist():
            content = old.read(item)
            if item.filename.endswith(".dist-info/RECORD"):
                _write(new, _PTH, data, item.date_time)
                content += f"{_PTH},sha256={digest},{len(data)}\n".encode()
            _write(new, item.filename, content, item.date_time)
    rebuilt.replace(wheel)
    return wheel.name


def _write(archive: zipfile.ZipFile, name: str, content: bytes, changed: tuple[int, ...]) -> None:
    """Write one file, of a fixed mode and, where SOURCE_DATE_EPOCH is set, of that time."""
    epoch = os.environ.get("SOURCE_DATE_EPOCH")
    # A zip file knows no time before 1980.
    date = time.gmtime(max(int(epoch), 315_532_800))[:6] if epoch else changed
    item = zipfile.ZipInfo(name, date)
    item.external_attr = 0o100644 << 16
    item.compress_type = zipfile.ZIP_DEFLATED
    archive.writestr(item, content)
