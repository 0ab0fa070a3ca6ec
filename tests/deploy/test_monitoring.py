"""The optional Prometheus and Grafana of the compose file."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import yaml

from tests.support.promtool import promtool


def _services(root: Path) -> dict[str, Any]:
    return yaml.safe_load((root / "deploy/compose.yaml").read_text(encoding="utf-8"))["services"]


def test_without_the_profile_only_the_router_starts(root: Path) -> None:
    profiles = {name: service.get("profiles") for name, service in _services(root).items()}
    assert profiles == {"llamayard": None, "prometheus": ["monitoring"], "grafana": ["monitoring"]}


def test_every_service_is_reachable_from_this_machine_only(root: Path) -> None:
    ports = [port for service in _services(root).values() for port in service["ports"]]
    assert all(port.startswith("127.0.0.1:") for port in ports)


def test_every_mounted_file_exists(root: Path) -> None:
    volumes = [volume for service in _services(root).values() for volume in service["volumes"]]
    mounted = [volume.split(":")[0] for volume in volumes if volume.startswith("./")]
    assert len(mounted) == 4
    assert [path for path in mounted if not (root / "deploy" / path).exists()] == []


def test_the_provisioned_dashboard_is_mounted_where_grafana_looks(root: Path) -> None:
    provider = root / "deploy/grafana/provisioning/dashboards/llamayard.yaml"
    (entry,) = yaml.safe_load(provider.read_text(encoding="utf-8"))["providers"]
    assert (
        f"./grafana/llamayard.json:{entry['options']['path']}/llamayard.json:ro"
        in _services(root)["grafana"]["volumes"]
    )


def test_prometheus_accepts_its_configuration(root: Path) -> None:
    command = [promtool(), "check", "config", "deploy/prometheus.yaml"]
    checked = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stdout + checked.stderr
    assert "rules found" in checked.stdout
