"""A headless Chromium, driven over its DevTools protocol through a pair of pipes."""

from __future__ import annotations

import base64
import itertools
import json
import os
import select
import shutil
import subprocess
import time

PROGRAM = shutil.which("chromium") or shutil.which("chromium-browser")
PATIENCE_S = 120  # bounds a browser that hangs


class Browser:
    """One page of a browser of its own.

    Attributes:
        errors: what the page that is open threw or logged as an error.
    """

    def __init__(self, profile, width=1000, height=900):
        to_read, self._to = os.pipe()
        self._from, to_write = os.pipe()
        options = [
            "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
            "--no-first-run", "--disable-background-networking", "--disable-extensions", "--hide-scrollbars",
            f"--user-data-dir={profile}", f"--window-size={width},{height}",
            "--remote-debugging-pipe", "about:blank",
        ]  # fmt: skip
        # The protocol is spoken on descriptors 3 and 4.
        script = f'exec "$0" "$@" 3<&{to_read} 4>&{to_write} 2>/dev/null'
        self._process = subprocess.Popen(
            ["bash", "-c", script, PROGRAM, *options], pass_fds=(to_read, to_write)
        )
        os.close(to_read)
        os.close(to_write)
        self._numbers = itertools.count(1)
        self._received = b""
        self._session = None
        self._url = ""
        self.errors = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        os.close(self._to)
        self._process.terminate()
        self._process.wait(PATIENCE_S)
        os.close(self._from)

    def open(self, url):
        self.errors.clear()
        self._url = url
        self.call("Page.navigate", url=url)
        self.until("document.readyState === 'complete'")

    def evaluate(self, expression):
        """The value of a JavaScript expression in the page."""
        answer = self.call(
            "Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True
        )
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def until(self, expression):
        """Wait until an expression is true."""
        end = time.monotonic() + PATIENCE_S
        while not self.evaluate(expression):
            assert time.monotonic() < end, f"waited {PATIENCE_S} s for {expression}"
            time.sleep(0.05)

    def screenshot(self, path):
        """The page from top to end, as a PNG."""
        shot = self.call("Page.captureScreenshot", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(shot["data"]))

    def call(self, method, **params):
        """Call a method of the protocol, and give its result."""
        message = {"id": next(self._numbers), "method": method, "params": params}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._to, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == message["id"]:
                assert "error" not in answer, answer["error"]
                return answer["result"]
            if answer.get("method") == "Runtime.exceptionThrown":
                self.errors.append(answer["params"]["exceptionDetails"])
            if answer.get("method") == "Log.entryAdded":
                entry = answer["params"]["entry"]
                # The page before, whose server has gone, may still be complaining.
                own = entry.get("url", self._url).startswith(self._url)
                self.errors += [entry] if own and entry["level"] == "error" else []

    def _next(self):
        """The next message; each ends with a zero byte."""
        while b"\0" not in self._received:
            ready, _, _ = select.select([self._from], [], [], PATIENCE_S)
            assert ready, f"the browser has said nothing for {PATIENCE_S} s"
            read = os.read(self._from, 1 << 16)
            assert read, "the browser has ended"
            self._received += read
        message, _, self._received = self._received.partition(b"\0")
        return json.loads(message)
