"""Blobs, create, copy, delete, pull and push; servers on one store see each other's models immediately."""

from __future__ import annotations

import hashlib
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest

from tests.contract.conftest import Start
from tests.contract.stage import Stage
from tests.support.ollama_server import OllamaServer
from tests.support.rawhttp import Address, call, connect, request_bytes
from tests.support.sparse_model import LLAMA_70B, put_into_store
from tests.support.waiting import eventually

_MISSING = "sha256:" + "3" * 64


@pytest.fixture(scope="module")
def sibling(stage: Stage, start: Start, folder: Path) -> Generator[OllamaServer]:
    """A second server on the store of the shared server."""
    with start(folder) as server:
        yield server


def _names(server: OllamaServer) -> set[str]:
    status, answer = server.call("GET", "/api/tags")
    assert status == 200
    return {model["name"] for model in answer["models"]}


async def test_a_sibling_server_can_run_a_new_model(stage: Stage, sibling: OllamaServer) -> None:
    stage.ensure_absent("made")
    assert "made:latest" not in _names(sibling)
    stage.post("/api/create", {"model": "made", "from": "tiny", "system": "be brief", "stream": False})
    assert "made:latest" in _names(sibling)
    body = {"model": "made", "prompt": "x", "stream": False, "options": {"num_predict": 2}}
    assert sibling.call("POST", "/api/generate", body)[1]["eval_count"] == 2
    stage.ensure_absent("made")


async def test_a_sibling_server_sees_a_copy_until_it_is_deleted(stage: Stage, sibling: OllamaServer) -> None:
    reply = await call(stage.server.address, "POST", "/api/copy", {"source": "tiny", "destination": "twin"})
    assert (reply.status, reply.body) == (200, b"")
    assert "twin:latest" in _names(sibling)
    assert sibling.call("POST", "/api/show", {"model": "twin"})[0] == 200
    reply = await call(stage.server.address, "DELETE", "/api/delete", {"model": "twin"})
    assert (reply.status, reply.body) == (200, b"")
    assert "twin:latest" not in _names(sibling)
    assert sibling.call("POST", "/api/show", {"model": "twin"})[0] == 404


async def test_a_deleted_model_stays_loaded_on_the_sibling_server(stage: Stage, sibling: OllamaServer) -> None:
    assert sibling.call("POST", "/api/generate", {"model": "tiny", "keep_alive": 0})[0] == 200
    await eventually(lambda: not sibling.call("GET", "/api/ps")[1]["models"])
    stage.copy("tiny", "ghost")
    assert sibling.call("POST", "/api/generate", {"model": "ghost"})[0] == 200
    stage.ensure_absent("ghost")
    assert [model["name"] for model in sibling.call("GET", "/api/ps")[1]["models"]] == ["ghost:latest"]
    assert sibling.call("POST", "/api/generate", {"model": "ghost"})[0] == 404
    assert sibling.call("POST", "/api/generate", {"model": "tiny", "keep_alive": 0})[0] == 200  # the same runner
    await eventually(lambda: not sibling.call("GET", "/api/ps")[1]["models"])


async def test_models_are_listed_newest_first_to_the_second(stage: Stage) -> None:
    stage.copy("tiny", "newest")
    times = [model["modified_at"][:19] for model in stage.server.call("GET", "/api/tags")[1]["models"]]
    assert times == sorted(times, reverse=True)
    stage.ensure_absent("newest")


async def test_both_servers_see_an_uploaded_blob(stage: Stage, sibling: OllamaServer) -> None:
    data = b"some bytes of a test"
    digest = "sha256:" + hashlib.sha256(data).hexdigest()
    stage.remove_blob(digest)
    assert sibling.call("HEAD", f"/api/blobs/{digest}")[0] == 404
    assert stage.server.call("POST", f"/api/blobs/{digest}", data)[0] == 201
    assert sibling.call("HEAD", f"/api/blobs/{digest}")[0] == 200
    assert sibling.call("POST", f"/api/blobs/{digest}", data)[0] == 200
    stage.remove_blob(digest)


async def test_an_upload_of_an_existing_blob_is_answered_without_reading_it(stage: Stage) -> None:
    digest = stage.files["big"].digest
    raw = request_bytes("POST", f"/api/blobs/{digest}", b"", (("Content-Length", str(2**30)),))
    async with connect(stage.server.address) as connection:
        await connection.send(raw)
        head = await connection.head()
        assert head.status == 200


@pytest.mark.parametrize(("digest", "status"), [(_MISSING, 404), ("sha256:zz", 400), ("nonsense", 400)])
async def test_missing_and_invalid_blob_digests(address: Address, digest: str, status: int) -> None:
    assert (await call(address, "HEAD", f"/api/blobs/{digest}")).status == status


