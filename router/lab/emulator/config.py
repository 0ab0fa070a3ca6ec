"""Settings of the emulated server, from the same environment variables as real Ollama, and its log lines.

As in real Ollama, an invalid number falls back to the default and an invalid boolean is true. The environment is
passed in as a mapping by the process's entry point.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from router.domain.gpu import memory_bandwidth
from router.domain.keep_alive import parse_keep_alive
from router.engines.ollama.tensor_split import TENSOR_SPLIT, parsed_split
from router.lab.emulator import vram
from router.lab.emulator.spec import DEFAULT_VERSION, VERSIONS
from router.lab.simulator.server_placement import human_bytes
from router.lab.simulator.world import WORLD

DEFAULT_KEEP_ALIVE_SECONDS = 300.0


@dataclass(frozen=True, slots=True)
class VisibleGpu:
    """One GPU visible to this server."""

    uuid: str
    name: str
    memory_total_bytes: int
    bandwidth_bytes_per_second: float
    fp32_teraflops: float
    compute_capability: tuple[int, int]


@dataclass(frozen=True, slots=True)
class Config:
    """Settings of one server."""

    host: str
    port: int
    models: Path
    version_text: str = DEFAULT_VERSION
    speed: float = 1.0
    emulator_dir: Path | None = None
    gpus: tuple[VisibleGpu, ...] = ()
    cold_bytes_per_second: float = WORLD.cold_bytes_per_second
    deviation: float = 0.0
    """Share by which loads differ from their usual size."""
    seed: int = 1
    ram_bytes: int | None = None
    """Host memory of the emulated machine; None: what the real machine has free."""
    context_length: int = 0
    num_parallel: int = 1
    keep_alive_seconds: float = DEFAULT_KEEP_ALIVE_SECONDS
    max_queue: int = 512
    max_loaded: int = 0
    spread: bool = False
    tensor_split: tuple[float, ...] = ()
    flash_attention: bool | None = None
    kv_cache_type: str = "f16"
    overhead_bytes: int = 0
    noprune: bool = False
    no_cloud: bool = False
    origins: tuple[str, ...] = ()

    @property
    def version(self) -> tuple[int, ...]:
        return tuple(int(part) for part in self.version_text.split("."))

    @property
    def is_0_30(self) -> bool:
        return self.version >= (0, 30)

    @property
    def is_pre_0_12(self) -> bool:
        """Before 0.12: no /v1/messages, no queue bypass for loaded models, and stream errors have status 200."""
        return self.version < (0, 12)

    @property
    def loaded_limit(self) -> int:
        return self.max_loaded or 3 * max(1, len(self.gpus))


def read_config(environment: Mapping[str, str]) -> Config:
    """Parses the environment variables. Raises ValueError for a version that is not emulated."""
    host, port = _address(_text(environment, "OLLAMA_HOST"))
    directory_text = _text(environment, "LLAMAYARD_RIG_DIR")
    emulator_dir = Path(directory_text) if directory_text else None
    rig_data = vram.read_json(emulator_dir / "rig.json") if emulator_dir else {}
    version = _text(environment, "LLAMAYARD_RIG_VERSION") or rig_data.get("version", DEFAULT_VERSION)
    if version not in VERSIONS:
        raise ValueError(f"LLAMAYARD_RIG_VERSION: {version!r} is not emulated; expected one of {', '.join(VERSIONS)}")
    models = _text(environment, "OLLAMA_MODELS")
    home = Path(environment.get("HOME") or "/")
    flash = _text(environment, "OLLAMA_FLASH_ATTENTION")
    return Config(
        host=host,
        port=port,
        models=Path(models) if models else home / ".ollama" / "models",
        version_text=version,
        speed=_speed(environment, rig_data.get("speed", 1.0)),
        emulator_dir=emulator_dir,
        gpus=_visible_gpus(rig_data, environment.get("CUDA_VISIBLE_DEVICES"), emulator_dir),
        ram_bytes=rig_data.get("ram_bytes"),
        cold_bytes_per_second=rig_data.get("cold_bytes_per_second", WORLD.cold_bytes_per_second),
        deviation=rig_data.get("deviation", 0.0),
        seed=rig_data.get("seed", 1),
        context_length=_number(environment, "OLLAMA_CONTEXT_LENGTH", 0),
        num_parallel=max(1, _number(environment, "OLLAMA_NUM_PARALLEL", 1)),
        keep_alive_seconds=_keep_alive(_text(environment, "OLLAMA_KEEP_ALIVE")),
        max_queue=max(1, _number(environment, "OLLAMA_MAX_QUEUE", 512)),
        max_loaded=_number(environment, "OLLAMA_MAX_LOADED_MODELS", 0),
        spread=_flag(environment, "OLLAMA_SCHED_SPREAD"),
        tensor_split=parsed_split(environment.get(TENSOR_SPLIT, "")),
        flash_attention=_is_true(flash) if flash else None,
        kv_cache_type=_text(environment, "OLLAMA_KV_CACHE_TYPE").lower() or "f16",
        overhead_bytes=_number(environment, "OLLAMA_GPU_OVERHEAD", 0),
        noprune=_flag(environment, "OLLAMA_NOPRUNE"),
        no_cloud=_flag(environment, "OLLAMA_NO_CLOUD"),
        origins=tuple(origin for origin in _text(environment, "OLLAMA_ORIGINS").split(",") if origin),
    )


def _text(environment: Mapping[str, str], name: str) -> str:
    return environment.get(name, "").strip().strip("\"'").strip()


def _number(environment: Mapping[str, str], name: str, default: int) -> int:
    text = _text(environment, name)
    if not text:
        return default
    if not text.isdigit():
        log("WARN", "invalid environment variable, using default", key=name, value=text, default=default)
        return default
    return int(text)


def _speed(environment: Mapping[str, str], default: float) -> float:
    text = _text(environment, "LLAMAYARD_RIG_SPEED")
    try:
        value = float(text) if text else default
    except ValueError:
        value = 0.0
    if not value > 0:
        raise ValueError(f"LLAMAYARD_RIG_SPEED: expected a number above 0, got {text!r}")
    return value


def _is_true(text: str) -> bool:
    return text.lower() not in ("0", "f", "false")


def _flag(environment: Mapping[str, str], name: str) -> bool:
    text = _text(environment, name)
    return bool(text) and _is_true(text)


def _keep_alive(text: str) -> float:
    try:
        value = parse_keep_alive(text or None)
    except ValueError:
        return DEFAULT_KEEP_ALIVE_SECONDS
    return DEFAULT_KEEP_ALIVE_SECONDS if value is None else value


def _address(text: str) -> tuple[str, int]:
    rest = text.partition("://")[2] if "://" in text else text
    rest = rest.partition("/")[0]
    host, colon, port = rest.rpartition(":")
    if not colon or "]" in port:
        host, port = rest, ""
    return host.strip("[]") or "127.0.0.1", int(port) if port.isdigit() and int(port) < 65536 else 11434


def _visible_gpus(
    rig_data: Mapping[str, Any], visible_devices: str | None, emulator_dir: Path | None
) -> tuple[VisibleGpu, ...]:
    """The GPUs that CUDA would expose: all, or those listed; none if any listed name is unknown."""
    if emulator_dir is None or not rig_data:
        return ()
    lost_gpus = vram.lost_gpus(emulator_dir)
    present = [gpu for gpu in rig_data["gpus"] if gpu["uuid"] not in lost_gpus]
    gpus = [
        VisibleGpu(
            gpu["uuid"],
            gpu["name"],
            gpu["memory_total_bytes"] - gpu["memory_reserved_bytes"],
            memory_bandwidth(gpu["memory_clock_hertz"], gpu["memory_bus_width_bits"]),
            gpu["fp32_teraflops"],
            (gpu["compute_capability"][0], gpu["compute_capability"][1]),
        )
        for gpu in present
    ]
    if visible_devices is None:
        return tuple(gpus)
    visible: list[VisibleGpu] = []
    for name in (part.strip() for part in visible_devices.split(",")):
        if name.isdigit() and int(name) < len(gpus):
            visible.append(gpus[int(name)])
            continue
        matching = [gpu for gpu in gpus if name.startswith("GPU-") and gpu.uuid.startswith(name)]
        if len(matching) != 1:
            return ()
        visible += matching
    return tuple(dict.fromkeys(visible))


# --- log lines --------------------------------------------------------------------------------------------


def log(level: str, message: str, **values: object) -> None:
    """Writes one line in Go's slog format to stderr; each line is marked as emulated."""
    now = datetime.now().astimezone().isoformat(timespec="milliseconds")
    pairs = "".join(f" {key}={_quoted(value)}" for key, value in values.items())
    line = f"time={now} level={level} source=rig msg={_quoted(message, always=True)}{pairs} emulated=true\n"
    sys.stderr.write(line)
    sys.stderr.flush()


