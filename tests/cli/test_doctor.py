"""The command `llamayard doctor`: output, JSON and exit codes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from router.cli.doctor import render
from router.cli.main import main
from router.doctor.examination import CHECKS
from tests.support.doctor_facts import FACTS, WARNED

Captured = pytest.CaptureFixture[str]


def _home(folder: Path) -> dict[str, str]:
    return {"HOME": str(folder), "PATH": "/nonexistent"}


def _rig(folder: Path, text: str) -> str:
    (folder / "rig.yaml").write_text(f"gpus: 2x3090\nmodels: [llama3.1:8b]\n{text}\n")
    return str(folder / "rig.yaml")


def test_a_failure_ends_with_one(tmp_path: Path, capsys: Captured) -> None:
    rig = _rig(tmp_path, "host: {driver_version: 470.0}")
    assert main(["doctor", "--rig", rig, "--port", "0"], _home(tmp_path)) == 2
    assert "host: driver_version" in capsys.readouterr().err
    rig = _rig(tmp_path, "host: {driver_version: '470.0'}")
    assert main(["doctor", "--rig", rig, "--port", "0"], _home(tmp_path)) == 1
    shown = capsys.readouterr().out.splitlines()
    assert shown[0].startswith("EMULATED rig ")
    (line,) = [line for line in shown if line.startswith("failure")]
    assert "driver 470.0: Ollama needs 531 or newer" in line
    assert shown[-1].startswith("1 failure, ")


def test_warnings_and_unmade_checks_end_with_zero(tmp_path: Path, capsys: Captured) -> None:
    rig = _rig(tmp_path, "host: {clock_synchronized: false}")
    assert main(["doctor", "--rig", rig, "--port", "0", "--json"], _home(tmp_path)) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["healthy"] is True
    assert document["verdict"] == f"1 warning, 1 not checked, {len(CHECKS) - 2} ok"
    checks = {check["id"]: check for check in document["checks"]}
    assert checks["clock"]["outcomes"] == [
        {"status": "warning", "what": "not synchronised", "command": "sudo timedatectl set-ntp true"}
    ]
    assert checks["power-supply"]["status"] == "not checked"


def test_the_power_supply_is_given_in_watts(tmp_path: Path, capsys: Captured) -> None:
    rig = _rig(tmp_path, "")
    assert main(["doctor", "--rig", rig, "--port", "0", "--power-supply", "850W"], _home(tmp_path)) == 1
    assert "the supply has 850 W" in " ".join(capsys.readouterr().out.split())
    assert main(["doctor", "--rig", rig, "--power-supply", "much"], _home(tmp_path)) == 2
    assert "--power-supply much: must be its rating in watts" in capsys.readouterr().err


def test_a_machine_without_a_driver_is_not_called_healthy(tmp_path: Path, capsys: Captured) -> None:
    rig = _rig(tmp_path, "host: {has_visible_gpus: false, nvidia_devices: 0}")
    main(["doctor", "--rig", rig, "--port", "0", "--json"], _home(tmp_path))
    checks = {check["id"]: check["status"] for check in json.loads(capsys.readouterr().out)["checks"]}
    unmade = {"gpus-found", "gpu-driver", "compute-capability", "pcie-link", "gpu-temperature", "power-supply",
              "gpu-ecc", "persistence-mode", "external-vram", "models-fit", "idle-gpus"}  # fmt: skip
    assert {checks[name] for name in unmade} == {"not checked"}


def test_lines_fit_a_hundred_columns_and_colours_are_for_terminals() -> None:
    plain = render(FACTS, WARNED, is_verbose=True, has_colours=False)
    assert "\x1b" not in plain
    assert max(map(len, plain.splitlines())) <= 100
    assert "\x1b[33mwarning" in render(FACTS, WARNED, is_verbose=False, has_colours=True)
    assert plain.count("why: ") > render(FACTS, WARNED, is_verbose=False, has_colours=False).count("why: ") > 0


def test_unmade_checks_of_one_reason_share_a_line() -> None:
    shown = render(FACTS, WARNED, is_verbose=False, has_colours=False)
    assert shown.count("no driver is installed") == 1
