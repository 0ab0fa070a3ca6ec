"""The fast path does the same as the full path: random event sequences are played through both."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from hypothesis import given, settings
from hypothesis import strategies as st

from router.domain.actions import Action, Grant, Load, Unload
from router.domain.drained import DrainTarget
from router.domain.events import (
    Arrived,
    Cancelled,
    DrainRequested,
    Event,
    InstanceChanged,
    LoadedModel,
    LoadFinished,
    Released,
    ResidencyRead,
    Ticked,
    UnloadFinished,
    UnloadRequested,
)
from router.domain.health import ReplyFailure
from router.domain.instance import InstanceName, InstanceSpec, InstanceState
from router.domain.model import NO_MODEL, BlobDigest
from router.domain.policy import Policy
from router.domain.request import Ticket, TicketId
from router.scheduler.dispatcher import Dispatcher
from tests.scheduler.builders import OLLAMA

_MODELS = tuple(replace(NO_MODEL, name=f"m{n}", digest=f"d{n}", blob=BlobDigest(f"b{n}")) for n in range(2))
_SPECS = tuple(
    InstanceSpec(InstanceName(name), (), f"http://127.0.0.1:{port}", num_parallel=2)
    for port, name in enumerate(("one", "two"), 1)
)


@dataclass(slots=True)
class _Life:
    """One dispatcher. Where `looks`, it is asked for its next wake after every event, which opens the short way."""

    attempts: bool
    dispatcher: Dispatcher = field(default_factory=lambda: Dispatcher(Policy(queue_limit=3), OLLAMA))
    now: float = 0.0
    wakes: list[float | None] = field(default_factory=list[float | None])

    def handle(self, event: Event) -> list[Action]:
        actions = self.dispatcher.handle(event, self.now)
        if self.attempts:
            self.wakes.append(self.dispatcher.next_wake())
        return actions


_STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("arrive"), st.integers(0, 1), st.sampled_from((None, None, None, -1.0, 0.0, 5.0))),
        st.tuples(st.just("talk"), st.integers(0, 1), st.sampled_from((10, 300, 3000))),
        st.tuples(st.just("release"), st.integers(0, 9), st.booleans()),
        st.tuples(st.just("release"), st.integers(0, 9), st.just(False)),
        st.tuples(st.just("fail"), st.integers(0, 9), st.sampled_from(list(ReplyFailure))),
        st.tuples(st.just("cancel"), st.integers(0, 9), st.just(None)),
        st.tuples(st.just("pass"), st.sampled_from((0.1, 1.0, 6.0)), st.just(None)),
        st.tuples(st.just("unload"), st.integers(0, 1), st.just(None)),
        st.tuples(st.just("listed"), st.integers(0, 1), st.booleans()),
        st.tuples(st.just("drain"), st.integers(0, 1), st.booleans()),
        st.tuples(st.just("state"), st.integers(0, 1), st.sampled_from(list(InstanceState))),
    ),
    max_size=60,
)


@dataclass(slots=True)
class _Lives:
    """Both, kept in step; what they ask for is done at once, in the order of asking."""

    short: _Life = field(default_factory=lambda: _Life(True))
    long: _Life = field(default_factory=lambda: _Life(False))
    held: list[TicketId] = field(default_factory=list[TicketId])
    asked: list[TicketId] = field(default_factory=list[TicketId])
    last: int = 0

    def handle(self, event: Event) -> None:
        actions = self.short.handle(event)
        assert actions == self.long.handle(event)
        mine, theirs = (life.dispatcher.snapshot(life.now) for life in (self.short, self.long))
        assert (mine.residencies, mine.reservations) == (theirs.residencies, theirs.reservations)
        assert self.short.dispatcher.waiting == self.long.dispatcher.waiting
        for action in actions:
            self._do(action)

    def _do(self, action: Action) -> None:
        match action:
            case Grant():
                self.held.append(action.ticket_id)
            case Load():
                self.handle(LoadFinished(action.load_id, 1, 1))
            case Unload():
                self.handle(UnloadFinished(action.instance, action.blob))
            case _:
                pass

    def step(self, what: str, which: int | float, more: object) -> None:
        if what == "pass":
            self.short.now += which
            self.long.now = self.short.now
            self.handle(Ticked())
        elif what == "arrive":
            self.last += 1
            self.asked.append(TicketId(self.last))
            keep = more if isinstance(more, float) else None
            now = self.short.now
            self.handle(Arrived(Ticket(TicketId(self.last), _MODELS[int(which)], (), 0, keep, now, now + 4.0)))
        elif what == "talk" and isinstance(more, int):
            self.last += 1
            self.asked.append(TicketId(self.last))
            now, session = self.short.now, f"session {self.last % 3}"
            asked = Ticket(TicketId(self.last), _MODELS[int(which)], (), 0, None, now, now + 4.0, session, session)
            prints = tuple(range(self.last % 2, more // 300))
            asked = replace(asked, session=session if self.last % 4 else "", fingerprints=lambda: prints)
            self.handle(Arrived(replace(asked, prompt_tokens=more, output_tokens_max=more)))
        elif what == "release" and self.held:
            ticket, now = self.held.pop(int(which) % len(self.held)), self.short.now
            self.handle(Released(ticket, bool(more), int(which) * 10, now - 0.05 if which else None))
        elif what == "fail" and self.held and isinstance(more, ReplyFailure):
            ticket = self.held.pop(int(which) % len(self.held))
            self.handle(Released(ticket, failure=more))
        elif what == "cancel" and self.asked:
            self.handle(Cancelled(self.asked[int(which) % len(self.asked)]))
        elif what == "unload":
            self.handle(UnloadRequested(_MODELS[int(which)].blob))
        elif what == "listed":
            rows = (LoadedModel("m0", "d0", 1, 1, 8192, _MODELS[0]),) if more else ()
            self.handle(ResidencyRead(_SPECS[int(which)].name, rows, self.short.now))
        elif what == "drain":
            self.handle(DrainRequested(DrainTarget(instance=_SPECS[int(which)].name), bool(more)))
        elif what == "state":
            self.handle(
                InstanceChanged(_SPECS[int(which)], more if isinstance(more, InstanceState) else InstanceState.READY)
            )


@given(_STEPS)
@settings(max_examples=400)
def test_both_paths_do_the_same(steps: list[tuple[str, int | float, object]]) -> None:
    lives = _Lives()
    for spec in _SPECS:
        lives.handle(InstanceChanged(spec, InstanceState.READY))
    for what, which, more in steps:
        lives.step(what, which, more)


@given(_STEPS)
@settings(max_examples=200)
def test_the_next_wake_equals_a_recomputed_one(steps: list[tuple[str, int | float, object]]) -> None:
    lives = _Lives()
    for spec in _SPECS:
        lives.handle(InstanceChanged(spec, InstanceState.READY))
    for what, which, more in steps:
        lives.step(what, which, more)
        if not lives.short.dispatcher.waiting:
            assert lives.short.dispatcher.next_wake() == lives.long.dispatcher.next_wake()
            lives.long.dispatcher.handle(Ticked(), lives.long.now)
            lives.short.dispatcher.handle(Ticked(), lives.short.now)
            lives.short.dispatcher.next_wake()
