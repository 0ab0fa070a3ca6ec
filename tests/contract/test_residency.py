"""Which models stay loaded and for how long, and what makes a server reload a model."""

from __future__ import annotations

from datetime import datetime
from typing import Any

import pytest

from tests.contract.stage import Stage
from tests.support.rawhttp import call
from tests.support.waiting import eventually

_YEAR_SECONDS = 365 * 86_400
_PS_KEYS = {"name", "model", "size", "digest", "details", "expires_at", "size_vram", "context_length"}


def _expires_in_seconds(entry: dict[str, Any]) -> float:
    return _timestamp(entry["expires_at"]) - datetime.now().astimezone().timestamp()


def _timestamp(text: str) -> float:
    """Parses a timestamp; Go prints nanoseconds, Python parses at most microseconds."""
    whole, dot, rest = text.partition(".")
    zone = rest.lstrip("0123456789") if dot else ""
    return datetime.fromisoformat((whole + zone).replace("Z", "+00:00")).timestamp()


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/api/generate", {}),
        ("/api/generate", {"stream": True}),
        ("/api/generate", {"prompt": ""}),
        ("/api/chat", {}),
        ("/api/chat", {"messages": []}),
    ],
)
async def test_a_request_without_a_prompt_only_loads(stage: Stage, path: str, body: dict[str, Any]) -> None:
    stage.unload_all()
    reply = await call(stage.server.address, "POST", path, {"model": "tiny", **body})
    assert (reply.status, reply.header("Content-Type")) == (200, "application/json; charset=utf-8")
    answer = reply.json()
    assert (answer["done"], answer["done_reason"]) == (True, "load")
    assert "eval_count" not in answer
    assert list(stage.loaded()) == ["tiny:latest"]


async def test_an_embedding_model_is_loaded_by_an_embed_request_without_input(stage: Stage) -> None:
    stage.unload_all()
    reply = await call(stage.server.address, "POST", "/api/embed", {"model": "embed"})
    assert (reply.status, reply.json()) == (200, {"model": "embed", "embeddings": []})
    assert list(stage.loaded()) == ["embed:latest"]


@pytest.mark.parametrize("path", ["/api/generate", "/api/chat"])
@pytest.mark.parametrize("was_loaded", [True, False])
async def test_keep_alive_zero_unloads(stage: Stage, path: str, was_loaded: bool) -> None:
    stage.unload_all()
    if was_loaded:
        stage.load("tiny")
    reply = await call(stage.server.address, "POST", path, {"model": "tiny", "keep_alive": 0})
    assert (reply.status, reply.json()["done_reason"]) == (200, "unload")
    await eventually(lambda: not stage.loaded())


async def test_a_keep_alive_under_a_second_unloads(stage: Stage) -> None:
    stage.load("tiny")
    reply = await call(stage.server.address, "POST", "/api/generate", {"model": "tiny", "keep_alive": "900ms"})
    # Up to 0.24 only whole seconds count; from 0.30 the model is loaded and then expires.
    assert reply.json()["done_reason"] == ("load" if stage.server.is_0_30 else "unload")
    await eventually(lambda: not stage.loaded())


async def test_keep_alive_zero_with_a_prompt_unloads_after_the_answer(stage: Stage) -> None:
    body = {"model": "tiny", "prompt": "x", "stream": False, "keep_alive": 0, "options": {"num_predict": 3}}
    reply = await call(stage.server.address, "POST", "/api/generate", body)
    assert (reply.json()["done_reason"], reply.json()["eval_count"]) == ("length", 3)
    await eventually(lambda: not stage.loaded())


@pytest.mark.parametrize(
    ("keep_alive", "low_seconds", "high_seconds"),
    [
        ("5m", 240, 300),
        (90, 60, 90),
        ("1h30m", 5300, 5400),
        ("-1s", 200 * _YEAR_SECONDS, 300 * _YEAR_SECONDS),
        (-1, 200 * _YEAR_SECONDS, 300 * _YEAR_SECONDS),
    ],
)
async def test_keep_alive_sets_when_a_model_expires(
    stage: Stage, keep_alive: str | int, low_seconds: float, high_seconds: float
) -> None:
    stage.load("tiny", keep_alive=keep_alive)
    await eventually(lambda: low_seconds < _expires_in_seconds(stage.loaded()["tiny:latest"]) <= high_seconds + 1)


async def test_a_request_without_keep_alive_keeps_the_previous_value(stage: Stage) -> None:
    stage.unload_all()
    stage.load("tiny", keep_alive=-1)
    stage.post("/api/generate", {"model": "tiny", "prompt": "x", "stream": False, "options": {"num_predict": 2}})
    assert _expires_in_seconds(stage.loaded()["tiny:latest"]) > _YEAR_SECONDS


async def test_an_idle_model_is_unloaded_when_it_expires(stage: Stage) -> None:
    stage.unload_all()
    stage.load("tiny", keep_alive="3s")
    assert list(stage.loaded()) == ["tiny:latest"]
    await eventually(lambda: not stage.loaded())


async def test_aliases_and_derived_models_share_one_runner(stage: Stage) -> None:
    stage.unload_all()
    stage.copy("tiny", "alias")
    for name in ("tooly", "alias", "tiny"):
        stage.load(name)
    assert list(stage.loaded()) == ["tooly:latest"]  # listed under the name that loaded it
    stage.unload("alias")
    await eventually(lambda: not stage.loaded())
    stage.ensure_absent("alias")


