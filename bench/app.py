"""The application the benchmarks serve: a few bytes, no framework."""

import sys
import time

BODY = b"hello, world\n"
HEADERS = [("Content-Type", "text/plain"), ("Content-Length", str(len(BODY)))]


def app(environ, start_response):
    """Answer at once."""
    start_response("200 OK", HEADERS)
    return [BODY]


def blocking(environ, start_response):
    """Answer at once, or hold the worker for 0.1 s like a driver that does not yield."""
    if environ["PATH_INFO"] == "/block":
        monkey = sys.modules.get("gevent.monkey")
        sleep = monkey.get_original("time", "sleep") if monkey else time.sleep
        sleep(0.1)
    return app(environ, start_response)
