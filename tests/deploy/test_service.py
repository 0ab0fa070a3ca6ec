"""The systemd unit, the image and their configuration files, without systemd and Docker."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
import yaml

from router.config.settings import load_settings

UNIT = "deploy/llamayard.service"
CONFIG = "/etc/llamayard/config.yaml"
PROGRAM = "/opt/llamayard/bin/llamayard"
STOCK_STORE = "/usr/share/ollama/.ollama/models"
DEFAULT_FILES = ["deploy/config.yaml", "deploy/container.yaml"]


def _unit(root: Path) -> Mapping[str, list[str]]:
    """The unit's settings by name, each with its values in order."""
    text = (root / UNIT).read_text(encoding="utf-8").replace("\\\n", " ")
    settings: dict[str, list[str]] = {}
    for line in text.splitlines():
        name, equals, value = line.partition("=")
        if equals and not line.startswith("#"):
            settings.setdefault(name, []).append(value)
    return settings


def _start(root: Path, program: Path, config: Path) -> subprocess.CompletedProcess[str]:
    """Runs the unit's main process with its environment, but another program and configuration file."""
    (command,) = _unit(root)["ExecStart"]
    replaced = {PROGRAM: str(program), CONFIG: str(config)}
    words = [replaced.get(word, word) for word in shlex.split(command.replace("$$", "$"))]
    assert {str(program), str(config)} <= set(words), words
    environment = dict(pair.split("=", 1) for pair in _unit(root)["Environment"])
    return subprocess.run(
        words, cwd=root, env={"PATH": os.environ["PATH"], **environment}, capture_output=True, text=True, check=False
    )


@pytest.fixture
def program(tmp_path: Path) -> Path:
    """Runs check-config as llamayard does, and prints the arguments of every other command instead."""
    path = tmp_path / "llamayard"
    path.write_text(
        f'#!/bin/sh\n[ "$1" = check-config ] && exec {shlex.quote(sys.executable)} -m router "$@"\necho "$@"\n',
        encoding="utf-8",
    )
    path.chmod(0o755)
    return path


@pytest.mark.parametrize("path", [UNIT, "Dockerfile", "deploy/compose.yaml"])
def test_no_variable_takes_precedence_over_the_users_file(root: Path, path: str) -> None:
    lines = (root / path).read_text(encoding="utf-8").splitlines()
    assert [line for line in lines if "LLAMAYARD_" in line and not line.lstrip().startswith("#")] == []


@pytest.mark.parametrize("path", DEFAULT_FILES)
def test_the_default_files_keep_state_and_models_in_the_service_s_directory(root: Path, path: str) -> None:
    settings = load_settings(root / path, {"HOME": "/root"})
    assert str(settings.state_directory) == "/var/lib/llamayard/state"
    assert str(settings.ollama.models) == "/var/lib/llamayard/models"


def test_the_container_listens_on_all_addresses_and_the_service_on_this_machine_only(root: Path) -> None:
    service, container = (load_settings(root / path, {}) for path in DEFAULT_FILES)
    assert (service.server.host, container.server.host) == ("127.0.0.1", "0.0.0.0")


def test_the_image_has_its_default_file_where_the_program_looks_for_it(root: Path) -> None:
    dockerfile = (root / "Dockerfile").read_text(encoding="utf-8")
    assert f"\nCOPY deploy/container.yaml {CONFIG}\n" in dockerfile
    assert "deploy" not in (root / ".dockerignore").read_text(encoding="utf-8").splitlines()


def test_the_image_has_an_ollama_that_splits_layers_by_gpu_memory(root: Path) -> None:
    version = re.search(r"^ARG OLLAMA_VERSION=(\S+)$", (root / "Dockerfile").read_text(encoding="utf-8"), re.MULTILINE)
    assert version is not None
    assert tuple(map(int, version[1].split("."))) >= (0, 30, 0)


def test_the_service_starts_with_the_users_file(root: Path, tmp_path: Path, program: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(f"ollama: {{models: {tmp_path}}}\nstate_directory: {tmp_path}/state\n", encoding="utf-8")
    started = _start(root, program, config)
    assert (started.returncode, started.stdout) == (0, f"serve --config {config}\n"), started.stderr


def test_a_typo_ends_the_main_process_with_the_code_that_is_not_restarted(
    root: Path, tmp_path: Path, program: Path
) -> None:
    config = tmp_path / "config.yaml"
    config.write_text("server: {prot: 1}\n", encoding="utf-8")
    ended = _start(root, program, config)
    assert _unit(root)["RestartPreventExitStatus"] == [str(ended.returncode)]
    assert ended.stdout == ""
    assert ended.stderr == "llamayard: server.prot: unknown key; did you mean `server.port`?\n"


def test_the_service_can_write_the_documented_stores(root: Path) -> None:
    writable = [path.removeprefix("-") for value in _unit(root)["ReadWritePaths"] for path in value.split()]
    operations = (root / "docs/operations.md").read_text(encoding="utf-8")
    assert STOCK_STORE in operations
    assert STOCK_STORE in writable
    models = load_settings(root / "deploy/config.yaml", {}).ollama.models
    assert any(models.is_relative_to(path) for path in writable)


def test_the_documented_check_runs_as_the_service_does(root: Path) -> None:
    operations = (root / "docs/operations.md").read_text(encoding="utf-8")
    command = re.search(r"^sudo systemd-run (?:.*\\\n)+.*$", operations, re.MULTILINE)
    assert command is not None
    words = shlex.split(command[0].replace("\\\n", " "))
    unit = _unit(root)
    for name in ("User", "SupplementaryGroups", "WorkingDirectory", "Environment", "EnvironmentFile"):
        assert f"{name}={unit[name][0]}" in words
    assert words[-4:] == [PROGRAM, "check-config", "--config", CONFIG]


def test_the_compose_file_names_the_file_to_replace(root: Path) -> None:
    text = (root / "deploy/compose.yaml").read_text(encoding="utf-8")
    service = yaml.safe_load(text)["services"]["llamayard"]
    assert "environment" not in service
    assert f":{CONFIG}:ro" in text
