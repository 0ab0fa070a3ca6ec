"""Unmodified popular client packages: each gets the same results directly from a server and through the router.

A play (`tests/clients/plays`) is a separate program that uses a client's features and prints the results. Tests marked
`clients` need packages that `make clients` installs separately from the project.
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
"""Plays that need only packages of the project's own environment."""
_PLAY_SECONDS = 600
_FEATURES = {"stream", "once", "tools", "image", "error", "cancel"}


def _results(play: str, stage: Stage) -> dict[str, Any]:
    """Runs a play with no models loaded and returns its results."""
    stage.unload_all()
    environment = {name: os.environ[name] for name in ("PATH", "LANG", "TMPDIR") if name in os.environ}
    home = str(stage.server.models_dir.parent)
    completed = subprocess.run(
        [*command(play, light=play in _LIGHT), stage.server.url], env={**environment, "HOME": home},
        capture_output=True, text=True, timeout=_PLAY_SECONDS, check=False, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    assert completed.returncode == 0, completed.stdout + completed.stderr
    return json.loads(completed.stdout)


def _compared_results(play: str, direct: Stage, routed: Routed) -> dict[str, Any]:
    routed_results = _results(play, routed.stage)
    assert routed_results == _results(play, direct)
    assert set(routed_results) >= _FEATURES

    def is_idle() -> bool:
        return not any(row["llamayard"].get("in_flight") for row in routed.product.call("GET", "/api/ps")[1]["models"])

    eventually_sync(is_idle, what="all slots released")
    return routed_results


@pytest.mark.parametrize("play", _LIGHT)
def test_a_package_gets_the_same_results_through_the_router(play: str, direct: Stage, routed: Routed) -> None:
    results = _compared_results(play, direct, routed)
    assert results["tools"] == [["add", {"a": 7}]]
    assert results["embed"] == [64, 64]
    assert results["error"][0] == 404
    assert results["cancel"] == 4


@pytest.mark.clients
@pytest.mark.parametrize("play", ["langchain_play.py", "llama_index_play.py", "ollama_js.mjs", "openai_js.mjs"])
def test_another_package_gets_the_same_results_through_the_router(play: str, direct: Stage, routed: Routed) -> None:
    results = _compared_results(play, direct, routed)
    assert results["tools"] == [["add", {"a": 7}]]
    assert results["embed"] == [64, 64]
    assert results["error"][0] == 404


@pytest.mark.clients
def test_the_anthropic_package_gets_the_same_results_through_the_router(direct: Stage, routed: Routed) -> None:
    results = _compared_results("anthropic_python.py", direct, routed)
    if not routed.has_all_apis:
        assert {tuple(outcome) for outcome in results.values()} == {(404, "NotFoundError")}
    else:
        assert results["once"] == [200, ["message", "max_tokens", 4, True]]
        assert results["cancel"] == [200, 4]
