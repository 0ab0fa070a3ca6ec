"""What a server's own output says of a load: bytes by GPU and part, slots, context and batch. Pure text work.

A server that the router spawned writes these lines to the pipe that the router reads anyway. They are exact for this
one load, whatever else moves on the GPU meanwhile, and they know what `/api/ps` leaves out: a draft context, the second
cache of sliding layers, an image encoder's graph.

Two formats:

- llama.cpp (a separate `llama-server` from 0.30, linked into the runner before):
  `load_tensors: CUDA0 model buffer size = 852.89 MiB`, `llama_kv_cache: CUDA0 KV buffer size = …`, `… RS buffer size`,
  `sched_reserve: CUDA0 compute buffer size = …`, `llama_context: n_ctx_seq = 2048`;
- Ollama's own engine up to 0.24: `msg="model weights" device=CUDA0 size="4.3 GiB"`, `msg="kv cache" …`,
  `msg="compute graph" …`, rounded to a tenth.

Sources: Ollama v0.24 `ml/device.go` (BackendMemory.Log), v0.34 `llm/llama_server.go` (memoryParsingWriter); output of
running servers 0.11.4 and 0.34.0 (tests/engines/ollama/recordings).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from router.domain.footprint import GpuFootprint
from router.domain.model import BlobDigest

_UNITS: Mapping[str, int] = {"B": 1, "KiB": 1024, "MiB": 1024**2, "GiB": 1024**3, "TiB": 1024**4}

_START = re.compile(r'msg="starting (?:llama-server|llama server|runner)".*?--model \S*?sha256-([0-9a-f]{64})')
_END = re.compile(r'msg="(?:llama-server|llama runner) started in ([\d.]+) seconds"')
_FAILED = re.compile(r'msg="(?:Load failed|error loading llama server)"')
_BUFFER = re.compile(
    r"[A-Za-z_][A-Za-z0-9_]*:\s+(?P<device>\S+)\s+(?P<part>model|KV|compute|output|RS)\s+buffer size\s*="
    r"\s*(?P<mib>[\d.]+)\s*MiB"
)
_ENGINE_PART = re.compile(
    r'msg="(?P<part>model weights|kv cache|compute graph)" device=(?P<device>\S+) '
    r'size="?(?P<size>[\d.]+) (?P<unit>\w+)"?'
)
_NEW_CONTEXT = "llama_context: constructing llama_context"
_FITTED = re.compile(
    r"common_fit_params: (?:successfully|failed)|common_fit_params: fitting params to free memory took"
)
_CONTEXT = re.compile(r"llama_context: n_ctx_(?:seq|per_seq)\s*=\s*(\d+)")
_SLOTS = re.compile(r"llama_context: n_seq_max\s*=\s*(\d+)")
_BATCH = re.compile(r"llama_context: n_ubatch\s*=\s*(\d+)")
_FLASH = re.compile(r"llama_context: flash_attn\s*=\s*(\w+)")
_OFFLOADED = re.compile(r"offloaded (\d+)/(\d+) layers to GPU")
_DEVICE = re.compile(r"(?:CUDA|ROCm|Vulkan|HIP)(\d+)(?:_Mapped|_Private)?$")

_PARTS: Mapping[str, str] = {
    "model": "weights_bytes",
    "model weights": "weights_bytes",
    "KV": "kv_cache_bytes",
    "kv cache": "kv_cache_bytes",
    "RS": "recurrent_state_bytes",
    "compute": "compute_buffer_bytes",
    "compute graph": "compute_buffer_bytes",
    "output": "compute_buffer_bytes",
}


@dataclass(frozen=True, slots=True)
class LoadReport:
    """What the output of one whole load said."""

    blob: BlobDigest
    gpus: Mapping[int, GpuFootprint]
    """By index among the GPUs that the server sees; empty where it loaded into host memory. No CUDA contexts."""
    seconds: float
    context_length: int | None = None
    """Tokens of one slot."""
    slots: int | None = None
    batch: int | None = None
    flash_attention: bool | None = None
    layers_on_gpus: int | None = None
    layers: int | None = None
    """The output layer counted as one."""


class _Key(NamedTuple):
    """A buffer: a later line for the same one replaces it, but for caches, which add up."""

    context: int
    device: str
    part: str


@dataclass(slots=True)
class _Load:
    blob: BlobDigest
    buffers: dict[_Key, int] = field(default_factory=dict["_Key", int])
    contexts: int = 0
    """Contexts made so far: a draft head gets a second one."""
    numbers: dict[str, int] = field(default_factory=dict[str, int])
    flash_attention: bool | None = None


class LoadLogReader:
    """Reads one server's output line by line. A server starts one runner at a time."""

    __slots__ = ("_load",)

    def __init__(self) -> None:
        self._load: _Load | None = None

    def feed(self, line: str) -> LoadReport | None:
        """The report of a load, with the line that ends it; None otherwise."""
        start = _START.search(line)
        if start is not None:
            self._load = _Load(BlobDigest(f"sha256:{start[1]}"))
            return None
        load = self._load
        if load is None:
            return None
        end = _END.search(line)
        if end is not None:
            self._load = None
            return _report(load, float(end[1]))
        if _FAILED.search(line) is not None:
            self._load = None
        else:
            _note(load, line)
        return None


def _note(load: _Load, line: str) -> None:
    if _NEW_CONTEXT in line:
        load.contexts += 1
        return
    if _FITTED.search(line) is not None:  # what was tried before is gone
        load.buffers.clear()
        return
    buffer = _BUFFER.search(line)
    if buffer is not None:
        _add(load, buffer["device"], buffer["part"], int(float(buffer["mib"]) * _UNITS["MiB"]))
        return
    part = _ENGINE_PART.search(line)
    if part is not None:
        _add(load, part["device"], part["part"], int(float(part["size"]) * _UNITS.get(part["unit"], 0)))
        return
    for name, pattern in (("context", _CONTEXT), ("slots", _SLOTS), ("batch", _BATCH)):
        found = pattern.search(line)
        if found is not None:
            load.numbers.setdefault(name, int(found[1]))
    flash, offloaded = _FLASH.search(line), _OFFLOADED.search(line)
    if flash is not None and flash[1] in ("enabled", "disabled", "1", "0"):
        load.flash_attention = flash[1] in ("enabled", "1")
    if offloaded is not None:
        load.numbers["on_gpus"], load.numbers["layers"] = int(offloaded[1]), int(offloaded[2])


def _add(load: _Load, device: str, part: str, size: int) -> None:
    """A context of a model with sliding layers has two caches, printed alike one after the other: they add up."""
    key = _Key(0 if part == "model" else load.contexts, device, part)
    load.buffers[key] = size + (load.buffers.get(key, 0) if part == "KV" else 0)


def _report(load: _Load, seconds: float) -> LoadReport:
    sums: dict[int, dict[str, int]] = {}
    for (_, device, part), size in load.buffers.items():
        index = _DEVICE.match(device)
        if index is not None:
            parts = sums.setdefault(int(index[1]), {})
            parts[_PARTS[part]] = parts.get(_PARTS[part], 0) + size
    numbers = load.numbers
    return LoadReport(
        blob=load.blob,
        gpus={index: GpuFootprint(**parts) for index, parts in sorted(sums.items())},
        seconds=seconds,
        context_length=numbers.get("context"),
        slots=numbers.get("slots"),
        batch=numbers.get("batch"),
        flash_attention=load.flash_attention,
        layers_on_gpus=numbers.get("on_gpus"),
        layers=numbers.get("layers"),
    )
