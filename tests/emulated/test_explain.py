"""`llamayard explain` and `why` over the whole program: what is said is what the next request gets, and got."""

from __future__ import annotations

import json
import os
from collections.abc import Generator
from typing import Any

import pytest

from router.cli.main import main
from tests.support.product import Product, prepare, running
from tests.support.rawhttp import Reply, call
from tests.support.waiting import eventually_sync

pytestmark = pytest.mark.rig

Captured = pytest.CaptureFixture[str]
MODELS = ("llama3.1:8b", "llama3.3:70b", "mixtral:8x22b")


@pytest.fixture(scope="module")
def product(tmp_path_factory: pytest.TempPathFactory) -> Generator[Product]:
    folder = tmp_path_factory.mktemp("explain")
    (folder / "rig.yaml").write_text(f"gpus: 2x3090\nmodels: [{', '.join(MODELS)}]\nspeed: 20\n", encoding="utf-8")
    config = {"aliases": {"big": "llama3.3:70b"}, "poll": {"gpu_seconds": 0.2, "residency_seconds": 0.2}}
    with running(prepare(folder, config, None, ("--rig", str(folder / "rig.yaml")))) as router:
        yield router


def _explain(product: Product, query: str) -> tuple[int, dict[str, Any]]:
    status, document = product.call("GET", f"/llamayard/explain?{query}")
    return status, document


def _generate(product: Product, model: str) -> None:
    body = {"model": model, "prompt": "hello", "stream": False, "options": {"num_predict": 2}}
    assert product.call("POST", "/api/generate", body)[0] == 200


def _loaded(product: Product) -> dict[str, str]:
    return {row["name"]: row["instance"] for row in product.call("GET", "/llamayard/status")[1]["models"]}


def _command(product: Product, *arguments: str) -> int:
    return main([*arguments, "--config", str(product.config)], {"HOME": str(product.config.parent), **_path()})


def _path() -> dict[str, str]:
    return {"PATH": os.environ["PATH"]}


def test_the_next_request_goes_where_it_was_said(product: Product) -> None:
    status, said = _explain(product, "model=big")
    assert status == 200
    assert (said["model"], said["requested_model"], said["outcome"]) == ("llama3.3:70b", "big", "load")
    assert said["candidates"][0]["instance"] == said["instance"]
    assert _loaded(product) == {}, "nothing is done"
    _generate(product, "big")
    assert _loaded(product) == {"llama3.3:70b": said["instance"]}
    assert _explain(product, "model=llama3.3:70b")[1]["outcome"] == "serve"
    evicting = _explain(product, "model=llama3.1:8b")[1]
    assert [each["model"] for each in evicting["leaving"]] == ["llama3.3:70b"]
    _generate(product, "llama3.1:8b")
    assert _loaded(product).get("llama3.1:8b") == evicting["instance"]
    eventually_sync(lambda: set(_loaded(product)) == {"llama3.1:8b"}, 30.0, "the 70B to leave, as was said")


def test_a_larger_context_is_explained_too(product: Product) -> None:
    said = _explain(product, "model=llama3.1:8b&context=100000")[1]
    assert said["context_length"] == 100_000
    assert said["options"]["num_ctx"] >= 100_000


def test_a_model_that_fits_nowhere_is_refused(product: Product, capsys: Captured) -> None:
    def is_refused() -> bool:
        said = _explain(product, "model=mixtral:8x22b")[1]
        return (said["outcome"], said["error_code"]) == ("refuse", "model_too_large")

    eventually_sync(is_refused, 30.0, "the GPUs to show what the last load changed")
    assert _command(product, "explain", "mixtral:8x22b") == 1
    shown = capsys.readouterr().out
    assert shown.startswith(
        "mixtral:8x22b, context 8192: would be refused\n  reason: model 'mixtral:8x22b' fits nowhere"
    )
    assert max(map(len, shown.splitlines())) <= 100


@pytest.mark.parametrize(
    ("query", "status", "message"),
    [
        ("", 400, "model: missing"),
        ("model=nothing", 404, "model 'nothing' not found"),
        ("model=llama3.1:8b&context=much", 400, "context: 'much' must be a number of tokens"),
        ("model=llama3.1:8b&context=99999999", 400, "must be a number of tokens from 4 to 16777216"),
        ("model=gpt-oss:120b-cloud", 403, "cloud is disabled"),
    ],
)
def test_a_wrong_question_gets_a_clear_error(product: Product, query: str, status: int, message: str) -> None:
    found, document = _explain(product, query)
    assert (found, message in document["error"]) == (status, True)


def test_the_command_prints_the_reply_as_json(product: Product, capsys: Captured) -> None:
    assert _command(product, "explain", "llama3.1:8b", "--json") == 0
    document = json.loads(capsys.readouterr().out)
    assert document.keys() == _explain(product, "model=llama3.1:8b")[1].keys()


def test_an_unknown_model_ends_with_one(product: Product, capsys: Captured) -> None:
    assert _command(product, "explain", "nothing") == 1
    assert "model 'nothing' not found" in capsys.readouterr().err


# --- why --------------------------------------------------------------------------------------------------------


async def _ask(product: Product, model: str, request_id: str) -> Reply:
    body = {"model": model, "prompt": "hello", "stream": False, "options": {"num_predict": 2}}
    return await call(product.address, "POST", "/api/generate", body, (("X-Request-ID", request_id),))


async def test_why_tells_what_a_request_waited_for(product: Product, capsys: Captured) -> None:
    for name, model in (("first", "llama3.1:8b"), ("second", "llama3.3:70b")):
        reply = await _ask(product, model, f"why-{name}")
        assert (reply.status, reply.head.header("x-request-id")) == (200, f"why-{name}")
    status, document = product.call("GET", "/llamayard/why?request_id=why-second")
    (attempt,) = document["attempts"]
    assert (status, attempt["model"], attempt["outcome"]) == (200, "llama3.3:70b", "granted")
    assert attempt["instance"] == _loaded(product)["llama3.3:70b"]
    steps = [(step["event"], step["model"]) for step in attempt["meanwhile"]]
    assert ("unload", "llama3.1:8b") in steps
    assert steps[-1] == ("loaded", "llama3.3:70b")
    placement = attempt["placement"]
    assert placement["instance"] == attempt["instance"]
    assert [each["model"] for each in placement["leaving"]] == ["llama3.1:8b"]
    assert len(placement["candidates"]) > 1
    assert 0 < attempt["waited_seconds"] <= attempt["time_to_first_token_seconds"] <= attempt["duration_seconds"]
    assert _command(product, "why", "why-second") == 0
    shown = capsys.readouterr().out
    assert "llama3.3:70b, 2" in shown
    assert f"granted on {attempt['instance']}, waited " in shown
    assert "\nCANDIDATES\n" in shown
    assert max(map(len, shown.splitlines())) <= 100


async def test_why_tells_a_refusal(product: Product) -> None:
    await _ask(product, "mixtral:8x22b", "why-refused")
    attempt = product.call("GET", "/llamayard/why?request_id=why-refused")[1]["attempts"][-1]
    assert (attempt["outcome"], attempt["error_code"]) == ("rejected", "model_too_large")
    assert "fits nowhere" in attempt["reason"]


def test_a_request_that_is_not_remembered_has_no_attempts(product: Product, capsys: Captured) -> None:
    assert product.call("GET", "/llamayard/why?request_id=none") == (200, {"request_id": "none", "attempts": []})
    assert product.call("GET", "/llamayard/why")[0] == 400
    assert _command(product, "why", "none") == 1
    assert "does not remember a request none" in capsys.readouterr().err
