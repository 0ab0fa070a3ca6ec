"""Specification of an EMULATED machine: GPU models and counts, Ollama models, server version and speed.

Parses `2x3090`, `4090+3090`, `h100` or a YAML file into an `EmulatorSpec`. Starts nothing.
"""

from __future__ import annotations

import difflib
import math
import re
import uuid
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, cast

import yaml

from router.domain.gpu import GpuUuid, memory_bandwidth
from router.lab.emulator.host import HOST_KEYS, EmulatedHost, read_host
from router.lab.simulator.true_footprint import DEVIATION_SHARE
from router.lab.simulator.world import WORLD

MIB = 1024**2
GIB = 1024**3

VERSIONS = ("0.11.4", "0.24.0", "0.33.0", "0.34.0")
"""Ollama versions that can be emulated."""
DEFAULT_VERSION = "0.34.0"

GPUS_MAX = 16


class SpecError(ValueError):
    """The text is not a valid specification; the message says why and suggests the nearest valid name."""


@dataclass(frozen=True, slots=True)
class GpuSpec:
    """One model of GPU, as NVML would report it."""

    name: str
    memory_total_bytes: int
    memory_reserved_bytes: int
    """Reserved by the driver (NVML memory info v2)."""
    memory_bus_width_bits: int
    memory_clock_hertz: int
    fp32_teraflops: float
    compute_capability: tuple[int, int]
    pcie_generation: int
    pcie_width: int
    power_limit_watts: float
    pcie_generation_max: int = 0
    """Of the device and its slot; 0: `pcie_generation`."""
    pcie_width_max: int = 0
    """Of the device and its slot; 0: `pcie_width`."""
    temperature_celsius: int | None = None
    """Constant; None: by what the GPU computes."""
    persistence_mode: bool = True
    ecc_mode: bool | None = None
    """None: the GPU has no ECC."""
    ecc_mode_pending: bool | None = None
    """After the next reboot; None: `ecc_mode`."""
    ecc_uncorrected_errors: int = 0
    row_remap_failed: bool = False
    external_bytes: int = 0
    """VRAM that other programs hold from the start."""
    is_lost: bool = False
    """Whether the driver has lost the GPU from the start."""

    @property
    def bandwidth_bytes_per_second(self) -> float:
        return memory_bandwidth(self.memory_clock_hertz, self.memory_bus_width_bits)


def _gpu_spec(
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
    "3060": _gpu_spec("GeForce RTX 3060", 12_288, 240, 192, 7_501, 12.7, (8, 6), 170),
    "3080": _gpu_spec("GeForce RTX 3080", 10_240, 240, 320, 9_501, 29.8, (8, 6), 320),
    "3090": _gpu_spec("GeForce RTX 3090", 24_576, 324, 384, 9_751, 35.6, (8, 6), 350),
    "3090ti": _gpu_spec("GeForce RTX 3090 Ti", 24_564, 324, 384, 10_501, 40.0, (8, 6), 450),
    "4070": _gpu_spec("GeForce RTX 4070", 12_282, 340, 192, 10_501, 29.1, (8, 9), 200),
    "4080": _gpu_spec("GeForce RTX 4080", 16_376, 364, 256, 11_201, 48.7, (8, 9), 320),
    "4090": _gpu_spec("GeForce RTX 4090", 24_564, 478, 384, 10_501, 82.6, (8, 9), 450),
    "5090": _gpu_spec("GeForce RTX 5090", 32_607, 518, 512, 14_001, 104.8, (12, 0), 575),
    "a6000": _gpu_spec("RTX A6000", 49_140, 454, 384, 8_001, 38.7, (8, 6), 300),
    "6000ada": _gpu_spec("RTX 6000 Ada Generation", 49_140, 630, 384, 10_001, 91.1, (8, 9), 300),
    "a100-40": _gpu_spec("A100 40GB", 40_960, 625, 5_120, 1_215, 19.5, (8, 0), 400),
    "a100-80": _gpu_spec("A100 80GB", 81_920, 870, 5_120, 1_593, 19.5, (8, 0), 400),
    "l40s": _gpu_spec("L40S", 46_068, 590, 384, 9_001, 91.6, (8, 9), 350),
    "h100": _gpu_spec("H100 80GB HBM3", 81_559, 551, 5_120, 2_619, 66.9, (9, 0), 700),
}
"""GPU models by their name in a specification.

Memory, bus, clock, FP32 rate and power limit come from NVIDIA's data sheets and architecture white papers (GA102,
AD102, GB202, A100, H100). Totals are as `nvidia-smi` prints them, with ECC on where that is the default. Reserved bytes
are rounded readings from current drivers and vary by some tens of MiB."""

