"""The Helm chart, by Helm itself: linted, rendered with each kind of values, and held to the Kubernetes schemas."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

import router
from router.config.settings import load_settings
from tests.support.ollama_server import ROOT

CHART = ROOT / "deploy" / "helm" / "llamayard"
KUBERNETES = ("1.29", "1.33")
KEYS = ("keys.existingSecret=keys",)
VALUES: dict[str, Sequence[str]] = {
    "keys": KEYS,
    "anonymous": ("allowAnonymous=true", "gpus=0", "networkPolicy.enabled=false"),
    "everything": (
        *KEYS, "gpus=8", "runtimeClassName=nvidia", "persistence.hostPath=/srv/llamayard", "service.type=LoadBalancer",
        "imagePullSecrets[0].name=registry", "extraEnv[0].name=TZ", "extraEnv[0].value=UTC", "nodeSelector.gpu=yes",
        "tolerations[0].key=gpu", "serviceMonitor.enabled=true", "serviceMonitor.authorizationSecret.name=metrics",
        "networkPolicy.from[0].namespaceSelector.matchLabels.team=a", "networkPolicy.allowPulls=false",
        "podAnnotations.note=x", "resources.limits.memory=64Gi", "probes.scheme=HTTPS",
    ),
    "claim": (*KEYS, "persistence.existingClaim=models"),
    "class": (*KEYS, "persistence.storageClass=fast", "persistence.size=1Ti"),
}  # fmt: skip


@pytest.fixture(scope="module")
def helm() -> str:
    found = shutil.which("helm") or ROOT / ".cache" / "helm" / "helm"
    if not Path(found).is_file():
        message = "no helm: run `make helm` (needs Go)"
        if os.environ.get("CI", "").lower() == "true":
            pytest.fail(message)
        pytest.skip(message)
    return str(found)


def _run(helm: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "HELM_CACHE_HOME": "/nonexistent", "HELM_CONFIG_HOME": "/nonexistent"}
    return subprocess.run([helm, *arguments], capture_output=True, text=True, check=False, env=environment, timeout=60)


def _rendered(helm: str, values: Sequence[str], version: str = KUBERNETES[-1]) -> list[dict[str, Any]]:
    sets = [argument for value in values for argument in ("--set-string" if "=yes" in value else "--set", value)]
    done = _run(helm, "template", "yard", str(CHART), "--namespace", "team", "--kube-version", version, *sets)
    assert done.returncode == 0, done.stderr
    return [document for document in yaml.safe_load_all(done.stdout) if document]


def _of_kind(documents: list[dict[str, Any]], kind: str) -> dict[str, Any]:
    (found,) = [document for document in documents if document["kind"] == kind]
    return found


def test_it_passes_helms_own_checks(helm: str) -> None:
    done = _run(helm, "lint", "--strict", str(CHART), "--kube-version", KUBERNETES[-1], "--set", KEYS[0])
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("version", KUBERNETES)
@pytest.mark.parametrize("values", VALUES.values(), ids=VALUES)
def test_what_it_renders_is_valid(helm: str, values: Sequence[str], version: str) -> None:
    for document in _rendered(helm, values, version):
        if document["kind"] != "ServiceMonitor":  # of the Prometheus operator: Kubernetes has no schema for it
            kubernetes_validate.validate(document, version, strict=True)


@pytest.mark.parametrize("values", VALUES.values(), ids=VALUES)
def test_the_router_takes_its_configuration(helm: str, values: Sequence[str], tmp_path: Path) -> None:
    text = _of_kind(_rendered(helm, values), "ConfigMap")["data"]["config.yaml"]
    (tmp_path / "config.yaml").write_text(text, encoding="utf-8")
    settings = load_settings(tmp_path / "config.yaml", {"HOME": str(tmp_path)})
    assert settings.server.host == "0.0.0.0"
    assert settings.server.allow_anonymous is ("allowAnonymous=true" in values)
    mounts = _of_kind(_rendered(helm, values), "StatefulSet")["spec"]["template"]["spec"]["containers"][0][
        "volumeMounts"
    ]
    folders = [mount["mountPath"] for mount in mounts]
    assert any(str(settings.ollama.models).startswith(folder + "/") for folder in folders)
    assert settings.server.keys_file is None or str(settings.server.keys_file.parent) in folders


def test_the_users_configuration_is_kept_beside_the_charts(helm: str) -> None:
    values = [*KEYS, "config.models.qwen3.keep_warm=true", "config.ollama.num_parallel=4", "config.server.host=1.2.3.4"]
    config = yaml.safe_load(_of_kind(_rendered(helm, values), "ConfigMap")["data"]["config.yaml"])
    assert config["models"] == {"qwen3": {"keep_warm": True}}
    assert config["ollama"]["num_parallel"] == 4
    assert config["server"]["host"] == "0.0.0.0", "probes and the Service need it"


def test_without_keys_it_says_what_is_missing(helm: str) -> None:
    done = _run(helm, "template", "yard", str(CHART), "--kube-version", KUBERNETES[-1])
    assert done.returncode != 0
    assert "keys.existingSecret" in done.stderr


def test_a_misspelt_value_is_refused(helm: str) -> None:
    done = _run(helm, "template", "yard", str(CHART), "--kube-version", KUBERNETES[-1], "--set", "keys.exstingSecret=a")
    assert done.returncode != 0
    assert "exstingSecret" in done.stderr


def test_every_value_is_in_the_schema() -> None:
    schema = json.loads((CHART / "values.schema.json").read_text(encoding="utf-8"))
    values = yaml.safe_load((CHART / "values.yaml").read_text(encoding="utf-8"))
    assert set(values) <= set(schema["properties"])


def test_its_version_is_the_programs() -> None:
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text(encoding="utf-8"))
    assert {chart["version"], chart["appVersion"]} == {router.__version__}
