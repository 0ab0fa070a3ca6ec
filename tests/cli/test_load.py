"""`llamayard load` tells what it waits for, and ends as the request does."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from router.cli.load import progress_of, while_telling

_GPUS = [{"uuid": "GPU-a", "index": 0}]
_INSTANCES = [{"name": "gpu0", "gpus": ["GPU-a"]}]
_ROW = {"name": "llama3.1:8b", "instance": "gpu0", "in_flight": 0, "slots": 2, "context_length": 8192}


def test_progress_is_told_until_the_request_has_ended() -> None:
    told, released = list[str](), threading.Event()

    def tell() -> None:
        told.append("")
        if len(told) == 3:
            released.set()

    assert while_telling(lambda: released.wait(60.0), tell, 0.001)
    assert len(told) >= 3


def test_the_error_of_the_request_is_raised() -> None:
    def fail() -> None:
        raise ValueError("fits nowhere")

    with pytest.raises(ValueError, match="fits nowhere"):
        while_telling(fail, lambda: None, 60.0)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"models": [{**_ROW, "state": "loading"}]}, "loading on gpu0 (GPU 0)"),
        ({"models": [{**_ROW, "state": "ready"}]}, "waits"),
        ({"waiting": [{"model": "other:1b", "reason": "x"}]}, "waits"),
        ({"waiting": [{"model": "llama3.1:8b", "reason": "2 requests run"}]}, "waits: 2 requests run"),
    ],
)
def test_progress_is_the_state_of_the_load_or_what_it_waits_for(changes: dict[str, Any], words: str) -> None:
    assert progress_of({"gpus": _GPUS, "instances": _INSTANCES, **changes}, "llama3.1:8b") == words
