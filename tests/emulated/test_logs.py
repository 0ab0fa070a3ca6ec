"""`llamayard logs` over the whole program."""

from __future__ import annotations

import json
import os
import re
import signal
from collections.abc import Generator

import pytest

from router.cli.main import main
from tests.support.product import Product, prepare, running
from tests.support.terminal import in_terminal
from tests.support.waiting import eventually_sync

pytestmark = pytest.mark.rig

Captured = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def product(tmp_path_factory: pytest.TempPathFactory) -> Generator[Product]:
    folder = tmp_path_factory.mktemp("logs")
    (folder / "rig.yaml").write_text("gpus: 2x3090\nmodels: [llama3.1:8b]\nspeed: 20\n")
    with running(prepare(folder, {}, None, ("--rig", str(folder / "rig.yaml")))) as router:
        eventually_sync(lambda: _all_are_ready(router), what="all servers have started")
        yield router


def _all_are_ready(product: Product) -> bool:
    return all(view["state"] == "ready" for view in product.call("GET", "/llamayard/status")[1]["instances"])


def _environment(product: Product) -> dict[str, str]:
    return {"HOME": str(product.config.parent), "PATH": os.environ["PATH"]}


def _logs(product: Product, *arguments: str) -> int:
    return main(["logs", *arguments, "--config", str(product.config)], _environment(product))


def test_lines_of_one_server_and_of_all(product: Product, capsys: Captured) -> None:
    assert _logs(product, "gpu0") == 0
    shown = capsys.readouterr().out.splitlines()
    assert shown
    assert not any(line.startswith("gpu0: ") for line in shown)
    assert _logs(product, "--json") == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert {"gpu0", "gpu1"} <= {row["instance"] for row in rows}
    assert [row["line"] for row in rows if row["instance"] == "gpu0"][: len(shown)] == shown
    assert _logs(product, "--lines", "1") == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert line.partition(": ")[0] in {row["instance"] for row in rows}


def test_what_is_wrong_is_said(product: Product, capsys: Captured) -> None:
    for arguments, message in (
        (("gpu7",), "instance: there is no instance 'gpu7'; there are: gpu0, gpu1, "),
        (("--lines", "many"), "lines: must be a whole number from 0 to 10000, not 'many'"),
    ):
        assert _logs(product, *arguments) == 1
        assert message in capsys.readouterr().err
    assert product.call("GET", "/llamayard/logs?follow=perhaps")[0] == 400


def test_following_shows_new_lines_until_ctrl_c(product: Product) -> None:
    arguments = ["logs", "-f", "--lines", "0", "--config", str(product.config)]
    with in_terminal(arguments, _environment(product), 300) as terminal:
        eventually_sync(lambda: _followers(product) == 1, 30.0, "the follower")
        assert main(["restart", "instance", "gpu0", "--config", str(product.config)], _environment(product)) == 0
        terminal.read_until("gpu0: ")
        terminal.process.send_signal(signal.SIGINT)
        assert terminal.end() == 130
    eventually_sync(lambda: _followers(product) == 0, 30.0, "its end at the router")


def _followers(product: Product) -> int:
    text = product.call("GET", "/metrics")[1]
    found = re.search(r"\nllamayard_requests_running (\S+)\n", text if isinstance(text, str) else text.decode())
    assert found is not None
    return int(float(found[1])) - 1


def test_a_follower_does_not_delay_the_end_of_the_router(product: Product) -> None:
    with in_terminal(["logs", "-f", "--config", str(product.config)], _environment(product), 300) as terminal:
        terminal.read_until("gpu1: ")
        product.signal(signal.SIGTERM)
        assert product.wait(20.0) == 0
        assert terminal.end() == 0
