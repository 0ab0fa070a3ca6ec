"""The `ollama` command of 0.11.4, which is the Go client: the same words straight to a server and through a router."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
from collections.abc import Generator, Mapping
from pathlib import Path

import pytest

from tests.clients.conftest import Routed
from tests.contract.stage import Stage
from tests.support.ollama_server import ModelFile, real_binary
from tests.support.waiting import eventually_sync

pytestmark = pytest.mark.ollama

_SECONDS = 300
_TERMINAL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|[\u2800-\u28ff] ?")
"""Control codes, and the spinner, which turns as long as it takes."""
_AGE = re.compile(r"(\d+|About an?|Less than an?) (second|minute|hour)s? (ago|from now)")
_ID = re.compile(r"\b[0-9a-f]{12}\b")
"""The manifest names the folder of its store, so its digest is another in each."""
_UNTIL = re.compile(r"(Forever|4 minutes from now|<age>|Stopping\.\.\.)\s*$", re.MULTILINE)


class Command:
    """The program, run in a folder of its own."""

    def __init__(self, binary: Path, folder: Path) -> None:
        self._binary = binary
        self._folder = folder

    def environment(self, stage: Stage) -> Mapping[str, str]:
        return {"PATH": os.environ["PATH"], "HOME": str(self._folder), "OLLAMA_HOST": stage.server.url, "TERM": "dumb"}

    def run(self, stage: Stage, *words: str) -> tuple[int, str]:
        """Exit code and what it printed, without what is for terminals, blanks of tables, ages and ids."""
        done = subprocess.run(
            [str(self._binary), *words], env=dict(self.environment(stage)), capture_output=True, text=True,
            timeout=_SECONDS, check=False, stdin=subprocess.DEVNULL, cwd=self._folder,
        )  # fmt: skip
        text = _ID.sub("<id>", _AGE.sub("<age>", _TERMINAL.sub("", done.stdout + done.stderr)))
        return done.returncode, "\n".join(" ".join(line.split()) for line in text.splitlines())

    @contextlib.contextmanager
    def started(self, stage: Stage, *words: str) -> Generator[subprocess.Popen[bytes]]:
        process = subprocess.Popen(
            [str(self._binary), *words], env=dict(self.environment(stage)), stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, cwd=self._folder,
        )  # fmt: skip
        with process:
            try:
                yield process
            finally:
                process.kill()


@pytest.fixture
def command(tmp_path: Path) -> Command:
    return Command(real_binary(), tmp_path)


def _both(command: Command, straight: Stage, routed: Routed, *words: str) -> str:
    """What the command says, which is the same either way; tables come in no order that is kept from call to call."""
    through, plain = command.run(routed.stage, *words), command.run(straight, *words)
    assert through[0] == plain[0] == 0, (through, plain)
    assert sorted(through[1].splitlines()) == sorted(plain[1].splitlines())
    return through[1]


@pytest.fixture(autouse=True)
def _nothing_loaded(straight: Stage, routed: Routed) -> None:
    straight.unload_all()
    routed.stage.unload_all()


def test_it_creates_runs_lists_shows_stops_copies_and_removes(
    command: Command, straight: Stage, routed: Routed, files: Mapping[str, ModelFile], tmp_path: Path
) -> None:
    parameters = "PARAMETER num_thread 1\nPARAMETER num_predict 6\nPARAMETER seed 1\n"
    (tmp_path / "Modelfile").write_text(f"FROM {files['tiny'].path}\n{parameters}", encoding="utf-8")
    assert "success" in _both(command, straight, routed, "create", "said", "-f", "Modelfile")
    assert len(_both(command, straight, routed, "run", "said", "hello").split()) == 6
    loaded = [_UNTIL.sub("", command.run(stage, "ps")[1]) for stage in (routed.stage, straight)]
    assert loaded[0] == loaded[1]
    assert "said:latest" in loaded[0]
    assert "num_predict" in _both(command, straight, routed, "show", "said")
    _both(command, straight, routed, "cp", "said", "said-again")
    listed = _both(command, straight, routed, "list")
    assert {"said:latest", "said-again:latest", "tiny:latest"} <= set(listed.split())
    _both(command, straight, routed, "stop", "said")
    for stage in (routed.stage, straight):
        eventually_sync(lambda stage=stage: not stage.loaded(), what="the end of the stopped model")
    _both(command, straight, routed, "rm", "said", "said-again")
    assert "said" not in command.run(routed.stage, "list")[1]


@pytest.mark.parametrize("words", [("show", "nope"), ("rm", "nope"), ("cp", "nope", "x"), ("stop", "nope")])
def test_it_tells_the_same_error(command: Command, straight: Stage, routed: Routed, words: tuple[str, ...]) -> None:
    through, plain = command.run(routed.stage, *words), command.run(straight, *words)
    assert through == plain
    assert through[0] != 0
    assert "nope" in through[1]


def test_a_pull_that_cannot_connect_is_told_the_same(command: Command, straight: Stage, routed: Routed) -> None:
    words = ("pull", "--insecure", "127.0.0.1:1/library/none")
    through, plain = command.run(routed.stage, *words), command.run(straight, *words)
    assert through[0] == plain[0] == 1
    assert through[1].splitlines()[-1] == plain[1].splitlines()[-1]
    assert "connection refused" in through[1]


def test_an_interrupted_run_frees_its_slot(command: Command, routed: Routed) -> None:
    with command.started(routed.stage, "run", "big", "hello") as process:
        assert process.stdout is not None
        assert process.stdout.read(1)
        process.send_signal(signal.SIGINT)
        process.wait(timeout=_SECONDS)
    body = {"model": "big", "prompt": "x", "stream": False, "options": {"num_predict": 2, "seed": 1}}
    assert routed.stage.post("/api/generate", body)["eval_count"] == 2
