"""A small server for the supervisor's tests: answers `/api/version`, can start a runner, and can misbehave.

Emulates only what a supervisor sees of a process. FAKE_PLAY is a comma-separated list of behaviours:
  runner     starts a child in its process group, as Ollama does for a model
  deaf       ignores SIGTERM            exit3      exits with code 3 after two lines
  mute       never listens              cpu        reports only the CPU
  onegpu     reports only the first of its GPUs
  numbered   reports GPUs by number, as servers from 0.30 do
  half       writes an unterminated line and exits
Files in FAKE_DIR: `version` overrides the version; while `hang` exists, requests hang; while `ill` exists, they fail.
Each start appends the pid to `starts`; `runner` has the runner's pid.
"""

from __future__ import annotations

import http.server
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

FOLDER = Path(os.environ["FAKE_DIR"])
PLAY = os.environ.get("FAKE_PLAY", "").split(",")


def say(line: str) -> None:
    print(line, flush=True)


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        while (FOLDER / "hang").exists():
            threading.Event().wait(0.02)
        version = FOLDER / "version"
        text = json.dumps({"version": version.read_text().strip() if version.exists() else "1.2.3"}).encode()
        status = 500 if (FOLDER / "ill").exists() else 200
        self.send_response(status if self.path == "/api/version" else 404)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *arguments: object) -> None:
        del arguments


class Server(http.server.ThreadingHTTPServer):
    daemon_threads = True


def report_gpus() -> None:
    gpus = [gpu for gpu in os.environ.get("CUDA_VISIBLE_DEVICES", "-1").split(",") if gpu != "-1"]
    if "cpu" in PLAY or not gpus:
        say('level=INFO msg="inference compute" id=cpu library=cpu')
        return
    for index, gpu in enumerate(gpus[:1] if "onegpu" in PLAY else gpus):
        say(f'level=INFO msg="inference compute" id={index if "numbered" in PLAY else gpu} library=CUDA')


def main() -> None:
    with (FOLDER / "starts").open("a") as starts:
        starts.write(f"{os.getpid()}\n")
    if "deaf" in PLAY:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if "runner" in PLAY:
        runner = subprocess.Popen([sys.executable, "-c", "import signal; signal.pause()", "runner"])
        (FOLDER / "runner.new").write_text(str(runner.pid))
        (FOLDER / "runner.new").rename(FOLDER / "runner")
    if "exit3" in PLAY:
        say("first line")
        say("Error: something is wrong")
        sys.exit(3)
    if "half" in PLAY:
        sys.stderr.write("an end without a newline")
        os._exit(1)
    if "mute" in PLAY:
        say("not listening")
        signal.pause()
    host, _, port = os.environ["OLLAMA_HOST"].partition(":")
    server = Server((host, int(port)), Handler)
    say("listening")
    report_gpus()
    server.serve_forever()


if __name__ == "__main__":
    main()
