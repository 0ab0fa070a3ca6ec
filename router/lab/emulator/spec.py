"""What an EMULATED rig consists of: GPUs by name and number, models, the server's version and its speed.

Reads `2x3090`, `4090+3090`, `h100` or a YAML file into a `RigSpec`. It emulates nothing itself and starts nothing.
"""

from __future__ import annotations

import difflib
import math
import re
import uuid
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, cast

import yaml

from router.domain.gpu import GpuUuid

MIB = 1024**2
GIB = 1024**3

VERSIONS = ("0.11.4", "0.24.0", "0.33.0")
"""Versions of the server whose behaviour is emulated."""

GPUS_MAX = 16


class SpecError(ValueError):
    """The text does not describe a rig; says what is wrong and the nearest right name."""


@dataclass(frozen=True, slots=True)
class GpuSpec:
    """One model of GPU, as NVML would report it."""

    name: str
    memory_total_bytes: int
    memory_reserved_bytes: int
    """Kept by the driver (NVML memory info v2)."""
    memory_bus_width_bits: int
    memory_clock_hertz: int
    fp32_teraflops: float
    compute_capability: tuple[int, int]
    pcie_generation: int
    pcie_width: int
    power_limit_watts: float

    @property
    def bandwidth_bytes_per_second(self) -> float:
        """Two transfers a clock over the whole bus."""
        return 2.0 * self.memory_clock_hertz * self.memory_bus_width_bits / 8


def _gpu(
    name: str, mib: int, reserved_mib: int, bus: int, mhz: int, teraflops: float, compute: tuple[int, int], watts: float
) -> GpuSpec:
    generation = {8: 4, 9: 5, 12: 5}[compute[0]]
    return GpuSpec(
        f"NVIDIA {name} (emulated)",
        mib * MIB,
        reserved_mib * MIB,
        bus,
        mhz * 1_000_000,
        teraflops,
        compute,
        generation,
        16,
        watts,
    )


GPU_MODELS: Mapping[str, GpuSpec] = {
    "3060": _gpu("GeForce RTX 3060", 12_288, 240, 192, 7_501, 12.7, (8, 6), 170),
    "3080": _gpu("GeForce RTX 3080", 10_240, 240, 320, 9_501, 29.8, (8, 6), 320),
    "3090": _gpu("GeForce RTX 3090", 24_576, 324, 384, 9_751, 35.6, (8, 6), 350),
    "3090ti": _gpu("GeForce RTX 3090 Ti", 24_564, 324, 384, 10_501, 40.0, (8, 6), 450),
    "4070": _gpu("GeForce RTX 4070", 12_282, 340, 192, 10_501, 29.1, (8, 9), 200),
    "4080": _gpu("GeForce RTX 4080", 16_376, 364, 256, 11_201, 48.7, (8, 9), 320),
    "4090": _gpu("GeForce RTX 4090", 24_564, 478, 384, 10_501, 82.6, (8, 9), 450),
    "5090": _gpu("GeForce RTX 5090", 32_607, 518, 512, 14_001, 104.8, (12, 0), 575),
    "a6000": _gpu("RTX A6000", 49_140, 454, 384, 8_001, 38.7, (8, 6), 300),
    "6000ada": _gpu("RTX 6000 Ada Generation", 49_140, 630, 384, 10_001, 91.1, (8, 9), 300),
    "l40s": _gpu("L40S", 46_068, 590, 384, 9_001, 91.6, (8, 9), 350),
    "h100": _gpu("H100 80GB HBM3", 81_559, 551, 5_120, 2_619, 66.9, (9, 0), 700),
}
"""GPUs by the name used in a spec. Memory, bus, clock, FP32 rate and power limit after NVIDIA's data sheets and
architecture white papers (GA102, AD102, GB202, H100); totals as `nvidia-smi` prints them, ECC on where it is by
default. The reserved bytes are rounded readings of current drivers; they vary by some tens of MiB."""


@dataclass(frozen=True, slots=True)
class EmulatorSpec:
    """A whole emulated machine."""

    gpus: tuple[GpuSpec, ...]
    models: tuple[str, ...] | None = None
    """Names of the catalogue that are there at the start; None: all of them."""
    version: str = "0.24.0"
    speed: float = 1.0
    """Emulated seconds in one real second: 10 makes loads and tokens ten times as fast."""
    ram_bytes: int = 128 * GIB
    """Host memory for what does not go to the GPUs."""

    @property
    def uuids(self) -> tuple[GpuUuid, ...]:
        """One a GPU, the same for the same rig."""
        return tuple(_uuid(index, gpu.name) for index, gpu in enumerate(self.gpus))


def _uuid(index: int, name: str) -> GpuUuid:
    return GpuUuid(f"GPU-{uuid.uuid5(uuid.NAMESPACE_OID, f'llamayard emulated GPU {index} {name}')}")


def parse_spec(text: str) -> EmulatorSpec:
    """The rig that `text` describes: GPUs (`2x3090+4090`) or the path of a YAML file.

    Raises:
        SpecError: what is wrong, where, and what would be right.
    """
    if "/" in text or text.endswith((".yaml", ".yml")):
        return _from_file(Path(text).expanduser())
    return EmulatorSpec(parse_gpus(text))


