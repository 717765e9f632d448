"""When responses close their connection."""

from __future__ import annotations

import threading
import time

import pytest

from hermes_gunicorn.keeping import Keeping, waited_for_cores

MS = 1_000_000
SECOND = 1000 * MS


def after(
    requests: int,
    each_ns: int,
    waited_ns: int = 0,
    seconds: int = 10,
    keeping: Keeping | None = None,
) -> bool:
    """Have so many requests a second hold the worker; say whether it closes connections then."""
    keeping = keeping or Keeping(always=False)
    for second in range(1, seconds + 1):
        for _ in range(requests):
            keeping.closes()
            keeping.held(each_ns)
        keeping.weigh(SECOND, second * waited_ns)
    return keeping.closes()


@pytest.mark.parametrize(
    ("requests", "each_ns"),
    [
        (10, 20 * MS),  # busy for a fifth of the time
        (1, 200 * MS),
        (2, 1000 * MS),  # overloaded
    ],
)
def test_connections_are_closed_where_requests_have_to_wait(requests, each_ns):
    assert after(requests, each_ns)


@pytest.mark.parametrize(
    ("requests", "each_ns"),
    [
        (0, 0),
        (100, 0),  # as they are where nothing blocks
        (100, MS),  # a connection would be a good part of it
        (1, 20 * MS),  # hardly ever met by another
    ],
)
def test_connections_are_kept_where_they_do_not(requests, each_ns):
    assert not after(requests, each_ns)


def test_one_request_of_many_that_holds_the_worker_is_not_enough():
    keeping = Keeping(always=False)
    for _ in range(10):
        keeping.held(200 * MS)
        for _ in range(1000):
            keeping.closes()
        keeping.weigh(SECOND, 0)
    assert not keeping.closes()


def test_connections_are_kept_where_cores_are_short():
    assert after(20, 20 * MS, waited_ns=10 * MS)
    assert not after(20, 20 * MS, waited_ns=150 * MS)


def test_what_was_waited_for_cores_at_the_start_does_not_count():
    keeping = Keeping(always=False)
    keeping.start(waited_ns=1000 * MS)
    assert after(20, 20 * MS, seconds=1, waited_ns=1000 * MS, keeping=keeping)


def test_it_may_decide_within_the_first_second():
    keeping = Keeping(always=False)
    for _ in range(3):
        keeping.closes()
        keeping.held(20 * MS)
    assert keeping.weigh(SECOND / 5, 0)


def test_how_often_it_decides_makes_no_difference():
    often, seldom = Keeping(always=False), Keeping(always=False)
    assert after(10, 20 * MS, keeping=often)
    assert after(10, 20 * MS, keeping=seldom)
    until = [0, 0]
    while often.weigh(SECOND / 5, 0):
        until[0] += 1
    while seldom.weigh(SECOND, 0):
        until[1] += 1
    assert until[0] / 5 == pytest.approx(until[1], abs=1)


@pytest.mark.parametrize(
    ("held_ns", "waited_ns", "starved"),
    [(0, 300 * MS, True), (0, 20 * MS, False), (900 * MS, 120 * MS, False)],
)
def test_a_worker_is_starved_if_it_waits_for_cores_for_long(held_ns, waited_ns, starved):
    keeping = Keeping(always=False)
    keeping.held(held_ns)
    keeping.weigh(SECOND, waited_ns)
    assert keeping.starved == starved


def test_connections_are_kept_where_nobody_else_could_serve():
    keeping = Keeping(always=False)
    assert after(10, 20 * MS, keeping=keeping)
    assert not keeping.weigh(SECOND, 0, alone=True)


def test_connections_are_kept_where_the_user_says_so():
    assert not after(10, 20 * MS, keeping=Keeping(always=True))


def test_the_past_is_forgotten_within_seconds():
    keeping = Keeping(always=False)
    assert after(10, 20 * MS, keeping=keeping)
    assert not after(10, 0, seconds=15, keeping=keeping)


def test_waiting_for_cores_is_summed_over_the_threads():
    def burn() -> None:
        until = time.thread_time() + 0.02
        while time.thread_time() < until:
            pass

    before = waited_for_cores()
    threads = [threading.Thread(target=burn) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert waited_for_cores() >= before >= 0
