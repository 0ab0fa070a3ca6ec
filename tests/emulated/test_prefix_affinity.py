"""With two replicas of a model, the second turn of a conversation goes to the replica of the first, on every API.

The clients identify neither themselves nor the conversation: only the prompt's prefix does. Emulated GPUs and servers.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import pytest

from tests.support.product import Product, prepare, running
from tests.support.rawhttp import call
from tests.support.sparse_model import LLAMA_8B, put_into_store

pytestmark = pytest.mark.rig

_FAST = {"LLAMAYARD_RIG_SPEED": "20"}
_LONG = 8600
"""Bytes of a first turn: just above the length at which a fingerprint is taken."""


@pytest.fixture(scope="module")
def product(tmp_path_factory: pytest.TempPathFactory) -> Generator[Product]:
    polls = {"catalog_seconds": 0.2, "gpu_seconds": 0.2, "residency_seconds": 0.2}
    with running(prepare(tmp_path_factory.mktemp("rig"), {"poll": polls}, _FAST, ("--rig", "2x3090"))) as router:
        (store,) = {process.environ()["OLLAMA_MODELS"] for process in router.servers().values()}
        put_into_store(Path(store), "small", LLAMA_8B)
        yield router


def _messages(texts: list[str]) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[turn % 2], "content": text} for turn, text in enumerate(texts)]


def _chat(texts: list[str]) -> dict[str, Any]:
    return {"messages": _messages(texts), "stream": False, "options": {"num_predict": 4}}


def _generate(texts: list[str]) -> dict[str, Any]:
    return {"prompt": "\n".join(texts), "stream": False, "options": {"num_predict": 4}}


def _with_max_tokens(texts: list[str]) -> dict[str, Any]:
    return {"max_tokens": 4, "messages": _messages(texts)}


_SHAPES = {
    "/api/chat": _chat,
    "/api/generate": _generate,
    "/v1/chat/completions": _with_max_tokens,
    "/v1/messages": _with_max_tokens,
}


async def _ask(product: Product, path: str, body: dict[str, Any], user: str, *extra_headers: tuple[str, str]) -> str:
    """Sends a request and returns the instance that answered."""
    headers = (("X-OpenWebUI-User-Id", user), *extra_headers)
    reply = await call(product.address, "POST", path, {"model": "small", **body}, headers)
    assert reply.status == 200, reply.body
    return reply.header("X-Llamayard-Instance") or ""


@pytest.mark.parametrize(("path", "shape"), _SHAPES.items(), ids=list(_SHAPES))
async def test_a_second_turn_goes_to_the_replica_of_the_first(
    product: Product, path: str, shape: Callable[[list[str]], dict[str, Any]]
) -> None:
    for gpu in ("gpu:0", "gpu:1"):
        await _ask(product, "/api/generate", _generate(["hi"]), "nobody", ("X-Llamayard-Layout", gpu))
    first_turns = {name: f"{path} {name} has this to say. ".ljust(100, ".") * (_LONG // 100) for name in ("ann", "ben")}
    instances = {
        name: await _ask(product, path, shape([text]), f"{path}{name} 1") for name, text in first_turns.items()
    }
    assert sorted(instances.values()) == ["gpu0", "gpu1"]
    for number, name in enumerate(("ben", "ann", "ann", "ben")):
        turn = shape([first_turns[name], "Is that so?", f"It is, for the {number}. time."])
        assert await _ask(product, path, turn, f"{path}{name} again {number}") == instances[name]
