"""What the gevent worker decides for itself, without a loop."""

from __future__ import annotations

from types import SimpleNamespace

from hermes_gunicorn.workers.gevent import HermesGeventWorker


def test_who_is_about_to_serve_a_request_that_holds_the_loop_leaves_siblings_to_others():
    worker = HermesGeventWorker.__new__(HermesGeventWorker)
    looked = []
    worker.look = lambda: looked.append(worker.publisher.turn)
    worker.holds = True
    worker.publisher = SimpleNamespace(turn=7)
    worker.accepted_in = 7  # its greenlet runs before poll
    worker.look_again()
    assert looked == []
    worker.publisher.turn = 8
    worker.look_again()
    assert looked == [8]
