"""Lists of loaded models update the state, unless they are older than it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from router.domain.events import GpusRead, LoadedModel, ResidencyRead
from router.domain.gpu import GpuProcess, GpuUuid
from router.domain.ids import LoadId
from router.domain.instance import InstanceName
from router.domain.request import RunnerOptions
from router.domain.residency import ResidencyState
from tests.scheduler.builders import key
from tests.scheduler.play import Play, sized

SMALL = sized("small", 10)
LONG: RunnerOptions = (("num_ctx", 2048),)


@pytest.fixture
def one() -> Play:
    return Play(1).begin()


def _only_load(play: Play) -> LoadId:
    (load,) = play.loads
    return load


def test_a_model_that_a_server_no_longer_lists_is_loaded_again(one: Play) -> None:
    one.arrive(SMALL)
    one.work_through()
    one.lose_runner(key("gpu0", SMALL))
    assert one.residency("gpu0", SMALL) is None
    again = one.arrive(SMALL)
    one.work_through()
    assert again in one.leases
    assert one.loads_sent == 2


def _listed(of: object, size: int, context: int | None = None, vram: int | None = None) -> LoadedModel:
    facts = of if not isinstance(of, str) else None
    name = getattr(of, "name", of)
    return LoadedModel(str(name), "", size, size if vram is None else vram, context, facts)  # type: ignore[arg-type]


def test_a_model_that_somebody_else_loaded_is_adopted_and_used(one: Play) -> None:
    one.external[GpuUuid("GPU-0")] = 12
    one.read_gpus()
    one.post(ResidencyRead(InstanceName("gpu0"), (_listed(SMALL, 12), _listed("unknown", 1)), one.now))
    found = one.residency("gpu0", SMALL)
    assert found is not None
    assert (found.per_gpu_bytes, found.options, found.reason) == ((12,), (), "found loaded on gpu0")
    one.held[key("gpu0", SMALL)] = {}
    assert one.arrive(SMALL) in one.leases
    assert one.loads_sent == 0


def test_an_adopted_model_with_another_context_serves_only_requests_for_it(one: Play) -> None:
    one.post(ResidencyRead(InstanceName("gpu0"), (_listed(SMALL, 10, context=2048),), one.now))
    found = one.residency("gpu0", SMALL)
    assert found is not None
    assert found.options == LONG


def test_a_listing_older_than_an_unload_restores_nothing(one: Play) -> None:
    ticket = one.arrive(SMALL, keep_alive_seconds=0.0)
    one.work_through()
    asked_at = one.now
    one.now += 1.0
    one.release(ticket)
    one.work_through()
    assert one.residency("gpu0", SMALL) is None
    one.post(ResidencyRead(InstanceName("gpu0"), (_listed(SMALL, 10),), asked_at))
    assert one.residency("gpu0", SMALL) is None


def test_a_listing_older_than_a_load_drops_nothing(one: Play) -> None:
    one.arrive(SMALL)
    one.finish_load(_only_load(one))
    one.post(ResidencyRead(InstanceName("gpu0"), (), one.now - 0.1))
    assert one.state("gpu0", SMALL) is ResidencyState.READY


def test_a_model_whose_name_means_another_now_is_still_matched(one: Play) -> None:
    one.arrive(SMALL)
    one.work_through()
    row = LoadedModel(SMALL.name, SMALL.digest, 10, 10, None, model=None)
    one.post(ResidencyRead(InstanceName("gpu0"), (row,), one.now))
    assert one.state("gpu0", SMALL) is ResidencyState.READY
    one.post(ResidencyRead(InstanceName("gpu0"), (replace(row, digest="another"),), one.now))
    assert one.residency("gpu0", SMALL) is None


def test_a_listing_replaces_the_estimated_size(one: Play) -> None:
    one.arrive(SMALL)
    one.work_through()
    one.post(ResidencyRead(InstanceName("gpu0"), (_listed(SMALL, 13, vram=12),), one.now))
    found = one.residency("gpu0", SMALL)
    assert found is not None
    assert (found.size_bytes, found.size_vram_bytes) == (13, 12)


def test_a_model_that_its_server_put_on_the_cpu_is_reported_and_loaded_as_planned(one: Play) -> None:
    """As 0.30 and later report it: no size at all."""
    one.post(ResidencyRead(InstanceName("gpu0"), (_listed(SMALL, 0),), one.now))
    (notice,) = one.notices
    assert (notice.event, notice.fields["cpu_percent"]) == ("model_on_cpu", 100)
    found = one.residency("gpu0", SMALL)
    assert found is not None
    assert (found.state, found.per_gpu_bytes) == (ResidencyState.UNLOADING, (0,))
    one.held[key("gpu0", SMALL)] = {}
    one.work_through()
    again = one.arrive(SMALL)
    one.work_through()
    assert again in one.leases


def test_a_model_that_its_server_loaded_again_partly_on_the_cpu_is_unloaded_once_it_is_idle(one: Play) -> None:
    ticket = one.arrive(SMALL)
    one.work_through()
    one.now += 1.0
    one.post(ResidencyRead(InstanceName("gpu0"), (_listed(SMALL, 10, vram=5),), one.now))
    assert [notice.fields["cpu_percent"] for notice in one.notices] == [50]
    found = one.residency("gpu0", SMALL)
    assert found is not None
    assert found.state is ResidencyState.READY
    one.release(ticket)
    one.now += 1.0
    one.post(ResidencyRead(InstanceName("gpu0"), (_listed(SMALL, 10, vram=5),), one.now))
    found = one.residency("gpu0", SMALL)
    assert found is not None
    assert found.state is ResidencyState.UNLOADING


def test_an_adopted_model_is_booked_by_what_its_servers_processes_hold() -> None:
    one, port = Play(1), 11_500
    one.specs[InstanceName("gpu0")] = replace(one.specs[InstanceName("gpu0")], url=f"http://127.0.0.1:{port}")
    one.begin()
    one.post(ResidencyRead(InstanceName("gpu0"), (_listed(SMALL, 10),), one.now))
    one.now += 1.0
    read = replace(one._gpu(0, 1.0), processes=(GpuProcess(1, 13, (port,)), GpuProcess(2, 90)))
    one.post(GpusRead((read,), one.now))
    found = one.residency("gpu0", SMALL)
    assert found is not None
    assert found.per_gpu_bytes == (13,)