async def test_a_blob_that_does_not_match_its_digest_is_refused(address: Address) -> None:
    reply = await call(address, "POST", f"/api/blobs/{_MISSING}", b"hello")
    actual = "sha256:" + hashlib.sha256(b"hello").hexdigest()
    message = f'digest mismatch, expected "{_MISSING}", got "{actual}"'
    assert (reply.status, reply.json()) == (400, {"error": message})
    assert (await call(address, "HEAD", f"/api/blobs/{_MISSING}")).status == 404


async def test_create_reports_its_steps_and_ends_with_success(stage: Stage) -> None:
    body = {"model": "steps", "from": "tiny", "system": "be brief", "parameters": {"num_ctx": 2048}}
    reply = await call(stage.server.address, "POST", "/api/create", body)
    assert (reply.status, reply.header("Content-Type"), reply.end) == (200, "application/x-ndjson", "complete")
    assert [line["status"] for line in reply.lines()][-2:] == ["writing manifest", "success"]
    shown = stage.post("/api/show", {"model": "steps"})
    assert shown["system"] == "be brief"
    assert shown["parameters"].split() == ["num_ctx", "2048"] or "num_ctx" in shown["parameters"]
    stage.load("steps")
    assert stage.loaded()["steps:latest"]["context_length"] == 2048
    stage.unload("steps")
    stage.ensure_absent("steps")


async def test_show_names_the_weights_blob(stage: Stage) -> None:
    blob = stage.files["tiny"].digest.replace(":", "-")
    for name in ("tiny", "tooly", "toolish"):
        shown = stage.post("/api/show", {"model": name})
        from_lines = [line for line in shown["modelfile"].splitlines() if line.startswith("FROM ")]
        assert [line.rpartition("/")[2] for line in from_lines] == [blob]


async def test_show_has_the_values_needed_for_memory_estimates(stage: Stage) -> None:
    info = stage.post("/api/show", {"model": "tiny"})["model_info"]
    expected = {
        "general.architecture": "llama",
        "llama.block_count": 2,
        "llama.context_length": 8192,
        "llama.embedding_length": 64,
        "llama.feed_forward_length": 128,
        "llama.attention.head_count": 2,
        "llama.attention.head_count_kv": 1,
        "llama.attention.key_length": 32,
        "llama.attention.value_length": 32,
    }
    assert {key: info[key] for key in expected} == expected
    assert info["general.parameter_count"] > 100_000


@pytest.mark.parametrize(
    ("model", "family", "capability"), [("tiny", "llama", "completion"), ("embed", "bert", "embedding")]
)
async def test_show_lists_capabilities(stage: Stage, model: str, family: str, capability: str) -> None:
    shown = stage.post("/api/show", {"model": model})
    assert shown["details"]["family"] == family
    assert shown["capabilities"] == [capability]


async def test_a_large_models_metadata_is_read_from_its_header(stage: Stage) -> None:
    size = put_into_store(stage.server.models_dir, "seventy", LLAMA_70B)
    listed = {model["name"]: model for model in stage.server.call("GET", "/api/tags")[1]["models"]}
    assert size < listed["seventy:latest"]["size"] < size + 1000  # plus its small other blobs
    assert listed["seventy:latest"]["details"]["parameter_size"] == "70.6B"
    info = stage.post("/api/show", {"model": "seventy"})["model_info"]
    assert (info["llama.block_count"], info["llama.attention.head_count_kv"]) == (80, 8)
    assert info["general.parameter_count"] == pytest.approx(70.6e9, rel=0.01)
    assert "llama.attention.key_length" not in info  # the default is width / heads
    stage.ensure_absent("seventy")


_UNREACHABLE: dict[str, Any] = {"model": "127.0.0.1:1/library/none", "insecure": True}
_PULL_ERROR = (
    'pull model manifest: Get "http://127.0.0.1:1/v2/library/none/manifests/latest": '
    "dial tcp 127.0.0.1:1: connect: connection refused"
)


async def test_a_streamed_pull_reports_a_failed_connection(address: Address) -> None:
    reply = await call(address, "POST", "/api/pull", _UNREACHABLE)
    assert (reply.status, reply.header("Content-Type"), reply.end) == (200, "application/x-ndjson", "complete")
    assert reply.lines() == [{"status": "pulling manifest"}, {"error": _PULL_ERROR}]


async def test_an_unstreamed_pull_reports_a_failed_connection(address: Address) -> None:
    reply = await call(address, "POST", "/api/pull", {**_UNREACHABLE, "stream": False})
    assert (reply.status, reply.json()) == (500, {"error": _PULL_ERROR})


async def test_a_streamed_push_reports_a_missing_model(address: Address) -> None:
    reply = await call(address, "POST", "/api/push", _UNREACHABLE)
    lines = reply.lines()
    assert (reply.status, lines[0]) == (200, {"status": "retrieving manifest"})
    assert "error" in lines[-1]


@pytest.mark.parametrize("path", ["/api/pull", "/api/push", "/api/create"])
async def test_pull_push_and_create_need_a_name(address: Address, path: str) -> None:
    reply = await call(address, "POST", path, {"model": ""})
    assert reply.status == 400
    assert reply.json()["error"]
