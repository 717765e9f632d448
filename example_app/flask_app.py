"""The example as a Flask app: ``gunicorn -k hermes --chdir example_app flask_app:app``."""

from __future__ import annotations

import os

import workload
from flask import Flask, Response, request
from workload import number


class Text(Response):
    """An answer that no browser takes for HTML; some repeat what they were sent."""

    default_mimetype = "text/plain"


app = Flask(__name__)
app.response_class = Text


@app.errorhandler(workload.BadNumber)
def bad_number(error: workload.BadNumber) -> tuple[str, int]:
    """Answer 400 and say what is wrong."""
    return str(error), 400


@app.get("/")
def index() -> str:
    """Answer at once."""
    return f"ok pid={os.getpid()}\n"


@app.get("/pid")
def pid() -> str:
    """Say which worker answers."""
    return str(os.getpid())


@app.get("/cpu")
def cpu() -> str:
    """Burn CPU for ``ms`` milliseconds."""
    workload.burn(number(request.args, "ms", 10))
    return index()


@app.get("/block")
def block() -> str:
    """Block the worker's loop for ``ms`` milliseconds."""
    workload.block(number(request.args, "ms", 1000))
    return index()


@app.get("/sleep")
def sleep() -> str:
    """Wait cooperatively for ``ms`` milliseconds."""
    workload.wait(number(request.args, "ms", 10))
    return index()


@app.get("/stream")
def stream() -> Response:
    """Stream ``chunks`` lines, ``ms`` milliseconds apart."""
    count, ms = number(request.args, "chunks", 10), number(request.args, "ms", 10)
    return Text(workload.chunks(count, ms))


@app.post("/echo")
def echo() -> Response:
    """Send the body back."""
    return Response(request.get_data(), mimetype="application/octet-stream")
