"""A request's `options` as the EMULATED server reads them: types checked, defaults and Modelfile parameters below them.

After `api.Options.FromMap` (v0.24). Which of them make a server load a model anew is decided in `needs_reload`.
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
_MOST_CONTEXTS = 10
"""No answer is longer than so many contexts."""


class OptionError(ValueError):
    """An option has the wrong type; the text is the server's."""


@dataclass(frozen=True, slots=True)
class RunnerOptions:
    """What a runner is started with. `num_gpu` -1 and `num_thread` 0 leave it to the server."""

    num_ctx: int
    num_batch: int = 512
    num_gpu: int = -1
    main_gpu: int = 0
    use_mmap: bool | None = None
    num_thread: int = 0


@dataclass(frozen=True, slots=True)
class Options:
    """All that matters here."""

    runner: RunnerOptions
    num_predict: int = -1
    seed: int | None = None
    stop: tuple[str, ...] = ()
    is_context_given: bool = False
    is_batch_given: bool = False

    def limit(self, context_length: int) -> int:
        """Tokens after which an answer is cut in any case."""
        most = _MOST_CONTEXTS * context_length
        return most if self.num_predict < 0 else min(self.num_predict, most)


def read_options(asked: Mapping[str, Any], parameters: Mapping[str, Any], default_context: int) -> Options:
    """`parameters` are the Modelfile's. Raises OptionError."""
    for name, value in asked.items():
        if name in _TYPES and value is not None and not _fits(value, _TYPES[name]):
            raise OptionError(f'option "{name}" must be of type {_TYPES[name]}')
    given = {
        key: value
        for source in (parameters, asked)
        for key, value in source.items()
        if key in _TYPES and value is not None and _fits(value, _TYPES[key])
    }
    runner = RunnerOptions(
        num_ctx=max(MINIMUM_CONTEXT, int(given.get("num_ctx", default_context))),
        num_batch=int(given.get("num_batch", 512)),
        num_gpu=int(given.get("num_gpu", -1)),
        main_gpu=int(given.get("main_gpu", 0)),
        use_mmap=given.get("use_mmap"),
        num_thread=int(given.get("num_thread", 0)),
    )
    return Options(
        runner=runner,
        num_predict=int(given.get("num_predict", -1)),
        seed=int(given["seed"]) if "seed" in given else None,
        stop=tuple(str(word) for word in cast("list[Any]", given.get("stop", []))),
        is_context_given="num_ctx" in given,
        is_batch_given="num_batch" in given,
    )


def _fits(value: object, kind: str) -> bool:
    if kind == "boolean":
        return isinstance(value, bool)
    if kind == "array":
        return isinstance(value, list)
    return isinstance(value, int | float) and not isinstance(value, bool)


def needs_reload(loaded: RunnerOptions, asked: Options, trained_context: int, is_0_30: bool) -> bool:
    """Whether a runner with these options cannot serve a request with those.

    Up to 0.24 the asked context is compared, not the one that came of it; from 0.30 the other way round, and what a
    request leaves open never matters.
    """
    new = asked.runner
    old = replace(loaded, num_gpu=-1) if new.num_gpu < 0 else loaded
    new = replace(new, num_gpu=-1) if new.num_gpu < 0 else new
    if is_0_30:
        old = replace(old, num_ctx=min(old.num_ctx, trained_context), use_mmap=None)
        context = min(new.num_ctx, trained_context) if asked.is_context_given else old.num_ctx
        batch = new.num_batch if asked.is_batch_given else old.num_batch
        new = replace(new, num_ctx=context, num_batch=batch, use_mmap=None)
    return old != new
