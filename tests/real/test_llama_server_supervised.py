"""A real llama-server that the router starts for a model of Ollama's store and for a file, without GPUs."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from typing import Any

import psutil
import pytest

from tests.support.ollama_server import REAL_VERSION, ModelFile, create_from_file, real_binary, real_server
from tests.support.product import Product, prepare, running
from tests.support.waiting import eventually_sync

pytestmark = pytest.mark.ollama

_CHAT = {"messages": [{"role": "user", "content": "hi"}], "options": {"num_predict": 3}, "stream": False}


@pytest.fixture(scope="module")
def routed(tmp_path_factory: pytest.TempPathFactory, files: Mapping[str, ModelFile]) -> Generator[Product]:
    folder, binary = tmp_path_factory.mktemp("supervised"), real_binary(REAL_VERSION)
    with real_server(folder) as server:
        create_from_file(server, "tiny", files["tiny"].path, files["tiny"].digest)
        models = server.models_dir
    program = str(binary.parent.parent / "lib" / "ollama" / "llama-server")
    command = [
        program, "--model", "{path}", "--alias", "{name}", "--host", "127.0.0.1", "--port", "{port}",
        "--ctx-size", "{context_total}", "--parallel", "{slots}",
    ]  # fmt: skip
    rules: dict[str, Any] = {"engine": "llama", "context_length": 1024}
    config = {
        "ollama": {"binary": str(binary), "models": str(models)},
        "engines": {"llama": {"kind": "llama-server", "command": command}},
        "models": {
            "tiny": {**rules, "flags": ["--cache-type-k", "q8_0"]},
            "vectors": {
                **rules,
                "path": str(files["embed"].path),
                "capabilities": ["embedding"],
                "flags": ["--embeddings"],
            },
        },
    }
    with running(prepare(folder, config)) as product:
        yield product


def _servers(product: Product) -> list[psutil.Process]:
    return [p for p in product.processes() if "--ctx-size" in p.cmdline()]


def test_a_model_of_the_store_is_loaded_served_and_unloaded(routed: Product) -> None:
    assert _servers(routed) == []
    status, found = routed.call("POST", "/api/chat", {"model": "tiny", **_CHAT})
    assert (status, found["done_reason"], found["eval_count"]) == (200, "length", 3)
    (server,) = _servers(routed)
    assert server.cmdline()[-6:-2] == ["--ctx-size", "2048", "--parallel", "2"]
    (row,) = routed.call("GET", "/api/ps")[1]["models"]
    assert (row["name"], row["llamayard"]["engine"]) == ("tiny:latest", "llama-server")
    assert routed.call("POST", "/api/generate", {"model": "tiny", "keep_alive": 0})[1]["done_reason"] == "unload"
    eventually_sync(lambda: not _servers(routed))


def test_a_file_serves_vectors(routed: Product) -> None:
    status, found = routed.call("POST", "/api/embed", {"model": "vectors", "input": ["a", "b"]})
    assert (status, len(found["embeddings"])) == (200, 2)


def test_a_killed_server_is_started_again(routed: Product) -> None:
    assert routed.call("POST", "/api/chat", {"model": "tiny", **_CHAT})[0] == 200
    (server,) = [p for p in _servers(routed) if "tiny:latest" in p.cmdline()]
    server.kill()
    assert routed.call("POST", "/api/chat", {"model": "tiny", **_CHAT})[0] == 200
