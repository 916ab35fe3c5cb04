"""A headless Chromium, driven over its DevTools protocol: just what the test of a page needs."""

import base64
import itertools
import json
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.request import urlopen

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
# Nothing outside of this machine is asked for anything.
FLAGS = "--headless=new --no-sandbox --disable-gpu --disable-dev-shm-usage --no-first-run --disable-extensions".split()
FLAGS += ["--disable-background-networking", "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"]


class Browser:
    """One tab: JavaScript is evaluated in it, the mouse moved and clicked, and pictures taken."""

    def __init__(self, socket, width: int, height: int):
        self.socket, self.numbers = socket, itertools.count()
        self.call("Page.enable")
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.call("Emulation.setDeviceMetricsOverride", **size)

    def call(self, method: str, **parameters) -> dict:
        number = next(self.numbers)
        self.socket.send(json.dumps({"id": number, "method": method, "params": parameters}))
        while True:
            answer = json.loads(self.socket.recv(timeout=60))
            if answer.get("id") == number:
                assert "error" not in answer, answer
                return answer["result"]

    def open(self, address: str) -> None:
        self.call("Page.navigate", url=address)

    def run(self, script: str):
        """The value of a JavaScript expression."""
        answer = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def wait(self, condition: str, seconds: float = 60) -> None:
        """Until a JavaScript expression is true, or names an element that is there."""
        end = time.monotonic() + seconds
        while not self.run(f"!!({condition})"):
            assert time.monotonic() < end, f"not in {seconds} s: {condition}\n{self.run('document.body.innerText')}"
            time.sleep(0.1)

    def place(self, element: str) -> tuple[float, float]:
        """The middle of the element that an expression names, scrolled into view."""
        box = "(e => {e.scrollIntoView({block: 'center'}); const b = e.getBoundingClientRect(); "
        return tuple(self.run(f"{box} return [b.x + b.width / 2, b.y + b.height / 2]}})({element})"))

    def hover(self, element: str) -> None:
        x, y = self.place(element)
        self.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def click(self, element: str) -> None:
        self.hover(element)
        x, y = self.place(element)
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def click_until(self, element: str, condition: str) -> None:
        """Click again and again: a page that is still being built passes over clicks."""
        for _ in range(60):
            if self.run(f"!!({condition})"):
                return
            if self.run(f"!!({element})"):
                self.click(element)
            time.sleep(1)
        self.wait(condition, 0)

    def type(self, element: str, text: str) -> None:
        """Put text in the place of what the field holds."""
        self.click(element)
        self.run(f"{element}.select()")
        self.call("Input.insertText", text=text)

    def picture(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot")["data"]))


@contextmanager
def browser(folder: Path, width: int = 1280, height: int = 900) -> Iterator[Browser]:
    """Start a Chromium whose profile lies in `folder`, and end it."""
    from websockets.sync.client import connect

    flags = [*FLAGS, f"--user-data-dir={folder}", "--remote-debugging-port=0"]
    process = subprocess.Popen([CHROMIUM, *flags, "about:blank"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        said = folder / "DevToolsActivePort"
        end = time.monotonic() + 60
        while not said.is_file() or not said.read_text().strip():
            assert process.poll() is None and time.monotonic() < end, "Chromium did not start"
            time.sleep(0.1)
        port = said.read_text().split()[0]
        tabs = json.load(urlopen(f"http://127.0.0.1:{port}/json/list"))
        address = next(tab["webSocketDebuggerUrl"] for tab in tabs if tab["type"] == "page")
        with connect(address, max_size=None) as socket:
            yield Browser(socket, width, height)
    finally:
        process.terminate()
        process.wait(30)
