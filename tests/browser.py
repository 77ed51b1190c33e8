"""A real Chromium, driven by Debian's chromium-driver over WebDriver's plain HTTP protocol."""

import base64
import json
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

INSTALLED = bool(shutil.which("chromium") and shutil.which("chromedriver"))
KEYS = {"ArrowRight": "\ue014", "ArrowLeft": "\ue012", "Enter": "\ue007", "Escape": "\ue00c"}


class Browser:
    """Headless, within `with`."""

    def __init__(self, width: int = 1280, height: int = 900, dark: bool = False) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.driver = subprocess.Popen(["chromedriver", f"--port={port}"], stdout=subprocess.DEVNULL)
        self.url = f"http://127.0.0.1:{port}"
        arguments = [
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--hide-scrollbars",
            f"--window-size={width},{height}",
        ]
        arguments += ["--blink-settings=preferredColorScheme=0"] if dark else []
        chrome: dict[str, Any] = {"args": arguments, "binary": shutil.which("chromium")}
        if width < 500:  # as narrow as no window may be
            metrics = {"width": width, "height": height, "pixelRatio": 1, "mobile": True}
            chrome["mobileEmulation"] = {"deviceMetrics": metrics}
        logging = {"browser": "ALL", "performance": "ALL"}
        wanted = {"goog:chromeOptions": chrome, "goog:loggingPrefs": logging}
        session = self._call("/session", {"capabilities": {"alwaysMatch": wanted}})
        self.url += f"/session/{session['sessionId']}"

    def __enter__(self) -> "Browser":
        return self

    def __exit__(self, *_: object) -> None:
        self._call("", None, "DELETE")
        self.driver.terminate()
        self.driver.wait()

    def open(self, page: Path) -> None:
        self._call("/url", {"url": page.resolve().as_uri()})

    def run(self, script: str) -> Any:
        return self._call("/execute/sync", {"script": script, "args": []})

    def until(self, script: str) -> None:
        """Waits until an expression holds."""
        end = time.monotonic() + 20
        while not self.run(f"return Boolean({script})"):
            assert time.monotonic() < end, f"never: {script}"
            time.sleep(0.05)

    def press(self, key: str) -> None:
        strokes = [{"type": kind, "value": KEYS[key]} for kind in ("keyDown", "keyUp")]
        self._call("/actions", {"actions": [{"type": "key", "id": "keyboard", "actions": strokes}]})

    def screenshot(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self._call("/screenshot")))

    def errors(self) -> list[str]:
        """What scripts and the page's own policy complained of; a file that is not there is no error."""
        entries = self._call("/se/log", {"type": "browser"})
        return [entry["message"] for entry in entries if entry["source"] != "network"]

    def requests(self) -> list[str]:
        """The addresses that were asked for."""
        events = [json.loads(entry["message"])["message"] for entry in self._call("/se/log", {"type": "performance"})]
        return [each["params"]["request"]["url"] for each in events if each["method"] == "Network.requestWillBeSent"]

    def _call(self, path: str, body: dict[str, Any] | None = None, method: str | None = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json"}, method=method)
        for _ in range(100):
            try:
                with urllib.request.urlopen(request, timeout=60) as answer:
                    return json.load(answer)["value"]
            except urllib.error.HTTPError as error:
                raise RuntimeError(error.read().decode()) from None
            except urllib.error.URLError:  # it is just starting
                time.sleep(0.1)
        raise RuntimeError("chromedriver does not answer")
