"""A running router takes over a changed configuration, by its command, its API and SIGHUP."""

from __future__ import annotations

import contextlib
import signal
import socket
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.emulated.test_operator_commands import _FAST, _QUICK_POLLS, _command
from tests.support.product import Product, prepare, running
from tests.support.waiting import eventually

pytestmark = pytest.mark.rig

_MODEL = "llama3.1:8b"


def _change(product: Product, **changes: Any) -> None:
    tree = yaml.safe_load(product.config.read_text(encoding="utf-8"))
    product.config.write_text(yaml.safe_dump({**tree, **changes}), encoding="utf-8")


def _ask(product: Product, model: str) -> int:
    return product.call("POST", "/api/generate", {"model": model, "prompt": "hello", "options": {"num_predict": 4}})[0]


async def test_rules_change_while_the_router_runs(tmp_path: Path) -> None:
    with running(prepare(tmp_path, _QUICK_POLLS, _FAST, ("--rig", "2x3090"))) as product:
        assert [_ask(product, "gpt-4o"), _ask(product, _MODEL)] == [404, 200]
        _change(product, aliases={"gpt-4o": _MODEL}, models={_MODEL: {"keep_warm": True}}, ollama={"num_parallel": 4})
        reloaded = _command(product, "reload")
        assert reloaded.returncode == 0, reloaded.stderr
        assert f'aliases: {{}} -> {{"gpt-4o": "{_MODEL}"}}' in reloaded.stdout
        assert "ollama.num_parallel: needs a restart of the router (2 -> 4)" in reloaded.stdout
        assert _ask(product, "gpt-4o") == 200
        metrics = product.call("GET", "/metrics")[1]
        assert f'llamayard_warm_models_missing{{model="{_MODEL}"}}' in str(metrics)
        _change(product, aliases={})
        assert product.call("POST", "/llamayard/reload")[0] == 200
        assert [_ask(product, "gpt-4o"), _ask(product, _MODEL)] == [404, 200]


async def test_a_wrong_configuration_changes_nothing_and_is_explained(tmp_path: Path) -> None:
    with running(prepare(tmp_path, _QUICK_POLLS, _FAST, ("--rig", "3090"))) as product:
        _change(product, queue={"limit": 3}, models={_MODEL: {"gpus": ["7"]}})
        status, answer = product.call("POST", "/llamayard/reload")
        assert (status, "'7' is no GPU" in answer["error"]) == (400, True), answer
        assert "nothing was changed" in answer["error"]
        assert product.call("GET", "/llamayard/status")[1]["queue"]["limit"] == 512
        product.config.write_text("queue: {limti: 3}\n", encoding="utf-8")
        status, answer = product.call("POST", "/llamayard/reload")
        assert (status, "did you mean `queue.limit`?" in answer["error"]) == (400, True), answer
        for blank in ("", "# models: {}\n\n"):
            product.config.write_text(blank, encoding="utf-8")
            status, answer = product.call("POST", "/llamayard/reload")
            assert (status, "is empty, or has comments only; write {}" in answer["error"]) == (400, True), answer
        product.config.write_text("{}\n", encoding="utf-8")
        assert product.call("POST", "/llamayard/reload")[0] == 200


async def test_under_a_service_manager_a_hangup_reloads_and_a_stop_is_reported(tmp_path: Path) -> None:
    with contextlib.closing(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)) as manager:
        manager.bind(str(tmp_path / "notify"))
        manager.settimeout(60.0)
        environment = {**_FAST, "NOTIFY_SOCKET": str(tmp_path / "notify"), "WATCHDOG_USEC": "1000000"}
        with running(prepare(tmp_path, _QUICK_POLLS, environment, ("--rig", "3090"))) as product:
            told = [manager.recv(4096), manager.recv(4096)]
            assert any(message.startswith(b"READY=1\nSTATUS=listening on http://") for message in told), told
            _change(product, queue={"limit": 3})
            product.signal(signal.SIGHUP)
            await eventually(lambda: "reloaded" in product.log_text(), what="the reload")
            assert product.call("GET", "/llamayard/status")[1]["queue"]["limit"] == 3
            product.config.write_text("queue: {limti: 3}\n", encoding="utf-8")
            product.signal(signal.SIGHUP)
            await eventually(lambda: "reload_refused" in product.log_text(), what="the refusal")
            product.signal(signal.SIGTERM)
            assert product.wait() == 0
        manager.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            while True:
                told.append(manager.recv(4096))
        assert b"WATCHDOG=1" in told
        assert b"STOPPING=1\nSTATUS=draining" in told
