"""What is configured is in force, in each way to configure gunicorn, with the hook and without."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from gunicorn_server import APPS, free_port, wait_for

HOOK = {"hook": {}, "no hook": {"HERMES_GUNICORN_HOOK": "0"}}
WORKER = "hermes_gunicorn.workers.sync.HermesSyncWorker"
# gunicorn's documentation has this one: what it does not know is skipped.
PROGRAM = """
import sys
from gunicorn.app.base import BaseApplication

class Standalone(BaseApplication):
    def __init__(self, app, options):
        self.options, self.application = options, app
        super().__init__()

    def load_config(self):
        for key, value in self.options.items():
            if key in self.cfg.settings and value is not None:
                self.cfg.set(key.lower(), value)

    def load(self):
        return self.application

if __name__ == "__main__":
    from apps import app, post_worker_init
    Standalone(app, {OPTIONS}).run()
"""


class Program:
    """A program that is its own gunicorn."""

    def __init__(self, folder: Path, options: dict[str, object], **environ: str) -> None:
        (folder / "apps.py").write_text(APPS.read_text())
        (folder / "program.py").write_text(PROGRAM.replace("{OPTIONS}", repr(options)))
        self.log_path = folder / "log"
        with self.log_path.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "program.py"],
                cwd=folder,
                env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1", **environ},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    @property
    def log(self) -> str:
        """All that it wrote."""
        return self.log_path.read_text()


@pytest.fixture
def launch_program(tmp_path):
    """Start programs, and end them."""
    programs = []

    def start(options: dict[str, object], **environ: str) -> Program:
        options = {
            "bind": f"127.0.0.1:{free_port()}",
            "workers": 2,
            "worker_class": WORKER,
            "control_socket_disable": True,
            **options,
        }
        programs.append(Program(tmp_path, options, **environ))
        return programs[-1]

    yield start
    for program in programs:
        if program.process.poll() is None:
            os.killpg(program.process.pid, signal.SIGKILL)
        program.process.wait(20)
        print(program.log[-5000:])


@pytest.mark.parametrize("hook", HOOK)
def test_a_program_of_its_own(launch_program, hook):
    options = {"hermes_policy": "cascade", "hermes_hang_threshold": 0.125}
    program = launch_program(options, **HOOK[hook])
    line = wait_for(
        lambda: [each for each in program.log.splitlines() if "kernel dispatch on" in each],
        "the server",
    )[0]
    assert "policy cascade" in line
    assert "hang threshold 0.125 s" in line


@pytest.mark.parametrize("hook", HOOK)
@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"hermes_policy": "best"}, "hermes_policy must be one of least_loaded, cascade"),
        ({"hermes_groups": 9}, "hermes_groups is 9 and there are 2 workers"),
    ],
)
def test_a_bad_value_in_a_program(launch_program, hook, options, says):
    program = launch_program({**options, "pidfile": "pid"}, **HOOK[hook])
    assert program.process.wait(20) == 1
    (error,) = [line for line in program.log.splitlines() if line.startswith("Error: ")]
    assert says in error
    assert "Traceback" not in program.log
    assert "Booting worker" not in program.log
    assert not (program.log_path.parent / "pid").exists()


ONCE = """
    def load_config(self):
        while self.options:
            key, value = self.options.popitem()
            if key in self.cfg.settings:
                self.cfg.set(key, value)
        if self.cfg.workers != 2:
            raise RuntimeError("no workers")

    def load(self):
"""


def test_a_program_that_can_be_configured_once_only_is_told_what_to_do(launch_program, monkeypatch):
    monkeypatch.setitem(
        globals(),
        "PROGRAM",
        PROGRAM.split("    def load_config")[0]
        + ONCE.strip("\n")
        + PROGRAM.split("    def load(self):")[1],
    )
    program = launch_program({"hermes_policy": "cascade"}, **HOOK["no hook"])
    assert program.process.wait(20) == 1
    (error,) = [line for line in program.log.splitlines() if line.startswith("Error: ")]
    assert "import hermes_gunicorn before" in error


@pytest.mark.parametrize("hook", HOOK)
@pytest.mark.parametrize("by", ["flag", "environment"])
def test_a_configuration_module(launch, tmp_path, hook, by):
    files = tmp_path / "files"
    files.mkdir()
    (files / "apps.py").write_text(APPS.read_text())
    (files / "shop.py").write_text(
        "from apps import post_worker_init\nhermes_policy = 'cascade'\nhermes_polcy = 'typo'\n"
        "def hermes_helper(): pass\n"
    )
    environ = {**HOOK[hook], "PYTHONPATH": "."}
    flags = ["-c", "python:shop"]
    if by == "environment":
        environ["GUNICORN_CMD_ARGS"] = " ".join(flags)
        flags = []
    server = launch(*flags, worker_class=WORKER, files=files, environ=environ).wait_ready()
    assert server.lines("hermes: kernel dispatch on", "policy cascade")
    (warning,) = server.lines("WARNING", "is not a setting")
    assert "hermes_polcy is not a setting and has no effect; did you mean hermes_policy?" in warning


def test_what_is_read_at_the_start_only_is_not_ignored_without_a_word(start):
    server = start(worker_class="hermes_sync", conf="hermes_mode = 'auto'\n")
    conf = server.folder / "gunicorn.conf.py"
    conf.write_text(conf.read_text() + "hermes_mode = 'shared'\n")
    server.signal(signal.SIGHUP)
    (line,) = wait_for(lambda: server.lines("WARNING", "hermes_mode stays auto"), "the warning")
    assert "USR2" in line
