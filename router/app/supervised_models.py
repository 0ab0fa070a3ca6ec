"""Models with a server of their own (`models.NAME.engine`), from the settings: their places, commands and sizes."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from router.app.model_sources import ModelSourceError, find_source
from router.config.schema import EngineSettings, ModelSettings
from router.config.settings import ConfigError, Settings
from router.domain.gpu import Gpu, GpuUuid
from router.domain.instance import InstanceName, InstanceSpec
from router.domain.model import ModelFacts
from router.domain.model_names import parse_name, shortest
from router.domain.policy import Policy
from router.domain.snapshot import Snapshot
from router.engines.ollama.blob_store import BlobStore
from router.engines.ollama.rules import OllamaRules
from router.engines.openai.servers import AttachedServer
from router.engines.openai.supervised import EstimateBytes, ServedModel

_START_SECONDS: Mapping[str, float] = {"llama-server": 15.0, "vllm": 120.0, "sglang": 90.0}
"""Until a start was measured."""
_CONTEXT_TOKENS = 8192
_SLOTS: Mapping[str, int] = {"llama-server": 2, "vllm": 32, "sglang": 32}
_COMMANDS: Mapping[str, tuple[str, ...]] = {
    "llama-server": (
        "llama-server", "--model", "{path}", "--alias", "{name}", "--host", "127.0.0.1", "--port", "{port}",
        "--ctx-size", "{context_total}", "--parallel", "{slots}", "--n-gpu-layers", "999", "--jinja",
    ),
    "vllm": (
        "vllm", "serve", "{path}", "--served-model-name", "{name}", "--host", "127.0.0.1", "--port", "{port}",
        "--tensor-parallel-size", "{gpus}", "--gpu-memory-utilization", "{share}", "--max-model-len", "{context}",
        "--max-num-seqs", "{slots}",
    ),
    "sglang": (
        "python3", "-m", "sglang.launch_server", "--model-path", "{path}", "--served-model-name", "{name}",
        "--host", "127.0.0.1", "--port", "{port}", "--tp", "{gpus}", "--mem-fraction-static", "{share}",
        "--context-length", "{context}", "--max-running-requests", "{slots}",
    ),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class SupervisedModel:
    """One model, with everything that its engine needs."""

    served: ServedModel
    instances: tuple[InstanceSpec, ...]
    servers: tuple[AttachedServer, ...]
    """As the lists and the proxy see its places."""


def supervised_models(
    settings: Settings, store: Path, gpus: Sequence[Gpu], policy: Policy, free_port: Callable[[], int]
) -> tuple[SupervisedModel, ...]:
    """`store`: Ollama's folder of models. Reads the headers of GGUF files: blocking.

    Raises:
        ConfigError: a model has no weights, or its memory is not known.
    """
    usable = {gpu.uuid: gpu for gpu in gpus if gpu.error is None}
    return tuple(
        _supervised(name, rules, settings.engines[rules.engine], store, usable, policy, free_port)
        for name, rules in settings.models.items()
        if rules.engine is not None
    )


def _supervised(
    written: str, rules: ModelSettings, engine: EngineSettings, store: Path, gpus: Mapping[GpuUuid, Gpu],
    policy: Policy, free_port: Callable[[], int],
) -> SupervisedModel:  # fmt: skip
    name, key = shortest(written), f"models.{written}"
    places = _places(rules, gpus, policy.pins[name].gpus)
    path, facts = _weights(written, rules, store)
    kind = f"{engine.kind}/{name}"
    slots = rules.num_parallel or _SLOTS[engine.kind]
    context = rules.context_length or _CONTEXT_TOKENS
    estimate = _estimate(key, rules, facts, bool(gpus))
    specs: list[InstanceSpec] = []
    commands: dict[InstanceName, tuple[str, ...]] = {}
    environments: dict[InstanceName, Mapping[str, str]] = {}
    for place in places:
        port = free_port()
        instance = _instance_name(name, [gpus[uuid].index for uuid in place])
        specs.append(
            InstanceSpec(
                instance, place, f"http://127.0.0.1:{port}", slots, context, "f16", attached=True, engine=kind
            )
        )  # fmt: skip
        share = _share(rules.memory_bytes_per_gpu, [gpus[uuid] for uuid in place])
        values = {
            "path": path, "name": name, "port": str(port), "gpus": str(len(place)), "share": share,
            "context": str(context), "slots": str(slots), "context_total": str(context * slots),
        }  # fmt: skip
        command = (*(engine.command or _COMMANDS[engine.kind]), *rules.flags)
        commands[instance] = tuple(_filled(part, values) for part in command)
        environments[instance] = {
            **engine.env, "CUDA_VISIBLE_DEVICES": ",".join(place) or "-1", "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
        }  # fmt: skip
    is_embedding = "embedding" in rules.capabilities and "completion" not in rules.capabilities
    served = ServedModel(
        name, engine.kind, kind, engine.start_timeout_seconds, _START_SECONDS[engine.kind], estimate, commands,
        environments, _signature(path, engine, rules), is_embedding,
    )  # fmt: skip
    servers = tuple(
        AttachedServer(spec.name, engine.kind, {name: name}, context, "", rules.capabilities, kind) for spec in specs
    )
    return SupervisedModel(served, tuple(specs), servers)


def _places(
    rules: ModelSettings, gpus: Mapping[GpuUuid, Gpu], pinned: tuple[GpuUuid, ...]
) -> list[tuple[GpuUuid, ...]]:
    """The sets of GPUs where it may run: those it is pinned to together, else each GPU alone."""
    if rules.layout == "cpu" or not gpus:
        return [()]
    if pinned:
        return [tuple(uuid for uuid in pinned if uuid in gpus)]
    return [(uuid,) for uuid in gpus]


def _weights(written: str, rules: ModelSettings, store: Path) -> tuple[str, ModelFacts | None]:
    """What `{path}` stands for, and the facts of a GGUF file where it is one."""
    path = rules.path
    if path is None:
        stored = BlobStore(store).get(parse_name(written))
        if stored is None:
            raise ConfigError([f"models.{written}: it is not in {store}: pull it there, or set its path"])
        path = str(BlobStore(store).blob(stored.weights.digest))
    try:
        return path, find_source(path, store).facts if Path(path).is_file() else None
    except ModelSourceError:
        return path, None


def _estimate(key: str, rules: ModelSettings, facts: ModelFacts | None, has_gpus: bool) -> EstimateBytes:
    declared = rules.memory_bytes_per_gpu
    if declared is not None:
        return lambda spec, _snapshot: (declared,) * len(spec.gpus)
    if facts is None:
        if has_gpus:
            raise ConfigError([f"{key}: set memory_bytes_per_gpu: its size cannot be read from its weights"])
        return lambda _spec, _snapshot: ()
    ollama = OllamaRules()

    def estimate(spec: InstanceSpec, snapshot: Snapshot) -> tuple[int, ...]:
        """Of llama.cpp, which an Ollama server runs too."""
        like = replace(spec, engine=ollama.kind)
        return ollama.estimate_bytes(facts, like, spec.context_length, snapshot)

    return estimate


def _instance_name(model: str, indices: Sequence[int]) -> InstanceName:
    where = "+".join(f"gpu{index}" for index in indices) or "cpu"
    return InstanceName(f"{re.sub(r'[^A-Za-z0-9_.-]', '-', model)}.{where}")


def _share(memory_bytes: int | None, gpus: Sequence[Gpu]) -> str:
    total = min((gpu.memory_total_bytes for gpu in gpus), default=0)
    return f"{min(memory_bytes / total, 0.99):.3f}" if memory_bytes and total else "0.900"


def _signature(path: str, engine: EngineSettings, rules: ModelSettings) -> str:
    parts = (path, *engine.command, *rules.flags, rules.memory_bytes_per_gpu, *sorted(engine.env.items()))
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:12]


def _filled(text: str, values: Mapping[str, str]) -> str:
    """Only these names in braces are replaced: an argument may be JSON."""
    return re.sub(r"\{(\w+)\}", lambda found: values.get(found[1], found[0]), text)
