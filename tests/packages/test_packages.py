"""The packages that people install: what is in them, and that they work where nothing else is."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import tarfile
import urllib.request
import venv
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from gunicorn_server import free_port, wait_for

ROOT = Path(__file__).parents[2]
EPOCH = "1700000000"
WITHIN = 300  # seconds, for a build or an installation; it may have to download


def run(*command: object, **options: object) -> str:
    """Run a command, which must succeed; return what it printed."""
    done = subprocess.run(
        [str(each) for each in command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=WITHIN,
        check=False,
        **options,  # type: ignore[call-overload]
    )
    assert done.returncode == 0, done.stdout[-5000:]
    return str(done.stdout)


def clean_copy(folder: Path) -> Path:
    """Copy what a clean clone of this checkout would hold, uncommitted changes included."""
    listed = run("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", cwd=ROOT)
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, folder / name)
    return folder


def build(source: Path, umask: int) -> Path:
    """Build both packages as a release would; return the folder they are in."""
    environ = {**os.environ, "SOURCE_DATE_EPOCH": EPOCH}
    run(sys.executable, "-m", "build", "--installer", "uv", cwd=source, env=environ, umask=umask)
    return source / "dist"


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with the sdist and the wheel."""
    return build(clean_copy(tmp_path_factory.mktemp("source")), 0o022)


@pytest.fixture(params=["*.tar.gz", "*.whl"], ids=["sdist", "wheel"])
def package(request: pytest.FixtureRequest, packages: Path) -> Path:
    """Each of the two."""
    (found,) = packages.glob(request.param)
    return found


def test_the_index_would_accept_them(packages: Path):
    report = run(sys.executable, "-m", "twine", "check", "--strict", *packages.iterdir())
    assert report.count("PASSED") == 2


def test_the_sdist_holds_all_that_builds_and_tests_it(packages: Path):
    (sdist,) = packages.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    wanted = {
        "CHANGELOG.md",
        "LICENSE",
        "bpf/hermes.bpf.c",
        "bpf/hermes.bpf.o",
        "hermes_gunicorn.pth",
        "scripts/test",
        "tests/support/gunicorn_server.py",
        "tools/backend.py",
        "tox.ini",
    }
    assert not wanted - names


def test_the_wheel_holds_no_more_than_the_package(packages: Path):
    (wheel,) = packages.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    tops = {name.partition("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {
        "hermes_gunicorn",
        "hermes_gunicorn.pth",
    }
    assert {"hermes_gunicorn/bpf/hermes.bpf.o", "hermes_gunicorn/py.typed"} <= set(names)


def test_the_wheel_is_reproducible(packages: Path, tmp_path: Path):
    again = build(clean_copy(tmp_path), 0o077)
    (first,), (second,) = packages.glob("*.whl"), again.glob("*.whl")
    assert first.read_bytes() == second.read_bytes()


def site_packages(environment: Path) -> set[Path]:
    """List the files that are installed, but for what Python caches."""
    (folder,) = environment.glob("lib/python*/site-packages")
    return {
        path
        for path in [*folder.rglob("*"), *(environment / "bin").iterdir()]
        if "__pycache__" not in path.parts
    }


@contextlib.contextmanager
def gunicorn(environment: Path, folder: Path, *flags: str) -> Iterator[str]:
    """Run the environment's gunicorn in an empty folder; yields its address."""
    address = f"127.0.0.1:{free_port()}"
    (folder / "app.py").write_text(
        "def app(environ, start_response):\n"
        "    start_response('200 OK', [('Content-Length', '5')])\n"
        "    return [b'hello']\n"
    )
    process = subprocess.Popen(
        [environment / "bin" / "gunicorn", *flags, "-b", address, "app:app"],
        cwd=folder,
        stdin=subprocess.DEVNULL,
    )
    try:
        yield address
    finally:
        process.terminate()
        process.wait(30)


def test_installed_into_an_empty_environment_it_serves_and_leaves_nothing(
    package: Path, tmp_path: Path
):
    environment = tmp_path / "environment"
    venv.create(environment, with_pip=True)
    pip = [environment / "bin" / "python", "-m", "pip", "--disable-pip-version-check", "-q"]
    run(*pip, "install", package, cwd=tmp_path)
    with gunicorn(environment, tmp_path, "-k", "hermes", "-w", "2") as address:

        def answer() -> bytes:
            with (
                contextlib.suppress(OSError),
                urllib.request.urlopen(f"http://{address}/", timeout=10) as response,
            ):
                return bytes(response.read())
            return b""

        assert wait_for(answer, "an answer", 60) == b"hello"
    run(*pip, "uninstall", "-y", "hermes-gunicorn")
    left = {path for path in site_packages(environment) if "hermes" in path.name}
    assert not left
