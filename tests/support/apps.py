"""The application under test; copied beside gunicorn.conf.py, imported by both."""

import asyncio
import contextlib
import ctypes
import itertools
import json
import multiprocessing
import os
import re
import subprocess
import sys
import time
from select import epoll  # gevent takes it away

worker = None


def post_worker_init(this):
    """Remember the worker, so that the application can show its table."""
    global worker
    worker = this


def original_sleep():
    """Return a sleep that blocks, whatever was patched."""
    monkey = sys.modules.get("gevent.monkey")
    return monkey.get_original("time", "sleep") if monkey else time.sleep


def table():
    """Show the worker status table, as far as there is one."""
    publisher = getattr(worker, "publisher", None)
    if publisher is None:
        return {}
    return {
        "hermes": True,
        "slot": publisher.slot,
        "policy": publisher.table.policy,
        "localities": publisher.table.localities,
        "eligible": publisher.table.eligible(),
        "selected": publisher.table.selected(),
        "binds": [bind.counters() for bind in worker.assignment.binds],
        "rows": [vars(row) | {"queued": row.queued} for row in publisher.table.rows()],
    }


def child(kind):
    """Start a process that stays for a while, and return its id."""
    if kind in ("fork", "turning"):  # the latter turns its copy of the loop
        sleep = original_sleep() if kind == "fork" else time.sleep
        pid = os.fork()
        if not pid:
            sleep(20 if kind == "fork" else 8)
            os._exit(0)
        return pid
    if kind == "multiprocessing":
        sleep = original_sleep()
        process = multiprocessing.get_context("fork").Process(target=sleep, args=(20,))
        process.start()
        return process.pid
    # What Popen closes by itself is not the point here.
    return subprocess.Popen(["sleep", "20"], close_fds=False).pid


def deafen():
    """Have the loop's poll report nothing of the worker's own listeners any more."""
    own = [s for s, mine in zip(worker.sockets, worker.exclusive(), strict=True) if mine]
    for fd in map(int, os.listdir("/proc/self/fd")):
        try:
            if os.readlink(f"/proc/self/fd/{fd}") != "anon_inode:[eventpoll]":
                continue
        except OSError:
            continue
        poll = epoll.fromfd(os.dup(fd))
        for sock in own:
            with contextlib.suppress(OSError):
                poll.unregister(sock)


def overwrite(part, word, value):
    """Store a value in a word of the table: of every row, group, or bind."""
    memory = worker.publisher.table
    binds = worker.assignment.binds
    areas = {
        "control": [(memory._control, 8)],
        "groups": [(memory._groups, 2)],
        "rows": [(memory._rows, 16)],
        "binds": [(bind._words, 16) for bind in binds],
        "allowed": [(bind._allowed, 1) for bind in binds],
    }
    for words, stride in areas[part]:
        for at in range(int(word), len(words), stride):
            words[at] = int(value)


def upgrade(environ):
    """Answer like a websocket: echo lines on the raw socket until the client ends."""
    sock = environ["gunicorn.socket"]
    sock.sendall(b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\n\r\n")
    while data := sock.recv(4096):
        sock.sendall(data)
    return []


def mark():
    """Leave a file that says that this worker begins to block."""
    with open(f"blocked-{os.getpid()}", "w"):
        pass


def until_released(name):
    """Leave a file that says so, and yield until the test releases that name."""
    for number in itertools.count():
        with contextlib.suppress(FileExistsError):
            open(f"held-{name}.{number}.{os.getpid()}", "x").close()
            break
    while not os.path.exists(f"release-{name}"):
        yield


def hold_the_gil(name):
    """Be inside C code that holds the GIL until the test releases that name."""
    path = f"gil-{name}"
    os.mkfifo(path)
    next(until_released(name))
    os.close(ctypes.PyDLL(None).open(path.encode(), os.O_RDONLY))


def answer(path, query):
    """Do what the path says, if it needs no server interface."""
    status, body = "200 OK", str(os.getpid()).encode()
    if path == "/table":
        body = json.dumps(table()).encode()
    elif path == "/threshold":
        body = str(worker.publisher.table.hang_threshold_ns).encode()
    elif path == "/slot":
        body = str(worker.publisher.slot).encode()
    elif path == "/scramble":
        memory = worker.publisher.table
        for words in (memory._rows, memory._groups, memory._control):
            words[:] = memoryview(os.urandom(words.nbytes)).cast("Q")
    elif path == "/deafen":
        deafen()
    elif path == "/overwrite":
        overwrite(*query.split(","))
    elif path == "/child":
        body = str(child(query)).encode()
    elif path == "/spin":
        mark()
        until = time.monotonic() + float(query)
        while time.monotonic() < until:
            pass
    elif path == "/regex":
        mark()
        # Backtracks in C, with the GIL held: a second or so, twice that for one more.
        re.match(r"(a+)+$", "a" * int(query) + "b")
    elif path == "/hold":
        for _ in until_released(query):
            original_sleep()(0.005)
    elif path == "/hold-the-gil":
        hold_the_gil(query)
    elif path == "/burn":
        for _ in until_released(query):
            pass
    elif path == "/block":
        mark()
        original_sleep()(float(query))
    elif path == "/error":
        raise RuntimeError("on purpose")
    elif path == "/fork":
        pid = os.fork()
        if not pid:
            time.sleep(0.05)  # turns the child's own loop
            os._exit(0)
        os.waitpid(pid, 0)
    elif path == "/missing":
        status = "404 Not Found"
    return status, body


def app(environ, start_response):
    """Do what the path says."""
    path, query = environ["PATH_INFO"], environ["QUERY_STRING"]
    status, body = answer(path, query)
    if path == "/sleep":
        time.sleep(float(query))
    elif path == "/wait":
        for _ in until_released(query):
            time.sleep(0.01)
    elif path == "/echo":
        body = environ["wsgi.input"].read()
    elif path == "/upgrade":
        from gunicorn.workers.base_async import ALREADY_HANDLED

        upgrade(environ)
        return ALREADY_HANDLED
    elif path == "/stream":
        start_response(status, [("Content-Type", "text/plain")])
        return (b"%d\n" % i for i in range(int(query)))
    start_response(status, [("Content-Length", str(len(body)))])
    return [body]


async def asgi(scope, receive, send):
    """Do the same, and answer each message on a websocket with the process id."""
    if scope["type"] == "lifespan":
        while (message := await receive())["type"] != "lifespan.shutdown":
            await send({"type": message["type"] + ".complete"})
        await send({"type": "lifespan.shutdown.complete"})
        return
    if scope["type"] == "websocket":
        await receive()
        await send({"type": "websocket.accept"})
        while (await receive())["type"] != "websocket.disconnect":
            await send({"type": "websocket.send", "text": str(os.getpid())})
        return
    path, query = scope["path"], scope["query_string"].decode()
    status, body = answer(path, query)
    if path == "/sleep":
        await asyncio.sleep(float(query))
    elif path == "/wait":
        for _ in until_released(query):
            await asyncio.sleep(0.01)
    elif path == "/echo":
        body = (await receive())["body"]
    length = str(len(body)).encode()
    start = {"type": "http.response.start", "status": int(status.split()[0])}
    await send(start | {"headers": [(b"content-length", length)]})
    await send({"type": "http.response.body", "body": body})
