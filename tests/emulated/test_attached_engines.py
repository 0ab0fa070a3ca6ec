"""A server with OpenAI's API beside emulated Ollama servers, behind the same endpoint."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from router.cli.main import main
from tests.support.openai_server import (
    HELLO,
    OWN_NAME,
    OpenAiServer,
    delta,
    finish,
    openai_server,
    replying,
    streaming,
    usage,
)
from tests.support.product import Product, prepare
from tests.support.rawhttp import Reply, call, connect, request_bytes
from tests.support.waiting import eventually

pytestmark = pytest.mark.rig

_NAME = "big:32b"
_QUICK = {"poll": {"catalog_seconds": 0.2, "gpu_seconds": 0.2, "residency_seconds": 0.2}}
_ASKED = {"model": _NAME, "messages": [{"role": "user", "content": "hi"}]}


def _config(server: OpenAiServer, **instance: Any) -> dict[str, Any]:
    entry = {"name": "box2", "kind": "vllm", "url": server.url, "models": {_NAME: OWN_NAME}, **instance}
    return {**_QUICK, "instances": [entry]}


@asynccontextmanager
async def _routed(
    folder: Path, config: dict[str, Any], arguments: tuple[str, ...] = ("--rig", "3090"), state: str = "ready"
) -> AsyncGenerator[Product]:
    product = prepare(folder, config, {"LLAMAYARD_RIG_SPEED": "20"}, arguments)
    try:
        await asyncio.to_thread(product.start)
        await eventually(lambda: _logged(product, "instance_state", state=state, instance="box2"), what=state)
        yield product
    finally:
        await asyncio.to_thread(product.destroy)


def _logged(product: Product, event: str, **fields: Any) -> list[Any]:
    entries = [json.loads(line) for line in product.log_text().splitlines() if line.startswith("{")]
    return [e for e in entries if e["event"] == event and all(e.get(name) == fields[name] for name in fields)]


async def _post(product: Product, path: str, body: Any, *headers: tuple[str, str]) -> Reply:
    return await call(product.address, "POST", path, body, headers)


async def test_v1_passes_byte_for_byte_but_for_the_name_and_the_content_type(tmp_path: Path) -> None:
    async with openai_server() as server, _routed(tmp_path, _config(server)) as product:
        raw = b'{ "model" : "BIG:32b", "messages":[{"role":"user","content":"h\\u0069"}],  "stream":true, "x":1.50 }'
        async with connect(product.address) as connection:
            await connection.send(request_bytes("POST", "/v1/chat/completions", raw, (("Content-Type", "text/plain"),)))
            reply = await connection.reply()
        assert reply.status == 200
        assert reply.events()[-1] == "[DONE]" or b"data: [DONE]" in reply.body
        (asked,) = server.asked
        assert asked.raw == raw.replace(b'"BIG:32b"', json.dumps(OWN_NAME).encode())
        assert asked.headers["Content-Type"] == "application/json"
        assert asked.headers["Via"].startswith("1.1 llamayard-")


async def test_it_is_in_every_list_with_a_note_of_its_engine(tmp_path: Path) -> None:
    async with openai_server() as server, _routed(tmp_path, _config(server, context_length=4096)) as product:
        note = {"engine": "vllm", "instances": ["box2"]}
        tags = (await call(product.address, "GET", "/api/tags")).json()["models"]
        (row,) = [row for row in tags if row["name"] == _NAME]
        assert (row["llamayard"], row["size"]) == (note, 0)
        assert len(tags) > 1
        listed = (await call(product.address, "GET", "/v1/models")).json()["data"]
        assert [row["llamayard"] for row in listed if row["id"] == _NAME] == [note]
        (loaded,) = (await call(product.address, "GET", "/api/ps")).json()["models"]
        assert loaded["name"] == _NAME
        assert loaded["llamayard"] == {"instance": "box2", "gpus": [], "slots": 32, "in_flight": 0, **note}
        shown = (await _post(product, "/api/show", {"model": "Big:32B"})).json()
        assert shown["llamayard"] == note
        assert (shown["capabilities"], shown["model_info"]["unknown.context_length"]) == (["completion", "tools"], 4096)
        assert (await call(product.address, "GET", f"/v1/models/{_NAME}")).json()["id"] == _NAME


async def test_what_the_store_does_is_refused_with_the_reason(tmp_path: Path) -> None:
    async with openai_server() as server, _routed(tmp_path, _config(server)) as product:
        for method, path, body in (
            ("POST", "/api/create", {"model": _NAME, "from": "llama3.1:8b"}),
            ("POST", "/api/create", {"model": "mine", "from": _NAME}),
            ("POST", "/api/copy", {"source": _NAME, "destination": "mine"}),
            ("POST", "/api/copy", {"source": "llama3.1:8b", "destination": _NAME}),
            ("POST", "/api/push", {"model": _NAME}),
            ("POST", "/api/pull", {"model": _NAME}),
            ("DELETE", "/api/delete", {"model": _NAME}),
        ):
            reply = await call(product.address, method, path, body)
            assert reply.status == 400, (path, reply.body)
            assert "is served by box2 (vllm), not from the model store" in reply.json()["error"]


async def test_a_name_that_nobody_has_is_404_here(tmp_path: Path) -> None:
    async with openai_server() as server:
        config = {**_config(server), "discover": False}
        async with _routed(tmp_path, config, ()) as product:
            for path in ("/v1/chat/completions", "/api/chat"):
                reply = await _post(product, path, {**_ASKED, "model": "other"})
                assert (reply.status, "not found" in reply.body.decode()) == (404, True)
            assert server.asked == []
            assert (await call(product.address, "GET", "/api/version")).status == 200
            assert [m["name"] for m in (await call(product.address, "GET", "/api/tags")).json()["models"]] == [_NAME]
            assert (await _post(product, "/api/chat", _ASKED)).lines()[-1]["done"] is True


async def test_a_chat_is_translated_as_a_stream_and_as_a_whole(tmp_path: Path) -> None:
    async with openai_server() as server, _routed(tmp_path, _config(server)) as product:
        reply = await _post(product, "/api/chat", {**_ASKED, "options": {"num_ctx": 9, "top_k": 3}})
        assert reply.header("Content-Type") == "application/x-ndjson"
        assert reply.header("X-Llamayard-Dropped-Options") == "num_ctx"
        *pieces, last = reply.lines()
        assert [(p["model"], p["message"]["content"], p["done"]) for p in pieces] == [
            (_NAME, "Hel", False),
            (_NAME, "lo", False),
        ]
        assert (last["done"], last["done_reason"], last["prompt_eval_count"], last["eval_count"]) == (
            True,
            "stop",
            7,
            2,
        )
        sent = server.asked[0].body
        assert sent["model"] == OWN_NAME
        assert (sent["stream"], sent["stream_options"], sent["top_k"]) == (True, {"include_usage": True}, 3)
        whole = {"choices": [{"message": {"content": "Hello"}, "finish_reason": "length"}], "usage": None}
        server.answers["/v1/chat/completions"] = replying(whole)
        found = (await _post(product, "/api/chat", {**_ASKED, "stream": False})).json()
        assert (found["message"], found["done_reason"]) == ({"role": "assistant", "content": "Hello"}, "length")


async def test_a_translated_connection_is_used_again_and_many_requests_share_the_slots(tmp_path: Path) -> None:
    async with openai_server() as server, _routed(tmp_path, _config(server, num_parallel=2)) as product:
        replies = await asyncio.gather(*(_post(product, "/api/chat", _ASKED) for _ in range(20)))
        assert {reply.lines()[-1]["done"] for reply in replies} == {True}
        ports = {asked.headers.get("Host") for asked in server.asked}
        assert len(server.asked) == 20
        assert len(ports) == 1
        (loaded,) = (await call(product.address, "GET", "/api/ps")).json()["models"]
        assert (loaded["llamayard"]["slots"], loaded["llamayard"]["in_flight"]) == (2, 0)


async def test_a_client_that_hangs_up_frees_the_servers_slot(tmp_path: Path) -> None:
    never = asyncio.Event()

    async def hanging(asked: Any, request: Any) -> Any:
        await never.wait()

    async with (
        openai_server({"/v1/chat/completions": hanging}) as server,
        _routed(tmp_path, _config(server)) as product,
    ):
        for path in ("/api/chat", "/v1/chat/completions"):
            async with connect(product.address) as connection:
                await connection.send(request_bytes("POST", path, json.dumps(_ASKED).encode()))
                await eventually(lambda: server.asked)
            await eventually(lambda: server.hung_up)
            server.asked.clear()
            server.hung_up.clear()
        status = await asyncio.to_thread(product.call, "GET", "/llamayard/status")
        assert [m["in_flight"] for m in status[1]["models"]] == [0]


async def test_an_engine_that_dies_in_a_stream_is_an_error_in_either_api(tmp_path: Path) -> None:
    dead = {"error": {"message": "EngineCore encountered an issue", "type": "InternalServerError", "code": 500}}
    answers = {"/v1/chat/completions": streaming(delta(content="Hel"), dead)}
    async with openai_server(answers) as server, _routed(tmp_path, _config(server)) as product:
        lines = (await _post(product, "/api/chat", _ASKED)).lines()
        assert lines[-1] == {"error": "EngineCore encountered an issue"}
        assert all(not line.get("done") for line in lines)
        reply = await _post(product, "/v1/chat/completions", {**_ASKED, "stream": True})
        assert reply.body.endswith(b"data: [DONE]\n\n")
        await eventually(lambda: len(_logged(product, "request", error="server_error")) == 2)


async def test_a_stream_without_its_end_mark_ends_with_an_error(tmp_path: Path) -> None:
    answers = {"/v1/chat/completions": streaming(*HELLO, done=False)}
    async with openai_server(answers) as server, _routed(tmp_path, _config(server)) as product:
        lines = (await _post(product, "/api/chat", _ASKED)).lines()
        assert "without its end mark" in lines[-1]["error"]
        assert all(not line.get("done") for line in lines)


async def test_errors_come_in_ollamas_shape_with_their_status(tmp_path: Path) -> None:
    async with openai_server() as server, _routed(tmp_path, _config(server)) as product:
        for status, content in (
            (400, {"error": {"message": "too long", "type": "exceed_context_size_error"}}),
            (422, {"detail": "too long"}),
            (500, {"object": "error", "message": "too long"}),
        ):
            server.answers["/v1/chat/completions"] = replying(content, status)
            reply = await _post(product, "/api/chat", _ASKED)
            assert (reply.status, reply.json()) == (status, {"error": "too long"})


async def test_tools_go_both_ways(tmp_path: Path) -> None:
    call_pieces = (
        delta(tool_calls=[{"index": 0, "id": "a1", "type": "function", "function": {"name": "get", "arguments": ""}}]),
        delta(tool_calls=[{"index": 0, "function": {"arguments": '{"ci'}}]),
        delta(tool_calls=[{"index": 0, "function": {"arguments": 'ty":"Bonn"}'}}]),
        finish("tool_calls"),
        usage(1, 1),
    )
    answers = {"/v1/chat/completions": streaming(*call_pieces)}
    async with openai_server(answers) as server, _routed(tmp_path, _config(server)) as product:
        called, last = (await _post(product, "/api/chat", {**_ASKED, "tools": [{"type": "function"}]})).lines()
        (found,) = called["message"]["tool_calls"]
        assert found["function"] == {"index": 0, "name": "get", "arguments": {"city": "Bonn"}}
        assert last["done_reason"] == "stop"
        history = [
            {"role": "assistant", "content": "", "tool_calls": called["message"]["tool_calls"]},
            {"role": "tool", "tool_name": "get", "content": "rain"},
        ]
        await _post(product, "/api/chat", {**_ASKED, "messages": history})
        sent = server.asked[1].body["messages"]
        assert sent[0]["tool_calls"][0]["function"] == {"name": "get", "arguments": '{"city":"Bonn"}'}
        assert sent[1]["tool_call_id"] == sent[0]["tool_calls"][0]["id"] == "a1"


async def test_generate_embed_and_the_commands_empty_requests(tmp_path: Path) -> None:
    answers = {
        "/v1/chat/completions": streaming(*HELLO),
        "/v1/completions": streaming({"choices": [{"text": "raw", "finish_reason": "stop"}]}),
        "/v1/embeddings": replying({"data": [{"index": 1, "embedding": [2.0]}, {"index": 0, "embedding": [1.0]}]}),
    }
    async with openai_server(answers) as server, _routed(tmp_path, _config(server)) as product:
        said = (await _post(product, "/api/generate", {"model": _NAME, "prompt": "a", "system": "b"})).lines()
        assert "".join(line["response"] for line in said) == "Hello"
        said = (await _post(product, "/api/generate", {"model": _NAME, "prompt": "a", "raw": True})).lines()
        assert said[0]["response"] == "raw"
        found = (await _post(product, "/api/embed", {"model": _NAME, "input": ["a", "b"]})).json()
        assert found["embeddings"] == [[1.0], [2.0]]
        found = (await _post(product, "/api/embeddings", {"model": _NAME, "prompt": "a"})).json()
        assert found == {"embedding": [1.0]}
        refused = await _post(product, "/api/generate", {"model": _NAME, "prompt": "a", "suffix": "b"})
        assert (refused.status, "suffix" in refused.json()["error"]) == (400, True)
        count = len(server.asked)
        loaded = (await _post(product, "/api/generate", {"model": _NAME})).json()
        assert (loaded["done"], loaded["done_reason"], loaded["response"]) == (True, "load", "")
        embedded = (await _post(product, "/api/embed", {"model": _NAME})).json()
        assert embedded == {"model": _NAME, "embeddings": []}
        unloaded = (await _post(product, "/api/chat", {"model": _NAME, "messages": [], "keep_alive": 0})).json()
        assert unloaded["done_reason"] == "unload"
        assert len(server.asked) == count


async def test_paths_that_the_server_lacks_are_refused_with_the_reason(tmp_path: Path) -> None:
    async with openai_server() as server, _routed(tmp_path, _config(server)) as product:
        reply = await _post(product, "/v1/messages", {**_ASKED, "max_tokens": 5})
        assert (reply.status, reply.json()["type"]) == (400, "error")
        assert "box2, which does not have /v1/messages" in reply.json()["error"]["message"]
        server.answers["/v1/responses"] = replying({"ok": True})
        assert (await _post(product, "/v1/responses", {"model": _NAME, "input": "a"})).json() == {"ok": True}
        assert server.asked[-1].body["model"] == OWN_NAME


async def test_a_server_that_is_down_is_503_and_comes_back(tmp_path: Path) -> None:
    async with openai_server() as server:
        config = _config(server, url="http://127.0.0.1:9")
        async with _routed(tmp_path, config, state="backoff") as product:
            reply = await _post(product, "/api/chat", _ASKED)
            assert (reply.status, "box2" in reply.json()["error"]) == (503, True)


async def test_the_servers_key_is_sent_and_the_clients_is_not(tmp_path: Path) -> None:
    key_file = tmp_path / "key"
    key_file.write_text("s3cret\n")
    config = {"api_key_file": str(key_file)}
    async with openai_server(key="s3cret") as server, _routed(tmp_path, _config(server, **config)) as product:
        for path in ("/api/chat", "/v1/chat/completions"):
            reply = await _post(product, path, _ASKED, ("Authorization", "Bearer mine"))
            assert reply.status == 200
            assert server.asked[-1].headers["Authorization"] == "Bearer s3cret"


async def test_a_long_body_with_an_image_is_translated(tmp_path: Path) -> None:
    picture = "iVBORw0KGgoAAAANSUhEUgAA" + "A" * 3_000_000
    async with openai_server() as server, _routed(tmp_path, _config(server)) as product:
        messages = [{"role": "user", "content": "what", "images": [picture]}]
        reply = await _post(product, "/api/chat", {"model": _NAME, "messages": messages})
        assert reply.lines()[-1]["done"] is True
        (message,) = server.asked[0].body["messages"]
        text, image = message["content"]
        assert text == {"type": "text", "text": "what"}
        assert image["image_url"]["url"] == "data:image/png;base64," + picture


async def test_ollamas_models_are_served_as_before(tmp_path: Path) -> None:
    async with openai_server() as server, _routed(tmp_path, _config(server)) as product:
        lines = (await _post(product, "/api/chat", {**_ASKED, "model": "llama3.1:8b"})).lines()
        assert lines[-1]["done"] is True
        assert server.asked == []
        assert (await _post(product, "/api/chat", {**_ASKED, "model": "nobody"})).status == 404


async def test_commands_say_that_an_attached_server_keeps_its_models(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def command(*arguments: str) -> tuple[int, str]:
        environment = {"HOME": str(tmp_path), "PATH": os.environ["PATH"]}
        code = main([*arguments, "--config", str(product.config)], environment)
        captured = capsys.readouterr()
        return code, captured.out + captured.err

    async with openai_server() as server, _routed(tmp_path, _config(server)) as product:
        code, said = await asyncio.to_thread(command, "load", _NAME)
        assert (code, "on box2, an attached server, which has it loaded" in said) == (0, True), said
        code, said = await asyncio.to_thread(command, "unload", _NAME)
        assert (code, "stays on box2: an attached server decides" in said) == (1, True), said
        code, said = await asyncio.to_thread(command, "pin", _NAME, "0")
        assert (code, "attached server, which decides where it runs" in said) == (1, True), said
        code, said = await asyncio.to_thread(command, "ps")
        assert "CPU" not in said
        assert server.asked == []


async def test_a_key_file_that_is_missing_is_a_problem_of_the_configuration(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    async with openai_server() as server:
        config = _config(server, api_key_file=str(tmp_path / "none"))
    (tmp_path / "c.yaml").write_text(json.dumps({**config, "rig": "3090"}), encoding="utf-8")
    code = main(["check-config", "--config", str(tmp_path / "c.yaml")], {"HOME": str(tmp_path), "PATH": ""})
    captured = capsys.readouterr()
    assert (code, "api_key_file" in captured.out + captured.err) == (2, True)
