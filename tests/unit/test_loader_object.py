"""Reading hermes.bpf.o."""

from __future__ import annotations

import contextlib
import struct

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hermes_gunicorn.core.errors import LayoutMismatch, LoaderError
from hermes_gunicorn.kernel import loader, object
from hermes_gunicorn.kernel.program import Layout

OBJECT = loader.bpf_directory() / "hermes.bpf.o"
LAYOUT = struct.pack("<6I", *vars(Layout.of_table()).values())


def test_the_shipped_object_names_its_maps_and_its_license():
    program = object.load(OBJECT)
    assert {name for _, name in program.map_references} == {
        "hermes_control",
        "hermes_groups",
        "hermes_allowed",
        "hermes_workers",
        "hermes_bind",
        "hermes_listeners",
    }
    assert program.license == b"Dual MIT/GPL"
    assert len(program.instructions) % 8 == 0


def test_a_map_nobody_made_is_refused():
    with pytest.raises(LoaderError, match="unknown map 'hermes_"):
        object.load(OBJECT).relocated({})


@pytest.mark.parametrize(
    ("index", "field"),
    list(enumerate(vars(Layout.of_table()))),
)
def test_another_layout_is_refused_by_name(tmp_path, index, field):
    data = OBJECT.read_bytes()
    assert data.count(LAYOUT) == 1
    numbers = list(struct.unpack("<6I", LAYOUT))
    numbers[index] += 8
    other = tmp_path / "hermes.bpf.o"
    other.write_bytes(data.replace(LAYOUT, struct.pack("<6I", *numbers)))
    with pytest.raises(LayoutMismatch, match=f"layout mismatch: {field} is {numbers[index]}"):
        object.load(other)


GOOD = OBJECT.read_bytes()
FAR_AWAY = GOOD[:47] + b"\x80" + GOOD[48:]  # its table of sections, that is


@pytest.mark.parametrize("data", [b"", b"\x7fELF", b"#!/bin/sh\n", bytes(4096), FAR_AWAY])
def test_what_is_no_object_is_refused_in_one_line(tmp_path, data):
    path = tmp_path / "hermes.bpf.o"
    path.write_bytes(data)
    with pytest.raises(LoaderError, match=r"hermes\.bpf\.o is damaged") as caught:
        object.load(path)
    assert "\n" not in str(caught.value)


def test_a_missing_object_is_named(tmp_path):
    with pytest.raises(LoaderError, match=r"cannot read hermes\.bpf\.o: No such file"):
        object.load(tmp_path / "hermes.bpf.o")


@settings(max_examples=400, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_a_damaged_object_is_refused_or_read_but_never_worse(tmp_path, data):
    content = bytearray(OBJECT.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path / "hermes.bpf.o"
    path.write_bytes(content[: data.draw(st.integers(0, len(content)))])
    with contextlib.suppress(LoaderError):
        object.load(path)
