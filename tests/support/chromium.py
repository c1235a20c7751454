"""A headless Chromium, driven over a pipe in its own protocol (https://chromedevtools.github.io/devtools-protocol)."""

from __future__ import annotations

import base64
import fcntl
import functools
import http.server
import json
import os
import queue
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

PROGRAM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
_FLAGS = (
    *("--headless", "--no-sandbox", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update", "--disable-dev-shm-usage"),
    *("--no-default-browser-check", "--remote-debugging-pipe"),
)
# A graphics card made of software, which computes on the processor what a page asks of it.
_GRAPHICS = (
    *("--enable-unsafe-webgpu", "--use-webgpu-adapter=swiftshader", "--enable-features=Vulkan"),
    *("--use-angle=swiftshader", "--enable-unsafe-swiftshader"),
)
_PATIENCE = 60.0  # seconds for whatever a page does


class Chromium:
    """One browser with an empty profile, without a graphics card or with one of software."""

    def __init__(self, profile: Path, *, graphics: bool) -> None:
        (reads, self._out), (self._in, writes) = _pipe(), _pipe()
        # The protocol's pipes are descriptors 3 and 4 of the browser, which bash gives them whatever they are here.
        command = [
            "bash",
            "-c",
            f'exec "$0" "$@" 3<&{reads} 4>&{writes}',
            PROGRAM,
            f"--user-data-dir={profile}",
            *_FLAGS,
            *(_GRAPHICS if graphics else ("--disable-gpu",)),
            "about:blank",
        ]
        self._process = subprocess.Popen(
            command, pass_fds=(reads, writes), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        os.close(reads)
        os.close(writes)
        self._answers: dict[int, queue.SimpleQueue[dict[str, Any]]] = {}
        self._last = 0
        self.requests: list[str] = []  # every address that a page asked for
        self.errors: list[str] = []  # what pages said to their console as an error, or threw
        threading.Thread(target=self._listen, daemon=True).start()

    def page(self) -> Page:
        """A new, empty page."""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network"):
            self.call(f"{domain}.enable", session=session)
        return Page(self, session)

    def call(self, method: str, session: str = "", **parameters: Any) -> dict[str, Any]:
        """Ask the browser for something, and wait for the answer."""
        self._last += 1
        number, answers = self._last, queue.SimpleQueue[dict[str, Any]]()
        self._answers[number] = answers
        message = {"id": number, "method": method, "params": parameters} | ({"sessionId": session} if session else {})
        os.write(self._out, json.dumps(message).encode() + b"\0")
        answer = answers.get(timeout=_PATIENCE)
        assert "error" not in answer, f"{method}: {answer['error']}"
        return answer["result"]

    def _listen(self) -> None:
        rest = b""
        while data := os.read(self._in, 1 << 20):
            *whole, rest = (rest + data).split(b"\0")
            for each in whole:
                self._take(json.loads(each))

    def _take(self, message: dict[str, Any]) -> None:
        said = message.get("params", {})
        if "id" in message:
            self._answers.pop(message["id"]).put(message)
        elif message["method"] == "Network.requestWillBeSent":
            self.requests.append(said["request"]["url"])
        elif message["method"] == "Runtime.exceptionThrown":
            self.errors.append(said["exceptionDetails"]["exception"].get("description", ""))
        elif message["method"] == "Runtime.consoleAPICalled" and said["type"] == "error":
            self.errors.append(str([each.get("value", each.get("description")) for each in said["args"]]))

    def close(self) -> None:
        """End it."""
        os.close(self._out)  # it ends with its pipe
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait(10)


def _pipe() -> list[int]:
    """Both ends of a pipe, above the descriptors that the browser wants."""
    ends = os.pipe()
    high = [fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10) for end in ends]
    for end in ends:
        os.close(end)
    return high


class Page:
    """One page of a browser."""

    def __init__(self, browser: Chromium, session: str) -> None:
        self.browser = browser
        self._session = session

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Ask for something about this page."""
        return self.browser.call(method, self._session, **parameters)

    def open(self, url: str) -> str:
        """Go there, and wait until the page is ready or has refused; returns which."""
        self.call("Page.navigate", url=url)
        return self.settled(url)

    def reload(self) -> str:
        """Load the page again."""
        self.do("document.documentElement.dataset.state = ''")
        self.call("Page.reload")
        return self.settled("")

    def settled(self, url: str) -> str:
        """Wait for the state that the page says it is in."""
        return self.until(f"location.href.startsWith('{url}') && document.documentElement.dataset.state")

    def do(self, script: str) -> Any:
        """The value of an expression, awaited."""
        found = self.call(
            "Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True, userGesture=True
        )
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def until(self, script: str) -> Any:
        """Wait until an expression is true; its value."""
        end = time.monotonic() + _PATIENCE
        while True:
            try:
                if found := self.do(script):
                    return found
            except AssertionError:  # between two documents
                if time.monotonic() > end:
                    raise
            assert time.monotonic() < end, f"{script}\n{self.browser.errors}"
            time.sleep(0.05)

    def there(self, selector: str, *, text: str = "") -> str:
        """Wait until an element is there and has this in it; what it says."""
        place = f"document.querySelector({json.dumps(selector)})"
        try:
            self.until(f"Boolean({place}?.innerText.includes({json.dumps(text)}))")
        except AssertionError:
            assert text in self.text(selector)
            raise
        return self.text(selector)

    def text(self, selector: str) -> str:
        """What an element says; empty when it is not there."""
        return self.do(f"document.querySelector({json.dumps(selector)})?.innerText ?? ''")

    def fill(self, selector: str, text: str) -> None:
        """Type into a field, or choose of a list."""
        place = f"document.querySelector({json.dumps(selector)})"
        self.do(f"{place}.value = {json.dumps(text)}, {place}.dispatchEvent(new Event('change')), true")

    def give(self, selector: str, name: str, data: bytes) -> None:
        """Choose a file."""
        coded = base64.b64encode(data).decode()
        self.do(
            f"""(() => {{
            const [field, chosen] = [document.querySelector({json.dumps(selector)}), new DataTransfer()];
            chosen.items.add(new File([Uint8Array.from(atob({coded!r}), (c) => c.charCodeAt(0))], {json.dumps(name)}));
            field.files = chosen.files;
            field.dispatchEvent(new Event('change'));
            }})()"""
        )

    def click(self, selector: str) -> None:
        """Press a button."""
        self.do(f"document.querySelector({json.dumps(selector)}).click()")

    def picture(self, path: Path, width: int) -> None:
        """Save how all of the page looks at this width, in pixels."""
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=844, deviceScaleFactor=1, mobile=width < 600
        )
        data = self.call("Page.captureScreenshot", captureBeyondViewport=True)["data"]
        path.write_bytes(base64.b64decode(data))


@contextmanager
def browser(*, graphics: bool = False) -> Iterator[Chromium]:
    """A browser for a while."""
    with tempfile.TemporaryDirectory(prefix="chromium-", ignore_cleanup_errors=True) as profile:
        opened = Chromium(Path(profile), graphics=graphics)
        try:
            yield opened
        finally:
            opened.close()


class Server:
    """A web server of this machine that shows a folder, and can be stopped and started again at its address."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._server: http.server.ThreadingHTTPServer | None = None
        self._port = 0
        self.start()

    @property
    def url(self) -> str:
        """Its address."""
        return f"http://localhost:{self._port}/"

    def start(self) -> None:
        """Serve."""

        class Handler(http.server.SimpleHTTPRequestHandler):
            def log_message(self, *_):
                pass

        handler = functools.partial(Handler, directory=str(self.folder))
        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", self._port), handler)
        self._server.daemon_threads = True
        self._port = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()

    def stop(self) -> None:
        """Be out of reach."""
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._server = None
