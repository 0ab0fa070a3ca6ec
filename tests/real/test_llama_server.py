"""A real llama-server on the CPU, attached, with Ollama's own clients in front of the router."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Generator
from pathlib import Path
from typing import Any

import ollama
import openai
import pytest

from tests.support.ollama_server import REAL_VERSION, blocking_call, free_port, kill_group, real_binary
from tests.support.product import Product, prepare, running
from tests.support.rawhttp import Address
from tests.support.tiny_model import EMBED, TINY, ModelSpec, write_model
from tests.support.waiting import eventually_sync

pytestmark = pytest.mark.ollama

_NAME = "tiny:local-box"
_VECTORS = "vectors:latest"


@pytest.fixture(scope="module")
def routed(tmp_path_factory: pytest.TempPathFactory) -> Generator[Product]:
    folder = tmp_path_factory.mktemp("llama-server")
    chat, embed = _start(folder, TINY, "own-name"), _start(folder, EMBED, "own-vectors", "--embeddings")
    try:
        instances = [
            {"name": "chat", "kind": "llama-server", "url": chat[1], "models": {_NAME: "own-name"}, "num_parallel": 2},
            {"name": "embed", "kind": "llama-server", "url": embed[1], "models": {_VECTORS: "own-vectors"}},
        ]
        with running(prepare(folder, {"discover": False, "instances": instances})) as product:
            eventually_sync(lambda: len(product.call("GET", "/api/ps")[1]["models"]) == 2)
            yield product
    finally:
        kill_group(chat[0])
        kill_group(embed[0])


@pytest.fixture
def client(routed: Product) -> Generator[Any]:
    opened: Any = ollama.Client(host=routed.address.url)
    with opened:
        yield opened


def _start(folder: Path, spec: ModelSpec, alias: str, *flags: str) -> tuple[subprocess.Popen[bytes], str]:
    program = real_binary(REAL_VERSION).parent.parent / "lib" / "ollama" / "llama-server"
    write_model(folder / f"{alias}.gguf", spec)
    port = free_port()
    command = [str(program), "-m", str(folder / f"{alias}.gguf"), "--host", "127.0.0.1", "--port", str(port)]
    command += ["-c", "4096", "-np", "2", "--alias", alias, *flags]
    with (folder / f"{alias}.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
    address = Address("127.0.0.1", port)

    def is_up() -> bool:
        try:
            return blocking_call(address, "GET", "/health")[0] == 200
        except OSError:
            return False

    eventually_sync(is_up, what="/health of llama-server")
    return process, f"http://127.0.0.1:{port}"


def test_ollama_python_chats_streams_and_embeds(client: Any) -> None:
    messages = [{"role": "user", "content": "hi"}]
    found = client.chat(_NAME, messages, options={"num_predict": 4})
    assert (found.done, found.done_reason, found.eval_count, found.model) == (True, "length", 4, _NAME)
    *pieces, last = client.chat(_NAME, messages, options={"num_predict": 4}, stream=True)
    assert (len(pieces), last.done, last.eval_count) == (4, True, 4)
    assert last.prompt_eval_duration
    raw = client.generate(_NAME, "a b", raw=True, options={"num_predict": 3, "top_k": 1})
    assert (raw.done, bool(raw.response), raw.eval_count) == (True, True, 3)
    vectors = client.embed(_VECTORS, ["a", "b"]).embeddings
    assert len(vectors) == 2
    assert len(vectors[0]) == EMBED.width
    assert _NAME in [model.model for model in client.list().models]
    assert _NAME in [model.model for model in client.ps().models]


def test_a_schema_that_the_server_cannot_keep_to_is_refused_in_its_own_words(client: Any) -> None:
    """The made-up vocabulary of the tiny model suits no grammar."""
    schema = {"type": "object", "properties": {"n": {"enum": ["x"]}}, "required": ["n"]}
    with pytest.raises(ollama.ResponseError, match="samplers") as refused:
        client.chat(_NAME, [{"role": "user", "content": "hi"}], format=schema)
    assert refused.value.status_code == 400


def test_an_error_of_the_server_is_one_of_ollama(client: Any) -> None:
    with pytest.raises(ollama.ResponseError, match="exceed") as refused:
        client.chat(_NAME, [{"role": "user", "content": "word " * 5000}])
    assert refused.value.status_code == 400


def test_openais_client_is_passed_through(routed: Product) -> None:
    with openai.OpenAI(base_url=f"{routed.address.url}/v1", api_key="none") as opened:
        messages: Any = [{"role": "user", "content": "hi"}]
        with opened.chat.completions.create(model=_NAME, messages=messages, max_tokens=3, stream=True) as stream:
            said = [chunk.choices[0].delta.content for chunk in stream if chunk.choices]
        assert len([each for each in said if each]) == 3
        with pytest.raises(openai.NotFoundError):
            opened.chat.completions.create(model="other", messages=messages)


def test_the_ollama_command_runs_it(routed: Product, tmp_path: Path) -> None:
    environment = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "OLLAMA_HOST": routed.address.url, "TERM": "dumb"}

    def command(*arguments: str) -> str:
        completed = subprocess.run(
            [str(real_binary(REAL_VERSION)), *arguments], env=environment, capture_output=True, text=True, timeout=300,
            check=False, stdin=subprocess.DEVNULL, cwd=tmp_path,
        )  # fmt: skip
        assert completed.returncode == 0, completed.stderr
        return completed.stdout

    assert _NAME in command("list")
    assert _NAME in command("ps")
    assert "completion" in command("show", _NAME)
    assert command("run", _NAME, "hi").strip()
    command("stop", _NAME)
    assert _NAME in command("ps")
