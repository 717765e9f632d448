"""The kernel program and its model choose alike, over random tables."""

from __future__ import annotations

import time

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from kernel_bind import Bind, MakeBind
from random_tables import Filling, fillings, fit, view

from hermes_gunicorn.core import policy
from hermes_gunicorn.core.layout import BY_BIND, SHARED_SLOT, SLOTS_PER_GROUP

# How many tables of each size: 10,000 together, a fifth of them unless the run is thorough.
# With 230 there are four groups.
TABLES = {1: 500, 3: 2500, 8: 3000, 63: 1500, 64: 500, 150: 1000, 230: 1000}

# What fails is found in the order in which it is drawn; shrinking hundreds of
# slots takes minutes and the numbers do not get any easier to read.
SETTINGS = settings(
    deadline=None,
    database=None,
    phases=(Phase.generate,),
    suppress_health_check=list(HealthCheck),
    report_multiple_bugs=False,
)


def sent_to(bind: Bind) -> int:
    """Open a connection and say to which slot it went."""
    (slot,) = bind.sent()
    bind.forget_clients()
    return slot


@pytest.mark.parametrize("slots", TABLES)
def test_the_kernel_chooses_what_the_model_chooses(
    make_bind: MakeBind, slots: int, pytestconfig: pytest.Config
):
    bind = make_bind(slots)
    tables = TABLES[slots] // (1 if pytestconfig.getoption("thorough") else 5)

    @settings(SETTINGS, max_examples=tables)
    @given(filling=fillings(slots))
    def agree(filling: Filling) -> None:
        filling.into(bind)
        seen = view(bind)
        own = None
        if seen.localities > 1:
            own = policy.locality(b"", BY_BIND, filling.seed, seen.localities)
        slot = sent_to(bind)
        choices = policy.candidates(seen, time.monotonic_ns(), own)
        assert any(slot in choice for choice in choices), (slot, choices)

        # Never a worker that is hung, leaving or gone while a live one exists; and with
        # more groups than are searched rather the shared listener, which live ones watch.
        live = fit(seen)
        assert slot in (live or {SHARED_SLOT}) or (
            slot == SHARED_SLOT and len(seen.rows) > 2 * SLOTS_PER_GROUP
        )

    agree()
