"""The model's pure functions, at their edges."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hermes_gunicorn.core import policy
from hermes_gunicorn.core.layout import (
    BOOTING,
    BY_BIND,
    BY_CLIENT,
    BY_DESTINATION,
    DEAD,
    DRAINING,
    FREE,
    READY,
    WEIGHT,
    Row,
)
from hermes_gunicorn.core.table import Columns

NOW = 1000


def by_column(**words: list[int]) -> Columns:
    """Make a table of ready workers behind the shared slot, as the given columns say."""
    count = len(next(iter(words.values())))
    base = {"state": [FREE] + [READY] * (count - 1), "weight": [WEIGHT // 10] * count}
    names = ("busy_since_ns", "frozen_since_ns", "connections", "events")
    return Columns(**{name: [0] * count for name in names} | base | words)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("connections", "has"),
    [
        ([0, 1, 1], True),  # as many as workers
        ([0, 1, 0], True),
        ([0, 0, 2], True),
        ([0, 2, 0], False),
        ([0, 1, 2], False),  # more than workers
        ([1, 1, 1], False),
    ],
)
def test_a_connection_has_its_worker_if_each_could(connections: list[int], has: bool):
    assert policy.has_its_own(by_column(connections=connections), 1, 1 << 2) is has


@pytest.mark.parametrize(
    ("words", "among", "free"),
    [
        ({"events": [0, 2, 1]}, 1 << 2, True),
        ({"events": [0, 2, 1]}, 1 << 1, False),  # not for this address
        ({"events": [0, 2, 2]}, 1 << 2, False),  # no less to do
        ({"events": [0, 2, 1], "busy_since_ns": [0, 0, 1]}, 1 << 2, False),
        ({"events": [0, 2, 1], "frozen_since_ns": [0, 0, 1]}, 1 << 2, False),
        ({"events": [0, 2, 1], "state": [FREE, READY, DRAINING]}, 1 << 2, False),
        ({"events": [0, 12, 9]}, 1 << 2, True),
        ({"events": [0, 12, 10]}, 1 << 2, False),  # full
        ({"events": [0, 12, 0], "weight": [0, WEIGHT // 10, 0]}, 1 << 2, True),
    ],
)
def test_a_sibling_is_free_in_poll_with_room_and_less_to_do(
    words: dict[str, list[int]], among: int, free: bool
):
    assert policy.free_sibling(by_column(**words), 1, among) is free


@pytest.mark.parametrize(
    ("busy_since", "threshold", "hung"),
    [
        (0, 100, False),  # in poll, however long
        (1, 100, True),
        (899, 100, True),
        (900, 100, False),  # exactly as long as is allowed
        (NOW, 100, False),
        (NOW + 1, 100, False),  # woke on another CPU, after we read the clock
        (1, 0, False),
        (1, 999, False),
        (1, 998, True),
        (1, 1000, False),
        (1, 1001, False),  # longer than the machine runs
    ],
)
def test_hung_is_busy_for_longer_than_the_threshold(busy_since: int, threshold: int, hung: bool):
    assert policy.is_hung(busy_since, NOW, threshold) is hung


def row(**words: int) -> Row:
    """A ready worker in poll with nothing to do."""
    names = Row.__dataclass_fields__
    return Row(**dict.fromkeys(names, 0) | {"state": READY, "weight": WEIGHT} | words)


def test_load_counts_before_poll_and_poll_before_connections():
    best, *others = [
        row(connections=3),
        row(busy_since_ns=5, connections=2),
        row(requests=1, connections=1),
        row(requests=1, dispatched=1, connections=0),
    ]
    for other in others:
        assert policy.rank(best) < policy.rank(other)
        best = other


def test_load_is_relative_to_capacity():
    assert policy.rank(row(requests=3, weight=WEIGHT // 4)) < policy.rank(row(requests=1))


def test_taken_before_it_was_booked_is_nothing_queued():
    assert policy.rank(row(settled=1)) == policy.rank(row())


def test_select_drops_those_with_clearly_more_connections_then_those_with_more_events():
    #              0   1   2    3    4
    connections = [10, 11, 100, 10, 12]
    events = [1, 9, 0, 2, 1]
    # Average 28.6 + 14.3 drops number 2; of the others average 3.25 + 1.6 drops number 1.
    assert policy.select(range(5), connections, events, 0.5) == 0b11001


def test_select_looks_at_live_workers_only():
    assert policy.select([1, 2], [0, 5, 5], [0, 0, 0], 0.5) == 0b110
    assert policy.select([], [1, 2], [3, 4], 0.5) == 0


@pytest.mark.parametrize("theta", [0, 0.5])
def test_an_idle_server_selects_everybody(theta: float):
    assert policy.select(range(4), [0] * 4, [0] * 4, theta) == 0b1111


def test_theta_is_at_least_one_and_the_limit_is_not_included():
    assert policy.select([0, 1], [0, 2], [0, 0], 0) == 0b01
    assert policy.select([0, 1], [0, 1], [0, 0], 0) == 0b11


@given(
    st.lists(st.tuples(st.booleans(), st.integers(0, 99), st.integers(0, 9)), max_size=64),
    st.floats(0, 10),
)
def test_select_keeps_a_live_worker_while_there_is_one(workers, theta):
    live = [i for i, (alive, _, _) in enumerate(workers) if alive]
    connections, events = [w[1] for w in workers], [w[2] for w in workers]
    bits = policy.select(live, connections, events, theta)
    assert bits & ~sum(1 << i for i in live) == 0
    assert bool(bits) is bool(live)
    least = min((connections[i] for i in live), default=0)
    calm = [i for i in live if connections[i] == least]
    if calm:
        # Whoever has fewest of both is in.
        quietest = min(calm, key=lambda i: events[i])
        if events[quietest] == min(events[i] for i in live):
            assert bits >> quietest & 1


def test_localities_are_spread_and_depend_on_the_seed_but_for_clients():
    addresses = [bytes([10, 0, 0, last]) for last in range(200)]
    for by in (BY_DESTINATION, BY_CLIENT):
        groups = [policy.locality(address, by, 1, 4) for address in addresses]
        assert all(35 <= groups.count(group) <= 65 for group in range(4))
    other = [policy.locality(address, BY_CLIENT, 2, 4) for address in addresses]
    assert other == groups
    binds = [policy.locality(b"", BY_BIND, seed, 4) for seed in range(200)]
    assert all(35 <= binds.count(group) <= 65 for group in range(4))


AFTER, THRESHOLD = 5, 100


@pytest.mark.parametrize(
    ("words", "due"),
    [
        ({"busy_since_ns": 900}, 905),
        ({"last_dispatch_ns": 850}, 950),  # in poll: it will turn to it, if it can
        ({"last_dispatch_ns": 850, "frozen_since_ns": 960}, 0),
        ({"busy_since_ns": 900, "requests": 1}, 0),  # full
        ({"busy_since_ns": 900, "requests": 1, "weight": WEIGHT // 2}, 905),
        ({"busy_since_ns": 900, "state": DRAINING}, 905),
        ({"busy_since_ns": 900, "state": BOOTING}, 0),
        ({"busy_since_ns": 900, "state": DEAD}, 0),
        ({"last_dispatch_ns": 850, "state": FREE}, 0),
    ],
)
def test_what_waits_is_rescued_at_once_unless_its_worker_may_turn_to_it(words, due):
    assert policy.rescue_at(row(**words), AFTER, THRESHOLD) == due


def test_without_a_hang_threshold_nobody_is_frozen():
    assert policy.rescue_at(row(last_dispatch_ns=850), AFTER, 0) == policy.NEVER


@pytest.mark.parametrize(
    ("requests", "capacity", "full"), [(0, 1, 0), (1, 1, 1), (62, 63, 0), (63, 63, 1), (9, 4, 1)]
)
def test_full_is_as_many_requests_as_can_run(requests, capacity, full):
    assert policy.is_full(row(requests=requests, weight=WEIGHT // capacity)) is bool(full)


def test_63_of_63_requests_are_full_to_the_last_unit():
    edge = WEIGHT - WEIGHT // 1024
    assert policy.is_full(row(requests=1, weight=edge))
    assert not policy.is_full(row(requests=1, weight=edge - 1))


def columns(*rows: Row) -> Columns:
    """What ``Table.group`` returns for these rows."""
    return Columns(
        *([getattr(row, name) for row in rows] for name in Columns._fields[:-1]),
        events=[row.requests + row.queued for row in rows],
    )


def better(*rows: Row, slot: int = 0) -> list[int]:
    """Return who should have a connection rather than the first."""
    return policy.better(columns(*rows), slot, NOW, THRESHOLD)


def test_a_connection_is_left_to_those_with_less_to_do_or_fewer_connections():
    one = row(requests=1, connections=2)
    assert better(one, row(connections=9), row(requests=1, connections=1)) == [1, 2]
    assert better(one, one, row(requests=2), row(requests=1, connections=3)) == []
    assert better(one, row(requests=1, connections=9, weight=WEIGHT // 2)) == [1]
    assert better(row(), row(connections=1), row(requests=1)) == []


def test_a_connection_is_not_left_to_those_who_cannot_take_it():
    one = row(requests=1)
    others = [row(state=DRAINING), row(frozen_since_ns=1), row(busy_since_ns=899), row(state=FREE)]
    assert better(one, *others) == []
    assert better(one, *others, row(busy_since_ns=900)) == [5]
