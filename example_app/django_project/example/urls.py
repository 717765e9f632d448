"""The same endpoints as flask_app.py."""

from __future__ import annotations

import os
from collections.abc import Callable

import workload
from django.http import HttpRequest, HttpResponse, HttpResponseBase, StreamingHttpResponse
from django.urls import path
from django.views.decorators.csrf import csrf_exempt
from django.views.decorators.http import require_POST, require_safe
from workload import number

View = Callable[[HttpRequest], HttpResponseBase]


def text(body: str, status: int = 200) -> HttpResponse:
    """Answer with plain text."""
    return HttpResponse(body, status=status, content_type="text/plain")


@require_safe
def index(request: HttpRequest) -> HttpResponse:
    """Answer at once."""
    return text(f"ok pid={os.getpid()}\n")


@require_safe
def pid(request: HttpRequest) -> HttpResponse:
    """Say which worker answers."""
    return text(str(os.getpid()))


def checked(view: View) -> View:
    """Answer 400 where a number is wrong."""

    def answer(request: HttpRequest) -> HttpResponseBase:
        try:
            return view(request)
        except workload.BadNumber as error:
            return text(str(error), 400)

    return answer


def timed(work: Callable[[int], None], default: int) -> View:
    """Make a view that works for ``ms`` milliseconds, then answers like ``index``."""

    @require_safe
    @checked
    def view(request: HttpRequest) -> HttpResponse:
        work(number(request.GET, "ms", default))
        return index(request)

    return view


@require_safe
@checked
def stream(request: HttpRequest) -> StreamingHttpResponse:
    """Stream ``chunks`` lines, ``ms`` milliseconds apart."""
    count, ms = number(request.GET, "chunks", 10), number(request.GET, "ms", 10)
    return StreamingHttpResponse(workload.chunks(count, ms), content_type="text/plain")


@csrf_exempt
@require_POST
def echo(request: HttpRequest) -> HttpResponse:
    """Send the body back."""
    return HttpResponse(request.body, content_type="application/octet-stream")


urlpatterns = [
    path("", index),
    path("pid", pid),
    path("cpu", timed(workload.burn, 10)),
    path("block", timed(workload.block, 1000)),
    path("sleep", timed(workload.wait, 10)),
    path("stream", stream),
    path("echo", echo),
]
