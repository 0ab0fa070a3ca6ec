"""`llamayard pin` and `unpin` over the whole program: what they change, what is refused, and what a reload leaves."""

from __future__ import annotations

import json
import os
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest
import yaml

from router.cli.main import main
from tests.support.product import Product, prepare, running

pytestmark = pytest.mark.rig

Captured = pytest.CaptureFixture[str]
_MODEL = "llama3.1:8b"


@pytest.fixture
def product(tmp_path: Path) -> Generator[Product]:
    models = f"[{_MODEL}, llama3.3:70b, nomic-embed-text]"
    (tmp_path / "rig.yaml").write_text(f"gpus: 2x3090\nmodels: {models}\nspeed: 20\n", encoding="utf-8")
    config = {
        "aliases": {"small": _MODEL},
        "models": {"nomic-embed-text": {"gpus": [1]}},
        "placement": {"exclusive_gpus": {"1": [_MODEL, "nomic-embed-text"]}},
        "poll": {"gpu_seconds": 0.2, "residency_seconds": 0.2},
    }
    with running(prepare(tmp_path, config, None, ("--rig", str(tmp_path / "rig.yaml")))) as router:
        yield router


def _run(product: Product, capsys: Captured, *arguments: str) -> tuple[int, str, str]:
    environment = {"HOME": str(product.config.parent), "PATH": os.environ["PATH"]}
    code = main([*arguments, "--config", str(product.config)], environment)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def _pins(product: Product) -> dict[str, tuple[list[str], str]]:
    rows = product.call("GET", "/llamayard/status")[1]["pins"]
    return {row["model"]: (row["gpus"], row["origin"]) for row in rows}


def _change(product: Product, **changes: Any) -> None:
    tree = yaml.safe_load(product.config.read_text(encoding="utf-8"))
    product.config.write_text(yaml.safe_dump({**tree, **changes}), encoding="utf-8")


CONFIGURED = {"nomic-embed-text:latest": (["1"], "configuration")}


def test_a_pin_decides_where_the_model_is_loaded_until_it_is_taken_away(product: Product, capsys: Captured) -> None:
    assert _pins(product) == CONFIGURED
    code, shown, _ = _run(product, capsys, "pin", "small", "1")
    assert (code, shown) == (0, f"{_MODEL}: pinned to GPU 1 until the router restarts\n")
    assert _pins(product) == {**CONFIGURED, _MODEL: (["1"], "run time")}
    assert _run(product, capsys, "load", "small")[1].startswith(f"{_MODEL}: on gpu1 (GPU 1)")
    assert "GPU 1, until restart" in _run(product, capsys, "ps")[1]
    shown = _run(product, capsys, "status")[1]
    assert "command, until restart" in shown
    assert max(map(len, shown.splitlines())) <= 100
    shown = _run(product, capsys, "pin", _MODEL, "0")[1]
    assert f"it is still on gpu1 (GPU 1): `llamayard unload {_MODEL}` lets it move" in shown
    _run(product, capsys, "unload", _MODEL)
    assert _run(product, capsys, "load", _MODEL)[1].startswith(f"{_MODEL}: on gpu0 (GPU 0)")
    assert _run(product, capsys, "unpin", _MODEL)[:2] == (0, f"{_MODEL}: is not pinned to GPUs\n")
    assert _pins(product) == CONFIGURED
    answer = json.loads(_run(product, capsys, "unpin", "nomic-embed-text", "--json")[1])
    assert answer["pin"] == {"gpus": [], "layout": "auto", "keep_warm": False, "origin": "run time"}
    shown = _run(product, capsys, "pin", "nomic-embed-text", "1")[1]
    assert shown == "nomic-embed-text:latest: is pinned to GPU 1 by the configuration\n"
    assert _pins(product) == CONFIGURED


