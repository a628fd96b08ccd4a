"""A real browser for tests, driven by its DevTools protocol over two pipes: nothing but an installed Chromium."""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
PATIENCE_S = 60.0
KEYS = {
    "Enter": ("\r", 13),
    " ": (" ", 32),
    "Escape": (None, 27),
    "ArrowDown": (None, 40),
    "/": ("/", 191),
    "Tab": (None, 9),
}


class Browser:
    """One tab of a browser.

    Attributes:
        said: what stood on the console so far, uncaught errors included.
        downloads: folder of what the page saved.
    """

    def __init__(self, folder: Path):
        assert CHROMIUM
        self.said: list[str] = []
        self.downloads = folder / "downloads"
        self.downloads.mkdir(parents=True)
        self._read, theirs_out = os.pipe()
        theirs_in, self._write = os.pipe()

        def as_three_and_four() -> None:
            high = [os.dup(theirs_in), os.dup(theirs_out)]
            os.dup2(high[0], 3)
            os.dup2(high[1], 4)

        self._process = subprocess.Popen(
            [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking",
             "--no-first-run", f"--user-data-dir={folder / 'profile'}", "--remote-debugging-pipe", "about:blank"],
            preexec_fn=as_three_and_four, close_fds=False, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(theirs_in)
        os.close(theirs_out)
        self._number, self._session, self._rest = 0, None, b""
        self._events: list[dict[str, Any]] = []
        targets = self.call("Target.getTargets")["targetInfos"]
        page = next(each["targetId"] for each in targets if each["type"] == "page")
        self._session = self.call("Target.attachToTarget", targetId=page, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")
        self.call("Page.setDownloadBehavior", behavior="allow", downloadPath=str(self.downloads))

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._read)
        os.close(self._write)

    def call(self, method: str, **given: Any) -> dict[str, Any]:
        """One command of the protocol; returns its result."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": given}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        deadline = time.monotonic() + PATIENCE_S
        while True:
            answer = self._message(deadline)
            if answer.get("id") == self._number:
                assert "error" not in answer, f"{method}: {answer['error']}"
                return answer["result"]

    def _message(self, deadline: float) -> dict[str, Any]:
        while b"\0" not in self._rest:
            ready, _, _ = select.select([self._read], [], [], max(deadline - time.monotonic(), 0))
            assert ready, "the browser does not answer"
            more = os.read(self._read, 1 << 20)
            assert more, "the browser ended"
            self._rest += more
        text, _, self._rest = self._rest.partition(b"\0")
        message = json.loads(text)
        given = message.get("params", {})
        if message.get("method") == "Runtime.exceptionThrown":
            self.said.append(str(given["exceptionDetails"].get("exception", {}).get("description") or given))
        elif message.get("method") == "Runtime.consoleAPICalled":
            self.said.append(" ".join(str(each.get("value", each.get("description"))) for each in given["args"]))
        elif message.get("method") == "Log.entryAdded":
            self.said.append(given["entry"]["text"])
        return message

    def open(self, url: str, width: int = 1400, height: int = 900, *, dark: bool = False) -> None:
        """Go somewhere and wait until the page is ready and its charts in sight are drawn."""
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 500
        )
        scheme = "dark" if dark else "light"
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        self.call("Page.navigate", url="about:blank")
        self.call("Page.navigate", url=url)
        self.until("document.body?.dataset.drawn !== undefined")

    def run(self, expression: str) -> Any:
        """The value of an expression in the page, of a promise what it ends in."""
        found = self.call("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def until(self, expression: str) -> Any:
        """Wait for an expression to be true; returns its value."""
        deadline = time.monotonic() + PATIENCE_S
        while not (value := self.run(expression)):
            assert time.monotonic() < deadline, f"{expression} never came true; console: {self.said}"
            time.sleep(0.03)
        return value

    def show(self, selector: str) -> None:
        """Scroll to an element."""
        found = self.run(
            f"document.querySelector({json.dumps(selector)})?.scrollIntoView({{block: 'center', behavior: 'instant'}}) "
            "?? document.querySelector(" + json.dumps(selector) + ") !== null"
        )
        assert found, f"nothing is {selector}"

    def place(self, selector: str) -> tuple[float, float]:
        """The middle of an element, scrolled into sight; nothing moves any more when it is told."""
        for _ in range(2):  # what comes into sight is drawn, and may move what is below
            self.settle()
            self.show(selector)
        self.settle()
        found = self.run(
            f"(() => {{ const box = document.querySelector({json.dumps(selector)}).getBoundingClientRect(); "
            "return [box.x + box.width / 2, box.y + box.height / 2]; })()"
        )
        return found[0], found[1]

    def point(self, selector: str) -> None:
        """Move the mouse over an element."""
        x, y = self.place(selector)
        for step in (3, 0):
            self.call("Input.dispatchMouseEvent", type="mouseMoved", x=x - step, y=y)
        self.settle()

    def click(self, selector: str) -> None:
        x, y = self.place(selector)
        self.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)
        self.settle()

    def press(self, key: str) -> None:
        text, code = KEYS[key]
        given = {"key": key, "windowsVirtualKeyCode": code, **({"text": text} if text else {})}
        self.call("Input.dispatchKeyEvent", type="keyDown", **given)
        self.call("Input.dispatchKeyEvent", type="keyUp", key=key, windowsVirtualKeyCode=code)
        self.settle()

    def write(self, text: str) -> None:
        """Type into what has the focus."""
        self.call("Input.insertText", text=text)
        self.settle()

    def settle(self) -> None:
        """Let two frames pass, and wait until all charts in sight are drawn."""
        self.run("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(() => done(1))))")
        self.until("document.body.dataset.drawn !== undefined")

    def cpu_seconds(self) -> float:
        """Processor time of the page's own thread so far: what others do on the machine does not count."""
        self.call("Performance.enable", timeDomain="threadTicks")
        return {each["name"]: each["value"] for each in self.call("Performance.getMetrics")["metrics"]}["ThreadTime"]

    def downloaded(self, name: str) -> bytes:
        """A file that the page saved, once it is whole."""
        deadline = time.monotonic() + PATIENCE_S
        while not (path := self.downloads / name).is_file():
            assert time.monotonic() < deadline, f"{name} was not saved; there is {os.listdir(self.downloads)}"
            time.sleep(0.05)
        return path.read_bytes()

    def picture(self, *, whole: bool = False) -> bytes:
        """A PNG of what is in sight, or of the whole page."""
        found = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        return base64.b64decode(found["data"])

    def paper(self, path: Path) -> Path:
        """The page as it is printed, as PDF."""
        found = self.call("Page.printToPDF", preferCSSPageSize=True)
        path.write_bytes(base64.b64decode(found["data"]))
        return path


@contextmanager
def browser(folder: Path) -> Iterator[Browser]:
    """A browser with a profile of its own in a folder; closed at the end."""
    tab = Browser(folder)
    try:
        yield tab
    finally:
        tab.close()
