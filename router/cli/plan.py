"""`llamayard plan`: what models would take on which GPUs, whether they fit, and how much context and how many slots.

It reads files, the version of the installed Ollama and, for `--gpus auto`, the driver. It asks no server and changes
nothing.
"""

from __future__ import annotations

import argparse
import json
import sys
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from router.app.host_reader import ollama_version
from router.app.model_sources import find_source
from router.app.plan import (
    AUTO_GPUS,
    PlannedModel,
    plan_document,
    planned_gpus,
    short_name,
    version_text,
    with_times,
)
from router.cli.configuration import print_problems
from router.cli.exit_codes import EXIT_FAILED, EXIT_MISUSED, EXIT_OK
from router.config.schema import KV_CACHE_TYPES
from router.config.settings import ConfigError, Settings, find_config, load_settings, process_environment
from router.domain.footprint import GpuFootprint
from router.domain.gpu import Gpu
from router.domain.policy import Policy
from router.engines.ollama.plan import SLOTS_MAX, GpuPlan, ModelPlan, PlanOptions, largest_context, plan_models
from router.engines.ollama.server_version import CURRENT, parse_version

_MAX = "max"
_GIB = 1024**3
_GPU_WIDTH = 23
_COLUMNS = (("WEIGHTS", 8), ("KV", 7), ("BUFFER", 7), ("STATE", 6), ("PROJ", 5), ("CUDA", 5), ("TOTAL", 7),
            ("MARGIN", 7), ("FREE", 7))  # fmt: skip
_TEXT_WIDTH = 100


def main(arguments: Sequence[str], environment: Mapping[str, str] | None = None) -> int:
    """Runs the command and returns its exit code: 0 all models fit together, 1 they do not, 2 misused."""
    given = _parser().parse_args(list(arguments))
    try:
        return _run(given, process_environment() if environment is None else environment)
    except ConfigError as error:
        problems = error.problems
    except ValueError as error:
        problems = [str(error)]
    print_problems(problems)
    return EXIT_MISUSED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="llamayard plan",
        description="What models take on GPUs, whether they fit together, and how much context and how many slots fit.",
        epilog="Exit code: 0 all fit together, 1 they do not, 2 bad input. Options left out are as configured.",
    )
    add = parser.add_argument
    add("models", nargs="+", metavar="MODEL",
        help="a name in Ollama's store, a GGUF file, a saved reply of /api/show, a name of the emulator")  # fmt: skip
    add("--context", metavar="N|max", help="tokens of one slot (8192, 32k); max: the most with which all models fit")
    add("--parallel", type=int, metavar="N", help="slots of each model")
    add("--kv-cache-type", choices=KV_CACHE_TYPES, help="q8_0 and q4_0 need --flash-attention on")
    add("--flash-attention", choices=("on", "off"), help="left out: the server's choice")
    add("--ollama-version", metavar="V", help="of the server, e.g. 0.33.0; left out, that of the installed one")
    add(
        "--gpus",
        default=AUTO_GPUS,
        metavar="SPEC",
        help="2x3090, 4090+3090, a100-80, a file; auto (default): this machine's",
    )
    add("--batch", type=int, metavar="N", help="num_batch; left out, the Modelfile's or the server's choice")
    add("--config", type=Path, metavar="FILE", help="YAML file (else ./llamayard.yaml, then /etc)")
    add("--json", action="store_true", help="print JSON instead of tables")
    return parser


