"""The command line: output, error messages and exit codes."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Generator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from router import __version__
from router.app.lifecycle import endpoint_url
from router.cli.main import AUTO_RIG, main
from router.cli.serve import with_rig_if_needed
from router.cli.status import StatusError, watch
from router.cli.status_tables import render_status
from router.config.keys import dotted_keys
from router.config.settings import Settings, load_settings

HOME = {"HOME": tempfile.gettempdir(), "PATH": "/nonexistent"}
"""A home that any user can write, as the state directory must be."""
Captured = pytest.CaptureFixture[str]


def test_version_is_printed(capsys: Captured) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["--version"], HOME)
    assert capsys.readouterr().out == f"llamayard {__version__}\n"
    assert main(["version"], HOME) == 0
    assert capsys.readouterr().out == f"llamayard {__version__}\n"


def test_check_config_shows_every_key_with_its_value_and_source(tmp_path: Path, capsys: Captured) -> None:
    config = tmp_path / "c.yaml"
    config.write_text("queue: {limit: 7}\nollama: {env: {A: b}}\n", encoding="utf-8")
    environment = {**HOME, "LLAMAYARD_LOG__LEVEL": "debug", "LLAMAYARD_OLLAMA__ENV__C": "d"}
    assert main(["check-config", "--config", str(config), "--port", "0"], environment) == 0
    head, *lines, verdict = capsys.readouterr().out.splitlines()
    assert verdict == "configuration is valid"
    shown = {line.partition(" = ")[0]: line.partition(" = ")[2] for line in lines}
    assert head == f"# file: {config}"
    assert list(shown) == list(dotted_keys(Settings))
    assert shown["queue.limit"] == f"7  # {config}"
    assert shown["log.level"] == '"debug"  # environment LLAMAYARD_LOG__LEVEL'
    assert shown["server.port"] == "0  # flag"
    assert shown["ollama.env"] == f'{{"A": "b", "C": "d"}}  # {config}, environment LLAMAYARD_OLLAMA__ENV__C'
    assert shown["queue.timeout_seconds"] == "300.0  # default"


def test_check_config_fails_with_every_problem(tmp_path: Path, capsys: Captured) -> None:
    config = tmp_path / "c.yaml"
    config.write_text("server: {prot: 1}\n", encoding="utf-8")
    assert main(["check-config", "--config", str(config), "--set", "queue.limit=x"], HOME) == 2
    captured = capsys.readouterr()
    assert captured.out == "2 errors\n"
    first, second = captured.err.splitlines()
    assert first == "llamayard: server.prot: unknown key; did you mean `server.port`?"
    assert second.startswith("llamayard: queue.limit: 'x' (flag)")


def test_check_config_reads_the_variables_of_each_instance(capsys: Captured) -> None:
    assert main(["check-config", "--set", "ollama.instance_env={spread: {OLLAMA_NUM_PARALLEL: many}}"], HOME) == 2
    assert "instance spread: OLLAMA_NUM_PARALLEL='many'" in capsys.readouterr().err
    assert main(["check-config", "--set", "ollama.env={OLLAMA_CONTEXT_LENGTH: 8k}"], HOME) == 2
    assert "OLLAMA_CONTEXT_LENGTH='8k'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "reported"),
    [
        (["serve", "--set", "queue.limit"], "write KEY=VALUE"),
        (["serve", "--port", "x"], "server.port: 'x' (flag)"),
        (["serve", "--config", "/nonexistent/c.yaml"], "/nonexistent/c.yaml: cannot be read"),
        (["serve", "--rig", "h100", "--set", "ollama.env={OLLAMA_NUM_PARALLEL: many}"], "OLLAMA_NUM_PARALLEL='many'"),
        (["status", "--set", "ollama.env=["], "flag ollama.env: is not a YAML list or mapping"),
    ],
)
def test_a_mistake_ends_in_a_sentence_and_code_2(arguments: list[str], reported: str, capsys: Captured) -> None:
    assert main(arguments, HOME) == 2
    captured = capsys.readouterr()
    assert reported in captured.err
    assert "Traceback" not in captured.err
    assert len(captured.err.splitlines()) == 1


def test_serve_without_ollama_says_what_to_do(capsys: Captured) -> None:
    assert main(["serve"], HOME) == 2
    reported = capsys.readouterr().err
    assert "no program `ollama` on PATH" in reported
    assert "--rig" in reported


def test_check_config_as_json_has_the_documented_shape(tmp_path: Path, capsys: Captured) -> None:
    config = tmp_path / "c.yaml"
    config.write_text("queue: {limit: 7}\naliases: {a: gone}\n", encoding="utf-8")
    assert main(["check-config", "--json", "--config", str(config)], HOME) == 0
    document = json.loads(capsys.readouterr().out)
    (warning,) = document["warnings"]
    assert warning.startswith("aliases.a: gone is not among the models in ")
    assert list(document["keys"]) == list(dotted_keys(Settings))
    assert document["keys"]["queue.limit"] == {"value": 7, "origin": str(config)}
    assert document["keys"]["server.port"] == {"value": 11434, "origin": "default"}
    assert {key: document[key] for key in document if key not in ("warnings", "keys")} == {
        "valid": True, "verdict": "configuration is valid, 1 warning", "file": str(config), "errors": [],
        "unchecked": [],
    }  # fmt: skip
    assert main(["check-config", "--json", "--set", "queue.limit=x"], HOME) == 2
    captured = capsys.readouterr()
    refused = json.loads(captured.out)
    assert (captured.err, refused["valid"], refused["verdict"], refused["keys"]) == ("", False, "1 error", {})
    assert refused["errors"] == ["queue.limit: 'x' (flag) cannot be used: must be a whole number from 0 to 1000000"]


def test_check_config_changed_shows_only_keys_that_differ_from_their_default(tmp_path: Path, capsys: Captured) -> None:
    config = tmp_path / "c.yaml"
    config.write_text("queue: {limit: 7, timeout_seconds: 300}\n", encoding="utf-8")
    assert main(["check-config", "--changed", "--config", str(config)], HOME) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"# file: {config}", f"queue.limit = 7  # {config}", "configuration is valid",
    ]  # fmt: skip
    assert main(["check-config", "--changed", "--json", "--config", str(config)], HOME) == 0
    assert list(json.loads(capsys.readouterr().out)["keys"]) == ["queue.limit"]


@pytest.mark.parametrize("key", [
    "server.prot=1", "queue.limit=x", "ollama.env={OLLAMA_NUM_PARALLEL: many}", "state_directory=/dev/null",
    "server.host=no-such-host.invalid", "instances=[{url: 'http://127.0.0.1:11434'}]", "models={a: {gpus: [0, 0]}}",
])  # fmt: skip
def test_check_config_and_serve_end_with_the_same_code(key: str, capsys: Captured) -> None:
    assert main(["check-config", "--rig", "h100", "--set", key], HOME) == 2
    checked = capsys.readouterr().err
    assert main(["serve", "--rig", "h100", "--set", key], HOME) == 2
    assert capsys.readouterr().err == checked


@pytest.mark.parametrize("arguments", [[], ["sevre"], ["serve", "--prot", "1"]])
def test_a_wrong_command_ends_in_its_usage_and_code_2(arguments: list[str], capsys: Captured) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments, HOME)
    assert ended.value.code == 2
    assert "usage: llamayard" in capsys.readouterr().err


def test_the_module_ends_with_the_commands_code(root: Path) -> None:
    command = [sys.executable, "-m", "router", "check-config", "--port", "x"]
    ended = subprocess.run(command, cwd=root, env=HOME, capture_output=True, text=True, timeout=300, check=False)
    assert (ended.returncode, ended.stdout) == (2, "1 error\n")


def test_simulate_runs_and_refuses_unknown_gpus_with_code_2(capsys: Captured) -> None:
    arguments = ["simulate", "--rig", "2x3090", "--seconds", "20", "--policy", "stock-0.24", "--json", "--out", "-"]
    assert main(arguments, HOME) == 0
    assert json.loads(capsys.readouterr().out)["simulated"] is True
    assert main(["simulate", "--rig", "2x9999"], HOME) == 2
    assert "no GPU '9999'" in capsys.readouterr().err


def test_serve_does_not_import_the_other_commands(root: Path) -> None:
    others = ("router.lab.simulator", "router.cli.check_config", "router.cli.status", "router.cli.simulate")
    shared_with_emulator = {f"router.lab.simulator{module}" for module in ("", ".true_footprint", ".world")}
    imported = _imported(root, "import router.cli.main, router.cli.serve", others)
    assert set(imported) <= shared_with_emulator


@pytest.mark.parametrize("arguments", [["--version"], ["version"], ["--help"], ["serve", "--help"]])
def test_version_and_help_import_no_library(root: Path, arguments: list[str]) -> None:
    program = (
        f"import contextlib, router.cli.main\nwith contextlib.suppress(SystemExit): router.cli.main.main({arguments})"
    )
    libraries = ("aiohttp", "pydantic", "structlog", "uvloop", "yaml", "router.app", "router.config")
    assert _imported(root, program, libraries) == []


STATUS_NEEDS_NONE_OF = ("aiohttp", "asyncio", "pydantic", "pydantic_settings", "structlog", "uvloop", "msgspec",
                        "prometheus_client", "psutil", "pynvml", "httptools", "router.app", "router.scheduler",
                        "router.engines", "router.proxy", "router.lab")  # fmt: skip


@pytest.mark.parametrize("arguments", [["--port", "1"], ["--config", "llamayard.yaml", "--json"]])
def test_status_imports_nothing_that_only_the_router_needs(root: Path, tmp_path: Path, arguments: list[str]) -> None:
    path = tmp_path / "llamayard.yaml"
    path.write_text("server: {port: 1}\nplacement: {exclusive_gpus: {}}\n", encoding="utf-8")
    given = [str(path) if argument == path.name else argument for argument in arguments]
    program = f"import router.cli.main\nassert router.cli.main.main({['status', *given]}, {HOME}) == 1"
    assert _imported(root, program, STATUS_NEEDS_NONE_OF) == []


def _imported(root: Path, program: str, prefixes: tuple[str, ...]) -> list[str]:
    """Modules with these prefixes that a new process has imported after the program."""
    report = (
        f"{program}\nimport json, sys\nprint(json.dumps([name for name in sys.modules if name.startswith({prefixes})]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", report], cwd=root, capture_output=True, text=True, check=True, timeout=60
    )
    return json.loads(done.stdout.splitlines()[-1])


@contextlib.contextmanager
def _closed_pipe() -> Generator[int]:
    reader, writer = os.pipe()
    os.close(reader)
    try:
        yield writer
    finally:
        os.close(writer)


@pytest.mark.parametrize("arguments", [["check-config"], ["version"]])
def test_a_closed_output_pipe_ends_a_command_quietly(root: Path, arguments: list[str]) -> None:
    with _closed_pipe() as closed:
        ended = subprocess.run(
            [sys.executable, "-m", "router", *arguments], cwd=root, env=HOME, stdout=closed, stderr=subprocess.PIPE,
            timeout=300, check=False,
        )  # fmt: skip
    assert (ended.returncode, ended.stderr) == (141, b"")


_LOGS = """
import asyncio, structlog
from router.observability.logging import RequestLines, configure_logs
configure_logs("json", "info")
async def main():
    structlog.get_logger("x").info("something")
    lines = RequestLines("info")
    lines("info", {})
    lines.flush()
