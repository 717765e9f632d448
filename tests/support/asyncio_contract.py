"""Worker classes that say what they find ``create_server`` to do; named in gunicorn.conf.py.

Each serves the bind addresses in turn, in ways that gunicorn's and uvicorn's classes do not.
"""

import asyncio
import json
import os
import socket
import ssl
import struct

from gunicorn.workers.base import Worker

_BACKLOG_AT = 28  # in struct tcp_info: of a listener, how many connections may wait


class Echo(asyncio.Protocol):
    """Sends back what it gets."""

    def connection_made(self, transport):
        """Remember where to."""
        self.transport = transport

    def data_received(self, data):
        """Send it."""
        self.transport.write(data)


def backlog(sock):
    """Read how many connections may wait on a listener."""
    info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _BACKLOG_AT + 4)
    return struct.unpack_from("=I", info, _BACKLOG_AT)[0]


async def echoes(address):
    """Connect, and wait until what was sent comes back."""
    reader, writer = await asyncio.open_connection(*address)
    writer.write(b"hello")
    echoed = await reader.readexactly(5)
    writer.close()
    return echoed == b"hello"


class Contract(Worker):
    """Writes what it found into a file, and ends the server."""

    def run(self):
        """Run the loop named in the environment."""
        if os.environ["LOOP"] == "uvloop":
            import uvloop

            loop = uvloop.new_event_loop()
        else:
            loop = asyncio.new_event_loop()
        loop.run_until_complete(self._serve())

    async def _serve(self):
        self.notify()
        found = {}
        sockets = {}
        for sock in self.sockets:
            sockets.setdefault(sock.getsockname(), []).append(sock.sock)
        tests = (self.refused, self.late, self.forever, self.context, self.tls)
        for (address, self.serving), test in zip(sockets.items(), tests, strict=True):
            name = test.__name__
            try:
                found[name] = await asyncio.wait_for(test(address), 20)
            except Exception as error:
                found[name] = repr(error)
        with open("found.json.new", "w") as file:
            json.dump(found, file)
        os.rename("found.json.new", "found.json")
        self.notify()
        while self.alive:
            await asyncio.sleep(0.05)

    async def create(self, **options):
        """Have all sockets of the address served."""
        loop = asyncio.get_running_loop()
        servers = [await loop.create_server(Echo, sock=sock, **options) for sock in self.serving]
        return servers[0], servers

    async def refused(self, address):
        """Ask for what is not to be had."""
        result = {}
        for options in (
            {"ssl": True},
            {"ssl_handshake_timeout": 1},
            {"ssl_shutdown_timeout": 1},
            {"host": "127.0.0.1"},
            {"nonsense": 1},
        ):
            try:
                await self.create(**options)
            except Exception as error:
                result[str(options)] = [type(error).__name__, str(error)]
        await self.create()
        return [result, await echoes(address)]

    async def late(self, address):
        """Serve from a later time on, with few who may wait."""
        server, servers = await self.create(start_serving=False, backlog=7)
        before = server.is_serving()
        waiting = asyncio.create_task(echoes(address))
        await asyncio.wait([waiting], timeout=0.3)
        early = waiting.done()
        for each in servers:
            await each.start_serving()
            await each.start_serving()  # which is harmless
        return [
            before,
            early,
            await waiting,
            server.is_serving(),
            backlog(self.serving[0]),
            [sock.getsockname() == address for sock in server.sockets],
            server.get_loop() is asyncio.get_running_loop(),
        ]

    async def forever(self, address):
        """Serve until cancelled."""
        server, servers = await self.create(start_serving=False)
        tasks = [asyncio.create_task(each.serve_forever()) for each in servers]
        echoed = await echoes(address)
        try:
            await server.serve_forever()
        except RuntimeError as error:
            twice = "already being awaited" in str(error)
        closed = asyncio.create_task(server.wait_closed())
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
        await closed
        try:
            await server.serve_forever()
        except RuntimeError as error:
            again = str(error).endswith("is closed")
        return [
            echoed,
            twice,
            again,
            tasks[0].cancelled(),
            server.is_serving(),
            len(server.sockets),
            self.serving[0].fileno(),
        ]

    async def context(self, address):
        """Serve in a block."""
        server, _ = await self.create()
        async with server:
            inside = [server.is_serving(), await echoes(address)]
        return [inside, server.is_serving(), self.serving[0].fileno()]

    async def tls(self, address):
        """Serve clients that do not speak."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(os.environ["CERT"], os.environ["KEY"])
        await self.create(ssl=context, ssl_handshake_timeout=0.2, ssl_shutdown_timeout=0.2)
        reader, _ = await asyncio.open_connection(*address)
        try:
            return (await reader.read()).decode()
        except ConnectionError:
            return ""
