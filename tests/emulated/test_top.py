"""`llamayard top` in a terminal and without one, over the whole program."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Generator

import pytest

from router.cli.main import main
from tests.support.product import Product, prepare, running
from tests.support.terminal import in_terminal

pytestmark = pytest.mark.rig


@pytest.fixture(scope="module")
def product(tmp_path_factory: pytest.TempPathFactory) -> Generator[Product]:
    folder = tmp_path_factory.mktemp("top")
    (folder / "rig.yaml").write_text("gpus: 2x3090\nmodels: [llama3.1:8b, nomic-embed-text]\nspeed: 20\n")
    config = {"poll": {"gpu_seconds": 0.2, "residency_seconds": 0.2}}
    with running(prepare(folder, config, None, ("--rig", str(folder / "rig.yaml")))) as router:
        for model in ("llama3.1:8b", "nomic-embed-text"):
            assert main(["load", model, "--config", str(router.config)], _environment(router)) == 0
        yield router


def _environment(product: Product) -> dict[str, str]:
    return {"HOME": str(product.config.parent), "PATH": os.environ["PATH"]}


@pytest.mark.parametrize(("columns", "rows"), [(80, 24), (100, 30)])
def test_keys_select_explain_sort_and_quit(product: Product, columns: int, rows: int) -> None:
    arguments = ["top", "--config", str(product.config)]
    with in_terminal(arguments, _environment(product), columns, rows) as terminal:
        assert "MODEL*" in terminal.read_until("> llama3.1:8b")
        terminal.type("s")
        terminal.read_until("STREAMS*")
        terminal.type("s")
        terminal.read_until("SIZE*")
        at = len(terminal.output)
        terminal.type("\x1b[B")
        terminal.read_until("> nomic-embe", at)
        terminal.type("\r")
        assert "would be served now" in terminal.read_until("any key: back", at)
        at = len(terminal.output)
        terminal.type("x")
        terminal.read_until("q quit", at)
        terminal.type("q")
        assert terminal.end() == 0
        assert terminal.output.endswith("\x1b[?25h\x1b[?1049l"), "the screen is restored"


@pytest.mark.parametrize("ending", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_restores_the_screen(product: Product, ending: signal.Signals) -> None:
    with in_terminal(["top", "--config", str(product.config)], _environment(product)) as terminal:
        terminal.read_until("q quit")
        terminal.process.send_signal(ending)
        assert terminal.end() == 130
        assert terminal.output.endswith("\x1b[?25h\x1b[?1049l")


def test_without_a_terminal_one_frame_is_printed(product: Product, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["top", "--config", str(product.config)], _environment(product)) == 0
    shown = capsys.readouterr().out
    assert "\x1b" not in shown
    assert "> llama3.1:8b" in shown
    assert "q quit" not in shown
    assert main(["top", "--json", "--config", str(product.config)], _environment(product)) == 0
    assert len(json.loads(capsys.readouterr().out)["models"]) == 2


def test_a_router_that_is_not_there_is_said(product: Product, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["top", "--config", str(product.config), "--port", "1"], _environment(product)) == 1
    assert "is `llamayard serve` running?" in capsys.readouterr().err
