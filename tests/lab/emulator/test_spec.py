"""Parsing of emulator specifications; errors suggest the nearest valid name."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.lab.emulator.spec import GIB, GPU_MODELS, GPUS_MAX, MIB, SpecError, parse_gpus, parse_spec

_PARTS = st.lists(st.tuples(st.integers(1, 4), st.sampled_from(sorted(GPU_MODELS))), min_size=1, max_size=4)


@given(_PARTS)
def test_gpus_are_parsed_in_order(parts: list[tuple[int, str]]) -> None:
    names = [name for count, name in parts for _ in range(count)]
    assert parse_gpus("+".join(f"{count}x{name}" for count, name in parts)) == tuple(GPU_MODELS[name] for name in names)


@given(_PARTS)
def test_each_gpu_has_a_unique_stable_uuid(parts: list[tuple[int, str]]) -> None:
    text = "+".join(f"{count}x{name}" for count, name in parts)
    uuids = parse_spec(text).uuids
    assert len(set(uuids)) == len(uuids) == len(parse_spec(text).gpus)
    assert parse_spec(text).uuids == uuids


@pytest.mark.parametrize("text", ["2xRTX3090", "2 x 3090", "2xGeForceRTX3090", "2xNVIDIAGeForceRTX3090"])
def test_vendor_prefixes_and_spaces_are_ignored(text: str) -> None:
    assert parse_gpus(text) == (GPU_MODELS["3090"],) * 2


def test_bandwidths_match_the_data_sheets() -> None:
    expected = {"3090": 936, "4090": 1008, "5090": 1792, "a6000": 768, "h100": 3352, "6000ada": 960, "l40s": 864}
    for name, gigabytes in expected.items():
        assert GPU_MODELS[name].bandwidth_bytes_per_second / 1e9 == pytest.approx(gigabytes, rel=0.005)


def test_every_gpu_says_that_it_is_emulated() -> None:
    assert all("emulated" in gpu.name for gpu in GPU_MODELS.values())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("3x309O", "did you mean '3090'"),
        ("9999", "known: "),
        ("", "is not a GPU"),
        ("2*3090", "is not a GPU"),
        ("0x3090", "has 0 GPUs"),
        (f"{GPUS_MAX + 1}x3090", f"1 to {GPUS_MAX}"),
        ("/nowhere/rig.yaml", "cannot read"),
    ],
)
def test_an_invalid_specification_is_refused(text: str, message: str) -> None:
    with pytest.raises(SpecError, match=message.replace("*", r"\*")):
        parse_spec(text)


def _file(folder: Path, text: str) -> str:
    path = folder / "rig.yaml"
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_a_file_can_override_single_values(tmp_path: Path) -> None:
    text = """
        gpus:
          - 2x3090
          - {gpu: 4090, name: My GPU, memory_total_bytes: 1073741824, compute_capability: [9, 0]}
        models: [llama3.1:8b]
        version: 0.33.0
        speed: 4
        ram_bytes: 1000
        cold_bytes_per_second: 500000000
        deviation: 0.1
        seed: 7
    """
    spec = parse_spec(_file(tmp_path, text))
    assert [gpu.name for gpu in spec.gpus][2] == "My GPU (emulated)"
    assert (spec.gpus[2].memory_total_bytes, spec.gpus[2].compute_capability) == (GIB, (9, 0))
    assert spec.gpus[2].memory_reserved_bytes == 478 * MIB
    assert (spec.models, spec.version, spec.speed, spec.ram_bytes) == (("llama3.1:8b",), "0.33.0", 4.0, 1000)
    assert (spec.cold_bytes_per_second, spec.deviation, spec.seed) == (5e8, 0.1, 7)


@pytest.mark.parametrize("text", ["off", "0", "'off'"])
def test_deviations_can_be_switched_off(tmp_path: Path, text: str) -> None:
    assert parse_spec(_file(tmp_path, f"{{gpus: 3090, deviation: {text}}}")).deviation == 0.0
    assert parse_spec("3090").deviation == 0.04


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("gpu: 3090", "did you mean 'gpus'"),
        ("speed: 2", "`gpus` is missing"),
        ("gpus: []", "list of GPUs"),
        ("{gpus: 3090, speed: 0}", "above 0"),
        ("{gpus: 3090, speed: .inf}", "above 0"),
        ("{gpus: 3090, speed: true}", "above 0"),
        ("{gpus: 3090, deviation: 0.5}", "below 0.5"),
        ("{gpus: 3090, deviation: much}", "above 0"),
        ("{gpus: 3090, seed: 0}", "above 0"),
        ("{gpus: 3090, version: 0.24.1}", "did you mean '0.24.0'"),
        ("{gpus: 3090, models: llama3.1}", "a list of names"),
        ("gpus: [{gpu: 3090, memory_totl_bytes: 1}]", "did you mean 'memory_total_bytes'"),
        ("[3090]", "keys and values"),
        ("{gpus: [", "is not YAML"),
    ],
)
def test_an_invalid_file_is_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        parse_spec(_file(tmp_path, text))
