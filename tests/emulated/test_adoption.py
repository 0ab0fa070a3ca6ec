"""Servers that outlive their router, with what they have loaded, and the next router that takes them over."""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import socket
import sys
from collections.abc import Generator, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support.product import Product, prepare, running
from tests.support.rawhttp import call, connect, request_bytes
from tests.support.waiting import eventually, eventually_sync

pytestmark = pytest.mark.rig

_MODEL = "llama3.1:8b"
_CHAT = {"model": _MODEL, "stream": False, "messages": [{"role": "user", "content": "x"}]}
_SPEED = {"LLAMAYARD_RIG_SPEED": "20"}
_POLLS = {"catalog_seconds": 0.2, "gpu_seconds": 0.2, "residency_seconds": 0.2}


def _product(folder: Path, rig: str = "2x3090", rules: Mapping[str, Any] | None = None, **ollama: Any) -> Product:
    config = {"ollama": {"adopt": True, **ollama}, "poll": _POLLS, **(rules or {})}
    return prepare(folder, config, _SPEED, ("--rig", rig))


def _change(product: Product, **ollama: Any) -> None:
    """Changes keys of the section `ollama` for the next start."""
    tree = yaml.safe_load(product.config.read_text())
    tree["ollama"] |= ollama
    product.config.write_text(yaml.safe_dump(tree))


def _reasons(product: Product) -> dict[str, str]:
    """Why servers were not adopted, by instance."""
    lines = [json.loads(line) for line in product.log_text().splitlines() if line.startswith("{")]
    return {line["instance"]: line["reason"] for line in lines if line["event"] == "server_not_adopted"}


def _adopted(product: Product) -> set[str]:
    """Instances that say that their server was adopted."""
    rows = product.call("GET", "/llamayard/status")[1]["instances"]
    return {row["name"] for row in rows if row["reason"].startswith("adopted")}


def _pids(product: Product) -> dict[int, int]:
    """Of the servers, by port."""
    return {port: server.pid for port, server in product.servers().items()}


def _runners(product: Product) -> set[int]:
    return {runner.pid for runner in product.runners()}


def _models(product: Product) -> list[dict[str, Any]]:
    return product.call("GET", "/llamayard/status")[1]["models"]


def _chat(product: Product) -> None:
    status, answer = product.call("POST", "/api/chat", _CHAT)
    assert status == 200, answer


def _are_ready(product: Product) -> bool:
    return all(row["state"] == "ready" for row in product.call("GET", "/llamayard/status")[1]["instances"])


def _stop(product: Product, number: signal.Signals = signal.SIGTERM) -> None:
    eventually_sync(lambda: _are_ready(product), what="all instances")
    product.signal(number)
    assert product.wait() == 0


def _is_empty(product: Product) -> bool:
    return not product.processes()


def test_a_restart_keeps_servers_and_what_they_have_loaded(tmp_path: Path) -> None:
    with running(_product(tmp_path)) as product:
        _chat(product)
        pids, runners = _pids(product), _runners(product)
        _stop(product)
        assert _pids(product) == pids
        product.start()
        assert _adopted(product) == {"gpu0", "gpu1", "spread"}
        (model,) = _models(product)
        assert (model["name"], model["cpu_ratio"]) == (_MODEL, 0.0)
        _chat(product)
        assert (_pids(product), _runners(product)) == (pids, runners)

        def is_booked() -> bool:
            status = product.call("GET", "/llamayard/status")[1]
            held = [process["used_bytes"] for gpu in status["gpus"] for process in gpu["processes"]]
            return [row["per_gpu_bytes"] for row in status["models"]] == [held] and len(held) == 1

        eventually_sync(is_booked, what="the bytes that its process holds")


def test_servers_of_a_killed_router_are_adopted(tmp_path: Path) -> None:
    with running(_product(tmp_path, adopt_timeout_seconds=60)) as product:
        _chat(product)
        eventually_sync(lambda: _are_ready(product), what="all instances")
        pids, runners = _pids(product), _runners(product)
        product.signal(signal.SIGKILL)
        product.wait()
        product.start()
        assert _adopted(product) == {"gpu0", "gpu1", "spread"}
        _chat(product)
        assert (_pids(product), _runners(product)) == (pids, runners)
        _stop(product, signal.SIGINT)
        assert _is_empty(product)