asyncio.run(main())
print("continues")
"""


def test_log_lines_for_a_closed_pipe_are_dropped_and_the_program_continues(root: Path) -> None:
    with _closed_pipe() as closed:
        ended = subprocess.run(
            [sys.executable, "-c", _LOGS], cwd=root, env=HOME, stdout=subprocess.PIPE, stderr=closed, timeout=300,
            check=False,
        )  # fmt: skip
    assert ended.stdout == b"continues\n"


@pytest.mark.parametrize(
    ("pair", "reported"),
    [
        ("state_directory=/dev/null/x", "state_directory: /dev/null/x: /dev/null is a file, not a directory"),
        ("models={m: {layout: cpu}}", "models.m: layout: cpu needs an instance on the CPU, and there is none"),
        ("placement.vram_margin_bytes=999GiB", "placement.vram_margin_bytes: 999.0 GiB leave no"),
        ("instances=[{name: a, gpus: [7]}]", "instance a: gpus: '7' is no GPU of this machine; there are: 0: GPU-"),
        ("models={m: {gpus: [7]}}", "models.m.gpus: '7' is no GPU of this machine; there are: 0: GPU-"),
    ],
)
def test_a_problem_found_at_startup_ends_in_a_sentence_too(
    root: Path, tmp_path: Path, pair: str, reported: str
) -> None:
    command = [sys.executable, "-m", "router", "serve", "--port", "0", "--rig", "h100", "--set", pair]
    environment = {**HOME, "LLAMAYARD_STATE_DIRECTORY": str(tmp_path)}
    ended = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr.splitlines()[-1].startswith(f"llamayard: {reported}")
    assert "Traceback" not in ended.stderr


def test_auto_serves_a_real_ollama_if_there_is_one(tmp_path: Path, capsys: Captured) -> None:
    binary = tmp_path / "ollama"
    binary.write_text("#!/bin/sh\n", encoding="utf-8")
    settings = load_settings(None, HOME)
    binary.chmod(0o600)
    assert with_rig_if_needed(settings, {"PATH": str(tmp_path)}, AUTO_RIG).rig == AUTO_RIG
    assert "EMULATED" in capsys.readouterr().err
    binary.chmod(0o700)
    assert with_rig_if_needed(settings, {"PATH": str(tmp_path)}, AUTO_RIG) == settings
    assert capsys.readouterr().err == ""


def test_auto_leaves_a_chosen_rig_and_attached_servers_alone() -> None:
    rig = load_settings(None, HOME, {"rig": "h100"})
    attached = load_settings(None, HOME, {"instances": [{"url": "http://127.0.0.1:11500"}]})
    assert with_rig_if_needed(rig, HOME, AUTO_RIG).rig == "h100"
    assert with_rig_if_needed(attached, HOME, AUTO_RIG).rig is None
    both = load_settings(None, HOME, {"instances": [{"url": "http://127.0.0.1:11500"}], "discover": "true"})
    assert with_rig_if_needed(both, HOME, AUTO_RIG).rig == AUTO_RIG


STATUS: dict[str, Any] = {"gpus": [], "queue": {"waiting": 3, "limit": 512}}


class _Answer(BaseHTTPRequestHandler):
    """Sends the prepared answer; `answers` is an attribute of the server."""

    def do_GET(self) -> None:
        status, body = self.server.answers[self.path]  # type: ignore[attr-defined]
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Logs nothing."""


