"""Writes the tables of docs/footprints.md: `python -m router.tools.generate_footprint_table` in the project's folder.

What real servers took (docs/measured/loads.json) next to what the estimator says, the cache of each architecture, and
what `llamayard plan` prints. Only the text between the markers is replaced; a test fails when it differs.
"""

from __future__ import annotations

import json
import math
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from router.app.model_sources import find_source
from router.app.plan import planned_gpus, with_times
from router.cli.plan import render
from router.domain.footprint import Footprint, GpuFootprint
from router.domain.model import ModelFacts
from router.engines.ollama.architectures import (
    CACHE_RULES,
    HYBRIDS,
    OLLAMA_ENGINE_ARCHITECTURES,
    PLAIN_ATTENTION,
    Backend,
    CacheRules,
)
from router.engines.ollama.client import ShowReply, TagRow
from router.engines.ollama.memory_estimate import LayerSplit, LoadParameters, batch_tokens, even_split, footprint
from router.engines.ollama.model_metadata import read_facts
from router.engines.ollama.plan import PlanOptions, plan_models
from router.engines.ollama.server_version import CURRENT

DOCUMENT = Path("docs/footprints.md")
LOADS = Path("docs/measured/loads.json")

_MIB = 1024**2
_PARTS: Mapping[str, Callable[[GpuFootprint], int]] = {
    "weights_mib": lambda gpu: gpu.weights_bytes + gpu.projector_bytes,
    "kv_cache_mib": lambda gpu: gpu.kv_cache_bytes,
    "compute_buffer_mib": lambda gpu: gpu.compute_buffer_bytes,
    "recurrent_state_mib": lambda gpu: gpu.recurrent_state_bytes,
}
_NAMES = {
    "weights_mib": "weights",
    "kv_cache_mib": "KV cache",
    "compute_buffer_mib": "compute buffer",
    "recurrent_state_mib": "recurrent state",
}


def main() -> int:
    """Rewrites the tables in the current folder's document and names it if that changed it."""
    text = DOCUMENT.read_text(encoding="utf-8")
    updated = with_tables(text, LOADS)
    if updated != text:
        DOCUMENT.write_text(updated, encoding="utf-8")
        sys.stdout.write(f"wrote {DOCUMENT}\n")
    return 0


def with_tables(text: str, loads: Path) -> str:
    """The document with its tables as they are now.

    Raises:
        ValueError: a marker is missing.
    """
    tables = {
        "measured loads": measured_table(loads),
        "architectures": architecture_table(),
        "example": example(),
        "parts": parts_table(loads),
    }
    for name, lines in tables.items():
        begin, end = f"<!-- {name}: generated -->", f"<!-- {name}: end -->"
        before, found_begin, rest = text.partition(begin)
        _, found_end, after = rest.partition(end)
        if not found_begin or not found_end:
            raise ValueError(f"{begin} or {end} is missing")
        text = "\n".join([before + begin, *lines, end]) + after
    return text


# --- measured loads ---------------------------------------------------------------------------------------------


def measured_table(loads: Path) -> list[str]:
    """One line for each load: what was estimated and what was measured, in MiB by part."""
    data = json.loads(loads.read_text(encoding="utf-8"))
    facts = {name: _facts(name, model) for name, model in data["models"].items()}
    lines = ["| model | server | context | part: estimate / measured, MiB | off |", "|---|---|---|---|---|"]
    return lines + [_line(case, facts[case["model"]]) for case in data["cases"]]


def parts_table(loads: Path) -> list[str]:
    """How far parts are off over all loads that tell them: absolute differences as shares of the estimate."""
    data = json.loads(loads.read_text(encoding="utf-8"))
    off: dict[str, list[float]] = {name: [] for name in _NAMES.values()}
    for case in data["cases"]:
        facts = _facts(case["model"], data["models"][case["model"]])
        for name, guess, seen in _compared(case, facts, _estimate(case, facts)):
            if name in off and sum(guess):
                off[name].append(sum(seen) / sum(guess) - 1)
    lines = [
        "| part | loads | median | nine in ten within | most above the estimate | most below |",
        "|---|---|---|---|---|---|",
    ]
    return lines + [_part_line(name, values) for name, values in off.items()]


def _part_line(name: str, off: Sequence[float]) -> str:
    sizes = sorted(abs(value) for value in off)
    tenth = sizes[math.ceil(0.9 * len(sizes)) - 1]
    above, below = max(0.0, *off), min(0.0, *off)
    return f"| {name} | {len(off)} | {statistics.median(sizes):.1%} | {tenth:.1%} | {above:.1%} | {abs(below):.1%} |"


def _facts(name: str, model: Mapping[str, Any]) -> ModelFacts:
    shown = {key: model[key] for key in ("model_info", "tensors", "capabilities")}
    reply = msgspec.json.decode(json.dumps({"modelfile": "FROM sha256:" + "0" * 64, **shown}), type=ShowReply)
    facts = read_facts(TagRow(name=name, size=model["size_bytes"]), reply)
    if facts is None:
        raise ValueError(f"{name}: no facts")
    return facts


def _estimate(case: Mapping[str, Any], facts: ModelFacts) -> Footprint:
    slots = _slots(case, facts)
    context_length, version, flash = case["context_length"], case["ollama_version"], case["flash_attention"]
    load = LoadParameters(
        context_length=context_length,
        slots=slots,
        kv_cache_type=case["kv_cache_type"],
        flash_attention=flash,
        batch=case["batch"] or batch_tokens(facts, context_length, slots, version, flash),
        version=version,
        backend=_backend(case),
    )
    given_split = case["layers_by_gpu"]
    split = even_split(facts.layers, case["gpus"])
    if given_split is not None:
        split = LayerSplit(tuple(given_split[0]), given_split[1])
    return footprint(facts, split, load)


