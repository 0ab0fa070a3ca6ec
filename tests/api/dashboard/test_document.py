"""The document of the dashboard: figures that add up, no null, and nothing that changes only because time passes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from router.api.dashboard.document import DocumentBuilder, Facts, alarms, parts_of, without_nulls
from router.api.dashboard.merge_patch import merge_patch
from router.domain.residency import ResidencyState
from router.domain.snapshot import Snapshot
from router.observability.last_hour import Point, Span
from router.observability.request_history import Step
from router.observability.running_request import RunningRequest
from tests.scheduler.builders import (
    LLAMA_70B,
    MIB,
    gpu,
    gpu_id,
    instance,
    model,
    reservation,
    residency,
    snapshot,
    ticket,
    view,
)

BIG, NEXT = model("big", 8000), model("next", 4000)


def _snapshot(now: float = 1000.0) -> Snapshot:
    loaded = residency("gpu0", BIG, 10_000, in_flight=1)
    loading = residency("gpu0", NEXT, 5000, state=ResidencyState.LOADING, load=7)
    held = reservation(7, "gpu0", NEXT, [(0, 5000)], sent_at=990.0)
    return snapshot([gpu(0, 13_000)], [view("gpu0", 0)], [loaded, loading], [held], now=now)


def _status(facts: Snapshot) -> dict[str, Any]:
    """The rows of the status document, as far as the dashboard reads them."""
    row = dict.fromkeys(
        ("index", "name", "temperature_celsius", "power_draw_watts", "power_limit_watts", "utilization_ratio")
    )
    row |= {"memory_total_bytes": 1, "memory_used_bytes": 1, "external_bytes": 0, "uuid": gpu_id(0)}
    flags = dict.fromkeys(("lost", "drained", "unfit", "hot", "on_probation"), False)
    models = [
        {
            "name": each.name, "instance": each.instance, "state": each.state.value, "slots": each.slots,
            "in_flight": each.in_flight, "context_length": each.context_length, "options": {}, "size_bytes": 0,
            "cpu_ratio": None, "pin": None, "reason": "", "unload_failures": 0, "ejected_seconds": 0.0,
            "per_gpu_bytes": list(each.per_gpu_bytes),
        }
        for each in facts.residencies.values()
    ]  # fmt: skip
    waiting = [{"ticket": 3, "position": 1, "expected_wait_seconds": 4.2, "reason": "its turn"}]
    return {
        "version": "1", "emulated": "", "drained": {"all": False}, "queue": {"waiting": 1, "limit": 9},
        "warm_missing": [], "restart": None, "gpus": [row | flags], "instances": [], "models": models,
        "waiting": waiting, "pulls": [],
    }  # fmt: skip


def _facts(now: float = 1000.0) -> Facts:
    found = _snapshot(now)
    waiting = replace(ticket(3, BIG, arrived_at=995.0, client="user:anna"), request_id="r3")
    running = RunningRequest("r2", "user:ben", "", "big", instance("gpu0", 0).name, "/api/chat", 980.0, 981.0, 982.0, 5)
    return Facts(
        status=_status(found),
        snapshot=found,
        tickets={waiting.id: waiting},
        running=[running],
        steps=[Step(990.0, "load", "next", "gpu0", "GPU 0 has room")],
        points=[Point(990.0, 1, 1, 12.345, 0, None, None, None)],
        spans=[Span("big", "gpu0", False, ((gpu_id(0), 10_000 * MIB),), 900.0)],
        wall_offset=500_000.0,
    )


def test_the_parts_of_a_gpu_sum_to_its_memory() -> None:
    row = DocumentBuilder().build(_facts())["gpus"][gpu_id(0)]
    parts = ("weights_bytes", "kv_cache_bytes", "buffers_bytes", "reserved_bytes", "external_bytes", "free_bytes")
    assert sum(row[part] for part in parts) == 24_000 * MIB
    assert row["reserved_bytes"] == 5000 * MIB
    assert row["weights_bytes"] > row["kv_cache_bytes"] > 0


@pytest.mark.parametrize("of", [BIG, LLAMA_70B, model("unknown", layers=0), model("odd", is_opaque=True)])
def test_the_parts_of_a_model_sum_to_what_it_holds_on_each_gpu(of: Any) -> None:
    facts = snapshot([gpu(0, 1000), gpu(1, 1000)], [view("spread", 0, 1)])
    sizes = (21_000, 19_000)
    found = parts_of(facts, residency("spread", of, *sizes))
    assert [part.total_bytes for part in found] == [size * MIB for size in sizes]


def test_a_model_on_an_instance_that_is_gone_counts_as_weights() -> None:
    (part,) = parts_of(snapshot(), residency("gpu0", BIG, 10))
    assert part.weights_bytes == part.total_bytes == 10 * MIB


def test_there_is_no_null_and_times_are_since_1970() -> None:
    document = DocumentBuilder().build(_facts())
    assert document == without_nulls(document)
    assert document["at"] == 501_000.0
    assert document["waiting"]["3"] == {
        "position": 1, "model": "big", "client": "user:anna", "request_id": "r3", "priority": 0,
        "arrived_at": 500_995.0, "deadline_at": 510_000.0, "expected_wait_seconds": 4, "reason": "its turn",
    }  # fmt: skip
    (request,) = document["running"].values()
    assert (request["client"], request["first_byte_at"], request["tokens"]) == ("user:ben", 500_982.0, 5)
    (step,) = document["decisions"].values()
    assert (step["at"], step["event"], step["reason"]) == (500_990.0, "load", "GPU 0 has room")
    assert document["points"]["500990"] == {"waiting": 1, "running": 1, "tokens_per_second": 12.3, "first_tokens": 0}


def test_a_load_says_when_it_began_and_how_long_it_should_take() -> None:
    models = DocumentBuilder().build(_facts())["models"]
    row = models[f"gpu0/{NEXT.blob}"]
    assert row["load_started_at"] == 500_990.0
    assert row["load_expected_seconds"] > 0
    assert "load_started_at" not in models[f"gpu0/{BIG.blob}"]


def test_passing_time_alone_changes_nothing_but_the_time() -> None:
    builder = DocumentBuilder()
    assert merge_patch(builder.build(_facts(1000.0)), builder.build(_facts(1001.0))) == {"at": 501_001.0}


_CALM = dict.fromkeys(("unfit", "drained", "hot", "on_probation"), False)


@pytest.mark.parametrize(
    ("flags", "changes", "said"),
    [
        ({}, {}, []),
        ({}, {"temperature_celsius": 84}, []),
        ({}, {"temperature_celsius": 86}, [("warning", "86 °C")]),
        ({"hot": True}, {"temperature_celsius": 91}, [("error", "91 °C")]),
        ({"hot": True}, {}, [("warning", "hot or slowed down: others are preferred")]),
        ({}, {"error": "GPU is lost", "temperature_celsius": 99}, [("error", "lost: GPU is lost")]),
        ({"unfit": "XID 79", "drained": True}, {}, [("error", "out of service: XID 79")]),
        ({"drained": True}, {}, [("warning", "drained by an operator")]),
        ({"on_probation": True}, {}, [("warning", "on probation after an error: one load at a time")]),
        ({}, {"throttle_reasons": ("sw_power_cap",)}, [("warning", "throttled: sw_power_cap")]),
        ({}, {"ecc_errors_uncorrected": 2}, [("warning", "2 uncorrected ECC errors")]),
    ],
)
def test_alarms_of_a_gpu(flags: dict[str, Any], changes: dict[str, Any], said: list[tuple[str, str]]) -> None:
    found = alarms(_CALM | flags, replace(gpu(0, 1), **changes))
    assert [(alarm["level"], alarm["text"]) for alarm in found] == said