@pytest.fixture
def router() -> Generator[HTTPServer]:
    server = HTTPServer(("127.0.0.1", 0), _Answer)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def _status(router: HTTPServer, status: int, body: bytes, *flags: str) -> int:
    router.answers = {"/llamayard/status": (status, body)}  # type: ignore[attr-defined]
    return main(["status", "--host", "0.0.0.0", "--port", str(router.server_port), *flags], HOME)


def test_status_reads_the_running_router(router: HTTPServer, capsys: Captured) -> None:
    assert _status(router, 200, json.dumps(STATUS).encode()) == 0
    assert capsys.readouterr().out == render_status(STATUS) + "\n"
    assert _status(router, 200, json.dumps(STATUS).encode(), "--json") == 0
    assert json.loads(capsys.readouterr().out) == STATUS


@pytest.mark.parametrize(
    ("host", "url"),
    [("127.0.0.1", "http://127.0.0.1:11434"), ("::1", "http://[::1]:11434"), ("::", "http://[::]:11434")],
)
def test_the_logged_address_is_a_valid_url(host: str, url: str) -> None:
    assert endpoint_url("http", host, 11434) == url


@pytest.mark.parametrize(
    ("status", "body", "reported"),
    [
        (404, b"404 page not found", "perhaps a stock Ollama"),
        (404, b"404 page not found", "add --port"),
        (200, b"hello", "not JSON"),
        (200, b"[]", "not a JSON object"),
    ],
)
def test_status_reports_another_server_on_the_port(
    router: HTTPServer, status: int, body: bytes, reported: str, capsys: Captured
) -> None:
    assert _status(router, status, body) == 1
    assert reported in capsys.readouterr().err


