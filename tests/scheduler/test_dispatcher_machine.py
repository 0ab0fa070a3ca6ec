"""Random event sequences: the invariants of the dispatcher hold after each event."""

from __future__ import annotations

import hypothesis.strategies as st
from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from router.domain.health import ReplyFailure
from router.domain.instance import InstanceState
from router.domain.policy import Policy, Rest, SchedulerConstants
from router.domain.request import Layout, LayoutKind, RunnerOptions
from router.domain.residency import ResidencyKey, ResidencyState
from tests.scheduler.builders import gpu_id
from tests.scheduler.play import GPU_BYTES, Play, sized

MODELS = {
    "tiny": sized("tiny", 4),
    "small": sized("small", 10),
    "embed": sized("embed", 2, is_embedding=True),
    "whole": sized("whole", 24),
    "pair": sized("pair", 40),
    "quad": sized("quad", 90),
    "never": sized("never", 200),
}
NAMES = st.sampled_from(tuple(MODELS))
OPTIONS: tuple[RunnerOptions, ...] = ((), (), (), (("num_ctx", 2048),))
LAYOUTS = (None,) * 5 + (Layout(LayoutKind.SINGLE), Layout(LayoutKind.SPREAD), Layout(LayoutKind.GPU, gpu_id(1)))
DOWN = (InstanceState.BACKOFF, InstanceState.STARTING, InstanceState.FATAL, InstanceState.DRAINING)