def test_an_adopted_server_s_output_and_end_are_seen(tmp_path: Path) -> None:
    with running(_product(tmp_path, "3090")) as product:
        _stop(product)
        product.start()
        (before,) = product.servers().values()
        before.kill()

        def is_replaced() -> bool:
            return "was killed by signal 9" in product.log_text() and before.pid not in _pids(product).values()

        eventually_sync(is_replaced, what="another server")
        eventually_sync(product.is_ready, what="its readiness")
        assert _adopted(product) == set()
        _chat(product)


def test_a_changed_environment_restarts_one_instance(tmp_path: Path) -> None:
    with running(_product(tmp_path)) as product:
        _stop(product)
        before = set(_pids(product).values())
        _change(product, instance_env={"gpu1": {"OLLAMA_DEBUG": "1"}})
        product.start()
        assert _adopted(product) == {"gpu0", "spread"}
        assert _reasons(product) == {"gpu1": "configured differently: OLLAMA_DEBUG"}
        eventually_sync(lambda: len(product.servers()) == 3, what="three servers")
        assert len(before & set(_pids(product).values())) == 2


def test_a_server_that_does_not_answer_is_replaced(tmp_path: Path) -> None:
    with running(_product(tmp_path, "3090")) as product:
        (hung,) = product.servers().values()
        _stop(product)
        hung.suspend()
        product.start()
        assert _reasons(product) == {"gpu0": "it does not answer"}
        assert not hung.is_running()
        _chat(product)


def test_servers_that_nobody_claims_end_at_the_deadline(tmp_path: Path) -> None:
    with running(_product(tmp_path, adopt_timeout_seconds=2)) as product:
        _chat(product)
        _stop(product)
        assert len(_pids(product)) == 3
        eventually_sync(lambda: _is_empty(product), what="the end of all processes")
        assert list((tmp_path / "state" / "servers").iterdir()) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_ctrl_c_and_a_closed_terminal_end_the_servers(tmp_path: Path, number: signal.Signals) -> None:
    with running(_product(tmp_path, "3090")) as product:
        _stop(product, number)
        assert _is_empty(product)


def test_a_second_signal_ends_the_servers(tmp_path: Path) -> None:
    with running(_product(tmp_path, "3090", {"server": {"drain_timeout_seconds": 600}})) as product:
        product.call("POST", "/api/chat", {**_CHAT, "stream": False})
        slow = {**_CHAT, "options": {"num_predict": 100_000}, "stream": True}
        with contextlib.closing(socket.create_connection((product.address.host, product.address.port))) as client:
            client.sendall(request_bytes("POST", "/api/chat", slow))
            assert client.recv(1)
            product.signal(signal.SIGTERM)
            eventually_sync(lambda: '"draining"' in product.log_text(), what="the drain")
            product.signal(signal.SIGTERM)
            assert product.wait() == 0
        eventually_sync(lambda: _is_empty(product), what="the end of all processes")


def test_a_router_that_does_not_adopt_ends_what_was_left(tmp_path: Path) -> None:
    with running(_product(tmp_path, "3090")) as product:
        (before,) = product.servers().values()
        _stop(product)
        _change(product, adopt=False)
        product.start()
        assert _reasons(product) == {"gpu0": "ollama.adopt is off"}
        assert not before.is_running()
        _stop(product)
        assert _is_empty(product)


def test_an_instance_on_demand_is_adopted(tmp_path: Path) -> None:
    rules = {"models": {_MODEL: {"num_parallel": 3}}}
    with running(_product(tmp_path, "3090", rules)) as product:
        _chat(product)
        (model,) = _models(product)
        pids, runners = _pids(product), _runners(product)
        assert len(pids) == 2
        _stop(product)
        product.start()
        assert _adopted(product) == {"gpu0", model["instance"]}
        _chat(product)
        assert (_pids(product), _runners(product)) == (pids, runners)