def test_status_reports_that_nothing_listens(router: HTTPServer, capsys: Captured) -> None:
    port = router.server_port
    router.shutdown()
    router.server_close()
    assert main(["status", "--port", str(port)], HOME) == 1
    reported = capsys.readouterr().err
    assert f"no answer from 127.0.0.1:{port}" in reported
    assert "if the router listens elsewhere, add --port, --host, or the --config" in reported


def test_watch_prints_the_status_until_ctrl_c_even_while_the_router_is_down(capsys: Captured) -> None:
    readings = iter(["one", StatusError("no answer"), "two"])

    def read() -> str:
        reading = next(readings)
        if isinstance(reading, StatusError):
            raise reading
        return reading

    pauses = iter([None, None])

    def pause() -> None:
        if next(pauses, KeyboardInterrupt) is KeyboardInterrupt:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        watch(read, pause, "<clear>")
    assert capsys.readouterr().out == "<clear>one\n<clear>llamayard: no answer\n<clear>two\n"


@pytest.mark.parametrize(
    ("text", "reported"), [("soon", "write a number of seconds"), ("0", "must be from 0.1 to 3600")]
)
def test_a_wrong_interval_is_refused(text: str, reported: str, capsys: Captured) -> None:
    assert main(["status", "--watch", text], HOME) == 2
    assert capsys.readouterr().err.startswith(f"llamayard: --watch {text}: {reported}")
