"""Shares of layers on unequal GPUs, and which servers use them."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.domain.footprint import MeasuredFootprint
from router.domain.instance import InstanceState, InstanceView
from router.domain.policy import Policy
from router.engines.ollama.footprint_estimator import estimated_footprint, footprint_key
from router.engines.ollama.memory_estimate import LayerSplit, even_split, split_by
from router.engines.ollama.tensor_split import (
    TENSOR_SPLIT,
    memory_shares,
    parsed_split,
    shares_of,
    split_text,
    unequal_text,
)
from router.scheduler.placement.candidates import Bounds, candidates_of_size
from router.scheduler.placement.measured_footprints import Footprints
from tests.scheduler.builders import GB, MIB, gpu, instance, model, snapshot

TWO = instance("both", 0, 1)
TOLD = replace(TWO, environment={TENSOR_SPLIT: "24,12"})
M = model("m", 20_000)


def test_gpus_share_by_their_memory_in_whole_gib_and_equal_ones_evenly() -> None:
    assert memory_shares((24 * 1024 * MIB, 12 * 1024 * MIB)) == (22.0, 10.0)
    assert memory_shares((24_564 * MIB, 24_576 * MIB)) == (1.0, 1.0)  # a 4090 and a 3090
    assert memory_shares(()) == ()


@pytest.mark.parametrize(
    ("text", "shares"),
    [("24,12", (24.0, 12.0)), ("3/1", (3.0, 1.0)), ("0.7,0.3", (0.7, 0.3)), ("1,0", (1.0, 0.0)), ("", ()), (" ", ()),
     ("0,0", ()), ("-1,2", ()), ("a,b", ()), ("1,", ()), ("nan,1", ()), ("inf,1", ())],
)  # fmt: skip
def test_shares_are_read_as_llama_cpp_reads_them(text: str, shares: tuple[float, ...]) -> None:
    assert parsed_split(text) == shares


def test_written_shares_are_parsed_again() -> None:
    assert split_text((24.0, 12.0)) == "24,12"
    assert parsed_split(split_text((0.7, 0.3))) == (0.7, 0.3)


@pytest.mark.parametrize(
    ("version", "shares"),
    [("0.33.0", (24.0, 12.0)), ("0.30.1", (24.0, 12.0)), (None, (24.0, 12.0)), ("0.24.0", (1.0, 1.0))],
)
def test_servers_from_0_30_use_the_configured_shares(version: str | None, shares: tuple[float, ...]) -> None:
    assert shares_of(TOLD, version) == shares
    assert shares_of(TWO, version) == (1.0, 1.0)


def test_missing_shares_are_0_and_surplus_shares_are_ignored() -> None:
    three = replace(instance("all", 0, 1, 2), environment={TENSOR_SPLIT: "1,1"})
    assert shares_of(three, "0.33.0") == (1.0, 1.0, 0.0)
    assert unequal_text(three) == "1,1,0"
    assert shares_of(replace(TWO, environment={TENSOR_SPLIT: "3,2,1"}), "0.33.0") == (3.0, 2.0)
    assert shares_of(replace(TWO, environment={TENSOR_SPLIT: "0,0,1"}), "0.33.0") == (1.0, 1.0)


SHARES = st.lists(st.integers(0, 96), min_size=1, max_size=8).filter(any)


@given(st.integers(0, 200), SHARES)
def test_each_gpu_has_its_share_of_the_layers_to_within_one(layers: int, shares: list[int]) -> None:
    split = split_by(layers, tuple(map(float, shares)))
    units = [count + (index == split.output_gpu) for index, count in enumerate(split.layers)]
    assert sum(units) == layers + 1
    exact = [share * (layers + 1) / sum(shares) for share in shares]
    assert all(abs(count - wanted) < 1 for count, wanted in zip(units, exact, strict=True))
    assert all(count == 0 for count, share in zip(units, shares, strict=True) if not share)


@given(st.integers(0, 200), st.integers(1, 8), st.integers(1, 96))
def test_equal_shares_are_an_even_split(layers: int, gpus: int, share: int) -> None:
    assert split_by(layers, (float(share),) * gpus) == even_split(layers, gpus)


def test_a_70b_over_24_and_12_gb() -> None:
    assert split_by(80, (24.0, 12.0)) == LayerSplit((54, 26), 1)
    with pytest.raises(ValueError, match="no layers and shares"):
        split_by(80, (0.0, 0.0))


def test_footprints_follow_the_shares_if_the_server_uses_them() -> None:
    def bytes_with(version: str) -> tuple[int, ...]:
        facts = snapshot(
            [gpu(0, 24_000), gpu(1, 12_000, total_mib=12_000)], [InstanceView(TOLD, InstanceState.READY, version)]
        )
        return estimated_footprint(M, TOLD, 8192, facts).per_gpu_bytes

    (large, small), even = bytes_with("0.33.0"), bytes_with("0.24.0")
    assert large / small == pytest.approx(2.0, rel=0.1)
    assert even[0] / even[1] == pytest.approx(1.0, rel=0.2)


def test_a_new_server_over_unequal_gpus_receives_shares() -> None:
    policy = Policy(vram_margin_bytes=0, instances_on_demand=True, on_demand_like=instance(""))
    unequal = snapshot([gpu(0, 12_000, total_mib=12_288), gpu(1, 24_000, total_mib=24_576)], policy=policy)
    (candidate,) = candidates_of_size(unequal, 2, Bounds("m"))
    assert candidate.spec.environment[TENSOR_SPLIT] == "10,22"
    (alone, _) = candidates_of_size(unequal, 1, Bounds("m"))
    assert TENSOR_SPLIT not in alone.spec.environment
    equal = snapshot([gpu(0, 24_000, total_mib=24_576), gpu(1, 24_000, total_mib=24_576)], policy=policy)
    (candidate,) = candidates_of_size(equal, 2, Bounds("m"))
    assert TENSOR_SPLIT not in candidate.spec.environment
    like = replace(instance(""), environment={TENSOR_SPLIT: "1,3"})
    told = replace(unequal, policy=replace(policy, on_demand_like=like))
    (candidate,) = candidates_of_size(told, 2, Bounds("m"))
    assert candidate.spec.environment[TENSOR_SPLIT] == "1,3"


def test_footprints_with_other_shares_are_different() -> None:
    seen = Footprints()
    assert (unequal_text(TOLD), unequal_text(TWO)) == ("24,12", "")
    assert unequal_text(replace(TWO, environment={TENSOR_SPLIT: "1,1"})) == ""
    seen.remember(MeasuredFootprint(footprint_key(M, TOLD, 8192), (14 * GB, 7 * GB)))
    assert seen.known.get(footprint_key(M, TWO, 8192)) is None
    assert seen.nearest(footprint_key(M, TWO, 4096)) is None
    assert seen.nearest(footprint_key(M, TOLD, 4096)) == footprint_key(M, TOLD, 8192)


def test_footprints_of_other_settings_or_versions_are_different() -> None:
    """Its batch and attention buffers may be larger."""
    seen = Footprints()
    flash = replace(TWO, flash_attention=True)
    seen.remember(MeasuredFootprint(footprint_key(M, flash, 8192, "0.24.1"), (14 * GB, 14 * GB)))
    known, near = seen.known, seen.nearest
    assert known[footprint_key(M, flash, 8192, "0.24.0")].per_gpu_bytes == (14 * GB, 14 * GB)
    for spec, version in (
        (flash, "0.33.0"),
        (flash, None),
        (TWO, "0.24.1"),
        (replace(TWO, flash_attention=False), "0.24.1"),
    ):
        assert known.get(footprint_key(M, spec, 8192, version)) is None
        assert near(footprint_key(M, spec, 4096, version)) is None
