"""Ten minutes on one GPU: what the router predicts of it, what the server says, and what the driver shows.

`python -m bench.hardware.examine_gpu --bundle FOLDER` runs on a machine with an NVIDIA GPU that `make gpu-bundle` was
carried to; `--rig 3090` runs the same over an EMULATED GPU, and says so. Written as JSON after each stage:

- `driver`: NVML's figures beside those of nvidia-smi;
- `start`: by which UUID the server was started, and with which version;
- `footprints`: bytes predicted, said by the server, and seen by NVML: three models, two contexts, two cache
  types;
- `rates`: tokens per second of prompt and answer, beside what `llamayard plan` expects;
- `loads`: seconds and bytes per second of a load, cold and cached, with and without mmap;
- `unload`: used memory over the seconds after an unload;
- `killed`: seconds until an answer after the runner was killed;
- `external`: what became of a request while another program held nearly all memory.

A stage that finds no time left is named as skipped. Nothing here is a test: figures are recorded, not judged.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import platform
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.hardware.cards import Card, EmulatedCard, RealCard, unload_curve
from bench.hardware.random_model import SHAPES, write_model
from bench.hardware.served_router import ServedRouter, served, wait_until
from router.cli.main import main as llamayard

CONTEXTS = (8192, 32_768)
CACHE_TYPES = ("f16", "q8_0")
EMULATED_MODELS = ("llama3.2:3b", "qwen3:8b", "gpt-oss:20b")
_OLLAMA_VERSION = "0.34.0"
_STAGE_SECONDS_MIN = 30.0
_LEFT_FREE_BYTES = 4 << 30
_VULKAN = {"OLLAMA_VULKAN": "1", "GGML_VK_VISIBLE_DEVICES": "0"}
"""The bundle's llama-server computes by Vulkan: it is packed without CUDA's libraries, which are too large."""


@dataclass(slots=True)
class Bench:
    """What the stages share."""

    card: Card
    rig: str | None
    folder: Path
    models: tuple[str, ...]
    port: int
    ollama: Path | None
    deadline: float

    def config(self, cache_type: str) -> dict[str, Any]:
        ollama: dict[str, Any] = {"kv_cache_type": cache_type, "flash_attention": True}
        if self.ollama is not None:
            ollama |= {"binary": str(self.ollama), "models": str(self.folder / "store"), "env": _VULKAN}
        server = {"port": self.port, "host": "127.0.0.1"}
        return {"server": server, "state_directory": str(self.folder / "state"), "ollama": ollama}

    def served(self, cache_type: str = "f16") -> contextlib.AbstractContextManager[ServedRouter]:
        return served(self.folder, self.config(cache_type), *(["--rig", self.rig] if self.rig else []))

    def planned(self, model: str, router: ServedRouter, context: int, cache_type: str) -> dict[str, Any]:
        """What `llamayard plan` says, without anything measured here."""
        shown = self.folder / "shown.json"
        tags = router.call("GET", "/api/tags")[1]["models"]
        size = next(entry["size"] for entry in tags if entry["model"].startswith(model))
        shown.write_text(
            json.dumps(router.call("POST", "/api/show", {"model": model, "verbose": True})[1] | {"size": size})
        )
        output = io.StringIO()
        with redirect_stdout(output):
            llamayard([
                "plan", str(shown), "--json", "--context", str(context), "--kv-cache-type", cache_type,
                "--parallel", "2",
                "--flash-attention", "on", "--ollama-version", _OLLAMA_VERSION, "--gpus", self.rig or "auto",
            ])  # fmt: skip
        return json.loads(output.getvalue())["models"][0]


def driver(bench: Bench) -> dict[str, Any]:
    gpu = bench.card.read()
    return {
        "nvml": {
            "uuid": gpu.uuid, "name": gpu.name, "memory_total_bytes": gpu.memory_total_bytes,
            "memory_used_bytes": gpu.memory_used_bytes, "memory_reserved_bytes": gpu.memory_reserved_bytes,
            "temperature_celsius": gpu.temperature_celsius, "power_draw_watts": gpu.power_draw_watts,
            "compute_capability": gpu.compute_capability, "pcie_generation": gpu.pcie_generation,
            "pcie_width": gpu.pcie_width, "memory_bus_width_bits": gpu.memory_bus_width_bits,
            "memory_clock_hertz": gpu.memory_clock_hertz,
        },
        "nvidia_smi": bench.card.smi(),
    }  # fmt: skip


def start(bench: Bench) -> dict[str, Any]:
    with bench.served() as router:
        instance = router.call("GET", "/llamayard/status")[1]["instances"][0]
    return {key: instance[key] for key in ("name", "state", "version", "gpus")}


def footprints(bench: Bench) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for cache_type in CACHE_TYPES:
        with bench.served(cache_type) as router:
            for model in bench.models:
                for context in CONTEXTS:
                    if bench.deadline - time.monotonic() < _STAGE_SECONDS_MIN:
                        return [*found, {"skipped": "no time left"}]
                    found.append(_footprint(bench, router, model, context, cache_type))
    return found


def _footprint(bench: Bench, router: ServedRouter, model: str, context: int, cache_type: str) -> dict[str, Any]:
    planned = bench.planned(model, router, context, cache_type)
    before = {process.pid for process in bench.card.read().processes}
    status, reply = router.generate(model, {"num_ctx": context, "num_predict": 8})
    seen = [process.used_bytes for process in bench.card.read().processes if process.pid not in before]
    said = [event["per_gpu_bytes"] for event in router.events("footprint_measured") if event["source"] == "server"]
    loaded = router.call("GET", "/api/ps")[1].get("models") or [{}]
    router.unload(model)
    return {
        "model": model, "context_length": context, "kv_cache_type": cache_type, "status": status,
        "error": None if status == 200 else reply, "predicted": planned["gpus"], "said_by_server_bytes": said[-1:],
        "seen_by_driver_bytes": sum(filter(None, seen)), "size_vram_bytes": loaded[0].get("size_vram"),
        "size_bytes": loaded[0].get("size"),
    }  # fmt: skip


def rates(bench: Bench) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    with bench.served() as router:
        for model in bench.models:
            planned = bench.planned(model, router, CONTEXTS[0], "f16")
            router.generate(model, {"num_predict": 1})  # loads it
            status, reply = router.generate(model, {"num_predict": 256}, words=512)
            seconds = (
                {name: reply[name] / 1e9 for name in ("prompt_eval_duration", "eval_duration")} if status == 200 else {}
            )
            found.append({
                "model": model, "status": status, "error": None if status == 200 else reply,
                "prompt_tokens": reply.get("prompt_eval_count"), "output_tokens": reply.get("eval_count"),
                "seconds": seconds,
                "tokens_per_second": _ratio(reply.get("eval_count"), seconds.get("eval_duration")),
                "prompt_tokens_per_second": _ratio(reply.get("prompt_eval_count"), seconds.get("prompt_eval_duration")),
                "tokens_per_second_expected": planned["tokens_per_second_estimate"],
            })  # fmt: skip
            router.unload(model)
    return found


def loads(bench: Bench) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    model = bench.models[-1]
    with bench.served() as router:
        planned = bench.planned(model, router, CONTEXTS[0], "f16")
        weights = _weights(bench, router, model)
        for is_cold, use_mmap in ((True, True), (False, True), (True, False), (False, False)):
            if is_cold:
                bench.card.evict_page_cache(weights)
            status, reply = router.generate(model, {"num_predict": 1, "use_mmap": use_mmap})
            seconds = list(router.events("loaded"))[-1]["duration_seconds"] if status == 200 else None
            found.append({
                "model": model, "cold": is_cold, "use_mmap": use_mmap, "status": status,
                "error": None if status == 200 else reply, "load_seconds": seconds, "size_bytes": planned["size_bytes"],
                "bytes_per_second": _ratio(planned["size_bytes"], seconds),
                "load_seconds_expected": planned[f"load_seconds{'' if is_cold else '_cached'}_estimate"],
            })  # fmt: skip
            router.unload(model)
    return found


def unload(bench: Bench) -> dict[str, Any]:
    model = bench.models[-1]
    with bench.served() as router:
        router.generate(model, {"num_predict": 1})
        loaded = bench.card.read().memory_used_bytes
        router.call("POST", "/api/generate", {"model": model, "keep_alive": 0})
        return {"model": model, "loaded_bytes": loaded, "seconds_and_used_bytes": unload_curve(bench.card, 8.0)}


def killed(bench: Bench) -> dict[str, Any]:
    model = bench.models[0]
    with bench.served() as router:
        before = {process.pid for process in bench.card.read().processes}
        router.generate(model, {"num_predict": 1})
        runners = [process.pid for process in bench.card.read().processes if process.pid not in before]
        for pid in runners:
            os.kill(pid, signal.SIGKILL)
        started = time.monotonic()
        status, reply = router.generate(model, {"num_predict": 1})
        return {
            "model": model, "killed": len(runners), "status": status, "error": None if status == 200 else reply,
            "answered_after_seconds": round(time.monotonic() - started, 3),
        }  # fmt: skip


def external(bench: Bench) -> dict[str, Any]:
    """While the memory is held, the largest model is asked for: it must wait or be refused, not run on the CPU."""
    model = bench.models[-1]
    with bench.served() as router:
        amount = bench.card.read().memory_free_bytes - _LEFT_FREE_BYTES
        answer: list[tuple[int, Any]] = []
        client = threading.Thread(target=lambda: answer.append(router.generate(model, {"num_predict": 1})))
        started = time.monotonic()
        with bench.card.held(amount) as said:
            seen = wait_until(lambda: _external_bytes(router) > amount * 0.9, 15)
            result: dict[str, Any] = {"held_bytes": amount, "holder": said, "external_bytes": _external_bytes(router)}
            result["seen_after_seconds"] = round(time.monotonic() - started, 3) if seen else None
            client.start()
            explained = router.call("GET", f"/llamayard/explain?model={model}")[1]
            client.join(5)
            result |= {"ended_meanwhile": not client.is_alive(), "explained": explained}
        released = time.monotonic()
        client.join(120)
        status, reply = answer[0] if answer else (0, "no answer in 120 s")
        loaded = (router.call("GET", "/api/ps")[1].get("models") or [{}])[0]
        return result | {
            "status": status, "error": None if status == 200 else reply, "size_bytes": loaded.get("size"),
            "size_vram_bytes": loaded.get("size_vram"),
            "answered_after_release_seconds": round(time.monotonic() - released, 3),
        }  # fmt: skip


def _external_bytes(router: ServedRouter) -> int:
    return router.call("GET", "/llamayard/status")[1]["gpus"][0]["external_bytes"]


def _weights(bench: Bench, router: ServedRouter, model: str) -> Path:
    shown = router.call("POST", "/api/show", {"model": model})[1]
    named = [line.split()[1] for line in shown["modelfile"].splitlines() if line.startswith("FROM /")]
    return Path(named[0]) if named else bench.folder / "none"


def _ratio(amount: float | None, seconds: float | None) -> float | None:
    return amount / seconds if amount and seconds else None


STAGES: Mapping[str, Callable[[Bench], Any]] = {
    "driver": driver, "start": start, "footprints": footprints, "rates": rates, "loads": loads, "unload": unload,
    "killed": killed, "external": external,
}  # fmt: skip


def _create_models(bench: Bench, heads: Path) -> None:
    """Writes each model's weights and creates it through the router, as any client would."""
    with bench.served() as router:
        for name in SHAPES:
            file = bench.folder / f"{name}.gguf"
            digest = write_model(heads, name, file)
            with file.open("rb") as body:
                status, reply = router.call("POST", f"/api/blobs/{digest}", body)
            if status not in (200, 201):
                raise SystemExit(f"upload of {name}: {status} {reply}")
            file.unlink()
            status, reply = router.call(
                "POST", "/api/create", {"model": name, "files": {file.name: digest}, "stream": False}
            )
            if status != 200:
                raise SystemExit(f"create {name}: {status} {reply}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, help="folder of the unpacked bundle")
    parser.add_argument("--rig", help="an EMULATED GPU instead, such as 3090")
    parser.add_argument("--out", type=Path, default=Path("gpu.json"))
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--port", type=int, default=11_439)
    parser.add_argument("--stages", default=",".join(STAGES), help="which, in this order")
    arguments = parser.parse_args()
    if (arguments.bundle is None) == (arguments.rig is None):
        parser.error("give --bundle FOLDER on a machine with a GPU, or --rig SPEC")
    deadline = time.monotonic() + 60 * arguments.minutes
    with tempfile.TemporaryDirectory() as folder:
        bench = _bench(arguments, Path(folder), deadline)
        results: dict[str, Any] = {
            "machine": bench.card.read().name, "emulated": bench.card.label, "system": platform.platform(),
            "ollama_version": _OLLAMA_VERSION, "minutes_max": arguments.minutes, "stages": {},
        }  # fmt: skip
        if arguments.bundle is not None:
            _create_models(bench, arguments.bundle / "models")
        for name in arguments.stages.split(","):
            print(f"{name} …", flush=True)
            results["stages"][name] = _staged(STAGES[name], bench)
            arguments.out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(f"written: {arguments.out} {bench.card.label}")


def _staged(stage: Callable[[Bench], Any], bench: Bench) -> Any:
    """What a stage found; one that fails is told in its place, so that the others still run."""
    if bench.deadline - time.monotonic() < _STAGE_SECONDS_MIN:
        return {"skipped": "no time left"}
    try:
        return stage(bench)
    except Exception as error:
        return {"failed": f"{type(error).__name__}: {error}"}


def _bench(arguments: argparse.Namespace, folder: Path, deadline: float) -> Bench:
    if arguments.rig is not None:
        from router.lab.emulator.gpu_reader import write_rig_file  # noqa: PLC0415
        from router.lab.emulator.spec import parse_spec  # noqa: PLC0415

        directory = folder / "state" / "rig"
        directory.mkdir(parents=True)
        write_rig_file(parse_spec(arguments.rig), directory)
        return Bench(EmulatedCard(directory), arguments.rig, folder, EMULATED_MODELS, arguments.port, None, deadline)
    binary = arguments.bundle / "ollama" / "bin" / "ollama"
    return Bench(RealCard(), None, folder, tuple(SHAPES), arguments.port, binary, deadline)


if __name__ == "__main__":
    main()