def parse_gpus(text: str) -> tuple[GpuSpec, ...]:
    """`2x3090+4090` as GPUs in that order. Raises SpecError."""
    gpus: list[GpuSpec] = []
    for part in text.lower().replace(" ", "").split("+"):
        match = re.fullmatch(r"(?:(\d{1,3})x)?([a-z0-9]+)", part)
        if match is None:
            raise SpecError(f"rig: {part!r} in {text!r} is not a GPU; write 2x3090, 4090+3090 or the path of a file")
        gpus += [_named(match[2])] * int(match[1] or 1)
    if not 1 <= len(gpus) <= GPUS_MAX:
        raise SpecError(f"rig: {text!r} has {len(gpus)} GPUs; 1 to {GPUS_MAX} can be emulated")
    return tuple(gpus)


def _named(name: str) -> GpuSpec:
    short = re.sub(r"^(nvidia|geforce|rtx|gtx)+", "", name)
    if short in GPU_MODELS:
        return GPU_MODELS[short]
    raise SpecError(f"rig: no GPU {name!r}; " + nearest(short, GPU_MODELS))


def nearest(word: str, known: Iterable[str]) -> str:
    """Words that help whoever wrote a name that is not known."""
    names = sorted(known)
    close = difflib.get_close_matches(word, names, n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else "known: " + ", ".join(names)


def _from_file(path: Path) -> EmulatorSpec:
    try:
        data: object = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SpecError(f"rig: cannot read {path}: {error.strerror}") from error
    except yaml.YAMLError as error:
        raise SpecError(f"rig: {path} is not YAML: {error}") from error
    try:
        return spec_from_mapping(_mapping(data, "rig"))
    except (TypeError, KeyError) as error:
        raise SpecError(f"{path}: {error}") from error


def spec_from_mapping(data: Mapping[str, Any]) -> EmulatorSpec:
    """A rig from a file's keys: `gpus` and optionally `models`, `version`, `speed`, `ram_bytes`. Raises SpecError."""
    known = {field.name for field in fields(EmulatorSpec)}
    for key in data:
        if key not in known:
            raise SpecError(f"rig: no key {key!r}; " + nearest(key, known))
    if "gpus" not in data:
        raise SpecError("rig: the key `gpus` is missing; write `gpus: 2x3090` or a list of GPUs")
    models = data.get("models")
    if models is not None and not isinstance(models, list):
        raise SpecError(f"models: a list of names is wanted, not {models!r}")
    return EmulatorSpec(
        gpus=_gpus(data["gpus"]),
        models=None if models is None else tuple(str(name) for name in cast("list[object]", models)),
        **changed(data),
    )


def changed(data: Mapping[str, Any]) -> dict[str, Any]:
    """Those of `version`, `speed` and `ram_bytes` that are given, checked. Raises SpecError."""
    found: dict[str, Any] = {}
    if "version" in data:
        found["version"] = str(data["version"])
        if found["version"] not in VERSIONS:
            raise SpecError(f"version: {data['version']!r} is not emulated; " + nearest(found["version"], VERSIONS))
    if "speed" in data:
        found["speed"] = _positive(data["speed"], "speed")
    if "ram_bytes" in data:
        found["ram_bytes"] = int(_positive(data["ram_bytes"], "ram_bytes"))
    return found


def _gpus(value: object) -> tuple[GpuSpec, ...]:
    if isinstance(value, str | int):
        return parse_gpus(str(value))
    if not isinstance(value, list) or not value:
        raise SpecError(f"GPUs: a text such as 2x3090 or a list of GPUs is wanted, not {value!r}")
    found: list[GpuSpec] = []
    for one in cast("list[object]", value):
        found += parse_gpus(str(one)) if isinstance(one, str | int) else (_gpu_of(_mapping(one, "gpus")),)
    if len(found) > GPUS_MAX:
        raise SpecError(f"gpus: {len(found)} GPUs; 1 to {GPUS_MAX} can be emulated")
    return tuple(found)


def _gpu_of(data: Mapping[str, Any]) -> GpuSpec:
    """`{gpu: 3090, memory_total_bytes: …}`: a known GPU with other figures."""
    changes = dict(data)
    gpu = _named(str(changes.pop("gpu", "3090")).lower())
    known = {field.name for field in fields(GpuSpec)}
    for key in changes:
        if key not in known:
            raise SpecError(f"GPUs: no key {key!r}; " + nearest(key, {*known, "gpu"}))
    if "compute_capability" in changes:
        major, minor = changes["compute_capability"]
        changes["compute_capability"] = (int(major), int(minor))
    if "name" in changes and "emulated" not in str(changes["name"]):
        changes["name"] = f"{changes['name']} (emulated)"
    return replace(gpu, **changes)


def _mapping(value: object, what: str) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise SpecError(f"{what}: keys and values are wanted, not {value!r}")
    return cast("Mapping[str, Any]", value)


def _positive(value: object, key: str) -> float:
    try:
        number = 0.0 if isinstance(value, bool) else float(cast("float | str", value))
    except (TypeError, ValueError):
        number = 0.0
    if not 0 < number < math.inf:
        raise SpecError(f"{key}: a number above 0 is wanted, not {value!r}")
    return number
