"""Only what uses a requirement needs it: the rest serves where it is missing or broken."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import gunicorn
import pytest
from gunicorn_server import wait_for

FAULTS = {"missing": "ImportError('no module')", "broken": "ValueError('size changed')"}
CLASSES = {"hermes_sync": "apps:app", "hermes_gthread": "apps:app"}
if int(gunicorn.__version__.split(".")[0]) >= 24:
    CLASSES["hermes_asgi"] = "apps:asgi"


@pytest.fixture(params=FAULTS)
def without(request, tmp_path_factory: pytest.TempPathFactory):
    """Make the environment of a server in which a module cannot be imported."""

    def without(module: str) -> dict[str, str]:
        folder = tmp_path_factory.mktemp("without")
        (folder / f"{module}.py").write_text(f"raise {FAULTS[request.param]}\n")
        return {"PYTHONPATH": str(folder)}

    return without


@pytest.mark.parametrize("module", ["gevent", "psutil"])
@pytest.mark.parametrize("worker_class", CLASSES)
def test_who_does_not_use_it_serves_without_it(start, without, worker_class: str, module: str):
    server = start(worker_class=worker_class, app=CLASSES[worker_class], environ=without(module))
    assert len(server.worker_pids()) == 2
    assert {worker["state"] for worker in server.status()["workers"]} == {"ready"}
    assert not server.lines("Traceback")


@pytest.mark.parametrize("worker_class", ["hermes", "hermes_gevent_pywsgi"])
def test_the_gevent_classes_say_in_a_line_that_they_need_it(launch, without, worker_class: str):
    server = launch(worker_class=worker_class, environ=without("gevent"))
    assert server.wait_ended() != 0
    assert server.lines("Error: gevent cannot be imported", "pip install 'gevent", "hermes_gthread")
    assert not server.lines("Traceback")


def test_a_reload_to_them_is_rejected(start, without):
    server = start(
        worker_class=None, conf="worker_class = 'hermes_sync'", environ=without("gevent")
    )
    before = server.worker_pids()
    (server.folder / "gunicorn.conf.py").write_text("worker_class = 'hermes'\n")
    server.signal(signal.SIGHUP)
    wait_for(lambda: server.lines("gevent cannot be imported"), "the reason")
    assert server.worker_pids() == before
    assert server.get("/pid")


def test_the_core_is_the_standard_librarys():
    core = Path(__file__).parents[2] / "hermes_gunicorn/core"
    code = (
        "import sys\n"
        "for name in 'asyncio gevent gunicorn psutil uvicorn uvloop'.split():\n"
        "    sys.modules[name] = None\n"
        "import importlib\n"
        f"for name in {[path.stem for path in core.glob('*.py')]!r}:\n"
        "    importlib.import_module(f'hermes_gunicorn.core.{name}')\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_the_old_place_of_the_asyncio_mixin_names_the_new_one():
    from hermes_gunicorn.workers import asgi, asyncio

    with pytest.warns(DeprecationWarning, match=r"hermes_gunicorn\.workers\.asgi\.HermesAsyncio"):
        assert asyncio.HermesAsyncioMixin is asgi.HermesAsyncioMixin
