"""The packages that people use, unchanged: each does the same straight to a server and through the router.

A play (`tests/clients/plays`) is a program of its own that goes through a client's features and prints what it saw.
Those marked `clients` need packages that `make clients` installs beside the project.
"""

from __future__ import annotations

import json
import os
import subprocess
from typing import Any

import pytest

from tests.clients.commands import command
from tests.clients.conftest import Routed
from tests.contract.stage import Stage
from tests.support.waiting import eventually_sync

_LIGHT = ("ollama_python.py", "openai_python.py")
"""They need only what the project's own environment has."""
_PLAY_SECONDS = 600
_FEATURES = {"stream", "once", "tools", "image", "error", "cancel"}


def _seen(play: str, stage: Stage) -> dict[str, Any]:
    """What a play saw of a server with nothing loaded."""
    stage.unload_all()
    environment = {name: os.environ[name] for name in ("PATH", "LANG", "TMPDIR") if name in os.environ}
    home = str(stage.server.models_dir.parent)
    done = subprocess.run(
        [*command(play, light=play in _LIGHT), stage.server.url], env={**environment, "HOME": home},
        capture_output=True, text=True, timeout=_PLAY_SECONDS, check=False, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout)


def _plays_the_same(play: str, straight: Stage, routed: Routed) -> dict[str, Any]:
    through = _seen(play, routed.stage)
    assert through == _seen(play, straight)
    assert set(through) >= _FEATURES

    def idle() -> bool:
        return not any(row["llamayard"].get("in_flight") for row in routed.product.call("GET", "/api/ps")[1]["models"])

    eventually_sync(idle, what="every slot given back")
    return through


@pytest.mark.parametrize("play", _LIGHT)
def test_a_package_meets_the_same_through_the_router(play: str, straight: Stage, routed: Routed) -> None:
    seen = _plays_the_same(play, straight, routed)
    assert seen["tools"] == [["add", {"a": 7}]]
    assert seen["embed"] == [64, 64]
    assert seen["error"][0] == 404
    assert seen["cancel"] == 4


@pytest.mark.clients
@pytest.mark.parametrize("play", ["langchain_play.py", "llama_index_play.py", "ollama_js.mjs", "openai_js.mjs"])
def test_a_further_package_meets_the_same_through_the_router(play: str, straight: Stage, routed: Routed) -> None:
    seen = _plays_the_same(play, straight, routed)
    assert seen["tools"] == [["add", {"a": 7}]]
    assert seen["embed"] == [64, 64]
    assert seen["error"][0] == 404


@pytest.mark.clients
def test_the_anthropic_package_meets_the_same_through_the_router(straight: Stage, routed: Routed) -> None:
    seen = _plays_the_same("anthropic_python.py", straight, routed)
    if routed.is_real:  # 0.11.4 has no /v1/messages
        assert {tuple(outcome) for outcome in seen.values()} == {(404, "NotFoundError")}
    else:
        assert seen["once"] == [200, ["message", "max_tokens", 4, True]]
        assert seen["cancel"] == [200, 4]
