"""The `ollama` command (the Go client): the same output directly from a server and through a router."""

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
from tests.support.ollama_server import REAL_VERSION, ModelFile, real_binary
from tests.support.waiting import eventually_sync

pytestmark = pytest.mark.ollama

_SECONDS = 300
_TERMINAL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|[\u2800-\u28ff] ?")
"""Control codes and the spinner."""
_AGE = re.compile(r"(\d+|About an?|Less than an?) (second|minute|hour)s? (ago|from now)")
_ID = re.compile(r"\b[0-9a-f]{12}\b")
"""The manifest names the folder of its store, so its digest differs between stores."""
_COPYING = re.compile(r"copying file sha256:[0-9a-f]{64} \d+%\s*")
"""A bar of progress: the command draws it again, in front of the next line, as often as time allows."""
_UNTIL = re.compile(r"(Forever|4 minutes from now|<age>|Stopping\.\.\.)\s*$", re.MULTILINE)


class Command:
    """Runs the command in a separate folder."""

    def __init__(self, binary: Path, folder: Path) -> None:
        self._binary = binary
        self._folder = folder

    def environment(self, stage: Stage) -> Mapping[str, str]:
        return {"PATH": os.environ["PATH"], "HOME": str(self._folder), "OLLAMA_HOST": stage.server.url, "TERM": "dumb"}

    def run(self, stage: Stage, *arguments: str) -> tuple[int, str]:
        """Exit code and output, without terminal codes, table padding, ages and ids."""
        completed = subprocess.run(
            [str(self._binary), *arguments], env=dict(self.environment(stage)), capture_output=True, text=True,
            timeout=_SECONDS, check=False, stdin=subprocess.DEVNULL, cwd=self._folder,
        )  # fmt: skip
        text = _ID.sub("<id>", _AGE.sub("<age>", _TERMINAL.sub("", completed.stdout + completed.stderr)))
        return completed.returncode, "\n".join(" ".join(line.split()) for line in text.splitlines())

    @contextlib.contextmanager
    def started(self, stage: Stage, *arguments: str) -> Generator[subprocess.Popen[bytes]]:
        process = subprocess.Popen(
            [str(self._binary), *arguments], env=dict(self.environment(stage)), stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, cwd=self._folder,
        )  # fmt: skip
        with process:
            try:
                yield process
            finally:
                process.kill()


@pytest.fixture
def command(routed: Routed, tmp_path: Path) -> Command:
    """The command of the server's version."""
    version = routed.behind.version if routed.behind.kind == "real" else REAL_VERSION
    return Command(real_binary(version), tmp_path)


def _both(command: Command, direct: Stage, routed: Routed, *arguments: str) -> str:
    """The output of the command, which must be the same both ways; the order of table rows is not stable."""
    routed_result, direct_result = command.run(routed.stage, *arguments), command.run(direct, *arguments)
    assert routed_result[0] == direct_result[0] == 0, (routed_result, direct_result)
    assert sorted(routed_result[1].splitlines()) == sorted(direct_result[1].splitlines())
    return routed_result[1]


@pytest.fixture(autouse=True)
def _nothing_loaded(direct: Stage, routed: Routed) -> None:
    direct.unload_all()
    routed.stage.unload_all()


def test_create_run_list_show_stop_copy_and_remove(
    command: Command, direct: Stage, routed: Routed, files: Mapping[str, ModelFile], tmp_path: Path
) -> None:
    parameters = "PARAMETER num_thread 1\nPARAMETER num_predict 6\nPARAMETER seed 1\n"
    (tmp_path / "Modelfile").write_text(f"FROM {files['tiny'].path}\n{parameters}", encoding="utf-8")
    created = [command.run(stage, "create", "said", "-f", "Modelfile") for stage in (routed.stage, direct)]
    assert [code for code, _ in created] == [0, 0], created
    steps = [set(_COPYING.sub("", output).splitlines()) - {""} for _, output in created]
    assert steps[0] == steps[1]
    assert "success" in steps[0]
    assert len(_both(command, direct, routed, "run", "said", "hello").split()) == 6
    loaded = [_UNTIL.sub("", command.run(stage, "ps")[1]) for stage in (routed.stage, direct)]
    assert loaded[0] == loaded[1]
    assert "said:latest" in loaded[0]
    assert "num_predict" in _both(command, direct, routed, "show", "said")
    _both(command, direct, routed, "cp", "said", "said-again")
    listed = _both(command, direct, routed, "list")
    assert {"said:latest", "said-again:latest", "tiny:latest"} <= set(listed.split())
    _both(command, direct, routed, "stop", "said")
    for stage in (routed.stage, direct):
        eventually_sync(lambda stage=stage: not stage.loaded(), what="the end of the stopped model")
    _both(command, direct, routed, "rm", "said", "said-again")
    assert "said" not in command.run(routed.stage, "list")[1]


@pytest.mark.parametrize("arguments", [("show", "nope"), ("rm", "nope"), ("cp", "nope", "x"), ("stop", "nope")])
def test_the_error_is_the_same(command: Command, direct: Stage, routed: Routed, arguments: tuple[str, ...]) -> None:
    routed_result, direct_result = command.run(routed.stage, *arguments), command.run(direct, *arguments)
    assert routed_result == direct_result
    assert routed_result[0] != 0
    assert "nope" in routed_result[1]


def test_a_failed_pull_gives_the_same_error(command: Command, direct: Stage, routed: Routed) -> None:
    arguments = ("pull", "--insecure", "127.0.0.1:1/library/none")
    routed_result, direct_result = command.run(routed.stage, *arguments), command.run(direct, *arguments)
    assert routed_result[0] == direct_result[0] == 1
    assert routed_result[1].splitlines()[-1] == direct_result[1].splitlines()[-1]
    assert "connection refused" in routed_result[1]


def test_an_interrupted_run_frees_its_slot(command: Command, routed: Routed) -> None:
    with command.started(routed.stage, "run", "big", "hello") as process:
        assert process.stdout is not None
        assert process.stdout.read(1)
        process.send_signal(signal.SIGINT)
        process.wait(timeout=_SECONDS)
    body = {"model": "big", "prompt": "x", "stream": False, "options": {"num_predict": 2, "seed": 1}}
    assert routed.stage.post("/api/generate", body)["eval_count"] == 2