def _slots(case: Mapping[str, Any], facts: ModelFacts) -> int:
    return 1 if facts.is_embedding else case["num_parallel"]


def _backend(case: Mapping[str, Any]) -> Backend:
    return Backend.OLLAMA_ENGINE if case["engine"] == "Ollama engine" else Backend.LLAMA_CPP


def _line(case: Mapping[str, Any], facts: ModelFacts) -> str:
    estimate = _estimate(case, facts)
    compared = _compared(case, facts, estimate)
    parts = "; ".join(f"{name} {_figures(guess)} / {_figures(seen)}" for name, guess, seen in compared)
    guessed, seen = sum(sum(guess) for _, guess, _ in compared), sum(sum(seen) for _, _, seen in compared)
    slots = _slots(case, facts)
    context = f"{case['context_length']:,}" + (f" × {slots}" if slots > 1 else "")
    gpus = f", {case['gpus']} GPUs" if case["gpus"] > 1 else ""
    off = "lower bound" if case["kind"] == "ps-replaced" else f"{100 * (guessed - seen) / seen:+.1f} %"
    return f"| {case['model']} | {case['ollama_version']}, {_backend(case).value}{gpus} | {context} | {parts} | {off} |"


def _compared(
    case: Mapping[str, Any], facts: ModelFacts, estimate: Footprint
) -> list[tuple[str, Sequence[float], Sequence[float]]]:
    """Part, estimate and measurement in MiB, by GPU where the measurement is."""
    measured: Mapping[str, Any] = case["measured"]
    rows: list[tuple[str, Sequence[float], Sequence[float]]] = []
    for part, bytes_of in _PARTS.items():
        if part in measured:
            by_gpu = [bytes_of(gpu) / _MIB for gpu in estimate.gpus]
            seen = measured[part]
            rows.append((_NAMES[part], by_gpu if len(seen) == len(by_gpu) else [sum(by_gpu)], seen))
    if "process_on_gpu_mib" in measured:
        total = [size / _MIB for size in estimate.per_gpu_bytes]
        rows.append(("process (nvidia-smi)", total, measured["process_on_gpu_mib"]))
    if "ps_size_gb" in measured:
        rows.append(("`size` in /api/ps", [_ps_mib(facts, estimate, measured)], [measured["ps_size_gb"] * 1e9 / _MIB]))
    return rows


def _ps_mib(facts: ModelFacts, estimate: Footprint, measured: Mapping[str, Any]) -> float:
    """Without CUDA contexts, and with the embedding table in host memory if that is nearer: versions differ in it."""
    on_gpus = (estimate.total_bytes - estimate.cuda_context_bytes) / _MIB
    seen = measured["ps_size_gb"] * 1e9 / _MIB
    return min(on_gpus, on_gpus + (facts.input_bytes or 0) / _MIB, key=lambda size: abs(size - seen))


def _figures(sizes: Sequence[float]) -> str:
    return " + ".join(f"{size:,.0f}" for size in sizes)


def example() -> list[str]:
    """What `llamayard plan` prints for a 70B on two GPUs."""
    model, gpus = "llama3.3:70b", "2x3090"
    source, options = (
        find_source(model, Path("no-store")),
        PlanOptions(default_context_length=8192, version=CURRENT, is_version_assumed=True),
    )
    present = planned_gpus(gpus)
    (plan,) = plan_models([source.facts], present, options)
    command = f"$ llamayard plan {model} --gpus {gpus} --context 8192 --parallel 1"
    return ["```", command, *render([with_times(source, plan)], present, options).splitlines(), "```"]


# --- architectures ----------------------------------------------------------------------------------------------


def architecture_table() -> list[str]:
    """One line for each kind of cache with the architectures that have it."""
    lines = ["| architectures | cache | up to 0.24 run by |", "|---|---|---|"]
    rows = [(kind, _rules_text(kind, rules)) for kind, rules in CACHE_RULES.items()]
    rows += [(kind, "the whole context in every layer") for kind in sorted(PLAIN_ATTENTION)]
    rows += [
        (kind, "the whole context in layers with attention, a recurrent state in others") for kind in sorted(HYBRIDS)
    ]
    groups: dict[tuple[str, str], list[str]] = {}
    for kind, rules_text in rows:
        runs_on = "Ollama's own engine" if kind in OLLAMA_ENGINE_ARCHITECTURES else "llama.cpp"
        groups.setdefault((rules_text, runs_on), []).append(kind)
    return lines + [f"| {', '.join(kinds)} | {rules} | {runs_on} |" for (rules, runs_on), kinds in groups.items()]


def _rules_text(kind: str, rules: CacheRules) -> str:
    if rules.is_encoder:
        return "none: an encoder sees its whole input at once"
    text = f"every {_ordinal(rules.full_attention_every)} layer the whole context, the others a window"
    if rules.window_tokens:
        text += f" ({rules.window_tokens:,} tokens if the file names none)"
    if rules.engine_memory_tokens:
        text += f"; Ollama's own engine keeps at least {rules.engine_memory_tokens:,} tokens of it"
    if rules.sliding_since > (0, 0, 0) and kind not in OLLAMA_ENGINE_ARCHITECTURES:
        major, minor, _ = rules.sliding_since
        text += f"; before {major}.{minor} the whole context in every layer"
    return text


def _ordinal(number: int) -> str:
    return {2: "second", 3: "third", 4: "fourth", 5: "fifth", 6: "sixth"}.get(number, f"{number}th")


if __name__ == "__main__":
    raise SystemExit(main())
