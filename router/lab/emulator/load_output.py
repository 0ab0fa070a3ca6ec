"""What the EMULATED server prints about a load from 0.30 on: the lines of llama-server that name its buffers.

Each line is as a real 0.34.0 prints it, with the sizes that the runner allocates and a mark at its end. The CUDA
context is in no buffer, and so in no line, as in real llama-server. Limitation: the weights and caches of an image
encoder and of a draft model are printed as part of the compute buffer.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from router.lab.emulator.config import log
from router.lab.simulator.server_placement import LoadRequest
from router.lab.simulator.true_footprint import cache_bytes_of, true_gpu_buffers, true_host_bytes

_MIB = 1024**2


def log_start(blob: Path, port: int, request: LoadRequest) -> None:
    """Logs the start of a llama-server."""
    shape = request.shape
    cache_type = shape.kv_cache_type
    options = [f"--model {blob} --port {port} --host 127.0.0.1 --no-webui --offline"]
    options += [f"-c {shape.context_length * shape.slots} -np {shape.slots}"]
    options += [f"--flash-attn {'auto' if shape.flash_attention else 'off'}"]
    options += [f"-b {shape.batch_tokens} -ub {shape.batch_tokens}"]
    options += [f"-ctk {cache_type} -ctv {cache_type}"] if cache_type != "f16" else []
    options += [f"-ngl {request.num_gpu}"] if request.num_gpu >= 0 else []
    log("INFO", "starting llama-server", cmd=" ".join(["llama-server", *options]))


def print_buffers(request: LoadRequest, layers: Sequence[int]) -> None:
    """Prints the buffers of a load; `layers` counts units on each visible GPU, the output layer as one."""
    for line in buffer_lines(request, layers):
        sys.stderr.write(f"{line} (emulated)\n")
    sys.stderr.flush()


def buffer_bytes(request: LoadRequest, layers: Sequence[int]) -> int:
    """All buffers on GPUs: what `/api/ps` shows from 0.30, whose servers add up these lines."""
    buffers = true_gpu_buffers(request.model, request.shape, layers)
    return sum(each.model_bytes + each.cache_bytes + each.compute_bytes for each in buffers)


def log_end(seconds: float) -> None:
    """Logs the end of a load."""
    log("INFO", f"llama-server started in {seconds:.2f} seconds")


def buffer_lines(request: LoadRequest, layers: Sequence[int]) -> Iterable[str]:
    """The lines of `print_buffers`."""
    model, shape = request.model, request.shape
    total = model.layers + 1
    buffers = dict(enumerate(true_gpu_buffers(model, shape, layers)))
    used = {index: buffers[index] for index, count in enumerate(layers) if count > 0}
    on_gpus = sum(layers) if layers else total  # without a GPU all layers count as offloaded

    yield f"load_tensors: offloaded {on_gpus}/{total} layers to GPU"
    cached = sum(each.cache_bytes for each in used.values())
    cache_on_cpu = max(0, int(cache_bytes_of(model, shape) * shape.size_ratio) - cached)
    weights_on_cpu = max(0, true_host_bytes(model, shape, layers) - cache_on_cpu)
    yield _buffer("load_tensors", "CPU_Mapped" if used else "CPU", "model", weights_on_cpu)
    for index, each in used.items():
        yield _buffer("load_tensors", f"CUDA{index}", "model", each.model_bytes)
    yield "llama_context: constructing llama_context"
    numbers = {"n_seq_max": shape.slots, "n_ctx": shape.context_length * shape.slots, "n_ctx_seq": shape.context_length}
    numbers |= {"n_batch": shape.batch_tokens, "n_ubatch": shape.batch_tokens}
    for name, value in {**numbers, "flash_attn": "enabled" if shape.flash_attention else "disabled"}.items():
        yield f"llama_context: {name:<21} = {value}"
    if cache_on_cpu:
        yield _buffer("llama_kv_cache", "CPU", "KV", cache_on_cpu)
    for index, each in used.items():
        if each.cache_bytes:
            yield _buffer("llama_kv_cache", f"CUDA{index}", "KV", each.cache_bytes)
    for index, each in used.items():
        yield _buffer("sched_reserve", f"CUDA{index}", "compute", each.compute_bytes)


def _buffer(function: str, device: str, part: str, size_bytes: int) -> str:
    return f"{function}: {device:>10} {part} buffer size = {size_bytes / _MIB:8.2f} MiB"
