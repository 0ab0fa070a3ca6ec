"""A router over one server, started for an examination and asked as any client would ask it."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Generator, Iterator, Mapping
from pathlib import Path
from typing import Any

_START_SECONDS = 90.0
_STOP_SECONDS = 60.0
REQUEST_SECONDS = 240.0


class ServedRouter:
    """A running router. `log` is the file of its log lines."""

    def __init__(self, port: int, log: Path) -> None:
        self._base = f"http://127.0.0.1:{port}"
        self.log = log

    def call(self, method: str, path: str, body: Any = None, seconds: float = REQUEST_SECONDS) -> tuple[int, Any]:
        """Status and JSON of a reply; 0 and the error's text where there was none. `body` is JSON, or an open file."""
        headers: dict[str, str] = {}
        if hasattr(body, "read"):
            data = body
            headers["Content-Length"] = str(os.fstat(body.fileno()).st_size)
        else:
            data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self._base + path, data, headers, method=method)
        try:
            with urllib.request.urlopen(request, timeout=seconds) as response:
                return response.status, _parsed(response.read())
        except urllib.error.HTTPError as error:
            return error.code, _parsed(error.read())
        except OSError as error:
            return 0, str(error)

    def generate(self, model: str, options: Mapping[str, Any], words: int = 8) -> tuple[int, Any]:
        """One answer to a prompt of so many words."""
        prompt = " ".join(f"word{index % 97}" for index in range(words))
        body = {"model": model, "prompt": prompt, "raw": True, "stream": False, "options": dict(options)}
        return self.call("POST", "/api/generate", body)

    def unload(self, model: str) -> None:
        """Ends when no server lists the model any more."""
        self.call("POST", "/api/generate", {"model": model, "keep_alive": 0})
        wait_until(lambda: not self.call("GET", "/api/ps")[1].get("models"), 30)

    def events(self, name: str) -> Iterator[dict[str, Any]]:
        """Log lines of one event, oldest first."""
        for line in self.log.read_text(encoding="utf-8", errors="replace").splitlines():
            with contextlib.suppress(ValueError):
                entry = json.loads(line)
                if entry.get("event") == name:
                    yield entry


@contextlib.contextmanager
def served(folder: Path, config: Mapping[str, Any], *arguments: str) -> Generator[ServedRouter]:
    """Starts `llamayard serve` with this configuration (JSON is YAML), and stops it at the end of the block."""
    file, log = folder / "config.yaml", folder / "router.log"
    file.write_text(json.dumps(config), encoding="utf-8")
    command = [sys.executable, "-m", "router", "serve", "--config", str(file), *arguments]
    with log.open("ab") as output, subprocess.Popen(command, stdout=output, stderr=output) as process:
        router = ServedRouter(config["server"]["port"], log)
        try:
            if not wait_until(lambda: router.call("GET", "/ready", seconds=5)[0] == 200, _START_SECONDS):
                raise RuntimeError(f"the router did not start:\n{log.read_text(errors='replace')[-3000:]}")
            yield router
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(_STOP_SECONDS)


def wait_until(condition: Any, seconds: float) -> bool:
    """Whether the condition held within the time; asked ten times a second."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


def _parsed(data: bytes) -> Any:
    try:
        return json.loads(data) if data else {}
    except ValueError:
        return data.decode(errors="replace")