class Fleet(RuleBasedStateMachine):
    """One to four GPUs, and an instance over all of them."""

    play: Play

    @initialize(
        gpus=st.integers(0, 4),
        slots=st.integers(1, 3),
        keep=st.sampled_from((-1.0, 0.0, 30.0)),
        rests=st.booleans(),
    )
    def build(self, gpus: int, slots: int, keep: float, rests: bool) -> None:
        policy = Policy(
            vram_margin_bytes=0,
            queue_limit=6,
            keep_alive_seconds=keep,
            ttft_target_seconds=1.0 if rests else 10.0,  # so that every load is slow
            rest=Rest(bytes_per_hour=1e18, weight=0.5) if rests else None,
            constants=SchedulerConstants(drain_after_seconds=5.0),
        )
        self.play = Play(gpus, policy, slots).begin()

    # --- requests ----------------------------------------------------------------------------------------------

    @rule(
        of=NAMES,
        count=st.integers(1, 3),
        options=st.sampled_from(OPTIONS),
        keep=st.sampled_from((None, None, None, -1.0, 0.0, 5.0)),
        patience=st.sampled_from((300.0, 300.0, 60.0, 2.0)),
        is_flexible=st.sampled_from((False, False, True)),
        layout=st.sampled_from(LAYOUTS),
        default_context=st.sampled_from((None, None, None, 0, 4096)),
    )
    def some_arrive(
        self,
        of: str,
        count: int,
        options: RunnerOptions,
        keep: float | None,
        patience: float,
        is_flexible: bool,
        layout: Layout | None,
        default_context: int | None,
    ) -> None:
        if default_context is not None:
            options, is_flexible = (("num_ctx", default_context),) if default_context else (), False
        for _ in range(count):
            self.play.arrive(
                MODELS[of], options, keep, patience, is_flexible=is_flexible, layout=layout,
                default_context=default_context,
            )  # fmt: skip

    @rule(of=st.sampled_from(("tiny", "small", "pair")))
    def one_arrives_and_is_served(self, of: str) -> None:
        self.play.arrive(MODELS[of])
        self.play.work_through()

    @precondition(lambda self: self.play.leases)
    @rule(
        data=st.data(),
        lost=st.sampled_from((False, False, False, False, True)),
        failure=st.sampled_from((None, None, *ReplyFailure)),
    )
    def request_ends(self, data: st.DataObject, lost: bool, failure: ReplyFailure | None) -> None:
        ticket = data.draw(st.sampled_from(sorted(self.play.leases)))
        self.play.release(ticket, runner_lost=lost, failure=failure)

    @precondition(lambda self: self.play.leases)
    @rule(data=st.data(), count=st.integers(3, 8))
    def an_instance_fails_requests(self, data: st.DataObject, count: int) -> None:
        play = self.play
        name = data.draw(st.sampled_from(sorted({key[0] for key, _ in play.leases.values()})))
        for ticket in [ticket for ticket, lease in sorted(play.leases.items()) if lease[0][0] == name][:count]:
            play.release(ticket, failure=ReplyFailure.ERROR)

    @precondition(lambda self: self.play.waiting)
    @rule(data=st.data())
    def client_leaves_the_queue(self, data: st.DataObject) -> None:
        self.play.cancel(data.draw(st.sampled_from(sorted(self.play.waiting))))

    # --- loads and GPUs ---------------------------------------------------------------------------------------

    @precondition(lambda self: self.play.loads)
    @rule(data=st.data(), outcome=st.sampled_from(("whole", "whole", "whole", "spilled", "failed")))
    def load_ends(self, data: st.DataObject, outcome: str) -> None:
        load = data.draw(st.sampled_from(sorted(self.play.loads)))
        if outcome == "failed":
            self.play.fail_load(load)
        else:
            self.play.finish_load(load, on_cpu=outcome == "spilled")

    @precondition(lambda self: self.play.unloads)
    @rule(data=st.data(), error=st.sampled_from((None, None, None, "busy")))
    def unload_ends(self, data: st.DataObject, error: str | None) -> None:
        self.play.finish_unload(data.draw(st.sampled_from(sorted(self.play.unloads))), error)

    @precondition(lambda self: self.play.loads or self.play.unloads)
    @rule()
    def all_that_is_under_way_ends_well(self) -> None:
        self.play.work_through()

    @rule(seconds=st.sampled_from((0.01, 0.5, 3.0, 6.0)), progress=st.sampled_from((0.0, 0.5, 1.0)))
    def time_passes_and_the_gpus_are_read(self, seconds: float, progress: float) -> None:
        self.play.advance(seconds)
        self.play.read_gpus(progress)

    # --- mishaps -----------------------------------------------------------------------------------------------

    @rule(data=st.data(), kind=st.sampled_from(("unload", "runner", "program", "instance", "instance", "ps", "hour")))
    def mishap(self, data: st.DataObject, kind: str) -> None:
        play = self.play
        if kind == "unload":
            play.ask_unload(MODELS[data.draw(NAMES)])
        elif kind == "runner" and self.loaded():
            play.lose_runner(data.draw(st.sampled_from(self.loaded())))
        elif kind == "program" and play.gpus:
            gpu = data.draw(st.sampled_from(sorted(play.external)))
            play.external[gpu] = data.draw(st.integers(0, play.free_bytes(gpu) + play.external[gpu]))
            play.read_gpus()
        elif kind == "instance":
            play.change_instance(data.draw(st.sampled_from(sorted(play.specs))), data.draw(st.sampled_from(DOWN)))
        elif kind == "ps":
            play.list_models(data.draw(st.sampled_from(sorted(play.specs))))
        else:
            play.advance(100.0)

    @rule(data=st.data(), what=st.sampled_from(("gpu", "instance", "restart")), resume=st.booleans())
    def an_operator_intervenes(self, data: st.DataObject, what: str, resume: bool) -> None:
        play = self.play
        if what == "gpu" and play.gpus:
            play.drain(gpu=data.draw(st.integers(0, play.gpus - 1)), resume=resume)
        elif what == "instance":
            play.drain(instance=data.draw(st.sampled_from(sorted(play.specs))), resume=resume)
        elif what == "restart":
            play.restart(*sorted(play.specs), timeout_seconds=data.draw(st.sampled_from((0.0, 5.0, 300.0))))

    @precondition(lambda self: self.down())
    @rule()
    def instances_come_back(self) -> None:
        for name in self.down():
            self.play.change_instance(name, InstanceState.READY)

    def down(self) -> list[str]:
        views = self.play.snapshot().instances.values()
        return sorted(found.spec.name for found in views if found.state is not InstanceState.READY)

    # --- invariants --------------------------------------------------------------------------------------------

    def loaded(self) -> list[ResidencyKey]:
        facts = self.play.snapshot()
        return sorted(key for key, found in facts.residencies.items() if found.state is ResidencyState.READY)

    @invariant()
    def no_gpu_holds_more_than_it_has(self) -> None:
        for gpu in self.play.external:
            assert 0 <= self.play.free_bytes(gpu) <= GPU_BYTES

    @invariant()
    def a_load_under_way_is_reserved_on_all_its_gpus(self) -> None:
        facts = self.play.snapshot()
        for load in self.play.loads.values():
            booked = facts.reservations.get(load.load_id)
            assert booked is not None
            assert booked.sent_at is not None
        for booked in facts.reservations.values():
            assert tuple(gpu for gpu, _ in booked.per_gpu_bytes) == self.play.specs[booked.instance].gpus
            assert any(found.load_id == booked.load_id for found in facts.residencies.values())

    @invariant()
    def slots_taken_are_leases_out(self) -> None:
        for key, found in self.play.snapshot().residencies.items():
            out = sum(1 for lease in self.play.leases.values() if lease == (key, found.load_id))
            assert found.in_flight == out, f"{key}: {found.in_flight} slots taken, {out} leases"
            assert 0 <= found.in_flight <= found.slots
            assert found.slots == (1 if found.model.is_embedding else self.play.slots)

    @invariant()
    def who_has_not_ended_waits(self) -> None:
        assert sorted(self.play.queued()) == sorted(self.play.waiting)
        assert len(self.play.waiting) <= self.play.policy.queue_limit
        assert all(ticket.deadline > self.play.now for ticket in self.play.waiting.values())

    @invariant()
    def nothing_is_loaded_where_no_server_runs(self) -> None:
        facts = self.play.snapshot()
        for name, _ in facts.residencies:
            assert facts.instances[name].state in (InstanceState.READY, InstanceState.DRAINING)

    @invariant()
    def what_waits_is_woken_for(self) -> None:
        if self.play.waiting:
            assert self.play.next_wake is not None

    def teardown(self) -> None:
        """Once everything works, every ticket ends."""
        if not hasattr(self, "play"):
            return
        play = self.play
        play.drain(resume=True)
        for name in sorted(play.specs):
            play.change_instance(name, InstanceState.READY)
        play.external = dict.fromkeys(play.external, 0)
        for _ in range(40):
            play.work_through()
            for lease in sorted(play.leases):
                play.release(lease)
            self.slots_taken_are_leases_out()
            if not play.waiting:
                return
            play.advance(1.0)
        raise AssertionError(f"they wait for ever: {[(t, play.reason(t)) for t in play.waiting]}")


Fleet.TestCase.settings = settings(
    max_examples=150, stateful_step_count=40, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
TestFleet = Fleet.TestCase
