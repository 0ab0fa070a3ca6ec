"""A real Prometheus that reads the router over emulated GPUs: every panel of the dashboard has something to show."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Generator
from pathlib import Path
from typing import Any
from urllib.parse import urlencode
from urllib.request import urlopen

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from router.tools.grafana_dashboard import dashboard_document, queries
from tests.support.ollama_server import free_port
from tests.support.product import Product, prepare, running
from tests.support.promtool import promtool
from tests.support.waiting import eventually_sync

pytestmark = pytest.mark.rig

_VALUES = {"$router": ".*", "$model": ".*", "$__rate_interval": "1m"}


@pytest.fixture
def product(tmp_path: Path) -> Generator[Product]:
    config: dict[str, Any] = {
        "ollama": {"keep_alive": "5m"},
        "models": {"nomic-embed-text": {"keep_warm": True}},
        "poll": {"catalog_seconds": 0.2, "gpu_seconds": 0.2, "residency_seconds": 0.2},
    }
    with running(prepare(tmp_path, config, {"LLAMAYARD_RIG_SPEED": "20"}, ("--rig", "2x3090"))) as router:
        yield router


@pytest.fixture
def prometheus(tmp_path: Path, product: Product) -> Generator[str]:
    """The URL of a Prometheus that reads the product every half second."""
    binary, port, folder = promtool("prometheus"), free_port(), tmp_path / "prometheus"
    folder.mkdir()
    target = f"{product.address.host}:{product.address.port}"
    config = {
        "global": {"scrape_interval": "500ms", "scrape_timeout": "500ms"},
        "scrape_configs": [{"job_name": "llamayard", "static_configs": [{"targets": [target]}]}],
    }
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config), encoding="utf-8")
    command = [
        binary, f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/data",
        f"--web.listen-address=127.0.0.1:{port}",
    ]  # fmt: skip
    with (folder / "log").open("wb") as log, subprocess.Popen(command, stdout=log, stderr=log) as process:
        try:
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()


def _use(product: Product) -> None:
    """Two models that do not fit together, a stream, and an error."""
    for name in ("llama3.1:8b", "llama3.3:70b"):
        body = {"model": name, "prompt": "hi", "options": {"num_predict": 8}}
        assert product.call("POST", "/api/generate", body)[0] == 200
    assert product.call("POST", "/api/generate", {"model": "nobody-has-it", "prompt": "hi"})[0] == 404


def _empty_queries(url: str) -> list[str]:
    """Queries of the dashboard that have no result."""
    empty: list[str] = []
    for query in queries():
        expression = re.sub(r"\$\w+", lambda found: _VALUES[found[0]], query)
        with urlopen(f"{url}/api/v1/query?{urlencode({'query': expression})}", timeout=10) as reply:
            if not json.load(reply)["data"]["result"]:
                empty.append(query)
    return empty


def test_every_panel_of_the_dashboard_shows_data(product: Product, prometheus: str) -> None:
    found: list[str] = []

    def has_data() -> bool:
        _use(product)
        try:
            found[:] = _empty_queries(prometheus)
        except OSError:
            return False
        return not found

    try:
        eventually_sync(has_data, 60.0, "data of all panels")
    except AssertionError as error:
        raise AssertionError(f"no data: {found}") from error


def test_the_router_exports_every_metric_of_the_dashboard(product: Product) -> None:
    _use(product)
    with urlopen(f"http://{product.address.host}:{product.address.port}/metrics", timeout=10) as reply:
        families = text_string_to_metric_families(reply.read().decode())
    exported = {family.name + "_total" * (family.type == "counter") for family in families}
    named = set(re.findall(r"\b(?:llamayard|process)_\w+", dashboard_document()))
    assert {name.removesuffix("_bucket") for name in named} <= exported
