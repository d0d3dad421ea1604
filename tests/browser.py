"""A headless Chromium, driven over the pipe of its DevTools protocol: pages are opened, clicked, typed at and looked at."""

import base64
import json
import os
import select
import shutil
import subprocess
import time

SECONDS = 60
NAMES = ("chromium", "chromium-browser", "google-chrome")
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--remote-debugging-pipe",
)
KEYS = {"ArrowRight": 39, "ArrowDown": 40, "ArrowLeft": 37, "ArrowUp": 38, "Home": 36, "End": 35, "Enter": 13, "Tab": 9}


def find() -> str | None:
    return next(filter(None, map(shutil.which, NAMES)), None)


class Browser:
    """
    with Browser(folder for its profile) as browser: one tab.

    requests: URLs that the tab asked for.   said: its console's errors and what its scripts threw.
    """

    def __init__(self, profile):
        self.profile, self.number, self.rest = profile, 0, b""
        self.requests, self.said, self.loaded = [], [], False

    def __enter__(self) -> "Browser":
        theirs_in, self._out = os.pipe()
        self._in, theirs_out = os.pipe()
        # Chromium reads its commands from descriptor 3 and answers on 4.
        script = f'exec "$@" 3<&{theirs_in} 4>&{theirs_out}'
        command = [find(), *FLAGS, f"--user-data-dir={self.profile}", "about:blank"]
        self._process = subprocess.Popen(
            ["bash", "-c", script, "bash", *command],
            pass_fds=(theirs_in, theirs_out),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(theirs_in)
        os.close(theirs_out)
        self._session = None
        try:
            self._session = self.call("Target.attachToTarget", targetId=self._tab(), flatten=True)["sessionId"]
            for domain in ("Page", "Network", "Runtime", "Log"):
                self.call(f"{domain}.enable")
        except BaseException:
            self.__exit__()
            raise
        return self

    def _tab(self) -> str:
        deadline = time.monotonic() + SECONDS
        while time.monotonic() < deadline:  # it answers before it has a tab
            for target in self.call("Target.getTargets")["targetInfos"]:
                if target["type"] == "page":
                    return target["targetId"]
            time.sleep(0.1)
        raise TimeoutError("the browser has no tab")

    def __exit__(self, *exception) -> None:
        self._process.terminate()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        os.close(self._in)
        os.close(self._out)

    def call(self, method: str, **parameters) -> dict:
        self.number += 1
        message = {"id": self.number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        return self._until(lambda answer: answer.get("id") == self.number)["result"]

    def _until(self, wanted) -> dict:
        deadline = time.monotonic() + SECONDS
        while True:
            while b"\0" not in self.rest:
                ready, _, _ = select.select([self._in], [], [], max(0, deadline - time.monotonic()))
                block = os.read(self._in, 1 << 16) if ready else b""
                if not block:
                    raise TimeoutError("the browser did not answer" if not ready else "the browser has ended")
                self.rest += block
            line, _, self.rest = self.rest.partition(b"\0")
            message = json.loads(line)
            self._note(message.get("method"), message.get("params", {}))
            if "error" in message:
                raise RuntimeError(message["error"])
            if wanted(message):
                return message

    def _note(self, method, parameters) -> None:
        if method == "Network.requestWillBeSent":
            self.requests.append(parameters["request"]["url"])
        elif method == "Runtime.exceptionThrown":
            self.said.append(parameters["exceptionDetails"]["text"])
        elif method == "Log.entryAdded" and parameters["entry"]["level"] == "error":
            self.said.append(parameters["entry"]["text"])

    def open(self, url: str, *, width=1200, height=900, dark=False) -> None:
        """Load a page and wait for it; requests and said are of this page alone."""
        self.width = width
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.call("Page.navigate", url="about:blank")  # the same file with another #… would not be loaded again
        self.requests, self.said = [], []
        self.call("Page.navigate", url=url)
        self._until(lambda message: message.get("method") == "Page.loadEventFired")

    def run(self, expression: str):
        """The value of a JavaScript expression, as Python has it."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        if "exceptionDetails" in answer:
            raise RuntimeError(answer["exceptionDetails"]["exception"]["description"])
        return answer["result"].get("value")

    def texts(self, selector: str) -> list[str]:
        return self.run(f"[...document.querySelectorAll({json.dumps(selector)})].map((node) => node.textContent)")

    def press(self, *keys: str) -> None:
        for key in keys:
            options = {"key": key, "code": key, "windowsVirtualKeyCode": KEYS[key]}
            self.call("Input.dispatchKeyEvent", type="keyDown", **options)
            self.call("Input.dispatchKeyEvent", type="keyUp", **options)

    def click(self, selector: str) -> None:
        """A press of the mouse in the middle of what the selector finds first."""
        node = f"document.querySelector({json.dumps(selector)})"
        self.run(f"{node}.scrollIntoView({{block: 'center'}})")
        box = self.run(f"{node}.getBoundingClientRect().toJSON()")
        place = {"x": box["left"] + box["width"] / 2, "y": box["top"] + box["height"] / 2}
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, button="left", clickCount=1, **place)

    def picture(self, file) -> None:
        """PNG of the whole page."""
        size = self.call("Page.getLayoutMetrics")["cssContentSize"]
        clip = {"x": 0, "y": 0, "width": self.width, "height": min(size["height"], 8000), "scale": 1}
        data = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=True, clip=clip)["data"]
        file.write_bytes(base64.b64decode(data))
