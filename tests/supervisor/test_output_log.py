"""The last lines of all servers: bounded, in order, and readable while they come."""

from __future__ import annotations

import asyncio

from hypothesis import given
from hypothesis import strategies as st

from router.supervisor.output_log import LINES_MAX, OutputLog


@given(st.lists(st.tuples(st.sampled_from("abc"), st.text(max_size=3)), max_size=60), st.integers(0, 70))
def test_lines_come_in_order_and_from_where_one_has_read(written: list[tuple[str, str]], number: int) -> None:
    log = OutputLog()
    for instance, text in written:
        log.append(instance, text)
    assert [(line.instance, line.text) for line in log.after(0)] == written
    assert [(line.instance, line.text) for line in log.after(number)] == written[number:]
    assert [line.text for line in log.after(0, "a")] == [text for instance, text in written if instance == "a"]
    assert set(log.instances) == {instance for instance, _ in written}


def test_an_instance_that_writes_much_does_not_push_out_another() -> None:
    log = OutputLog()
    log.append("quiet", "first")
    for number in range(2 * LINES_MAX):
        log.append("loud", str(number))
    assert [line.text for line in log.after(0, "quiet")] == ["first"]
    assert [line.text for line in log.after(0, "loud")] == [str(n) for n in range(LINES_MAX, 2 * LINES_MAX)]


def test_long_lines_and_many_instances_are_bounded() -> None:
    log = OutputLog()
    for _ in range(100):
        log.append("a", "x" * 8192)
    assert sum(len(line.text) for line in log.after(0)) <= 262_144
    for number in range(100):
        log.append(f"gpu0.{number}", "")
    assert len(log.instances) == 64
    assert log.instances[-1] == "gpu0.99"


async def test_whoever_waits_gets_the_next_line() -> None:
    log = OutputLog()
    async with asyncio.timeout(30), asyncio.TaskGroup() as tasks:
        waiting = [tasks.create_task(log.grown()) for _ in range(2)]
        await asyncio.sleep(0)
        log.append("a", "line")
        await asyncio.gather(*waiting)
