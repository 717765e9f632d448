"""A real nginx in front of a server."""

from __future__ import annotations

import contextlib
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

from gunicorn_server import free_port, wait_for

CONFIG = """
pid {folder}/nginx.pid;
error_log {folder}/nginx.log;
user root;
worker_processes 1;
daemon off;
events {{}}
http {{
    access_log off;
    client_body_temp_path {folder}/body;
    proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi;
    scgi_temp_path {folder}/scgi;
    server {{
        listen 127.0.0.1:{port};
        location / {{
            proxy_pass http://unix:{path};
            # As most have it: a connection for each request, and none tried again.
            proxy_next_upstream off;
        }}
    }}
}}
"""


@contextlib.contextmanager
def nginx(folder: Path, path: str) -> Iterator[int]:
    """Run nginx before a Unix socket; yields its port."""
    port = free_port()
    config = folder / "nginx.conf"
    config.write_text(CONFIG.format(folder=folder, path=path, port=port))
    process = subprocess.Popen(["nginx", "-c", config], stdin=subprocess.DEVNULL)

    def listens() -> bool:
        assert process.poll() is None, (folder / "nginx.log").read_text()
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
            return True
        return False

    try:
        wait_for(listens, "nginx")
        yield port
    finally:
        process.terminate()
        process.wait(10)
