"""`llamayard drain`, `resume` and `restart`: what they send, what they say, and how they fail."""

from __future__ import annotations

import pytest

from router.cli.main import main
from router.cli.operate import describe, target_of
from router.config.settings import ConfigError

HOME = {"HOME": "/nonexistent", "PATH": "/nonexistent"}


def test_a_target_is_a_gpu_an_instance_or_all() -> None:
    assert target_of(["gpu", "1"]) == {"gpu": "1"}
    assert target_of(["instance", "spread"]) == {"instance": "spread"}
    assert target_of(["all"]) == {"all": True}


@pytest.mark.parametrize("words", [[], ["gpu"], ["gpu", "1", "2"], ["everything"]])
def test_other_words_are_refused_with_the_forms(words: list[str]) -> None:
    with pytest.raises(ConfigError, match="write `gpu N`, `instance NAME` or `all`"):
        target_of(words)


def test_the_answer_says_what_is_drained_now() -> None:
    assert describe("drain", {"drained": {"all": False, "gpus": [1], "instances": ["cpu"]}}) == "drained: GPU 1, cpu"
    assert (
        describe("resume", {"drained": {"all": False, "gpus": [], "instances": []}})
        == "nothing is drained: everything is in service"
    )
    assert describe("drain", {"drained": {"all": True, "gpus": [], "instances": []}}) == "drained: all"


def test_the_answer_says_what_is_restarted() -> None:
    restart = {"instance": "gpu0", "phase": "draining", "pending": ["gpu1"]}
    assert describe("restart", {"restart": restart}).startswith("restarting one after the other: gpu0, gpu1;")
    assert describe("restart", {"restart": None}) == "nothing to restart"


def test_a_router_that_does_not_run_is_reported(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["drain", "gpu", "0", "--port", "1"], HOME) == 1
    assert "is `llamayard serve` running?" in capsys.readouterr().err
