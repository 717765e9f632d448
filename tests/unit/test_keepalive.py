"""When responses close their connection."""

from __future__ import annotations

import select
import socket
import threading
import time

import pytest
from gunicorn.config import Config

from hermes_gunicorn.core.keepalive import Keeping, round_trip_ns, unread, waited_for_cores
from hermes_gunicorn.workers.closing import is_cheap

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
            keeping.began()
            keeping.held(each_ns)
        keeping.weigh(SECOND, second * waited_ns)
    return keeping.closing


@pytest.mark.parametrize(
    ("requests", "each_ns"),
    [
        (25, 20 * MS),  # busy for half of the time
        (2, 200 * MS),
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
        (3, 20 * MS),  # busy for 6 % of the time
        (15, 20 * MS),  # for less than a third
        (70, 5 * MS),  # half of it, but the wait is hardly longer than a connection takes
    ],
)
def test_connections_are_kept_where_they_do_not(requests, each_ns):
    assert not after(requests, each_ns)


def test_one_request_of_many_that_holds_the_worker_is_not_enough():
    keeping = Keeping(always=False)
    for _ in range(10):
        keeping.held(400 * MS)
        for _ in range(1000):
            keeping.began()
        keeping.weigh(SECOND, 0)
    assert not keeping.closing


@pytest.mark.parametrize("held_ns", [200 * MS, 5 * SECOND])
def test_a_single_request_that_takes_long_closes_nothing(held_ns):
    keeping = Keeping(always=False)
    for second in range(10):
        keeping.began()
        keeping.began()
        if second == 2:
            keeping.held(held_ns)
        assert not keeping.weigh(SECOND, 0)


def test_what_is_closed_at_a_third_is_kept_again_at_a_fifth():
    keeping = Keeping(always=False)
    assert not after(14, 20 * MS, keeping=keeping)
    assert after(20, 20 * MS, keeping=keeping)
    assert after(14, 20 * MS, keeping=keeping)
    assert not after(8, 20 * MS, keeping=keeping)


@pytest.mark.parametrize(
    ("round_trip_ns", "pays"), [(0, True), (MS, True), (20 * MS, False), (None, False)]
)
def test_a_connection_is_closed_only_if_the_wait_is_longer_than_a_new_one_takes(
    round_trip_ns, pays
):
    keeping = Keeping(always=False)
    assert not keeping.pays(round_trip_ns)
    assert after(25, 20 * MS, keeping=keeping)  # a wait of 10 ms
    assert keeping.pays(round_trip_ns) == pays


def test_the_round_trip_is_the_shortest_of_the_connection():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        client = socket.create_connection(listener.getsockname())
        accepted, _ = listener.accept()
        with client, accepted:
            nanoseconds = round_trip_ns(accepted)
            assert nanoseconds is not None
            assert 0 < nanoseconds < SECOND
    left, right = socket.socketpair()
    with left, right:
        assert round_trip_ns(left) == 0
    with socket.socket() as unconnected:
        assert round_trip_ns(unconnected) is None


@pytest.mark.parametrize("family", [socket.AF_UNIX, socket.AF_INET])
def test_what_has_been_received_and_not_read_is_seen(family):
    address = "" if family == socket.AF_UNIX else ("127.0.0.1", 0)
    with socket.socket(family) as listener:
        listener.bind(address)
        listener.listen()
        client = socket.socket(family)
        client.connect(listener.getsockname())
        accepted, _ = listener.accept()
        with client, accepted:
            assert not unread(accepted.fileno())
            client.sendall(b"GET")
            select.select([accepted], [], [], 5)
            assert unread(accepted.fileno())
            accepted.recv(3)
            assert not unread(accepted.fileno())
    assert unread(-1)  # closed: nothing is known


def test_connections_are_kept_where_cores_are_short():
    assert after(20, 20 * MS, waited_ns=10 * MS)
    assert not after(20, 20 * MS, waited_ns=150 * MS)


def test_what_was_waited_for_cores_at_the_start_does_not_count():
    keeping = Keeping(always=False)
    keeping.start(waited_ns=1000 * MS)
    assert after(20, 20 * MS, seconds=1, waited_ns=1000 * MS, keeping=keeping)


def test_it_may_decide_within_the_first_second():
    keeping = Keeping(always=False)
    for _ in range(18):
        keeping.began()
        keeping.held(20 * MS)
    assert keeping.weigh(SECOND / 5, 0)


def test_how_often_it_decides_makes_no_difference():
    often, seldom = Keeping(always=False), Keeping(always=False)
    assert after(20, 20 * MS, keeping=often)
    assert after(20, 20 * MS, keeping=seldom)
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
    assert after(20, 20 * MS, keeping=keeping)
    assert not keeping.weigh(SECOND, 0, alone=True)


def test_connections_are_kept_where_the_user_says_so():
    assert not after(20, 20 * MS, keeping=Keeping(always=True))


def test_the_past_is_forgotten_within_seconds():
    keeping = Keeping(always=False)
    assert after(20, 20 * MS, keeping=keeping)
    assert not after(10, 0, seconds=4, keeping=keeping)


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


@pytest.mark.parametrize(
    ("settings", "cheap"),
    [
        ({}, True),
        ({"certfile": "x", "keyfile": "x"}, False),
        ({"proxy_protocol": True}, False),
        ({"proxy_protocol": False}, True),
    ],
)
def test_a_connection_is_dear_with_tls_or_behind_a_proxy_that_hides_the_client(settings, cheap):
    cfg = Config()
    for name, value in settings.items():
        cfg.set(name, value)
    assert is_cheap(cfg) == cheap


@pytest.mark.skipif("protocol" not in Config().settings, reason="this gunicorn speaks HTTP only")
def test_a_connection_that_does_not_speak_http_is_kept():
    cfg = Config()
    cfg.set("protocol", "uwsgi")
    assert not is_cheap(cfg)
