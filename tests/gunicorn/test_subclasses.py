"""Worker classes of the user's that are made from ours, as they were from gunicorn's."""

from __future__ import annotations

import pytest
from gunicorn_server import wait_for
from websockets.sync.client import connect as websocket

WEBSOCKETS = """
import apps
from gunicorn.workers.ggevent import GeventPyWSGIWorker
from geventwebsocket.gunicorn.workers import GeventWebSocketWorker
from geventwebsocket.handler import WebSocketHandler
from geventwebsocket.server import WebSocketServer
from hermes_gunicorn.workers.gevent import HermesGeventWorker
from hermes_gunicorn.workers.gevent_pywsgi import HermesGeventPyWSGIWorker


class Stock(GeventWebSocketWorker): ...


class Mixed(HermesGeventWorker, GeventWebSocketWorker): ...


class ByHandler(HermesGeventPyWSGIWorker):
    wsgi_handler = WebSocketHandler


class ByServer(HermesGeventWorker):
    server_class = WebSocketServer


serve = apps.app


def app(environ, start_response):
    session = environ.get("wsgi.websocket")
    if session is None:
        return serve(environ, start_response)
    while (message := session.receive()) is not None:
        session.send(message)
    return []


apps.app = app
worker_class = {name}
"""


@pytest.mark.parametrize("name", ["Stock", "Mixed", "ByHandler", "ByServer"])
def test_the_servers_and_handlers_of_a_subclass_are_used(start, name):
    server = start(worker_class=None, conf=WEBSOCKETS.replace("{name}", name))
    with server.connect() as client, websocket("ws://localhost/", sock=client.sock) as session:
        for text in ("one", "two"):
            session.send(text)
            assert session.recv(timeout=10) == text
        if name != "Stock":  # the session is a request in flight, beside the one that asks
            assert sum(row["requests"] for row in server.rows()) == 2
    if name != "Stock":
        wait_for(lambda: sum(row["requests"] for row in server.rows()) == 1, "its end")
        wait_for(lambda: sum(row["connections"] for row in server.rows()) == 1, "its end")
    assert server.get("/pid")
    assert not server.lines("Traceback")


OVERRIDES = """
from gunicorn.workers.{stock_module} import {stock}
from hermes_gunicorn.workers.{our_module} import {ours}


class User({base}):
    def {method}(self, *args):
        print("the user's own", flush=True)
        return super().{method}(*args)


worker_class = User
"""
SYNC = {"stock": "SyncWorker", "stock_module": "sync"}
SYNC |= {"ours": "HermesSyncWorker", "our_module": "sync"}
THREADS = {"stock": "ThreadWorker", "stock_module": "gthread"}
THREADS |= {"ours": "HermesThreadWorker", "our_module": "gthread"}
GEVENT = {"stock": "GeventWorker", "stock_module": "ggevent"}
GEVENT |= {"ours": "HermesGeventWorker", "our_module": "gevent"}


@pytest.mark.parametrize("base", ["stock", "ours"])
@pytest.mark.parametrize(
    ("names", "method"), [(SYNC, "accept"), (THREADS, "accept"), (GEVENT, "handle")]
)
def test_a_method_that_is_overridden_is_called(start, names, method, base):
    conf = OVERRIDES.format(**names, method=method, base=names[base])
    server = start(worker_class=None, conf=conf, workers=1)
    server.get("/pid")
    wait_for(lambda: server.lines("the user's own"), "a word of it")
    assert not server.lines("Traceback")


@pytest.mark.parametrize("method", ["wait", "run_for_one"])
def test_one_that_would_never_be_called_is_refused_by_name(launch, method):
    conf = OVERRIDES.format(**SYNC, method=method, base=SYNC["ours"])
    server = launch(worker_class=None, conf=conf, workers=1)
    assert server.wait_ended() != 0
    (line,) = server.lines(f"User.{method} is never called")
    assert "use the stock worker class" in line
    assert not server.lines("Traceback")


NO_SERVER = """
from hermes_gunicorn.workers.gevent import HermesGeventWorker


class User(HermesGeventWorker):
    server_class = object


worker_class = User
"""


def test_a_server_that_is_none_of_gevents_is_refused_by_name(launch):
    server = launch(worker_class=None, conf=NO_SERVER, workers=1)
    assert server.wait_ended() != 0
    assert server.lines("User.server_class is not a subclass")
    assert not server.lines("Traceback")
