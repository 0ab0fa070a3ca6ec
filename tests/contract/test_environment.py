"""Environment variables set by the supervisor: their effects, and what a server logs about itself."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Generator, Mapping

import pytest

from tests.contract.conftest import Start
from tests.contract.stage import Stage, create_models
from tests.support.ollama_server import ModelFile
from tests.support.rawhttp import call
from tests.support.waiting import eventually


@pytest.fixture(scope="module")
def configured(
    start: Start, tmp_path_factory: pytest.TempPathFactory, files: Mapping[str, ModelFile]
) -> Generator[Stage]:
    """A server configured as the router configures its own, with room for two models."""
    environment = {
        "OLLAMA_KEEP_ALIVE": "-1",
        "OLLAMA_CONTEXT_LENGTH": "2048",
        "OLLAMA_NUM_PARALLEL": "2",
        "OLLAMA_MAX_LOADED_MODELS": "2",
        "OLLAMA_ORIGINS": "http://page.example",
    }
    with start(tmp_path_factory.mktemp("governed"), **environment) as server:
        yield create_models(server, files)


async def test_a_negative_server_keep_alive_keeps_models_forever(configured: Stage) -> None:
    configured.unload_all()
    configured.load("tiny")
    assert int(configured.loaded()["tiny:latest"]["expires_at"][:4]) > 2200


async def test_the_context_length_applies_unless_a_request_sets_one(configured: Stage) -> None:
    configured.unload_all()
    configured.load("tiny")
    assert configured.loaded()["tiny:latest"]["context_length"] == 2048
    configured.load("tiny", options={"num_ctx": 1024})
    assert configured.loaded()["tiny:latest"]["context_length"] == 1024


async def test_the_idle_model_with_the_shortest_keep_alive_is_evicted(configured: Stage) -> None:
    configured.unload_all()
    configured.load("embed", keep_alive="1h")
    configured.load("big", keep_alive="10m")
    configured.load("tiny")
    assert sorted(configured.loaded()) == ["embed:latest", "tiny:latest"]


async def test_configured_origins_are_allowed(configured: Stage) -> None:
    headers = (("Origin", "http://page.example"),)
    reply = await call(configured.server.address, "GET", "/api/version", headers=headers)
    assert (reply.status, reply.header("Access-Control-Allow-Origin")) == (200, "http://page.example")


async def test_the_log_shows_the_address_and_the_compute_device(configured: Stage) -> None:
    address = configured.server.address
    text = await eventually(lambda: _log_with(configured, "inference compute"))
    assert re.search(rf'level=INFO .*msg="Listening on {address.host}:{address.port} \(version [0-9.]+\)"', text)
    assert re.search(r'msg="inference compute" id=\S+ library=cpu ', text)
    assert text.index("Listening on") < text.index("inference compute")


def _log_with(stage: Stage, expected: str) -> str:
    text = stage.server.log.read_text(errors="replace")
    return text if expected in text else ""


@pytest.mark.parametrize("is_noprune", [True, False])
async def test_a_start_without_noprune_removes_recent_blobs_only_before_0_21(
    start: Start, tmp_path_factory: pytest.TempPathFactory, is_noprune: bool
) -> None:
    folder = tmp_path_factory.mktemp("prune")
    data = b"nothing names these bytes"
    digest = "sha256:" + hashlib.sha256(data).hexdigest()
    with start(folder) as server:
        assert server.call("POST", f"/api/blobs/{digest}", data)[0] == 201
    with start(folder, OLLAMA_NOPRUNE="1" if is_noprune else "") as server:
        status = server.call("HEAD", f"/api/blobs/{digest}")[0]
        assert status == (404 if server.version == "0.11.4" and not is_noprune else 200)