REFUSED: list[tuple[tuple[str, ...], int, str]] = [
    (("pin", "llama3.3:70b", "1"), 1, "GPU 1 is reserved for llama3.1:8b, nomic-embed-text"),
    (("pin", "llama3.3:70b", "0"), 1, "nothing was changed: models.llama3.3:70b: "),
    (("pin", _MODEL, "7"), 1, "gpu: '7' is no GPU of this machine; there are: 0 (GPU-"),
    (("pin", _MODEL, "0,0"), 1, "gpus: 0, 0 name one GPU twice"),
    (("pin", "nothing", "0"), 1, "model 'nothing' not found"),
    (("pin", _MODEL, "0,"), 2, "0,: write one GPU or several, such as 0 or 0,1"),
]


def test_what_contradicts_other_rules_or_does_not_fit_is_refused(product: Product, capsys: Captured) -> None:
    before = product.config.read_text()
    for arguments, code, reason in REFUSED:
        found, _, errors = _run(product, capsys, *arguments, "--save")
        assert (found, reason in errors) == (code, True), errors
        assert _pins(product) == CONFIGURED
    assert product.config.read_text() == before


WRONG: list[tuple[str, object]] = [
    ("pin", {"model": _MODEL}),
    ("pin", {"gpus": [0]}),
    ("pin", {"model": _MODEL, "gpu": 0}),
    ("pin", {"model": 1}),
    ("pin", {"model": "", "gpus": [0]}),
    ("pin", None),
    ("unpin", {"model": _MODEL, "gpus": [0]}),
]


def test_a_wrong_body_is_answered_with_the_right_form(product: Product) -> None:
    for route, body in WRONG:
        status, answer = product.call("POST", f"/llamayard/{route}", body)
        assert (status, bool(answer["error"])) == (400, True), (body, answer)


def test_a_pin_outlives_a_reload_that_agrees_with_it_and_refuses_one_that_does_not(
    product: Product, capsys: Captured
) -> None:
    _run(product, capsys, "pin", _MODEL, "1")
    _change(product, queue={"limit": 3})
    assert _run(product, capsys, "reload")[0] == 0
    assert _pins(product)[_MODEL] == (["1"], "run time")
    _change(product, placement={"exclusive_gpus": {"1": ["nomic-embed-text"]}})
    code, _, errors = _run(product, capsys, "reload")
    assert (code, f"{_MODEL} is pinned at run time: llamayard unpin {_MODEL}" in errors) == (1, True)
    assert _run(product, capsys, "unpin", _MODEL)[0] == 0
    assert _run(product, capsys, "reload")[0] == 0
    assert _run(product, capsys, "pin", _MODEL, "0")[0] == 0
    _change(product, models={_MODEL: {"gpus": [0]}})
    assert _run(product, capsys, "reload")[0] == 0
    assert _pins(product) == {_MODEL: (["0"], "configuration")}


def test_a_saved_pin_is_the_configurations_after_the_next_reload(product: Product, capsys: Captured) -> None:
    product.config.write_text("# kept\n" + product.config.read_text())
    code, shown, _ = _run(product, capsys, "pin", _MODEL, "0", "--save")
    assert (code, shown) == (0, f"{_MODEL}: pinned to GPU 0, and saved in {product.config}\n")
    assert product.config.read_text().startswith("# kept\n")
    assert _run(product, capsys, "reload")[0] == 0
    assert _pins(product)[_MODEL] == (["0"], "configuration")
    assert _run(product, capsys, "unpin", _MODEL, "--save")[0] == 0
    assert _run(product, capsys, "reload")[0] == 0
    assert _pins(product) == CONFIGURED


def test_a_file_that_cannot_be_edited_is_left_and_the_pin_holds_until_the_restart(
    product: Product, capsys: Captured
) -> None:
    tree = yaml.safe_load(product.config.read_text())
    del tree["models"]
    product.config.write_text(json.dumps(tree))
    before = product.config.read_text()
    code, _, errors = _run(product, capsys, "pin", _MODEL, "0", "--save")
    assert (code, "its keys are in braces; write it by hand: models: {'llama3.1:8b': {gpus: [0]}}" in errors) == (
        1,
        True,
    )
    assert product.config.read_text() == before
    assert _pins(product)[_MODEL] == (["0"], "run time")
