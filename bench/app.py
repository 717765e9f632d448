"""The application the benchmarks serve: a few bytes, no framework."""

import os
import sys
import time

BODY = b"hello, world\n"
HEADERS = [("Content-Type", "text/plain"), ("Content-Length", str(len(BODY)))]


def app(environ, start_response):
    """Answer at once."""
    start_response("200 OK", HEADERS)
    return [BODY]


def hold(seconds):
    """Hold the worker, or its thread, like a driver that does not yield."""
    monkey = sys.modules.get("gevent.monkey")
    sleep = monkey.get_original("time", "sleep") if monkey else time.sleep
    sleep(seconds)


def blocking(environ, start_response):
    """Answer at once, or hold the worker for 0.1 s."""
    if environ["PATH_INFO"] == "/block":
        hold(0.1)
    return app(environ, start_response)


def burn(seconds):
    """Compute for so long."""
    until = time.thread_time() + seconds
    while time.thread_time() < until:
        pass


served = 0


def work(path):
    """Return the body of the answer: /hold/20 holds the worker for 20 ms, /burn/5 burns 5.

    Of /sometimes/300 every hundredth holds it.
    """
    global served
    if path.startswith("/hold/"):
        hold(float(path.removeprefix("/hold/")) / 1000)
    elif path.startswith("/burn/"):
        burn(float(path.removeprefix("/burn/")) / 1000)
    elif path.startswith("/sometimes/"):
        served += 1
        if served % 100 == 0:
            hold(float(path.removeprefix("/sometimes/")) / 1000)
    return str(os.getpid()).encode()


def wsgi(environ, start_response):
    """Do what the path says."""
    body = work(environ["PATH_INFO"])
    start_response("200 OK", [("Content-Length", str(len(body)))])
    return [body]


async def asgi(scope, receive, send):
    """Do what the path says."""
    if scope["type"] == "lifespan":
        while (message := await receive())["type"] != "lifespan.shutdown":
            await send({"type": message["type"] + ".complete"})
        await send({"type": "lifespan.shutdown.complete"})
        return
    body = work(scope["path"])
    headers = [(b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})
