"""A request's `options` as the EMULATED server reads them: type checks, Modelfile parameters, then defaults.

Modelled on `api.Options.FromMap` (v0.24). `needs_reload` decides which options force a reload.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, cast

_INTEGERS = ("num_ctx", "num_batch", "num_gpu", "main_gpu", "num_thread", "num_keep", "seed", "num_predict", "top_k",
             "repeat_last_n")  # fmt: skip
_FLOATS = ("top_p", "min_p", "typical_p", "temperature", "repeat_penalty", "presence_penalty", "frequency_penalty")
_TYPES: Mapping[str, str] = {
    **dict.fromkeys(_INTEGERS, "integer"),
    **dict.fromkeys(_FLOATS, "float32"),
    "use_mmap": "boolean",
    "stop": "array",
}
MINIMUM_CONTEXT = 4
_MAX_CONTEXTS = 10
"""Upper bound of an answer, as a multiple of the context length."""


class OptionError(ValueError):
    """An option has the wrong type; the message is the server's."""


@dataclass(frozen=True, slots=True)
class RunnerOptions:
    """Options a runner is started with. `num_gpu` -1, `main_gpu` None and `num_thread` 0 let the server decide."""

    num_ctx: int
    num_batch: int = 512
    num_gpu: int = -1
    main_gpu: int | None = None
    use_mmap: bool | None = None
    is_mmap_automatic: bool = False
    """Whether the server decided on `use_mmap`, as it does from 0.30."""
    num_thread: int = 0


@dataclass(frozen=True, slots=True)
class Options:
    """The options the emulator uses."""

    runner: RunnerOptions
    num_predict: int = -1
    seed: int | None = None
    stop: tuple[str, ...] = ()
    is_context_given: bool = False
    is_batch_given: bool = False

    def limit(self, context_length: int) -> int:
        """Maximum number of tokens of an answer."""
        max_tokens = _MAX_CONTEXTS * context_length
        return max_tokens if self.num_predict < 0 else min(self.num_predict, max_tokens)


def read_options(requested: Mapping[str, Any], parameters: Mapping[str, Any], default_context: int) -> Options:
    """Merges the request's options over the Modelfile's `parameters`. Raises OptionError."""
    for name, value in requested.items():
        if name in _TYPES and value is not None and not _fits(value, _TYPES[name]):
            raise OptionError(f'option "{name}" must be of type {_TYPES[name]}')
    merged = {
        key: value
        for source in (parameters, requested)
        for key, value in source.items()
        if key in _TYPES and value is not None and _fits(value, _TYPES[key])
    }
    runner = RunnerOptions(
        num_ctx=max(MINIMUM_CONTEXT, int(merged.get("num_ctx", default_context))),
        num_batch=int(merged.get("num_batch", 512)),
        num_gpu=int(merged.get("num_gpu", -1)),
        main_gpu=int(merged["main_gpu"]) if "main_gpu" in merged else None,
        use_mmap=merged.get("use_mmap"),
        num_thread=int(merged.get("num_thread", 0)),
    )
    return Options(
        runner=runner,
        num_predict=int(merged.get("num_predict", -1)),
        seed=int(merged["seed"]) if "seed" in merged else None,
        stop=tuple(str(stop_word) for stop_word in cast("list[Any]", merged.get("stop", []))),
        is_context_given="num_ctx" in merged,
        is_batch_given="num_batch" in merged,
    )


def _fits(value: object, type_name: str) -> bool:
    if type_name == "boolean":
        return isinstance(value, bool)
    if type_name == "array":
        return isinstance(value, list)
    return isinstance(value, int | float) and not isinstance(value, bool)


def needs_reload(loaded: RunnerOptions, requested: Options, trained_context: int, is_0_30: bool) -> bool:
    """Whether a model loaded with `loaded` must be reloaded for a request with `requested`.

    Up to 0.24 the requested values are compared; from 0.30 the effective context lengths, and options that the server
    chose and the request leaves unset are ignored (server/sched.go, v0.34, `needsReload`).
    """
    new = requested.runner
    old = replace(loaded, num_gpu=-1) if new.num_gpu < 0 else loaded
    new = replace(new, num_gpu=-1) if new.num_gpu < 0 else new
    if is_0_30:
        context = min(new.num_ctx, trained_context) if requested.is_context_given else old.num_ctx
        batch = new.num_batch if requested.is_batch_given else old.num_batch
        use_mmap = old.use_mmap if old.is_mmap_automatic and new.use_mmap is None else new.use_mmap
        old = replace(old, num_ctx=min(old.num_ctx, trained_context), is_mmap_automatic=False)
        new = replace(new, num_ctx=min(context, trained_context), num_batch=batch, use_mmap=use_mmap)
    else:  # 0 is the default
        old, new = replace(old, main_gpu=old.main_gpu or 0), replace(new, main_gpu=new.main_gpu or 0)
    return old != new
