"""Slots spread over groups; seats outlive their workers."""

from __future__ import annotations

from collections import Counter

import pytest

from hermes_gunicorn.core.slots import Slots


def nobody_waits(slot: int) -> int:
    """No slot has connections left on its listeners."""
    return 0


def take(slots: Slots, count: int, workers: int, localities: int = 1) -> list[int]:
    """Give slots to new workers."""
    taken = [slots.take(object(), workers, localities, nobody_waits) for _ in range(count)]
    return [slot for slot in taken if slot is not None]


def groups(slots: list[int]) -> Counter[int]:
    """Count slots by group of 64."""
    return Counter(slot // 64 for slot in slots)


def members(bits: int) -> set[int]:
    """List the set bits."""
    return {slot for slot in range(bits.bit_length()) if bits >> slot & 1}


def test_as_few_groups_as_possible_are_used_because_each_is_a_search():
    slots = Slots(256)
    assert take(slots, 63, 63) == list(range(1, 64))


def test_more_workers_are_spread_evenly_over_groups():
    assert sorted(groups(take(Slots(1024), 130, 130)).values()) == [43, 43, 44]


def test_a_reload_of_a_full_group_goes_on_in_the_next():
    slots = Slots(256)
    take(slots, 40, 40)
    assert groups(take(slots, 40, 40)) == {0: 23, 1: 17}


@pytest.mark.parametrize("workers", [4, 8, 9])
def test_locality_groups_are_filled_evenly(workers: int):
    assert sorted(groups(take(Slots(256), workers, workers, 4)).values())[-1] == -(-workers // 4)
    assert len(groups(take(Slots(256), workers, workers, 4))) == 4


def test_a_slot_on_which_connections_wait_gets_its_owner_first():
    slots = Slots(256)
    waiting = {7: 1, 9: 3}
    assert slots.take(object(), 2, 1, lambda slot: waiting.get(slot, 0)) == 9
    assert slots.take(object(), 2, 1, lambda slot: waiting.get(slot, 0)) == 7


def test_a_full_table_has_no_slot():
    slots = Slots(3)
    assert take(slots, 3, 3) == [1, 2]


def test_shares_side_by_side_have_no_worker_in_common():
    slots = Slots(256)
    take(slots, 8, 8)
    first, second = slots.share(0, 0.5, 8), slots.share(0.5, 1, 8)
    assert first & second == 0
    assert len(members(first)) == len(members(second)) == 4


@pytest.mark.parametrize("workers", range(1, 10))
def test_a_share_has_at_least_one_worker_and_about_its_part(workers: int):
    slots = Slots(256)
    take(slots, workers, workers)
    count = len(members(slots.share(0, 0.3, workers)))
    assert count >= 1
    assert abs(count - 0.3 * workers) < 1


def test_a_share_outlives_reloads_and_crashes():
    slots = Slots(256)
    old = take(slots, 8, 8)
    seated = members(slots.share(0, 0.5, 8))
    take(slots, 8, 8)  # as at HUP: the new workers come, then the old ones go
    assert len(members(slots.share(0, 0.5, 8))) == 8
    for slot in old:
        slots.give_back(slot, 8)
    renewed = members(slots.share(0, 0.5, 8))
    assert len(renewed) == 4
    assert not renewed & seated
    crashed = min(renewed)
    slots.give_back(crashed, 8)
    (replacement,) = take(slots, 1, 8)
    assert members(slots.share(0, 0.5, 8)) == renewed - {crashed} | {replacement}


def test_a_shrinking_server_keeps_its_shares():
    slots = Slots(256)
    taken = take(slots, 8, 8)
    for workers, slot in zip(range(7, 0, -1), taken, strict=False):
        slots.give_back(slot, workers)  # TTOU stops the oldest
        both = slots.share(0, 0.5, workers), slots.share(0.5, 1, workers)
        assert all(members(share) for share in both)
        assert len(members(both[0] | both[1])) == workers