async def test_models_are_listed_by_latest_expiry(stage: Stage) -> None:
    stage.unload_all()
    stage.load("tiny", keep_alive="10m")
    stage.load("embed", keep_alive="30m")
    stage.load("big", keep_alive="20m")
    assert list(stage.loaded()) == ["embed:latest", "big:latest", "tiny:latest"]


async def test_a_ps_entry_describes_the_loaded_model(stage: Stage) -> None:
    stage.unload_all()
    stage.load("tiny", options={"num_ctx": 2048})
    entry = stage.loaded()["tiny:latest"]
    tags = {model["name"]: model for model in stage.server.call("GET", "/api/tags")[1]["models"]}
    assert set(entry) == _PS_KEYS
    assert entry["digest"] == tags["tiny:latest"]["digest"]
    added_to_tags = {"context_length", "embedding_length"} if stage.server.is_0_30 else set()
    details = tags["tiny:latest"]["details"]
    assert entry["details"] == {key: value for key, value in details.items() if key not in added_to_tags}
    assert (entry["size_vram"], entry["context_length"]) == (0, 2048)
    assert (entry["size"] == 0) == stage.server.is_0_30  # with all layers "on GPUs", of which a CPU has none


_RELOADING: list[dict[str, Any]] = [
    {"num_ctx": 2048},
    {"num_batch": 256},
    {"num_thread": 2},
    {"num_gpu": 0},
    {"main_gpu": 1},
    {"use_mmap": True},
]
_NOT_RELOADING: list[dict[str, Any]] = [
    {"seed": 7, "temperature": 0.1, "top_k": 5, "top_p": 0.5, "stop": ["x"], "num_predict": 1, "num_keep": 2},
    {"numa": True, "low_vram": True, "f16_kv": False, "logits_all": True, "vocab_only": False, "use_mlock": True},
    {"num_gpu": -1},
    {"num_ctx": 4096},
    {"nonsense": 1},
]


async def _reloads(stage: Stage, path: str, body: dict[str, Any]) -> bool:
    """Whether a request replaces the runner of `tiny`: a new one has the default keep-alive, the old one never expires.

    The runners' process ids must agree.
    """
    stage.unload_all()
    stage.load("tiny", keep_alive=-1)
    runners = set(stage.server.runners())
    reply = await call(stage.server.address, "POST", path, {"model": "tiny", "stream": False, **body})
    assert reply.status == 200, reply.body
    replaced = _expires_in_seconds(stage.loaded()["tiny:latest"]) < _YEAR_SECONDS
    assert len(runners) == 1
    await eventually(lambda: len(stage.server.runners()) == 1)
    assert (set(stage.server.runners()) != runners) == replaced
    return replaced


@pytest.mark.parametrize("options", _RELOADING, ids=str)
async def test_runner_options_cause_a_reload(stage: Stage, options: dict[str, Any]) -> None:
    assert await _reloads(stage, "/api/generate", {"options": options})


@pytest.mark.parametrize("options", _NOT_RELOADING, ids=str)
async def test_other_options_do_not_cause_a_reload(stage: Stage, options: dict[str, Any]) -> None:
    assert not await _reloads(stage, "/api/generate", {"options": options})


async def test_a_spelled_out_main_gpu_causes_a_reload_from_0_30(stage: Stage) -> None:
    assert await _reloads(stage, "/api/generate", {"options": {"main_gpu": 0}}) == stage.server.is_0_30


async def test_use_mmap_off_causes_a_reload_only_up_to_0_24(stage: Stage) -> None:
    """From 0.30 it is off anyway on a CPU."""
    assert await _reloads(stage, "/api/generate", {"options": {"use_mmap": False}}) != stage.server.is_0_30


async def test_a_chat_model_embeds_only_up_to_0_24(stage: Stage) -> None:
    stage.unload_all()
    reply = await call(stage.server.address, "POST", "/api/embed", {"model": "tiny", "input": "x"})
    assert reply.status == (501 if stage.server.is_0_30 else 200)
    assert list(stage.loaded()) == ["tiny:latest"]


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}], "max_tokens": 1}),
        ("/v1/completions", {"prompt": "x", "max_tokens": 1}),
        ("/api/chat", {"messages": [{"role": "user", "content": "x"}], "options": {"num_predict": 1}}),
    ],
)
async def test_other_endpoints_use_the_same_runner(stage: Stage, path: str, body: dict[str, Any]) -> None:
    assert not await _reloads(stage, path, body)


async def test_a_context_above_the_trained_one_is_capped_but_compared_as_requested_up_to_0_24(stage: Stage) -> None:
    stage.unload_all()
    stage.load("tiny", keep_alive=-1, options={"num_ctx": 9000})
    assert stage.loaded()["tiny:latest"]["context_length"] in (8192, 9000)
    stage.load("tiny", options={"num_ctx": 8192})
    entry = stage.loaded()["tiny:latest"]
    assert entry["context_length"] == 8192
    was_reloaded = _expires_in_seconds(entry) < _YEAR_SECONDS
    assert was_reloaded != stage.server.is_0_30  # which compares the capped values
