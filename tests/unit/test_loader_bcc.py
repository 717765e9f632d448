"""Compiling hermes.bpf.c with the system's BCC."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from hermes_gunicorn.core.errors import LayoutMismatch, LoaderError
from hermes_gunicorn.kernel import bcc, loader

pytestmark = pytest.mark.bcc


@pytest.fixture
def source(tmp_path) -> Path:
    """A copy of the sources that may be spoilt."""
    for name in ("hermes.bpf.c", "hermes.h"):
        shutil.copy(loader.bpf_directory() / name, tmp_path)
    return tmp_path / "hermes.bpf.c"


def test_it_compiles_to_a_program_with_the_same_maps_as_the_object(source):
    program = bcc.load(source)
    built, _ = loader.load("object")
    names = {name for _, name in program.map_references}
    assert names == {name for _, name in built.map_references}


def test_llvm_does_not_stay(source):
    bcc.load(source)
    assert not re.search("LLVM|clang|libbcc", Path("/proc/self/maps").read_text())


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("__u64 requests;", "__u64 requests, extra;", "size of struct hermes_worker"),
        ("HERMES_LAYOUT_VERSION 4", "HERMES_LAYOUT_VERSION 5", "HERMES_LAYOUT_VERSION"),
    ],
)
def test_another_layout_is_refused_by_name(source, old, new, says):
    header = source.with_name("hermes.h")
    text = header.read_text()
    assert old in text
    header.write_text(text.replace(old, new))
    with pytest.raises(LayoutMismatch, match=re.escape(f"layout mismatch: {says}")):
        bcc.load(source)


def test_fields_that_changed_places_are_refused_by_name(source):
    header = source.with_name("hermes.h")
    other = {"requests": "connections", "connections": "requests"}
    swapped = re.sub(
        "__u64 (requests|connections);", lambda m: f"__u64 {other[m[1]]};", header.read_text()
    )
    header.write_text(swapped)
    with pytest.raises(LayoutMismatch, match=r"struct hermes_worker\.requests"):
        bcc.load(source)


def test_an_error_in_the_source_is_one_line(source):
    source.write_text(source.read_text() + "\nint broken(void) { return nonsense; }\n")
    with pytest.raises(LoaderError, match="undeclared identifier 'nonsense'") as caught:
        bcc.load(source)
    assert "\n" not in str(caught.value)


def test_where_bcc_is_missing_the_right_package_is_named(source, tmp_path, monkeypatch):
    script = tmp_path / "bcc_compile.py"
    original = bcc._COMPILE.read_text()
    assert "dist-packages" in original
    script.write_text(original.replace("/usr/lib", "/nowhere"))
    monkeypatch.setattr(bcc, "_COMPILE", script)
    with pytest.raises(LoaderError, match=r"BCC is not installed; .*python3-bpfcc.*not PyPI"):
        bcc.load(source)
