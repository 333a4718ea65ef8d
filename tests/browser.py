"""Headless Chromium over its DevTools pipe, with nothing but the standard library."""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update", "--disable-dev-shm-usage", "--hide-scrollbars",
    "--mute-audio", "--remote-debugging-pipe",
)  # fmt: skip
# The browser reads commands from descriptor 3 and answers on 4.
START = "import os, sys; o, r, w, *c = sys.argv; os.dup2(int(r), 3); os.dup2(int(w), 4); os.execv(c[0], c)"


def find_browser() -> str | None:
    """Where Chromium is: ZSQ_BROWSER, or a usual name."""
    own = os.environ.get("ZSQ_BROWSER")
    return own or next((found for name in NAMES if (found := shutil.which(name))), None)


class Browser:
    """One page in a browser of its own.

    Args:
        program: of Chromium.
        profile: an empty folder.

    Attributes:
        events: everything the page reported so far, as (method, parameters).
    """

    def __init__(self, program: str, profile: Path) -> None:
        there, self._send = os.pipe()
        self._receive, back = os.pipe()
        arguments = [sys.executable, "-c", START, str(there), str(back), program, *FLAGS, f"--user-data-dir={profile}"]
        with (profile / "log.txt").open("wb") as log:
            self._process = subprocess.Popen(
                arguments, pass_fds=(there, back), stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        os.close(there)
        os.close(back)
        self._buffer, self._count, self._session = b"", 0, ""
        self.events: list[tuple[str, Mapping[str, Any]]] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        os.close(self._send)
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        os.close(self._receive)

    def call(self, method: str, **parameters: Any) -> Mapping[str, Any]:
        """Send a command and wait for its answer."""
        self._count += 1
        message = {"id": self._count, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._send, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._read()
            if answer.get("id") == self._count:
                assert "error" not in answer, f"{method}: {answer['error']}"
                return answer["result"]

    def open(self, file: Path, *, width: int = 1280, height: int = 900, dark: bool = False, scale: float = 1.0) -> None:
        """Load a page from a file into a viewport of that size, and wait until it has loaded."""
        size = {"width": width, "height": height, "deviceScaleFactor": scale, "mobile": width < 600}
        self.call("Emulation.setDeviceMetricsOverride", **size)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.events.clear()
        self.call("Page.navigate", url=file.as_uri())
        while not any(name == "Page.loadEventFired" for name, _ in self.events):
            self._read()

    def run(self, expression: str) -> Any:
        """Evaluate JavaScript in the page and give its value."""
        result = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def press(self, key: str, code: int) -> None:
        """Press a key where the focus is."""
        text = {"text": "\r"} if key == "Enter" else {}
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code, **text)

    def screenshot(self, file: Path, *, whole: bool = True) -> None:
        """Save the page as a PNG."""
        clip = {}
        if whole:
            size = self.call("Page.getLayoutMetrics")["cssContentSize"]
            clip = {"clip": {"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1}}
        taken = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=whole, **clip)
        file.write_bytes(base64.b64decode(taken["data"]))

    def _read(self, seconds: float = 60.0) -> dict[str, Any]:
        """The next message; an event is also kept."""
        end = time.monotonic() + seconds
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._receive], [], [], max(0.0, end - time.monotonic()))
            part = os.read(self._receive, 1 << 20) if ready else b""
            if not part:
                raise TimeoutError(f"the browser said nothing (exit status {self._process.poll()})")
            self._buffer += part
        message, _, self._buffer = self._buffer.partition(b"\0")
        found: dict[str, Any] = json.loads(message)
        if "method" in found:
            self.events.append((found["method"], found.get("params", {})))
        return found
