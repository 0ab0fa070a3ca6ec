"""GPUs and configuration become instances with their whole environment."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import count
from typing import Any

import pytest

from router.domain.gpu import Gpu, GpuUuid
from router.domain.instance import InstanceSpec
from router.engines.ollama.instance_plan import (
    ON_DEMAND,
    DeclaredInstance,
    InstancePlan,
    PlanError,
    TuningFor,
    are_equal,
    fill_order,
    on_demand_instance,
    on_demand_like,
    plan_instances,
    ports_needed,
)

GIB = 1024**3


@dataclass(frozen=True)
class Values:
    num_parallel: int = 2
    context_length: int = 8192
    kv_cache_type: str = "f16"
    flash_attention: bool | None = None
    environment: Mapping[str, str] = field(default_factory=dict[str, str])


def gpu(
    index: int, name: str = "NVIDIA GeForce RTX 3090", bus: int | None = 384, mhz: int = 9751, gib: int = 24
) -> Gpu:
    clock = None if bus is None else mhz * 1_000_000
    total = gib * GIB
    return Gpu(
        GpuUuid(f"GPU-{index}aaa"), index, name, total, total, 0, memory_bus_width_bits=bus, memory_clock_hertz=clock
    )


A6000 = {"name": "NVIDIA RTX A6000", "mhz": 8001, "gib": 48}
RTX4090 = {"name": "NVIDIA GeForce RTX 4090", "mhz": 10501}


def same_for_all(values: Values) -> TuningFor:
    def tuning_for(name: str) -> Values:
        return values

    return tuning_for


def planned(*gpus: Gpu, tunings: Mapping[str, Values] | None = None, **fields: Any) -> dict[str, InstanceSpec]:
    plan = InstancePlan("/store", lambda name: (tunings or {}).get(name, Values()), **fields)
    specs = plan_instances(gpus, plan, count(20001))
    return {spec.name: spec for spec in specs}


def test_each_gpu_has_an_instance_and_two_or_more_a_spread_one() -> None:
    specs = planned(gpu(0), gpu(1), gpu(2))
    assert list(specs) == ["gpu0", "gpu1", "gpu2", "spread"]
    assert [spec.gpus for spec in specs.values()] == [
        ("GPU-0aaa",), ("GPU-1aaa",), ("GPU-2aaa",), ("GPU-0aaa", "GPU-1aaa", "GPU-2aaa"),
    ]  # fmt: skip
    assert [spec.url for spec in specs.values()] == [f"http://127.0.0.1:{20001 + i}" for i in range(4)]


def test_one_gpu_has_no_spread_instance_and_no_gpu_one_on_the_cpu() -> None:
    assert list(planned(gpu(3))) == ["gpu3"]
    assert list(planned()) == ["cpu"]
    assert planned()["cpu"].gpus == ()


def test_cpu_overflow_has_an_instance_of_its_own_beside_gpus_only() -> None:
    specs = planned(gpu(0), cpu_overflow=True)
    assert {name: (spec.gpus, spec.is_overflow) for name, spec in specs.items()} == {
        "gpu0": (("GPU-0aaa",), False), "cpu-overflow": ((), True),
    }  # fmt: skip
    assert specs["cpu-overflow"].environment["CUDA_VISIBLE_DEVICES"] == "-1"
    assert not planned(cpu_overflow=True)["cpu"].is_overflow


def test_an_instance_has_its_whole_environment() -> None:
    assert planned(gpu(0))["gpu0"].environment == {
        "OLLAMA_HOST": "127.0.0.1:20001",
        "OLLAMA_MODELS": "/store",
        "OLLAMA_KEEP_ALIVE": "-1",
        "OLLAMA_NOPRUNE": "1",
        "OLLAMA_NO_CLOUD": "1",
        "OLLAMA_NUM_PARALLEL": "2",
        "OLLAMA_CONTEXT_LENGTH": "8192",
        "OLLAMA_KV_CACHE_TYPE": "f16",
        "OLLAMA_MAX_LOADED_MODELS": "100000",
        "OLLAMA_SCHED_SPREAD": "0",
        "CUDA_VISIBLE_DEVICES": "GPU-0aaa",
        "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
        "OLLAMA_VULKAN": "0",
        "GGML_VK_VISIBLE_DEVICES": "-1",
        "ROCR_VISIBLE_DEVICES": "-1",
        "HIP_VISIBLE_DEVICES": "-1",
    }


def test_an_instance_on_the_cpu_sees_no_gpu() -> None:
    assert planned()["cpu"].environment["CUDA_VISIBLE_DEVICES"] == "-1"


def test_cloud_models_are_reached_only_where_they_are_switched_on() -> None:
    assert "OLLAMA_NO_CLOUD" not in planned(cloud=True)["cpu"].environment


def test_tuning_reaches_the_spec_and_the_environment() -> None:
    own = Values(4, 4096, "q8_0", True, {"OLLAMA_DEBUG": "1", "OLLAMA_MAX_LOADED_MODELS": "1", "OLLAMA_VULKAN": "1"})
    specs = planned(gpu(0), gpu(1), tunings={"gpu1": own})
    one = specs["gpu1"]
    assert (one.num_parallel, one.context_length, one.kv_cache_type, one.flash_attention) == (4, 4096, "q8_0", True)
    wanted = {**own.environment, "OLLAMA_NUM_PARALLEL": "4", "OLLAMA_CONTEXT_LENGTH": "4096",
              "OLLAMA_KV_CACHE_TYPE": "q8_0", "OLLAMA_FLASH_ATTENTION": "1"}  # fmt: skip
    assert wanted.items() <= one.environment.items()
    assert "OLLAMA_DEBUG" not in specs["gpu0"].environment


def test_variables_needed_for_accounting_cannot_be_overridden() -> None:
    environment = {
        "OLLAMA_KEEP_ALIVE": "5m",
        "CUDA_VISIBLE_DEVICES": "0",
        "OLLAMA_HOST": "0.0.0.0",
        "OLLAMA_NOPRUNE": "0",
    }
    spec = planned(gpu(0), tunings={"gpu0": Values(environment=environment)})["gpu0"]
    assert spec.environment == planned(gpu(0))["gpu0"].environment


def test_equal_gpus_are_spread_evenly_in_their_own_order() -> None:
    spread = planned(gpu(1), gpu(0))["spread"]
    assert spread.environment["OLLAMA_SCHED_SPREAD"] == "1"
    assert spread.environment["CUDA_VISIBLE_DEVICES"] == "GPU-0aaa,GPU-1aaa"


def test_unequal_gpus_are_filled_fastest_first() -> None:
    specs = planned(gpu(0), gpu(1, **RTX4090), gpu(2, **A6000))
    assert specs["spread"].environment["OLLAMA_SCHED_SPREAD"] == "0"
    assert specs["spread"].gpus == ("GPU-1aaa", "GPU-0aaa", "GPU-2aaa")
    assert specs["gpu0"].environment["OLLAMA_SCHED_SPREAD"] == "0"


def test_servers_on_unequal_gpus_receive_shares_in_the_order_of_the_instance() -> None:
    gpus = (gpu(0), gpu(1, gib=12))
    assert planned(*gpus)["spread"].environment["LLAMA_ARG_TENSOR_SPLIT"] == "22,10"
    assert planned(gpu(0, gib=12), gpu(1))["spread"].environment["LLAMA_ARG_TENSOR_SPLIT"] == "22,10"
    assert planned(gpu(0), gpu(1))["spread"].environment["LLAMA_ARG_TENSOR_SPLIT"] == "1,1"
    assert "LLAMA_ARG_TENSOR_SPLIT" not in planned(*gpus)["gpu0"].environment
    declared = DeclaredInstance(Values(), "mine", gpus=("1", "0"))
    mine = planned(*gpus, discover=False, declared=(declared,))["mine"]
    assert mine.environment["LLAMA_ARG_TENSOR_SPLIT"] == "10,22"
    own = Values(environment={"LLAMA_ARG_TENSOR_SPLIT": "3,1"})
    assert planned(*gpus, tunings={"spread": own})["spread"].environment["LLAMA_ARG_TENSOR_SPLIT"] == "3,1"


@pytest.mark.parametrize(
    ("own", "told", "then"), [({}, "22,10", "22,10"), ({"LLAMA_ARG_TENSOR_SPLIT": "3,1"}, None, "3,1")]
)
def test_an_instance_on_demand_receives_the_shares_used_for_its_estimate(
    own: dict[str, str], told: str | None, then: str
) -> None:
    plan = InstancePlan("/store", same_for_all(Values(environment=own)))
    like = on_demand_like(plan)
    known = {**like.environment, "LLAMA_ARG_TENSOR_SPLIT": told} if told else like.environment
    wanted = replace(like, gpus=(GpuUuid("GPU-0aaa"), GpuUuid("GPU-1aaa")), environment=known)
    assert on_demand_instance(wanted, plan, 20001).environment["LLAMA_ARG_TENSOR_SPLIT"] == then
    assert wanted.environment["LLAMA_ARG_TENSOR_SPLIT"] == then


def test_how_to_spread_can_be_overridden() -> None:
    unequal, equal = (gpu(0), gpu(1, **RTX4090)), (gpu(0), gpu(1))
    assert planned(*unequal, spread="even")["spread"].environment["OLLAMA_SCHED_SPREAD"] == "1"
    assert planned(*unequal, spread="even")["spread"].gpus == ("GPU-0aaa", "GPU-1aaa")
    assert planned(*equal, spread="fill_first")["spread"].environment["OLLAMA_SCHED_SPREAD"] == "0"
    assert "spread" not in planned(*equal, spread="off")
    by_variable = Values(environment={"OLLAMA_SCHED_SPREAD": "0"})
    assert planned(*equal, tunings={"spread": by_variable})["spread"].environment["OLLAMA_SCHED_SPREAD"] == "0"


@pytest.mark.parametrize("environment", [{}, {"OLLAMA_SCHED_SPREAD": "0"}, {"OLLAMA_SCHED_SPREAD": "1"}])
def test_the_template_of_instances_on_demand_spreads_like_the_instances(environment: dict[str, str]) -> None:
    values = Values(environment=environment)
    plan = InstancePlan("/store", lambda name: {ON_DEMAND: values}[name])
    like = on_demand_like(plan)
    spec = on_demand_instance(replace(like, gpus=(GpuUuid("GPU-0aaa"), GpuUuid("GPU-1aaa"))), plan, 20001)
    assert like.environment["OLLAMA_SCHED_SPREAD"] == environment.get("OLLAMA_SCHED_SPREAD", "1")
    assert spec.environment["OLLAMA_SCHED_SPREAD"] == like.environment["OLLAMA_SCHED_SPREAD"]


def test_gpus_are_equal_by_name_and_memory() -> None:
    assert are_equal([gpu(0), gpu(1)])
    assert not are_equal([gpu(0), gpu(1, **RTX4090)])
    assert not are_equal([gpu(0), gpu(1, gib=12)])


def test_speed_goes_by_bandwidth_then_memory_then_index() -> None:
    unknown_small, unknown_big = gpu(0, bus=None), gpu(1, bus=None, gib=48)
    ordered = fill_order([unknown_small, unknown_big, gpu(3), gpu(2), gpu(4, **RTX4090)])
    assert [one.index for one in ordered] == [4, 2, 3, 1, 0]


def test_no_instance_is_spread_over_mig_devices() -> None:
    parts = [replace(gpu(i), uuid=GpuUuid(f"MIG-{i}")) for i in (1, 2)]
    assert list(planned(gpu(0), *parts)) == ["gpu0", "gpu1", "gpu2"]


def test_a_gpu_that_cannot_be_read_gets_no_instance() -> None:
    specs = planned(gpu(0), replace(gpu(1), error="GPU is lost"), gpu(2))
    assert list(specs) == ["gpu0", "gpu2", "spread"]
    assert specs["spread"].gpus == ("GPU-0aaa", "GPU-2aaa")


def test_declared_instances_replace_or_extend_discovered_ones() -> None:
    declared = (DeclaredInstance(Values(), name="a"), DeclaredInstance(Values(), name="b"))
    assert list(planned(gpu(0), discover=False, declared=declared)) == ["a", "b"]
    assert list(planned(gpu(0), declared=declared)) == ["gpu0", "a", "b"]


def test_two_declared_instances_without_gpus_have_ports_of_their_own() -> None:
    specs = planned(discover=False, declared=tuple(DeclaredInstance(Values(), name=name) for name in "ab"))
    assert {spec.environment["CUDA_VISIBLE_DEVICES"] for spec in specs.values()} == {"-1"}
    assert {spec.url for spec in specs.values()} == {"http://127.0.0.1:20001", "http://127.0.0.1:20002"}


@pytest.mark.parametrize("wanted", ["GPU-1aaa", "gpu-1", "1"])
def test_a_declared_gpu_is_named_by_uuid_its_beginning_or_index(wanted: str) -> None:
    specs = planned(gpu(0), gpu(1), discover=False, declared=(DeclaredInstance(Values(), name="a", gpus=(wanted,)),))
    assert specs["a"].environment["CUDA_VISIBLE_DEVICES"] == "GPU-1aaa"


def test_a_declared_instance_keeps_the_order_of_its_gpus() -> None:
    specs = planned(gpu(0), gpu(1), discover=False, declared=(DeclaredInstance(Values(), name="a", gpus=("1", "0")),))
    assert specs["a"].environment["CUDA_VISIBLE_DEVICES"] == "GPU-1aaa,GPU-0aaa"
    assert specs["a"].environment["OLLAMA_SCHED_SPREAD"] == "1"


def test_an_attached_instance_has_no_environment_and_is_named_after_its_address() -> None:
    one = DeclaredInstance(Values(num_parallel=8), url="http://127.0.0.1:11500/", gpus=("0",))
    spec = planned(gpu(0), discover=False, declared=(one,))["127.0.0.1:11500"]
    assert spec.attached
    assert (spec.url, spec.environment, spec.num_parallel) == ("http://127.0.0.1:11500", {}, 8)
    assert spec.gpus == ("GPU-0aaa",)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"name": "a", "gpus": ("7",)}, "'7' is no GPU of this machine; there are: 0: GPU-0aaa"),
        ({"name": "a", "gpus": ("GPU-",)}, "'GPU-' fits several GPUs"),
        ({"name": "a", "gpus": ("0", "GPU-0aaa")}, "names one GPU twice"),
        ({"name": "gpu0"}, "two instances are called 'gpu0'"),
        ({}, "neither a name nor a url"),
    ],
)
def test_an_impossible_declaration_is_an_error(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(PlanError, match=words):
        planned(gpu(0), gpu(1), declared=(DeclaredInstance(Values(), **fields),))


def test_ports_needed_are_enough_and_fewer_are_an_error() -> None:
    declared = (DeclaredInstance(Values(), name="a"), DeclaredInstance(Values(), url="http://x:1"))
    plan = InstancePlan("/store", same_for_all(Values()), declared=declared)
    gpus = [gpu(0), gpu(1)]
    needed = ports_needed(gpus, plan)
    assert needed == 4
    assert len(plan_instances(gpus, plan, range(1, needed + 1))) == 5
    with pytest.raises(PlanError, match="no free port"):
        plan_instances(gpus, plan, range(1, needed))
