"""A headless Chromium that tests drive over its DevTools protocol: a pipe of JSON, without a package."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import select
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any, Iterator

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FLAGS = ("--headless=new", "--disable-gpu", "--no-first-run", "--disable-background-networking", "--hide-scrollbars",
         "--disable-component-update", "--disable-dev-shm-usage", "--remote-debugging-pipe")
PATIENCE = 60.0  # s for one answer: a machine may be busy


def find() -> str | None:
    """Where a Chromium is; None where there is none."""
    return next(filter(None, map(shutil.which, NAMES)), None)


class Browser:
    """One process and the pipe to it: commands go in, answers and events come out."""

    def __init__(self, program: str, profile: str) -> None:
        to_browser, self._commands = os.pipe()
        self._answers, from_browser = os.pipe()

        def place() -> None:  # in the child: DevTools reads from 3 and writes to 4
            ends = os.dup(to_browser), os.dup(from_browser)
            os.dup2(ends[0], 3)
            os.dup2(ends[1], 4)

        sandbox = ["--no-sandbox"] if hasattr(os, "getuid") and os.getuid() == 0 else []
        command = [program, *FLAGS, *sandbox, f"--user-data-dir={profile}", "about:blank"]
        self._process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            preexec_fn=place, close_fds=False)  # fmt: skip  # noqa: PLW1509
        os.close(to_browser)
        os.close(from_browser)
        self._buffer = b""
        self._number = 0
        self.events: list[dict[str, Any]] = []

    def _read(self, deadline: float) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([self._answers], [], [], left)[0]:
                raise TimeoutError("Chromium does not answer")
            data = os.read(self._answers, 1 << 20)
            if not data:
                raise EOFError("Chromium ended")
            self._buffer += data
        message, _, self._buffer = self._buffer.partition(b"\0")
        return json.loads(message)

    def call(self, method: str, session: str = "", **params: Any) -> dict[str, Any]:
        """One command and its answer; events that come meanwhile are kept."""
        self._number += 1
        command = {"id": self._number, "method": method, "params": params}
        if session:
            command["sessionId"] = session
        os.write(self._commands, json.dumps(command).encode("utf-8") + b"\0")
        deadline = time.monotonic() + PATIENCE
        while True:
            message = self._read(deadline)
            if message.get("id") == self._number:
                if "error" in message:
                    raise RuntimeError(f"{method}: {message['error']['message']}")
                return message["result"]
            self.events.append(message)

    def wait(self, method: str, session: str) -> None:
        """Until an event has come."""
        deadline = time.monotonic() + PATIENCE
        while not any(event.get("method") == method and event.get("sessionId") == session for event in self.events):
            self.events.append(self._read(deadline))

    def close(self) -> None:
        """Ends the process."""
        with contextlib.suppress(OSError, EOFError, TimeoutError, RuntimeError):
            self.call("Browser.close")
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        os.close(self._commands)
        os.close(self._answers)


class Page:
    """One tab with a file in it. `requests`: the URLs that it asked for; `complaints`: what its console says."""

    def __init__(self, browser: Browser, url: str, width: int, height: int = 900, dark: bool = False) -> None:
        self._browser = browser
        target = browser.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = browser.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        self.call("Page.bringToFront")  # a tab behind another one draws nothing
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(domain + ".enable")
        self.resize(width, height)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.call("Page.navigate", url=url)
        browser.wait("Page.loadEventFired", self._session)

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """One command to this tab."""
        return self._browser.call(method, self._session, **params)

    def resize(self, width: int, height: int = 900) -> None:
        """Another window."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1,
                  mobile=width < 500)  # fmt: skip

    def evaluate(self, script: str) -> Any:
        """The value of an expression in the page; a promise is waited for."""
        answer = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in answer:
            raise RuntimeError(answer["exceptionDetails"].get("exception", {}).get("description", "script failed"))
        return answer["result"].get("value")

    def wait(self, script: str) -> None:
        """Until an expression is true in the page."""
        deadline = time.monotonic() + PATIENCE
        while not self.evaluate(script):
            if time.monotonic() > deadline:
                raise TimeoutError(f"never true: {script}")
            time.sleep(0.02)

    CHARTS = "[...document.querySelectorAll('.chart')].filter(chart => chart.checkVisibility())"

    def draw_all(self) -> None:
        """Comes near every chart, as a reader who scrolls, until each that can be seen is drawn."""
        height = self.evaluate("document.documentElement.scrollHeight")
        for top in [*range(0, height, 500), 0]:
            self.evaluate(f"window.scrollTo(0, {top})")
            self.evaluate("new Promise(done => requestAnimationFrame(() => setTimeout(done)))")
        self.wait(f"{self.CHARTS}.every(chart => chart.querySelector('svg, canvas'))")

    def screenshot(self, path: Path, whole: bool = True) -> None:
        """The page as a PNG: all of it, or what the window shows."""
        clip = {}
        if whole:
            size = self.call("Page.getLayoutMetrics")["cssContentSize"]
            clip = {"clip": {"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1}}
        shot = self.call("Page.captureScreenshot", captureBeyondViewport=whole, **clip)
        path.write_bytes(base64.b64decode(shot["data"]))

    def pdf(self) -> bytes:
        """The page on A4, as the print button would have it."""
        printed = self.call("Page.printToPDF", preferCSSPageSize=True, printBackground=True, paperWidth=8.27,
                            paperHeight=11.69)  # fmt: skip
        return base64.b64decode(printed["data"])

    def _events(self, *methods: str) -> list[dict[str, Any]]:
        self.evaluate("0")  # what happened before it has come by now
        return [event["params"] for event in self._browser.events
                if event.get("sessionId") == self._session and event["method"] in methods]  # fmt: skip

    @property
    def requests(self) -> list[str]:
        """The URLs that the page asked for."""
        return [event["request"]["url"] for event in self._events("Network.requestWillBeSent")]

    @property
    def complaints(self) -> list[str]:
        """Errors and warnings of the console, exceptions and refused loads."""
        thrown = [event["exceptionDetails"] for event in self._events("Runtime.exceptionThrown")]
        found = [details["text"] + str(details.get("exception", {}).get("description")) for details in thrown]
        found += [str(event["args"]) for event in self._events("Runtime.consoleAPICalled")
                  if event["type"] in ("error", "warning", "assert")]  # fmt: skip
        return found + [event["entry"]["text"] for event in self._events("Log.entryAdded")]


@contextlib.contextmanager
def started() -> Iterator[Browser]:
    """A running browser with a profile of its own; needs that `find` finds one."""
    program = find()
    assert program, "no Chromium is installed"
    profile = tempfile.mkdtemp()
    browser = Browser(program, profile)
    try:
        yield browser
    finally:
        browser.close()
        shutil.rmtree(profile, ignore_errors=True)  # a helper process may still write to it
