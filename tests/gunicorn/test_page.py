"""The live page in a real browser, and ``hermesctl top``, with pictures of both.

The pictures go to the folder that ``HERMES_PICTURES`` names; those in docs/ were made so.
"""

from __future__ import annotations

import base64
import contextlib
import io
import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from gunicorn_server import GUNICORN, Server, free_port, listens, under_load, wait_for
from rich.console import Console
from rich.text import Text
from selenium import webdriver
from selenium.webdriver.common.by import By

DESKTOP, PHONE = (1100, 900), (390, 844)


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Where pictures go."""
    return Path(os.environ.get("HERMES_PICTURES", tmp_path))


class Browser:
    """Headless Chromium."""

    def __init__(self, profile: Path) -> None:
        options = webdriver.ChromeOptions()
        for flag in ("--headless=new", "--no-sandbox", f"--user-data-dir={profile}"):
            options.add_argument(flag)
        options.binary_location = "/usr/bin/chromium"
        options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
        service = webdriver.ChromeService("/usr/bin/chromedriver")
        self.driver = webdriver.Chrome(options, service)

    def open(self, url: str, size: tuple[int, int] = DESKTOP, scheme: str = "light") -> None:
        """Show a page in a window of that size, in light or dark."""
        metrics = {"width": size[0], "height": size[1], "deviceScaleFactor": 1}
        self._do("Emulation.setDeviceMetricsOverride", mobile=size == PHONE, **metrics)
        self._do(
            "Emulation.setEmulatedMedia",
            features=[{"name": "prefers-color-scheme", "value": scheme}],
        )
        self.driver.get(url)

    def _do(self, command: str, **arguments: Any) -> dict[str, Any]:
        answer: dict[str, Any] = self.driver.execute_cdp_cmd(command, arguments)
        return answer

    def all(self, selector: str) -> list[str]:
        """Return the texts of all elements that match."""
        script = "return [...document.querySelectorAll(arguments[0])].map(e => e.innerText)"
        texts: list[str] = self.driver.execute_script(script, selector)
        return texts

    def overflows(self) -> bool:
        """Say whether something is wider than the window."""
        script = "return document.documentElement.scrollWidth > window.innerWidth"
        return bool(self.driver.execute_script(script))

    def ground(self) -> list[int]:
        """Return the red, green and blue of the page's background."""
        colour = self.driver.find_element(By.TAG_NAME, "body").value_of_css_property(
            "background-color"
        )
        return [int(part) for part in colour.partition("(")[2].rstrip(")").split(",")[:3]]

    def picture(self, path: Path, whole: bool = True) -> None:
        """Save the page as it is shown, or what fits the window."""
        taken = self._do("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        path.write_bytes(base64.b64decode(taken["data"]))

    def asked_for(self) -> set[str]:
        """Return the addresses of all that has been fetched."""
        events = [json.loads(entry["message"]) for entry in self.driver.get_log("performance")]
        return {
            event["message"]["params"]["request"]["url"]
            for event in events
            if event["message"]["method"] == "Network.requestWillBeSent"
            # Chromium's own first page.
            and not event["message"]["params"]["documentURL"].startswith("chrome:")
        }

    def complaints(self) -> list[str]:
        """Return what the page's script has complained of."""
        return [
            entry["message"]
            for entry in self.driver.get_log("browser")
            if entry["level"] == "SEVERE" and "favicon" not in entry["message"]
        ]


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Browser]:
    """A browser of its own."""
    result = Browser(tmp_path / "profile")
    yield result
    result.driver.quit()


@pytest.fixture
def with_page(launch) -> Any:
    """Start servers with a page; returns the server and the page's address."""

    def begin(**options: Any) -> tuple[Server, str]:
        port = free_port()
        conf = f"hermes_stats = '127.0.0.1:{port}'\nproc_name = 'shop'\n"
        server = launch("--keep-alive", "30", conf=conf, **options).wait_ready(seconds=60)
        wait_for(lambda: listens(port), "the page")
        return server, f"http://127.0.0.1:{port}/"

    return begin


@contextlib.contextmanager
def one_hung(server: Server) -> Iterator[None]:
    """Have one worker hang while the others serve requests on kept-alive connections."""
    with contextlib.ExitStack() as stack:
        for _ in range(20):
            stack.enter_context(server.connect()).get("/pid")
        blocker = stack.enter_context(server.connect())
        blocker.send("/block?60")
        wait_for(lambda: list(server.folder.glob("blocked-*")), "the block")
        with under_load(server, 40) as failures:
            yield
        assert not failures


def test_a_hung_worker_is_seen_at_a_glance(with_page, browser, pictures):
    server, url = with_page(workers=8)
    with one_hung(server):
        browser.open(url)
        wait_for(lambda: "1 of 8 workers hangs" in browser.all("#health")[0], "a word about it")
        (hung,) = browser.all(".worker.hung")
        assert "hung" in hung
        assert len(browser.all(".worker")) == 8
        # Some history for the plots.
        wait_for(lambda: server.lines("hermes") and _points(browser) >= 8, "points", 30)
        assert len(browser.all(".plot polyline")) == 4
        assert not browser.overflows()
        assert min(browser.ground()) > 200
        browser.picture(pictures / "page.png")
        browser.open(url, scheme="dark")
        wait_for(lambda: browser.all(".worker.hung"), "the workers")
        assert max(browser.ground()) < 60
        browser.picture(pictures / "page-dark.png")
        browser.open(url, PHONE)
        wait_for(lambda: browser.all(".worker.hung"), "the workers")
        assert not browser.overflows()
        browser.picture(pictures / "page-phone.png")
        _picture_of_top(server, pictures / "top.svg")
    assert browser.asked_for() <= {url, f"{url}stats.json", f"{url}favicon.ico"}
    assert browser.complaints() == []


def _points(browser: Browser) -> int:
    script = "return document.querySelector('.plot polyline').points.length"
    return int(browser.driver.execute_script(script))


def _picture_of_top(server: Server, path: Path) -> None:
    """Make a picture of what ``hermesctl top`` prints on a terminal."""
    run = subprocess.run(
        [GUNICORN.with_name("hermesctl"), "top", "--once", "--server", str(server.process.pid)],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "FORCE_COLOR": "1", "TERM": "xterm-256color", "COLUMNS": "100"},
    )
    console = Console(record=True, width=100, file=io.StringIO())
    console.print(Text.from_ansi(run.stdout))
    console.save_svg(str(path), title="hermesctl top")
    assert "hung" in path.read_text()


def test_a_hundred_and_twenty_eight_workers_fit(with_page, browser, pictures):
    server, url = with_page(workers=128, worker_class="hermes_sync")
    with server.connect() as blocker:
        blocker.send("/block?30")
        for size, name in ((DESKTOP, "page-128"), (PHONE, "page-128-phone")):
            browser.open(url, size)
            wait_for(lambda: len(browser.all(".worker")) == 128, "the workers")
            wait_for(lambda: browser.all(".worker.hung"), "the one that hangs")
            assert not browser.overflows()
            browser.picture(pictures / f"{name}.png", whole=False)


def test_the_page_says_when_nobody_answers(with_page, browser):
    server, url = with_page()
    browser.open(url)
    wait_for(lambda: browser.all("#health") == ["healthy"], "health")
    server.kill()
    wait_for(lambda: "does not answer" in browser.all("#health")[0], "a word")