def _run(given: argparse.Namespace, environment: Mapping[str, str]) -> int:
    settings = load_settings(find_config(given.config, Path.cwd()), environment)
    options = _options(given, settings, environment)
    gpus = planned_gpus(settings.rig if given.gpus == AUTO_GPUS and settings.rig else given.gpus)
    store = Path(environment.get("OLLAMA_MODELS") or settings.ollama.models).expanduser()
    sources = [find_source(model, store) for model in given.models]
    facts = [source.facts for source in sources]
    if given.context == _MAX:
        options = replace(options, context_length=largest_context(facts, gpus, options) or None)
    plans = plan_models(facts, gpus, options)
    models = [with_times(source, plan) for source, plan in zip(sources, plans, strict=True)]
    if given.json:
        sys.stdout.write(json.dumps(plan_document(models), indent=2, ensure_ascii=False) + "\n")
    else:
        sys.stdout.write(render(models, gpus, options))
    return EXIT_OK if all(plan.fits for plan in plans) else EXIT_FAILED


def _options(given: argparse.Namespace, settings: Settings, environment: Mapping[str, str]) -> PlanOptions:
    flash = settings.ollama.flash_attention if given.flash_attention is None else given.flash_attention == "on"
    if given.ollama_version is not None and parse_version(given.ollama_version) is None:
        raise ValueError(f"--ollama-version {given.ollama_version}: write it as 0.33.0")
    installed = given.ollama_version or ollama_version(settings.ollama.binary, environment)
    return PlanOptions(
        default_context_length=settings.ollama.context_length,
        context_length=_context(given.context),
        slots=_within("--parallel", given.parallel, SLOTS_MAX) or settings.ollama.num_parallel,
        kv_cache_type=given.kv_cache_type or settings.ollama.kv_cache_type,
        flash_attention=flash,
        version=installed if isinstance(installed, str) else CURRENT,
        is_version_assumed=not isinstance(installed, str),
        batch=_within("--batch", given.batch, 2**20),
        policy=Policy(vram_margin_bytes=settings.placement.vram_margin_bytes),
    )


def _context(text: str | None) -> int | None:
    """Tokens; None for the default and for `max`."""
    if text is None or text == _MAX:
        return None
    digits, unit = (text[:-1], 1024) if text[-1:] in ("k", "K") else (text, 1)
    tokens = int(digits) * unit if digits.isdecimal() else 0
    if not 4 <= tokens <= 2**24:
        raise ValueError(f"--context {text}: write a number of tokens from 4 to {2**24}, such as 8192 or 32k, or max")
    return tokens


def _within(flag: str, value: int | None, limit: int) -> int | None:
    if value is not None and not 1 <= value <= limit:
        raise ValueError(f"{flag} {value}: write a number from 1 to {limit}")
    return value


# --- text -------------------------------------------------------------------------------------------------------


def render(models: Sequence[PlannedModel], gpus: Sequence[Gpu], options: PlanOptions) -> str:
    """The plan as tables of GiB, at most 100 columns wide."""
    blocks = [_model_text(model, len(gpus), options) for model in models]
    if len(models) > 1:
        missing = [model.plan.facts.name for model in models if not model.plan.fits]
        blocks.append(
            f"together: {', '.join(missing)} {'does' if len(missing) == 1 else 'do'} not fit beside the others\n"
            if missing
            else f"together: all {len(models)} models fit at the same time\n"
        )
    return "\n".join(blocks)


def _model_text(model: PlannedModel, gpu_count: int, options: PlanOptions) -> str:
    plan, facts = model.plan, model.plan.facts
    kind = facts.architecture if plan.is_known_architecture else f"{facts.architecture} (unknown architecture)"
    lines = [
        f"{facts.name}  {kind}, {facts.layers} layers, {facts.weights_bytes / 1e9:.1f} GB, from {model.source.origin}",
        _row("GiB on GPU", [title for title, _ in _COLUMNS]),
        *(_row(f"{part.gpu.index} {short_name(part.gpu)}", _figures(part)) for part in plan.gpus),
    ]
    lines += _wrapped(_verdict(plan, gpu_count))
    lines += _wrapped(f"loaded with: {_load_text(plan, options)}")
    lines += _wrapped(_limits_text(plan))
    lines += _wrapped(_estimates_text(model))
    if not plan.is_known_architecture:
        note = "unknown architecture: the general rule, a full cache in each layer, and a margin of 10 % instead of 2 %"
        lines += _wrapped(f"note: {note}")
    for note in model.source.notes:
        lines += _wrapped(f"note: {note}")
    return "\n".join(lines) + "\n"


