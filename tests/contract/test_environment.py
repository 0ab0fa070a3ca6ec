"""Variables that the supervisor sets: what they change, and what a server writes to its log about itself."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Generator, Mapping

import pytest

from tests.contract.conftest import Start
from tests.contract.stage import Stage, furnish
from tests.support.ollama_server import ModelFile
from tests.support.rawhttp import call
from tests.support.waiting import eventually


@pytest.fixture(scope="module")
def governed(
    start: Start, tmp_path_factory: pytest.TempPathFactory, files: Mapping[str, ModelFile]
) -> Generator[Stage]:
    """A server started as the router starts its own, with room for two models."""
    environment = {
        "OLLAMA_KEEP_ALIVE": "-1",
        "OLLAMA_CONTEXT_LENGTH": "2048",
        "OLLAMA_NUM_PARALLEL": "2",
        "OLLAMA_MAX_LOADED_MODELS": "2",
        "OLLAMA_ORIGINS": "http://page.example",
    }
    with start(tmp_path_factory.mktemp("governed"), **environment) as server:
        yield furnish(server, files)


async def test_a_negative_keep_alive_of_the_server_keeps_models_for_ever(governed: Stage) -> None:
    governed.unload_all()
    governed.load("tiny")
    assert int(governed.loaded()["tiny:latest"]["expires_at"][:4]) > 2200


async def test_the_context_length_holds_where_a_request_names_none(governed: Stage) -> None:
    governed.unload_all()
    governed.load("tiny")
    assert governed.loaded()["tiny:latest"]["context_length"] == 2048
    governed.load("tiny", options={"num_ctx": 1024})
    assert governed.loaded()["tiny:latest"]["context_length"] == 1024


async def test_the_idle_model_with_the_shortest_keep_alive_makes_room(governed: Stage) -> None:
    governed.unload_all()
    governed.load("embed", keep_alive="1h")
    governed.load("big", keep_alive="10m")
    governed.load("tiny")
    assert sorted(governed.loaded()) == ["embed:latest", "tiny:latest"]


async def test_further_origins_are_allowed(governed: Stage) -> None:
    headers = (("Origin", "http://page.example"),)
    reply = await call(governed.server.address, "GET", "/api/version", headers=headers)
    assert (reply.status, reply.header("Access-Control-Allow-Origin")) == (200, "http://page.example")


async def test_the_log_says_where_it_listens_and_what_it_computes_on(governed: Stage) -> None:
    address = governed.server.address
    text = await eventually(lambda: _log_with(governed, "inference compute"))
    assert re.search(rf'level=INFO .*msg="Listening on {address.host}:{address.port} \(version [0-9.]+\)"', text)
    assert re.search(r'msg="inference compute" id=\S+ library=cpu ', text)
    assert text.index("Listening on") < text.index("inference compute")


def _log_with(stage: Stage, words: str) -> str:
    text = stage.server.log.read_text(errors="replace")
    return text if words in text else ""


@pytest.mark.parametrize("keeps", [True, False])
async def test_a_start_without_noprune_removes_young_blobs_only_before_0_21(
    start: Start, tmp_path_factory: pytest.TempPathFactory, keeps: bool
) -> None:
    folder = tmp_path_factory.mktemp("prune")
    data = b"nothing names these bytes"
    digest = "sha256:" + hashlib.sha256(data).hexdigest()
    with start(folder) as server:
        assert server.call("POST", f"/api/blobs/{digest}", data)[0] == 201
    with start(folder, OLLAMA_NOPRUNE="1" if keeps else "") as server:
        status = server.call("HEAD", f"/api/blobs/{digest}")[0]
        assert status == (404 if server.version == "0.11.4" and not keeps else 200)