GPU_ALIASES: Mapping[str, str] = {
    "h100-80": "h100",
    "a6000ada": "6000ada",
    "a6000-ada": "6000ada",
    "6000-ada": "6000ada",
}
"""Further names of the same GPUs."""


@dataclass(frozen=True, slots=True)
class EmulatorSpec:
    """One emulated machine."""

    gpus: tuple[GpuSpec, ...]
    models: tuple[str, ...] | None = None
    """Catalogue models installed at the start; None: all of them."""
    version: str = DEFAULT_VERSION
    speed: float = 1.0
    """Emulated seconds per real second: 10 makes loads and tokens ten times faster."""
    ram_bytes: int = 128 * GIB
    """Host memory, for layers that are not on a GPU."""
    cold_bytes_per_second: float = WORLD.cold_bytes_per_second
    """Reading rate of the disk."""
    deviation: float = DEVIATION_SHARE
    """Share by which a load's size differs from the usual one, by model and load; one model in ten takes 15 % more.
    0: exact sizes, and unloaded memory is never slow to return."""
    seed: int = 1
    """Of these deviations."""
    host: EmulatedHost = field(default_factory=EmulatedHost)
    """What `llamayard doctor` reads besides the GPUs."""

    @property
    def uuids(self) -> tuple[GpuUuid, ...]:
        """One UUID per GPU, stable for the same specification."""
        return tuple(_uuid(index, gpu.name) for index, gpu in enumerate(self.gpus))


def _uuid(index: int, name: str) -> GpuUuid:
    return GpuUuid(f"GPU-{uuid.uuid5(uuid.NAMESPACE_OID, f'llamayard emulated GPU {index} {name}')}")


def parse_spec(text: str) -> EmulatorSpec:
    """Parses GPUs (`2x3090+4090`) or the YAML file at the path `text`.

    Raises:
        SpecError: says what is wrong, where, and what would be valid.
    """
    if "/" in text or text.endswith((".yaml", ".yml")):
        return _from_file(Path(text).expanduser())
    return EmulatorSpec(parse_gpus(text))


def parse_gpus(text: str) -> tuple[GpuSpec, ...]:
    """Parses `2x3090+4090` into GPUs in that order. Raises SpecError."""
    gpus: list[GpuSpec] = []
    for part in text.lower().replace(" ", "").split("+"):
        match = re.fullmatch(r"(?:(\d{1,3})x)?([a-z0-9][a-z0-9-]*)", part)
        if match is None:
            raise SpecError(f"rig: {part!r} in {text!r} is not a GPU; use 2x3090, 4090+3090 or a file path")
        gpus += [_gpu_named(match[2])] * int(match[1] or 1)
    if not 1 <= len(gpus) <= GPUS_MAX:
        raise SpecError(f"rig: {text!r} has {len(gpus)} GPUs; 1 to {GPUS_MAX} can be emulated")
    return tuple(gpus)


def _gpu_named(name: str) -> GpuSpec:
    short_name = re.sub(r"^(nvidia|geforce|rtx|gtx)+-?", "", name)
    short_name = GPU_ALIASES.get(short_name, short_name)
    if short_name in GPU_MODELS:
        return GPU_MODELS[short_name]
    raise SpecError(f"rig: no GPU {name!r}; " + suggestion(short_name, GPU_MODELS))


def suggestion(name: str, valid_names: Iterable[str]) -> str:
    """Hint for an unknown name: the closest valid name, or the list of them."""
    names = sorted(valid_names)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
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
    """Reads the keys of a file: `gpus`, optionally those of `read_overrides`, `models` and `host`. Raises SpecError."""
    valid_keys = {field.name for field in fields(EmulatorSpec)}
    for key in data:
        if key not in valid_keys:
            raise SpecError(f"rig: no key {key!r}; " + suggestion(key, valid_keys))
    if "gpus" not in data:
        raise SpecError("rig: the key `gpus` is missing; use `gpus: 2x3090` or a list of GPUs")
    models = data.get("models")
    if models is not None and not isinstance(models, list):
        raise SpecError(f"models: expected a list of names, got {models!r}")
    return EmulatorSpec(
        gpus=_parse_gpu_list(data["gpus"]),
        models=None if models is None else tuple(str(name) for name in cast("list[object]", models)),
        host=_parse_host(data.get("host", {})),
        **read_overrides(data),
    )


