"""A headless Chromium driven through its debugging pipe: no package, no port, no network."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")


def find() -> str | None:
    """The browser on this machine, if there is one."""
    return os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)


class Browser:
    """One page; `evaluate` runs JavaScript in it, `requests` are the addresses it asked for."""

    def __init__(self, to: int, answers: int, timeout: float):
        self._to, self._answers, self._timeout = to, answers, timeout
        self._buffer, self._count, self._session = b"", 0, None
        self.requests: list[str] = []
        self.problems: list[str] = []

    def _read(self) -> dict[str, Any]:
        end = time.monotonic() + self._timeout
        while b"\0" not in self._buffer:
            left = end - time.monotonic()
            if left <= 0 or not select.select([self._answers], [], [], left)[0]:
                raise TimeoutError(f"the browser said nothing for {self._timeout} s")
            piece = os.read(self._answers, 1 << 16)
            if not piece:
                raise RuntimeError("the browser went away")
            self._buffer += piece
        text, _, self._buffer = self._buffer.partition(b"\0")
        message = json.loads(text)
        self._note(message.get("method"), message.get("params", {}))
        return message

    def _note(self, method: str | None, params: dict[str, Any]) -> None:
        if method == "Network.requestWillBeSent":
            self.requests.append(params["request"]["url"])
        elif method == "Log.entryAdded" and params["entry"]["level"] == "error":
            self.problems.append(params["entry"]["text"])
        elif method == "Runtime.exceptionThrown":
            self.problems.append(json.dumps(params["exceptionDetails"]))

    def send(self, method: str, **params: Any) -> dict[str, Any]:
        """The result of one command of the DevTools protocol."""
        self._count += 1
        message: dict[str, Any] = {"id": self._count, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._to, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._read()
            if answer.get("id") == self._count:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                return answer["result"]

    def open(self, page: Path) -> None:
        """Go to a file and wait until a head is drawn."""
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        attached = self.send("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.send(f"{domain}.enable")
        self.send("Page.navigate", url=page.as_uri())
        self.wait("document.documentElement?.dataset.shown")

    def evaluate(self, script: str) -> Any:
        """The value of a JavaScript expression."""
        answer = self.send("Runtime.evaluate", expression=script, returnByValue=True)
        if "exceptionDetails" in answer:
            raise RuntimeError(json.dumps(answer["exceptionDetails"]))
        return answer["result"].get("value")

    def wait(self, script: str, wanted: Any = None) -> Any:
        """Wait until an expression is true, or equals `wanted`."""
        end = time.monotonic() + self._timeout
        while time.monotonic() < end:
            value = self.evaluate(script)
            if value == wanted if wanted is not None else value:
                return value
            time.sleep(0.02)
        raise TimeoutError(f"{script} stayed {value!r}; {self.problems}")

    def text(self, selector: str) -> str:
        """The text of an element."""
        return self.evaluate(f"document.querySelector({json.dumps(selector)}).textContent")

    def mouse(self, selector: str, *, click: bool = False, at: tuple[float, float] = (0.5, 0.5)):
        """Move the mouse onto a part of an element, and click."""
        x, y = self.evaluate(
            f"(() => {{ const e = document.querySelector({json.dumps(selector)});"
            "e.scrollIntoView({block: 'center'}); const r = e.getBoundingClientRect();"
            f"return [r.left + r.width * {at[0]}, r.top + r.height * {at[1]}]; }})()"
        )
        for kind in ("mouseMoved", *(("mousePressed", "mouseReleased") if click else ())):
            button = {"button": "left", "clickCount": 1} if kind != "mouseMoved" else {}
            self.send("Input.dispatchMouseEvent", type=kind, x=x, y=y, **button)

    def press(self, key: str) -> None:
        """Press and release a key."""
        text = {"text": "\r"} if key == "Enter" else {}
        self.send("Input.dispatchKeyEvent", type="keyDown", key=key, code=key, **text)
        self.send("Input.dispatchKeyEvent", type="keyUp", key=key, code=key)


@contextlib.contextmanager
def browser(profile: Path, *, timeout: float = 60) -> Iterator[Browser]:
    """A browser that ends with the block."""
    low = [*os.pipe(), *os.pipe()]
    # Chromium reads commands from descriptor 3 and answers on 4: keep ours out of the way.
    commands, to, answers, replies = (fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10) for end in low)
    for end in low:
        os.close(end)
    program = find() or ""
    start = (
        f"import os, sys; os.dup2({commands}, 3); os.dup2({replies}, 4);"
        "os.execv(sys.argv[1], sys.argv[1:])"
    )
    options = [
        "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
        "--no-first-run", "--disable-background-networking", "--disable-component-update",
        "--window-size=1200,1600", f"--user-data-dir={profile}", "--remote-debugging-pipe",
    ]  # fmt: skip
    process = subprocess.Popen(
        [sys.executable, "-c", start, program, *options],
        pass_fds=(commands, replies),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    os.close(commands)
    os.close(replies)
    page = Browser(to, answers, timeout)
    try:
        yield page
    finally:
        with contextlib.suppress(Exception):
            page._session = None
            page.send("Browser.close")
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        os.close(to)
        os.close(answers)
