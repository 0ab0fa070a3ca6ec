"""Changes of the store come one after the other, and none waits for ever."""

from __future__ import annotations

import asyncio

import pytest

from router.api.context import store_turn
from router.errors import WaitTimeout
from router.llm_api.limits import RequestLimits


def _limits(seconds: float) -> RequestLimits:
    return RequestLimits(1, seconds, 60.0, 60.0)


async def test_one_has_the_store_at_a_time() -> None:
    writing, order = asyncio.Lock(), list[str]()

    async def change(name: str) -> None:
        async with store_turn(writing, _limits(60.0)):
            order.append(f"{name} begins")
            await asyncio.sleep(0)
            order.append(f"{name} ends")

    await asyncio.gather(change("a"), change("b"))
    assert order == ["a begins", "a ends", "b begins", "b ends"]
    assert not writing.locked()


async def test_who_waits_too_long_is_told_for_what_and_changes_nothing() -> None:
    writing = asyncio.Lock()
    async with writing:
        with pytest.raises(WaitTimeout, match=r"such as a pull, has run for 0\.01 s \(queue\.timeout_seconds\)"):
            async with store_turn(writing, _limits(0.01)):
                raise AssertionError("the store was not free")
        assert writing.locked()
    assert not writing.locked()


async def test_a_change_that_fails_leaves_the_store_to_others() -> None:
    writing = asyncio.Lock()
    with pytest.raises(KeyError):
        async with store_turn(writing, _limits(60.0)):
            raise KeyError("x")
    assert not writing.locked()