def read_overrides(data: Mapping[str, Any]) -> dict[str, Any]:
    """Validated values of the keys besides `gpus` and `models`, where given. Raises SpecError."""
    overrides: dict[str, Any] = {}
    if "version" in data:
        overrides["version"] = str(data["version"])
        if overrides["version"] not in VERSIONS:
            raise SpecError(
                f"version: {data['version']!r} is not emulated; " + suggestion(overrides["version"], VERSIONS)
            )
    if "speed" in data:
        overrides["speed"] = _positive(data["speed"], "speed")
    if "ram_bytes" in data:
        overrides["ram_bytes"] = int(_positive(data["ram_bytes"], "ram_bytes"))
    if "cold_bytes_per_second" in data:
        overrides["cold_bytes_per_second"] = _positive(data["cold_bytes_per_second"], "cold_bytes_per_second")
    if "deviation" in data:
        overrides["deviation"] = _deviation(data["deviation"])
    if "seed" in data:
        overrides["seed"] = int(_positive(data["seed"], "seed"))
    return overrides


def _deviation(value: object) -> float:
    """`off`, which YAML reads as false, or a share below 0.5."""
    if value is False or str(value) in ("off", "0"):
        return 0.0
    share = _positive(value, "deviation")
    if share >= 0.5:
        raise SpecError(f"deviation: expected `off` or a share below 0.5 such as 0.04, got {value!r}")
    return share


def _parse_gpu_list(value: object) -> tuple[GpuSpec, ...]:
    if isinstance(value, str | int):
        return parse_gpus(str(value))
    if not isinstance(value, list) or not value:
        raise SpecError(f"gpus: expected a string such as 2x3090 or a list of GPUs, got {value!r}")
    gpus: list[GpuSpec] = []
    for item in cast("list[object]", value):
        gpus += parse_gpus(str(item)) if isinstance(item, str | int) else (_modified_gpu(_mapping(item, "gpus")),)
    if len(gpus) > GPUS_MAX:
        raise SpecError(f"gpus: {len(gpus)} GPUs; 1 to {GPUS_MAX} can be emulated")
    return tuple(gpus)


def _modified_gpu(data: Mapping[str, Any]) -> GpuSpec:
    """Parses `{gpu: 3090, memory_total_bytes: …}`: a known GPU model with some values replaced."""
    changes = dict(data)
    gpu = _gpu_named(str(changes.pop("gpu", "3090")).lower())
    valid_keys = {field.name for field in fields(GpuSpec)}
    for key in changes:
        if key not in valid_keys:
            raise SpecError(f"gpus: no key {key!r}; " + suggestion(key, {*valid_keys, "gpu"}))
    if "compute_capability" in changes:
        major, minor = changes["compute_capability"]
        changes["compute_capability"] = (int(major), int(minor))
    if "name" in changes and "emulated" not in str(changes["name"]):
        changes["name"] = f"{changes['name']} (emulated)"
    return replace(gpu, **changes)


def _parse_host(value: object) -> EmulatedHost:
    try:
        return read_host(_mapping(value, "host"))
    except KeyError as error:
        key = str(error.args[0])
        raise SpecError(f"host: no key {key!r}; " + suggestion(key, HOST_KEYS)) from error
    except TypeError as error:
        raise SpecError(str(error)) from error


def _mapping(value: object, key: str) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise SpecError(f"{key}: expected keys and values, got {value!r}")
    return cast("Mapping[str, Any]", value)


def _positive(value: object, key: str) -> float:
    try:
        number = 0.0 if isinstance(value, bool) else float(cast("float | str", value))
    except (TypeError, ValueError):
        number = 0.0
    if not 0 < number < math.inf:
        raise SpecError(f"{key}: expected a number above 0, got {value!r}")
    return number