def _row(label: str, cells: Sequence[str]) -> str:
    return f"  {label[:_GPU_WIDTH]:<{_GPU_WIDTH}}" + "".join(
        f"{cell:>{width + 1}}" for cell, (_, width) in zip(cells, _COLUMNS, strict=True)
    )


def _figures(part: GpuPlan) -> list[str]:
    sizes: GpuFootprint = part.footprint
    figures = (
        sizes.weights_bytes,
        sizes.kv_cache_bytes,
        sizes.compute_buffer_bytes,
        sizes.recurrent_state_bytes,
        sizes.projector_bytes,
        sizes.cuda_context_bytes,
        sizes.total_bytes,
        part.margin_bytes,
        part.gpu.memory_free_bytes,
    )
    return [f"{size / _GIB:.2f}" if size else "-" for size in figures]


def _verdict(plan: ModelPlan, gpu_count: int) -> str:
    if plan.fits:
        numbers = " + ".join(str(part.gpu.index) for part in plan.gpus)
        return f"fits on {len(plan.gpus)} of {gpu_count} GPUs: {numbers}"
    lacking = [part for part in plan.gpus if part.missing_bytes]
    missing = [f"GPU {part.gpu.index} lacks {_rounded_up(part.missing_bytes):.2f} GiB" for part in lacking]
    return f"does not fit: {', '.join(missing)}, margin included"


def _rounded_up(size: int) -> float:
    """GiB to the next hundredth: what is lacking is never 0.00."""
    return -(-size * 100 // _GIB) / 100


def _load_text(plan: ModelPlan, options: PlanOptions) -> str:
    load = plan.load
    version = f"Ollama {version_text(load.version)}" + (" (assumed)" if plan.is_version_assumed else "")
    cache = f"KV cache {plan.kv_cache_type}"
    if plan.kv_cache_type != options.kv_cache_type:
        cache += f" ({options.kv_cache_type} is ignored without --flash-attention on)"
    flash = "flash attention" if plan.flash_attention else "no flash attention"
    return f"{_slots(load.slots)} of {_tokens(load.context_length)}, {cache}, {flash}, batch {load.batch}, {version}"


def _limits_text(plan: ModelPlan) -> str:
    where = "there" if plan.fits else "on these GPUs"
    if not plan.context_length_max and not plan.slots_max:
        return f"at most {where}: nothing, with any context or number of slots"
    context, slots = plan.context_length_max, plan.slots_max
    is_trained = context == plan.facts.context_length
    limit = f"{_tokens(context)}{' (its trained context)' if is_trained else ''}" if context else "no context"
    by_context = f"{limit} with {_slots(plan.load.slots)}"
    by_slots = f"{_slots(slots)} of {_tokens(plan.load.context_length)}" if slots else "no slot of this context"
    return f"at most {where}: {by_context}, or {by_slots}"


def _estimates_text(model: PlannedModel) -> str:
    speed = "" if model.tokens_per_second is None else f"{model.tokens_per_second:.1f} tokens/s (one stream), "
    return (
        f"estimates: {speed}load {model.load_seconds_cold:.0f} s from disk, "
        f"{model.load_seconds_warm:.0f} s from the page cache"
    )


def _slots(count: int) -> str:
    return "1 slot" if count == 1 else f"{count} slots"


def _tokens(count: int) -> str:
    return f"{count:,} tokens"


def _wrapped(text: str) -> list[str]:
    """Lines with an indent that fit the width, cut between words."""
    return textwrap.wrap(
        text, _TEXT_WIDTH, initial_indent="  ", subsequent_indent="    ", break_long_words=False, break_on_hyphens=False
    )
