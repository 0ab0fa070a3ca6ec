"""The dispatcher's choice among replicas, depending on earlier requests."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import pytest

from router.domain.actions import Grant
from router.domain.events import Arrived, GpusRead, InstanceChanged, LoadedModel, Released, ResidencyRead
from router.domain.instance import InstanceState
from router.domain.policy import Policy
from router.domain.request import Layout, LayoutKind
from router.scheduler.dispatcher import Dispatcher
from tests.scheduler.builders import BY_WEIGHT, gpu, gpu_id, instance, model, ticket

M = model("m", 8000)
FAST, SLOW = 9_751_000_000, 6_000_000_000


@dataclass(slots=True)
class Fleet:
    """Replicas of one model on `gpu0`, `gpu1`, …, with two slots each."""

    clocks: tuple[int, ...] = (FAST, FAST)
    slots: int = 2
    attempts: bool = True
    """True if `next_wake` is called after each event, which enables the fast path."""
    now: float = 1000.0
    dispatcher: Dispatcher = field(default_factory=lambda: Dispatcher(Policy(), BY_WEIGHT))
    last: int = 0

    def __post_init__(self) -> None:
        gpus = tuple(gpu(number, 1000, clock_hertz=clock) for number, clock in enumerate(self.clocks))
        self._post(GpusRead(gpus, self.now))
        for number in range(len(self.clocks)):
            self.restart(number)

    def restart(self, number: int) -> None:
        spec = instance(f"gpu{number}", number, slots=self.slots)
        self._post(InstanceChanged(spec, InstanceState.BACKOFF))
        self.now += 10.0
        self._post(InstanceChanged(spec, InstanceState.READY))
        self._post(ResidencyRead(spec.name, (LoadedModel(M.name, M.digest, 1, 1, 8192, M),), self.now))

    def _post(self, event: GpusRead | InstanceChanged | ResidencyRead | Arrived | Released) -> list[object]:
        actions = self.dispatcher.handle(event, self.now)
        if self.attempts:
            self.dispatcher.next_wake()
        return list(actions)

    def ask(
        self,
        prompt: int = 100,
        *,
        session: str = "",
        client: str = "",
        output: int | None = None,
        on: int | None = None,
        said: str = "",
    ) -> Grant:
        """A request. `on`: the only GPU that it allows. `said`: the text of its prompt, which determines its length."""
        self.now += 0.001
        self.last += 1
        made = ticket(
            self.last, M, arrived_at=self.now, deadline=self.now + 60, client=client, session=session,
            prompt_tokens=len(said) // 4 if said else prompt, output_tokens_max=output, prompt=said.encode(),
            layout=None if on is None else Layout(LayoutKind.GPU, gpu_id(on)),
        )  # fmt: skip
        (grant,) = self._post(Arrived(made))
        assert isinstance(grant, Grant)
        return grant

    def answer(self, grant: Grant, seconds: float = 1.0, output: int = 0, first_after: float | None = None) -> None:
        """Ends a request after some seconds; its first byte comes `first_after` seconds from now."""
        first = None if first_after is None else self.now + first_after
        self.now += seconds
        self._post(Released(grant.ticket_id, False, output, first))

    def serve(self, prompt: int = 100, *, session: str = "", client: str = "", output: int = 0, said: str = "") -> str:
        grant = self.ask(prompt, session=session, client=client, said=said)
        self.answer(grant, output=output, first_after=0.1)
        return grant.instance


@pytest.fixture(params=[True, False], ids=["the short way", "the long way"])
def attempts(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


def test_idle_replicas_take_turns(attempts: bool) -> None:
    fleet = Fleet(attempts=attempts)
    assert [fleet.serve() for _ in range(4)] == ["gpu0", "gpu1", "gpu0", "gpu1"]


def test_requests_go_where_fewer_tokens_are_ahead_not_where_fewer_requests_are(attempts: bool) -> None:
    fleet = Fleet(slots=4, attempts=attempts)
    assert fleet.ask(30_000).instance == "gpu0"
    assert [fleet.ask(50, output=1).instance for _ in range(3)] == ["gpu1", "gpu1", "gpu1"]


def test_a_long_prompt_goes_where_it_stalls_few(attempts: bool) -> None:
    """A short prompt prefers three concurrent streams to a long prompt ahead."""
    for prompt, goes in ((10, "gpu0"), (6000, "gpu1")):
        fleet = Fleet(slots=5, attempts=attempts)
        for _ in range(3):
            fleet.ask(10, output=1, on=0)
        fleet.now += 10.0
        fleet.ask(2000, output=1, on=1)
        assert fleet.ask(prompt, output=1).instance == goes


def test_the_faster_gpu_is_used_until_it_is_busy(attempts: bool) -> None:
    fleet = Fleet((SLOW, FAST), slots=4, attempts=attempts)
    assert [fleet.serve(500) for _ in range(3)] == ["gpu1"] * 3
    assert fleet.ask(8000).instance == "gpu1"
    assert fleet.ask(500).instance == "gpu0"


def test_a_replica_measured_as_slow_is_used_less(attempts: bool) -> None:
    fleet = Fleet(attempts=attempts)
    for _ in range(12):
        grant = fleet.ask(2000)
        slow = grant.instance == "gpu0"
        fleet.answer(grant, 30.0 if slow else 1.0, output=100, first_after=10.0 if slow else 0.4)
    assert [fleet.serve(2000, output=100) for _ in range(3)] == ["gpu1"] * 3


def test_a_conversation_returns_to_its_replica(attempts: bool) -> None:
    fleet = Fleet(attempts=attempts)
    home = fleet.serve(1000, session="talk", output=300)
    for turn in range(2, 6):
        assert fleet.serve(500 * turn) in ("gpu0", "gpu1")
        assert fleet.serve(1000 * turn, session="talk", output=300) == home
    grant = fleet.ask(6000, session="talk")
    assert "tokens of the prompt in its cache, and " in grant.reason


def test_a_conversation_moves_if_the_work_ahead_takes_longer_than_a_cold_prompt(attempts: bool) -> None:
    """A batch has a part of each prompt, so behind a long prompt a short turn waits for one batch."""
    for said, goes in ((400, "gpu1"), (3000, "gpu0")):
        fleet = Fleet(attempts=attempts)
        fleet.answer(fleet.ask(said, session="talk", on=0))
        fleet.now += 60.0
        fleet.ask(7000, on=0)
        assert fleet.ask(said + 50, session="talk").instance == goes


def test_a_conversation_does_not_wait_for_a_slot_of_its_replica(attempts: bool) -> None:
    fleet = Fleet(attempts=attempts)
    fleet.answer(fleet.ask(3000, session="talk", on=0))
    for _ in range(2):
        fleet.ask(10, on=0)
    assert fleet.ask(3050, session="talk").instance == "gpu1"


def test_a_reloaded_replica_has_no_cached_conversation(attempts: bool) -> None:
    fleet = Fleet(attempts=attempts)
    fleet.answer(fleet.ask(4000, session="talk", on=0))
    fleet.restart(0)
    grant = fleet.ask(5000, session="talk")
    assert grant.instance == "gpu1"
    assert "in its cache" not in grant.reason


def test_a_grant_says_why_this_replica_was_chosen(attempts: bool) -> None:
    fleet = Fleet(attempts=attempts)
    reason = fleet.ask(3000).reason
    assert "0 of 2 slots were in use; about " in reason
    assert reason.endswith(" s on gpu1")


SYSTEM = "You are a patient assistant of a small firm. " * 60
"""2,700 bytes that all prompts have in common."""


def _talk(user: str, turns: int) -> str:
    return SYSTEM + "".join(f"{user} says something long, for the {turn}. time. " * 20 for turn in range(turns))


def test_a_conversation_without_an_id_returns_to_its_replica_by_its_beginning(attempts: bool) -> None:
    fleet = Fleet(attempts=attempts)
    prefix_affinity = {user: fleet.serve(said=_talk(user, 1)) for user in ("ann", "ben", "cem", "dan")}
    prefix_affinity |= {user: fleet.serve(said=_talk(user, 2)) for user in prefix_affinity}
    for turns in range(3, 6):
        for user, home in prefix_affinity.items():
            assert fleet.serve(said=_talk(user, turns)) == home


def test_a_common_beginning_does_not_send_all_requests_to_one_replica(attempts: bool) -> None:
    fleet = Fleet(slots=8, attempts=attempts)
    at_once = [fleet.ask(said=_talk(f"user {number}", 1)).instance for number in range(8)]
    assert sorted(Counter(at_once).values()) in ([3, 5], [4, 4])
    later = [fleet.ask(said=_talk(f"late {number}", 1)).instance for number in range(4)]
    assert set(later) == {"gpu0", "gpu1"}


def test_once_both_replicas_have_a_common_beginning_new_conversations_take_turns(attempts: bool) -> None:
    fleet = Fleet(attempts=attempts)
    for number in (0, 1):
        fleet.answer(fleet.ask(said=SYSTEM, on=number))
    served = [fleet.serve(said=_talk(f"user {number}", 1)) for number in range(6)]
    assert served == ["gpu0", "gpu1"] * 3


def test_a_beginning_does_not_count_if_the_work_ahead_takes_longer_than_a_cold_prompt(attempts: bool) -> None:
    for turns, goes in ((1, "gpu1"), (12, "gpu0")):
        fleet = Fleet(attempts=attempts)
        fleet.answer(fleet.ask(said=_talk("ann", turns)[1000:], on=0))
        fleet.now += 60.0
        fleet.ask(7000, on=0)
        assert fleet.ask(said=_talk("ann", turns + 1)[1000:]).instance == goes


def test_a_client_with_short_prompts_returns_to_its_replica_while_replicas_are_equal(attempts: bool) -> None:
    fleet = Fleet(attempts=attempts)
    prefix_affinity = {client: fleet.serve(20, client=client) for client in ("ann", "ben")}
    assert set(prefix_affinity.values()) == {"gpu0", "gpu1"}
    for _ in range(3):
        for client in ("ben", "ann", "ann"):
            assert fleet.serve(20, client=client) == prefix_affinity[client]
    fleet.ask(20, client="ann")
    assert fleet.ask(20, client="ann").instance != prefix_affinity["ann"]


def test_reloaded_replicas_have_no_cached_beginning(attempts: bool) -> None:
    fleet = Fleet(attempts=attempts)
    fleet.answer(fleet.ask(said=_talk("ann", 3), on=0))
    fleet.restart(0)
    assert "in its cache" not in fleet.ask(said=_talk("ann", 4)).reason
