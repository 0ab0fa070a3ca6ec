"""Every finding of `llamayard doctor`, provoked by the fields of an emulated rig; a healthy rig gives none."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from router.app.doctor_facts import gather
from router.config.settings import load_settings
from router.doctor.examination import CHECKS, examine
from router.doctor.finding import Finding, Status
from router.engines.ollama.blob_store import PARAMETERS
from router.lab.emulator.host import HOST_KEYS
from router.lab.emulator.spec import SpecError, spec_from_mapping
from router.lab.emulator.store import Store
from tests.support.sparse_model import LLAMA_8B, put_into_store
from tests.support.tree import ROOT, none_of

MODELS = ["llama3.1:8b", "llama3.3:70b"]
HEALTHY_HOST = {"power_supply_watts": 1600}
GIB = 1024**3
SMALLER = {"gpu": 3090, "memory_total_bytes": 23_600_000_000}
"""Two of these hold the weights and caches of a 70B, but not what each GPU also needs."""

Rig = Mapping[str, Any]


def _findings(
    folder: Path, rig: Rig | None = None, configuration: Mapping[str, Any] | None = None
) -> dict[str, Finding]:
    host = {**HEALTHY_HOST, **(rig or {}).get("host", {})}
    (folder / "rig.yaml").write_text(yaml.safe_dump({"gpus": "2x3090", "models": MODELS, **(rig or {}), "host": host}))
    tree: dict[str, Any] = {"state_directory": str(folder / "state"), "server": {"port": 0}, **(configuration or {})}
    (folder / "c.yaml").write_text(yaml.safe_dump(tree))
    settings = load_settings(folder / "c.yaml", {}, {"rig": str(folder / "rig.yaml")})
    found = examine(gather(settings, {"PATH": "/nonexistent"}))
    assert [finding.check.id for finding in found] == [check.id for check in CHECKS]
    return {finding.check.id: finding for finding in found}


def _text(finding: Finding) -> str:
    return " | ".join(outcome.what for outcome in finding.outcomes)


def test_a_healthy_rig_gives_no_finding(tmp_path: Path) -> None:
    found = _findings(tmp_path)
    assert {name: _text(finding) for name, finding in found.items() if finding.status is not Status.OK} == {}


def _gpu(**values: object) -> Rig:
    return {"gpus": [{"gpu": 3090, **values}, 3090]}


def _host(**values: object) -> Rig:
    return {"host": values}


FINDINGS: list[tuple[str, Status, Rig, str]] = [
    ("gpus-found", Status.FAILURE, _gpu(is_lost=True), "GPU 0 is lost"),
    ("gpus-found", Status.FAILURE, _host(nvidia_devices=3), "the driver lists 2 of 3 GPUs"),
    ("gpus-found", Status.FAILURE, _host(has_visible_gpus=False), "but the driver shows none"),
    ("gpus-found", Status.FAILURE, _host(has_visible_gpus=False, in_container=True), "this container sees none"),
    ("gpus-found", Status.NOT_CHECKED, _host(has_visible_gpus=False, nvidia_devices=0), "not visible"),
    ("gpu-driver", Status.FAILURE, _host(driver_version="470.256.02"), "Ollama needs 531"),
    (
        "gpu-driver", Status.FAILURE, {"gpus": "3090+4090", **_host(driver_version="550.54.13")}, "550.54.14",
    ),
    ("gpu-driver", Status.NOT_CHECKED, _host(driver_version=None), "not visible"),
    ("compute-capability", Status.WARNING, _gpu(compute_capability=[7, 5]), "compute capability 7.5: below 8.0"),
    ("compute-capability", Status.FAILURE, _gpu(compute_capability=[3, 7]), "Ollama needs 5.0"),
    (
        "pcie-link", Status.FAILURE, _gpu(pcie_generation=3, pcie_width=4),
        "PCIe 3.0 x4, of 3.0 x4 possible: a model over several GPUs loses 30–40 %",
    ),
    ("pcie-link", Status.WARNING, _gpu(pcie_width=8, pcie_width_max=16), "PCIe 4.0 x8, though 4.0 x16 is possible"),
    ("pcie-link", Status.WARNING, _gpu(pcie_generation=3, pcie_width=8), "below 4.0 x8"),
    ("pcie-link", Status.NOT_CHECKED, {"gpus": [{"gpu": 3090, "pcie_width": 0}]}, "as in a virtual machine"),
    ("gpu-temperature", Status.WARNING, _gpu(temperature_celsius=85), "85 °C, close to throttling"),
    ("gpu-temperature", Status.FAILURE, _gpu(temperature_celsius=90), "90 °C, the main cause of random failures"),
    ("power-supply", Status.WARNING, _host(power_supply_watts=1000), "may draw 700 W, with peaks and the rest 1090 W"),
    ("power-supply", Status.FAILURE, _host(power_supply_watts=850), "the supply has 850 W"),
    ("power-supply", Status.NOT_CHECKED, _host(power_supply_watts=None), "--power-supply WATTS"),
    (
        "gpu-errors", Status.FAILURE,
        _host(kernel_log=["NVRM: Xid (PCI:0000:01:00): 79, pid=1, GPU has fallen off the bus."] * 2),
        "GPU at 0000:01:00: XID 79, 2 times: the GPU has fallen off the bus",
    ),
    ("gpu-errors", Status.WARNING, _host(kernel_log=["NVRM: Xid (PCI:0000:01:00): 31, pid=1"]), "XID 31: a program's"),
    ("gpu-errors", Status.FAILURE, _host(kernel_log=["NVRM: Xid (PCI:0000:01:00): 999"]), "see NVIDIA's list"),
    ("gpu-errors", Status.NOT_CHECKED, _host(kernel_log=None), "may not read it"),
    ("gpu-ecc", Status.FAILURE, _gpu(ecc_mode=True, ecc_uncorrected_errors=3), "3 uncorrected memory errors"),
    ("gpu-ecc", Status.FAILURE, _gpu(row_remap_failed=True), "the board is defective"),
    ("gpu-ecc", Status.WARNING, _gpu(ecc_mode=True, ecc_mode_pending=False), "ECC will be off after a reboot"),
    ("persistence-mode", Status.WARNING, _gpu(persistence_mode=False), "off on GPU 0"),
    ("external-vram", Status.WARNING, _gpu(external_bytes=3 * GIB), "other programs hold 3.0 GiB"),
    ("equal-answers", Status.NOTE, {"gpus": "3090+4090"}, "unequal GPUs (RTX 3090, RTX 4090)"),
    ("ollama-binary", Status.FAILURE, _host(has_ollama=False), "no program `ollama`"),
    ("ollama-version", Status.FAILURE, _host(ollama_version="0.9.6"), "the router serves 0.11.4 and newer"),
    ("ollama-version", Status.WARNING, _host(ollama_version="0.23.0"), "ollama/ollama/issues/15968"),
    ("ollama-version", Status.NOT_CHECKED, _host(ollama_version="dev"), "no version can be read"),
    ("stock-service", Status.WARNING, _host(stock_service="ollama.service is active"), "ollama.service is active"),
    ("environment", Status.WARNING, _host(environment={"CUDA_VISIBLE_DEVICES": "1"}), "CUDA_VISIBLE_DEVICES=1 in this"),
    ("environment", Status.WARNING, _host(service_environment={"OLLAMA_SCHED_SPREAD": "1"}), "in ollama.service"),
    ("device-files", Status.FAILURE, _host(closed_devices=["/dev/nvidia0"]), "may not open /dev/nvidia0"),
    ("store-access", Status.FAILURE, _host(store_readable=False), "cannot be read"),
    ("store-access", Status.WARNING, _host(store_writable=False), "pull, create and delete fail"),
    ("store-space", Status.WARNING, _host(store_free_bytes=50 * GIB), "50 of 2000 GiB free"),
    ("store-space", Status.FAILURE, _host(store_free_bytes=GIB - 1), "pulls fail"),
    ("store-speed", Status.WARNING, _host(store_bytes_per_second=1.5e8), "0.15 GB/s: the largest model (42.5 GB)"),
    ("store-speed", Status.NOT_CHECKED, _host(store_bytes_per_second=None), "not measured"),
    ("host-memory", Status.WARNING, _host(memory_total_bytes=32 * GIB), "32 GiB, less than the largest model"),
    ("open-files", Status.WARNING, _host(open_files_max=1024), "1024 open files are allowed; a full queue needs 1280"),
    ("clock", Status.WARNING, _host(clock_synchronized=False), "not synchronised"),
    ("clock", Status.NOT_CHECKED, _host(clock_synchronized=None), "does not tell"),
    ("port", Status.FAILURE, _host(port_holder="a stock Ollama"), "is taken by a stock Ollama"),
    ("models-fit", Status.WARNING, {"models": ["gpt-oss:120b"]}, "gpt-oss:120b: needs 61.1 GiB, all GPUs have 47.4"),
    ("fits-by-sum", Status.WARNING, {"gpus": [SMALLER, SMALLER]}, "llama3.3:70b: needs "),
]  # fmt: skip


@pytest.mark.parametrize(("check", "status", "rig", "what"), FINDINGS)
def test_a_rig_provokes_the_finding(check: str, status: Status, rig: Rig, what: str, tmp_path: Path) -> None:
    finding = _findings(tmp_path, rig)[check]
    assert what in _text(finding)
    assert finding.status is status
    bad = [each for each in finding.outcomes if each.status in (Status.WARNING, Status.FAILURE)]
    assert all(each.command for each in bad), "a finding names the command that mends it"


BY_CONFIGURATION: list[tuple[str, Status, dict[str, Any], str]] = [
    ("idle-gpus", Status.WARNING, {"instances": [{"name": "a", "gpus": [0]}]}, "no instance uses GPU 1"),
    (
        "needless-split", Status.WARNING, {"models": {"llama3.1:8b": {"layout": "spread"}}},
        "llama3.1:8b is pinned to 2 GPUs, and 1 would hold it",
    ),
    ("configuration", Status.FAILURE, {"models": {"llama3.3:70b": {"gpus": [0]}}}, "fits nowhere"),
    ("configuration", Status.FAILURE, {"models": {"llama3.1:8b": {"gpus": [7]}}}, "'7' is no GPU of this machine"),
    ("configuration", Status.WARNING, {"aliases": {"gpt-4o": "nothing"}}, "nothing is not among the models"),
]  # fmt: skip


@pytest.mark.parametrize(("check", "status", "configuration", "what"), BY_CONFIGURATION)
def test_a_configuration_provokes_the_finding(
    check: str, status: Status, configuration: dict[str, Any], what: str, tmp_path: Path
) -> None:
    finding = _findings(tmp_path, None, configuration)[check]
    assert what in _text(finding)
    assert finding.status is status


def test_a_modelfile_that_leaves_layers_on_the_cpu_is_found(tmp_path: Path) -> None:
    models = tmp_path / "state" / "rig" / "models"
    put_into_store(models, "eight", LLAMA_8B)
    entry = models / "manifests" / "registry.ollama.ai" / "library" / "eight" / "latest"
    manifest = json.loads(entry.read_text())
    parameters = Store(models).put_blob(b'{"num_gpu":20}')
    manifest["layers"].append({"mediaType": PARAMETERS, "digest": parameters.digest, "size": parameters.size})
    entry.write_text(json.dumps(manifest))
    finding = _findings(tmp_path)["num-gpu"]
    assert "eight:latest: its Modelfile says num_gpu 20: of 33 layers 13 stay on the CPU" in _text(finding)
    assert finding.status is Status.WARNING


def test_without_gpus_the_models_are_still_read(tmp_path: Path) -> None:
    rig = _host(has_visible_gpus=False, nvidia_devices=0, memory_total_bytes=32 * GIB)
    found = _findings(tmp_path, rig)
    assert "less than the largest model (40 GiB)" in _text(found["host-memory"])
    assert found["num-gpu"].status is Status.OK
    assert {found[name].status for name in ("models-fit", "fits-by-sum", "needless-split")} == {Status.NOT_CHECKED}


def test_nothing_is_written(tmp_path: Path) -> None:
    _findings(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c.yaml", "rig.yaml"]


def test_every_check_is_provoked_here() -> None:
    tested = {check for check, *_ in (*FINDINGS, *BY_CONFIGURATION)} | {"num-gpu"}
    assert tested == {check.id for check in CHECKS}


def test_every_check_is_in_the_documents() -> None:
    text = (ROOT / "docs" / "doctor.md").read_text(encoding="utf-8")
    none_of([check.id for check in CHECKS if f"| `{check.id}` |" not in text])


def test_every_fact_of_a_rig_file_is_in_the_documents() -> None:
    text = (ROOT / "docs" / "emulator.md").read_text(encoding="utf-8")
    none_of([key for key in HOST_KEYS if f"`{key}`" not in text])


@pytest.mark.parametrize(
    ("host", "message"),
    [
        ({"driver": "1"}, "host: no key 'driver'; did you mean 'driver_version'?"),
        ({"in_container": 1}, "host: in_container: 1 is no bool"),
        ({"driver_version": 550.54}, "host: driver_version: 550.54 is no str"),
        ([], r"host: expected keys and values, got \[\]"),
    ],
)
def test_wrong_facts_of_a_rig_file_are_refused(host: object, message: str) -> None:
    with pytest.raises(SpecError, match=message.replace("?", r"\?")):
        spec_from_mapping({"gpus": "3090", "host": host})


def test_one_gpu_may_have_a_narrow_link(tmp_path: Path) -> None:
    finding = _findings(tmp_path, {"gpus": [{"gpu": 3090, "pcie_generation": 3, "pcie_width": 4}]})["pcie-link"]
    assert (finding.status, "a model loads slowly" in _text(finding)) == (Status.WARNING, True)


def test_that_one_gpu_is_enough_for_each_model_is_said(tmp_path: Path) -> None:
    finding = _findings(tmp_path, {"models": ["llama3.1:8b"]})["idle-gpus"]
    assert (finding.status, "leaves the others idle, rightly" in _text(finding)) == (Status.OK, True)