def _quoted(value: object, always: bool = False) -> str:
    text = str(value)
    plain = text and not always and not any(character in ' "=' for character in text)
    return text if plain else '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def log_devices(config: Config, host_free_bytes: int, host_total_bytes: int) -> None:
    """Logs the discovered devices as a real server does."""
    free_bytes = vram.free_bytes(config.emulator_dir) if config.emulator_dir else {}
    for index, gpu in enumerate(config.gpus):
        free = free_bytes.get(gpu.uuid, 0)
        log(
            "INFO",
            "inference compute",
            id=index if config.is_0_30 else gpu.uuid,  # from 0.30 as llama-server numbers its devices
            library="CUDA",
            compute=".".join(map(str, gpu.compute_capability)),
            name=f"CUDA{index}",
            description=gpu.name,
            libdirs="ollama,cuda_v12",
            driver="12.8",
            pci_id=f"0000:{index + 1:02x}:00.0",
            type="discrete",
            total=human_bytes(gpu.memory_total_bytes),
            available=human_bytes(free),
        )
    if not config.gpus:
        sizes = {"total": human_bytes(host_total_bytes), "available": human_bytes(host_free_bytes)}
        names = {"name": "cpu", "description": "cpu", "libdirs": "ollama", "driver": "", "pci_id": "", "type": ""}
        log("INFO", "inference compute", id="cpu", library="cpu", compute="", **names, **sizes)


def now_text(moment: datetime | None = None) -> str:
    """RFC 3339 in UTC, as Go formats times."""
    return (moment or datetime.now(UTC)).astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%S.%f") + "Z"
