"""What is remembered of requests: endings, what happened meanwhile, and a bound."""

from __future__ import annotations

from dataclasses import replace

from router.domain.actions import Grant, Load, Reject, Unload
from router.domain.events import Arrived, Cancelled, LoadFinished, Released, Ticked
from router.domain.ids import LoadId
from router.domain.instance import InstanceName
from router.domain.request import Ticket, TicketId
from router.observability.request_history import REQUESTS_MAX, Ending, RequestHistory
from tests.scheduler.builders import model, ticket

GPU0 = InstanceName("gpu0")
TINY = model("tiny")


def _ticket(number: int, request_id: str) -> Ticket:
    return replace(ticket(number, TINY), request_id=request_id)


def _grant(number: int) -> Grant:
    return Grant(TicketId(number), GPU0, "", "there was room", 0, 2)


def test_a_request_is_remembered_from_its_arrival_to_its_end() -> None:
    history = RequestHistory()
    load = Load(LoadId(1), GPU0, "", TINY, (), True, 600.0, "GPU 0 has room")
    history.observe(Arrived(_ticket(1, "a")), [load], 10.0)
    (trace,) = history.find("a")
    assert (trace.ending, trace.model) == (Ending.WAITING, "tiny")
    history.observe(LoadFinished(LoadId(1), 1, 1), [_grant(1)], 14.0)
    history.observe(Ticked(), [Unload(GPU0, "", TINY, TINY.blob, "x")], 15.0)
    released = Released(TicketId(1), output_tokens=7, first_byte_at=14.5)
    history.observe(released, [], 16.0)
    assert (trace.ending, trace.ended_at, trace.released, trace.released_at) == (Ending.GRANTED, 14.0, released, 16.0)
    assert [(step.at, step.event, step.reason) for step in history.meanwhile(trace)] == [
        (10.0, "load", "GPU 0 has room"),
        (14.0, "loaded", ""),
    ]


def test_rejected_and_cancelled_requests_say_so() -> None:
    history = RequestHistory()
    history.observe(Arrived(_ticket(1, "a")), [Reject(TicketId(1), "queue_full", "the queue is full")], 1.0)
    history.observe(Arrived(_ticket(2, "a")), [], 2.0)
    history.observe(Cancelled(TicketId(2)), [], 3.0)
    assert [trace.ending for trace in history.find("a")] == [Ending.REJECTED, Ending.CANCELLED]


def test_only_the_latest_requests_are_kept() -> None:
    history = RequestHistory()
    for number in range(1, REQUESTS_MAX + 2):
        history.observe(Arrived(_ticket(number, f"r{number}")), [_grant(number)], float(number))
    assert history.find("r1") == []
    assert len(history.find("r2")) == len(history.find(f"r{REQUESTS_MAX + 1}")) == 1
    history.observe(Released(TicketId(1)), [], 9999.0)
    assert history.find(f"r{REQUESTS_MAX + 1}")[0].released is None, (
        "the end of another request is not taken for its own"
    )


def test_a_remembered_request_does_not_keep_its_body() -> None:
    history = RequestHistory()
    kept: list[str] = ["the body"]

    class Body:
        def fingerprints(self) -> tuple[int, ...]:
            return ()

        def __del__(self) -> None:
            kept.clear()

    history.observe(Arrived(replace(_ticket(1, "a"), fingerprints=Body().fingerprints)), [_grant(1)], 1.0)
    assert kept == []
