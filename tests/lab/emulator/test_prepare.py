"""What `--rig` sets up for the router: GPUs, a filled model store and a way to start servers."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from router.domain.model_names import parse_name
from router.lab.emulator import vram
from router.lab.emulator.catalogue import catalogue
from router.lab.emulator.prepare import prepare_emulator
from router.lab.emulator.spec import SpecError
from router.lab.emulator.store import Store


def test_an_emulator_has_its_gpus_and_all_catalogue_models(tmp_path: Path) -> None:
    emulator = prepare_emulator("2x3090+4090", tmp_path / "new" / "rig", {})
    assert [gpu.name.split()[3] for gpu in emulator.reader.read()] == ["3090", "3090", "4090"]
    assert {stored.name.shortest for stored in Store(emulator.models_directory).all()} == set(catalogue())
    assert emulator.title == "EMULATED rig 2x3090+4090"
    assert emulator.command[:2] == (sys.executable, "-m")
    assert emulator.environment["LLAMAYARD_RIG_DIR"] == str(tmp_path / "new" / "rig")


def test_environment_variables_override_speed_and_version(tmp_path: Path) -> None:
    path = tmp_path / "rig.yaml"
    path.write_text("{gpus: 3090, speed: 3, version: 0.11.4}", encoding="utf-8")
    environment = prepare_emulator(str(path), tmp_path / "a", {}).environment
    assert (environment["LLAMAYARD_RIG_SPEED"], environment["LLAMAYARD_RIG_VERSION"]) == ("3.0", "0.11.4")
    variables = {"LLAMAYARD_RIG_SPEED": "20", "LLAMAYARD_RIG_VERSION": "0.33.0", "PYTHONPATH": "/elsewhere"}
    overridden = prepare_emulator(str(path), tmp_path / "b", variables).environment
    assert (overridden["LLAMAYARD_RIG_SPEED"], overridden["LLAMAYARD_RIG_VERSION"]) == ("20.0", "0.33.0")
    assert overridden["PYTHONPATH"].endswith(":/elsewhere")
    assert vram.read_json(tmp_path / "b" / "rig.json")["version"] == "0.33.0"


@pytest.mark.parametrize(
    ("text", "environment", "message"),
    [
        ("2x309o", {}, "did you mean '3090'"),
        ("3090", {"LLAMAYARD_RIG_SPEED": "fast"}, "LLAMAYARD_RIG_SPEED.*above 0"),
        ("3090", {"LLAMAYARD_RIG_VERSION": "0.24"}, "LLAMAYARD_RIG_VERSION.*did you mean '0.24.0'"),
    ],
)
def test_an_invalid_specification_is_refused(
    tmp_path: Path, text: str, environment: dict[str, str], message: str
) -> None:
    with pytest.raises(SpecError, match=message):
        prepare_emulator(text, tmp_path, environment)


def test_an_unknown_model_is_refused_with_the_nearest_name(tmp_path: Path) -> None:
    path = tmp_path / "rig.yaml"
    path.write_text("{gpus: 3090, models: [llama3.1:9b]}", encoding="utf-8")
    with pytest.raises(SpecError, match=r"did you mean 'llama3.1:8b'"):
        prepare_emulator(str(path), tmp_path / "rig", {})


def test_a_second_preparation_keeps_living_allocations_and_removes_dead_ones(tmp_path: Path) -> None:
    emulator = prepare_emulator("2x3090", tmp_path, {})
    uuids = [gpu.uuid for gpu in emulator.reader.read()]
    dead = subprocess.Popen([sys.executable, "-S", "-c", "pass"])
    vram.allocate(tmp_path, {uuids[0]: 5}, dead.pid)
    dead.wait()
    (tmp_path / "vram" / f"{dead.pid}.busy").write_text("0.0")
    vram.allocate(tmp_path, {uuids[1]: 7})
    again = prepare_emulator("2x3090", tmp_path, {})
    assert [gpu.memory_used_bytes for gpu in again.reader.read()] == [0, 7]
    assert [path.name for path in (tmp_path / "vram").iterdir()] == [f"{os.getpid()}.json"]


def test_user_models_stay_and_catalogue_models_are_reinstalled(tmp_path: Path) -> None:
    store = Store(prepare_emulator("3090", tmp_path, {}).models_directory)
    stored = store.get(parse_name("llama3.2:3b"))
    assert stored is not None
    store.copy(stored, parse_name("mine"))
    store.delete(stored)
    prepare_emulator("3090", tmp_path, {})
    assert store.get(parse_name("mine")) is not None
    assert store.get(parse_name("llama3.2:3b")) is not None


def test_the_executable_prints_its_version_and_refuses_other_commands() -> None:
    command = [sys.executable, "-m", "router.lab.emulator.server"]
    version_output = subprocess.run([*command, "--version"], capture_output=True, text=True, check=True, timeout=30)
    assert version_output.stdout == "ollama version is 0.34.0 (emulated)\n"
    assert subprocess.run([*command, "pull"], capture_output=True, check=False, timeout=30).returncode == 2
    invalid_version = subprocess.run(
        [*command, "serve"], capture_output=True, text=True, check=False, timeout=30,
        env={**os.environ, "LLAMAYARD_RIG_VERSION": "0.24"},
    )  # fmt: skip
    assert (invalid_version.returncode, "0.24.0" in invalid_version.stderr) == (1, True)
