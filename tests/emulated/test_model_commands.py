"""`llamayard ps`, `load` and `unload` over the whole program."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Generator
from typing import Any

import pytest

from router.cli.main import main
from router.lab.emulator.faults import write_faults
from tests.support.product import Product, prepare, running
from tests.support.rawhttp import call
from tests.support.waiting import eventually, eventually_sync

pytestmark = pytest.mark.rig

Captured = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def product(tmp_path_factory: pytest.TempPathFactory) -> Generator[Product]:
    folder = tmp_path_factory.mktemp("commands")
    models = "[llama3.1:8b, llama3.3:70b, mixtral:8x22b, nomic-embed-text, bge-m3]"
    (folder / "rig.yaml").write_text(f"gpus: 2x3090\nmodels: {models}\nspeed: 20\n", encoding="utf-8")
    config = {
        "aliases": {"big": "llama3.3:70b"},
        "models": {"nomic-embed-text": {"gpus": [1], "keep_warm": True}},
        "poll": {"gpu_seconds": 0.2, "residency_seconds": 0.2, "catalog_seconds": 0.2},
    }
    with running(prepare(folder, config, None, ("--rig", str(folder / "rig.yaml")))) as router:
        eventually_sync(lambda: _models(router) == {"nomic-embed-text:latest"}, 60.0, "the warm model")
        yield router


def _models(product: Product) -> set[str]:
    return {row["name"] for row in product.call("GET", "/llamayard/status")[1]["models"] if row["state"] == "ready"}


def _run(product: Product, capsys: Captured, *arguments: str) -> tuple[int, str, str]:
    environment = {"HOME": str(product.config.parent), "PATH": os.environ["PATH"]}
    code = main([*arguments, "--config", str(product.config)], environment)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def _json(product: Product, capsys: Captured, *arguments: str) -> dict[str, Any]:
    return json.loads(_run(product, capsys, *arguments, "--json")[1])


def test_load_tells_where_the_model_went_and_unload_takes_it_away(product: Product, capsys: Captured) -> None:
    code, shown, _ = _run(product, capsys, "load", "big")
    assert code == 0
    assert shown.startswith("llama3.3:70b: on gpu0+gpu1 (GPU 0, 1), context 8192, ")
    rows = {row["model"]: row for row in _json(product, capsys, "ps")["models"]}
    assert rows["llama3.3:70b"]["gpus"] == ["0", "1"]
    assert rows["llama3.3:70b"]["expires_in_seconds"] is None
    assert rows["nomic-embed-text:latest"]["pin"] == {
        "gpus": ["1"],
        "layout": "auto",
        "keep_warm": True,
        "origin": "configuration",
    }
    assert _run(product, capsys, "unload", "big")[:2] == (0, "llama3.3:70b: unloaded from gpu0+gpu1 (GPU 0, 1)\n")
    assert _models(product) == {"nomic-embed-text:latest"}
    assert _run(product, capsys, "unload", "big")[:2] == (0, "llama3.3:70b: is not loaded\n")


def test_load_takes_a_context(product: Product, capsys: Captured) -> None:
    loaded = _json(product, capsys, "load", "llama3.1:8b", "--context", "16000")
    assert (loaded["model"], loaded["context_length"] >= 16_000) == ("llama3.1:8b", True)
    assert loaded.keys() - _json(product, capsys, "ps")["models"][0].keys() == {"seconds"}
    assert _run(product, capsys, "unload", "llama3.1:8b")[0] == 0


def test_an_embedding_model_is_loaded_too(product: Product, capsys: Captured) -> None:
    assert _json(product, capsys, "load", "bge-m3")["model"] == "bge-m3:latest"
    assert _run(product, capsys, "unload", "bge-m3")[0] == 0


def test_a_model_that_is_kept_warm_stays(product: Product, capsys: Captured) -> None:
    code, shown, _ = _run(product, capsys, "unload", "nomic-embed-text")
    assert (code, "stays on gpu1 (GPU 1)" in shown) == (1, True)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("load", "nothing"), 1, "model 'nothing' not found"),
        (("unload", "nothing"), 1, "model 'nothing' not found"),
        (("load", "mixtral:8x22b"), 1, "fits nowhere"),
        (("load", "llama3.1:8b", "--context", "much"), 2, "--context much: must be a number of tokens"),
    ],
)
def test_what_cannot_be_done_is_said(
    product: Product, capsys: Captured, arguments: tuple[str, ...], code: int, message: str
) -> None:
    found, _, errors = _run(product, capsys, *arguments)
    assert (found, message in errors) == (code, True)


async def test_a_busy_replica_leaves_when_its_requests_have_ended(product: Product, capsys: Captured) -> None:
    rig = product.config.parent / "state" / "rig"
    write_faults(rig, [{"model": "llama3.1:8b", "slow": 50}])
    body = {"model": "llama3.1:8b", "prompt": "hello", "stream": False, "options": {"num_predict": 4000}}
    running_request = asyncio.create_task(call(product.address, "POST", "/api/generate", body))
    await eventually(lambda: "llama3.1:8b" in _models(product), 30.0, "the model to be loaded")
    code, shown, _ = await asyncio.to_thread(_run, product, capsys, "unload", "llama3.1:8b")
    assert code == 0
    assert shown.startswith("llama3.1:8b: leaves gpu")
    assert shown.endswith("when its running requests (1) have ended\n")
    running_request.cancel()
    write_faults(rig, [])
    await eventually(lambda: _models(product) == {"nomic-embed-text:latest"}, 30.0, "the model to leave")