def test_an_instance_on_demand_that_is_not_allowed_any_more_is_ended(tmp_path: Path) -> None:
    rules = {"models": {_MODEL: {"num_parallel": 3}}}
    with running(_product(tmp_path, "3090", rules)) as product:
        _chat(product)
        _stop(product)
        tree = yaml.safe_load(product.config.read_text())
        product.config.write_text(yaml.safe_dump({**tree, "models": {}, "placement": {"on_demand": False}}))
        product.start()
        assert (_adopted(product), set(_reasons(product).values())) == ({"gpu0"}, {"no such instance is configured"})
        assert len(product.servers()) == 1


def test_another_router_with_the_same_state_takes_nothing_that_is_in_use(tmp_path: Path) -> None:
    with running(_product(tmp_path, "3090")) as first:
        pids = _pids(first)
        _stop(first)
        first.start()
        (tmp_path / "second").mkdir()
        other = prepare(tmp_path / "second", yaml.safe_load(first.config.read_text()) | {"server": {}}, _SPEED,
                        ("--rig", "3090"))  # fmt: skip
        with running(other) as second:
            assert _adopted(second) == set()
            assert _pids(first) == pids
            assert first.is_ready()


_ACTIVATED = """
import os, sys
os.dup2(int(sys.argv[1]), 3)
os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS="1", LISTEN_FDNAMES="llamayard.socket")
os.execv(sys.executable, [sys.executable, "-m", "router", *sys.argv[2:]])
"""


@contextlib.contextmanager
def _activated(folder: Path, **ollama: Any) -> Generator[Product]:
    """A router whose socket belongs to its parent, as to a service manager."""
    with contextlib.closing(socket.create_server(("127.0.0.1", 0), backlog=128)) as listener:
        product = prepare(folder, {"ollama": {"adopt": True, **ollama}, "poll": _POLLS}, _SPEED, ("--rig", "3090"),
                          listener.getsockname()[1])  # fmt: skip
        product.program = (sys.executable, "-c", _ACTIVATED, str(listener.fileno()))
        product.pass_fds = (listener.fileno(),)
        with running(product):
            yield product


async def test_no_request_fails_while_an_activated_router_restarts(tmp_path: Path) -> None:
    with _activated(tmp_path) as product:
        _chat(product)
        pids, answers = _pids(product), list[int]()
        is_over = asyncio.Event()

        async def ask() -> None:
            while not is_over.is_set():
                answers.append((await call(product.address, "POST", "/api/chat", _CHAT)).status)

        async with asyncio.TaskGroup() as tasks:
            for _ in range(4):
                tasks.create_task(ask())
            await eventually(lambda: len(answers) > 8, what="requests before")
            for _ in range(2):
                await asyncio.to_thread(_stop, product)
                await asyncio.to_thread(product.start)
                count = len(answers)
                await eventually(lambda count=count: len(answers) > count + 8, what="requests after")
            is_over.set()
        assert set(answers) == {200}
        assert pids.items() <= _pids(product).items()  # one more may have been started on demand


async def test_what_waits_is_served_by_this_router_and_what_comes_later_by_the_next(tmp_path: Path) -> None:
    with _activated(tmp_path) as product:
        async with connect(product.address) as waiting:
            await waiting.send(request_bytes("POST", "/api/chat", _CHAT))
            await asyncio.to_thread(eventually_sync, lambda: bool(_models(product)), what="its load")
            product.signal(signal.SIGTERM)
            assert (await waiting.reply()).status == 200
        assert await asyncio.to_thread(product.wait) == 0
        async with connect(product.address) as late:
            await late.send(request_bytes("POST", "/api/chat", _CHAT))
            await asyncio.to_thread(product.start)
            assert (await late.reply()).status == 200


def test_a_socket_that_the_configuration_does_not_name_is_refused(tmp_path: Path) -> None:
    with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as listener:
        product = prepare(tmp_path, {}, _SPEED, ("--rig", "3090"))
        product.program = (sys.executable, "-c", _ACTIVATED, str(listener.fileno()))
        product.pass_fds = (listener.fileno(),)
        product.start(ready=False)
        assert product.wait() == 2
        assert f"127.0.0.1:{listener.getsockname()[1]}" in product.log_text()
        assert "ListenStream=" in product.log_text()
