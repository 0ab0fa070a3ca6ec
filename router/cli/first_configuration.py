"""The configuration file that `llamayard init` writes: commented, with the GPUs that were found. Pure."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from router.domain.gpu import Gpu

GIB = 1024**3
_PLAIN = re.compile(r"[A-Za-z~/][\w./~-]*")
_WORDS = frozenset({"y", "n", "yes", "no", "on", "off", "true", "false", "null", "~"})
"""Text that YAML would read as something else."""
_EXAMPLE_MODEL = "llama3.1:8b"


@dataclass(frozen=True, slots=True)
class Choices:
    """The answers to the questions."""

    port: int
    for_others: bool
    """Whether other machines may use the router."""
    store: Path | None
    """None: it is not asked for, because the rig has its own."""
    warm: str
    """A model to keep loaded; "" for none."""
    rig: str | None = None


def configuration_text(choices: Choices, gpus: Sequence[Gpu], no_gpus_reason: str) -> str:
    """A YAML file that loads as it is."""
    return "\n".join(
        [
            "# Made by `llamayard init`. Every key, its default and its meaning: docs/configuration.md.",
            "# After a change: llamayard check-config, then llamayard reload.",
            "",
            *_gpu_lines(gpus, no_gpus_reason),
            *([f"rig: {_scalar(choices.rig)}   # EMULATED GPUs and servers", ""] if choices.rig is not None else []),
            *_server_lines(choices),
            "",
            *_ollama_lines(choices),
            "",
            *_model_lines(choices, gpus),
            "",
        ]
    )


def _gpu_lines(gpus: Sequence[Gpu], no_gpus_reason: str) -> Iterator[str]:
    if not gpus:
        yield f"# No GPU was found ({no_gpus_reason}): models run on the CPU."
        yield ""
        return
    yield "# GPUs that were found. One server runs on each, and others over several of them when a model needs it."
    for gpu in gpus:
        size = f"{gpu.memory_total_bytes / GIB:.1f} GiB" if gpu.error is None else f"cannot be read: {gpu.error}"
        yield f"#   {gpu.index}: {gpu.name}, {size}, {gpu.uuid}"
    yield ""


def _server_lines(choices: Choices) -> Iterator[str]:
    yield "server:"
    if choices.for_others:
        yield "  host: 0.0.0.0   # all addresses; needs access keys: llamayard keys create NAME"
    else:
        yield "  host: 127.0.0.1   # this machine only; 0.0.0.0 for others too, which needs access keys"
    yield f"  port: {choices.port}" + ("" if choices.port != 11434 else "   # Ollama's own: clients need no change")


def _ollama_lines(choices: Choices) -> Iterator[str]:
    yield "ollama:"
    if choices.store is not None:
        yield f"  models: {_scalar(str(choices.store))}   # all servers share this store"
    yield "  num_parallel: 2         # requests at a time for each loaded model; each takes memory for a context"
    yield "  context_length: 8192    # tokens of a request that asks for no context of its own"
    yield "  # flash_attention: true # with both of these lines, contexts take half the memory"
    yield "  # kv_cache_type: q8_0"


def _model_lines(choices: Choices, gpus: Sequence[Gpu]) -> Iterator[str]:
    example = choices.warm or _EXAMPLE_MODEL
    yield "# Rules for single models. Without a rule, the router decides by the memory that is free."
    if choices.warm:
        yield "models:"
        yield f"  {_scalar(choices.warm)}: {{keep_warm: true}}   # loaded at the start, and never unloaded for another"
    else:
        yield "# models:"
        yield f"#   {example}: {{keep_warm: true}}   # loaded at the start, and never unloaded for another"
    usable = [str(gpu.index) for gpu in gpus if gpu.error is None]
    if usable:
        yield f"#   llama3.2:3b: {{gpus: [{usable[0]}]}}           # only there"
    if len(usable) > 1:
        yield f"#   llama3.3:70b: {{gpus: [{', '.join(usable[:2])}]}}       # over these two"
    yield "# aliases: {gpt-4o: " + example + "}    # for clients with fixed names of models"


def _scalar(text: str) -> str:
    """The text as YAML, quoted where it must be."""
    is_plain = _PLAIN.fullmatch(text) is not None and text.lower() not in _WORDS
    return text if is_plain else json.dumps(text, ensure_ascii=False)
