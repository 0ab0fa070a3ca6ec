"""Which options of a request decide the runner it needs, and what context and how many slots that runner has.

Ollama starts another runner when one of these differs from the loaded one's (server/sched.go, `needsReload`; seen on
0.11.4 and 0.24.0). Values equal to the defaults are dropped, so that a request that spells a default out shares the
runner of one that does not. `num_gpu` and `main_gpu` are placement, which is the router's, and never part of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from router.domain.instance import InstanceSpec
from router.domain.model import ModelFacts
from router.domain.policy import Pin
from router.domain.request import RunnerOptions

RUNNER_OPTIONS: Mapping[str, int | bool | None] = {
    "num_ctx": None,
    "num_batch": 512,
    "num_thread": 0,
    "use_mmap": None,
}
"""Name -> the server's default; None where the default is not one value."""

_BOOLEANS = frozenset({"use_mmap"})

PLACEMENT_OPTIONS = ("num_gpu", "main_gpu")

SINGLE_SLOT_ARCHITECTURES = frozenset(
    ("lfm2", "lfm2moe", "mllama", "nemotron_h", "qwen35", "qwen35moe", "qwen3next", "qwen3vl", "qwen3vlmoe")
)
"""Families that Ollama serves one request at a time (server/sched.go, v0.24 and v0.33)."""


def slots_of(model: ModelFacts, spec: InstanceSpec) -> int:
    """Requests for the model that the server runs in parallel; embedding models and some families get one slot."""
    if model.is_embedding or model.architecture in SINGLE_SLOT_ARCHITECTURES:
        return 1
    return spec.num_parallel


def context_of(options: RunnerOptions, model: ModelFacts, spec: InstanceSpec) -> int:
    """Tokens of context of one slot: the requested ones or the instance's default, cut to the trained context."""
    requested = requested_context(options)
    context = spec.context_length if requested is None else requested
    return max(4, min(context, model.context_length) if model.context_length > 0 else context)


def requested_context(options: RunnerOptions) -> int | None:
    """The context that the options name, uncut."""
    for name, value in options:
        if name == "num_ctx":
            return int(value)
    return None


def runner_parameters(written: Iterable[tuple[str, str]]) -> tuple[tuple[str, str], ...]:
    """Of a Modelfile's parameters those that matter to a runner, as `ModelFacts` has them: the last of each name, and
    whole numbers as such, which Go prints as floats (`1.048576e+06`)."""
    known = ((name, text.strip()) for name, text in written if name in RUNNER_OPTIONS or name in PLACEMENT_OPTIONS)
    return tuple(sorted({name: _plain_number(text) for name, text in known}.items()))


def _plain_number(text: str) -> str:
    try:
        number = float(text)
    except ValueError:
        return text
    return str(int(number)) if number.is_integer() else text


def runner_options(facts: ModelFacts, asked: Mapping[str, object], default_context_length: int) -> RunnerOptions:
    """The options a request needs of a runner: the Modelfile's parameters under the request's own, defaults dropped.

    Values of a type that Ollama refuses are left out: the server answers such a request with its own error.
    """
    merged: dict[str, int | bool] = {}
    written = ((name, _parsed(text)) for name, text in facts.parameters)
    for name, given in (*written, *asked.items()):
        value = _typed(name, given)
        if name in RUNNER_OPTIONS and value is not None:
            merged[name] = value
    defaults = {**RUNNER_OPTIONS, "num_ctx": default_context_length}
    return tuple(sorted((name, value) for name, value in merged.items() if value != defaults[name]))


def default_context_length_of(facts: ModelFacts, default_context_length: int) -> int:
    """Tokens of context that a request gets which says nothing of it: the Modelfile's, else the server's default."""
    return int(dict(runner_options(facts, {}, default_context_length)).get("num_ctx", default_context_length))


def with_context(facts: ModelFacts, context_length: int, default_context_length: int) -> RunnerOptions:
    """What the Modelfile says of a runner, with this context instead of its own."""
    own = (pair for pair in runner_options(facts, {}, default_context_length) if pair[0] != "num_ctx")
    context = (("num_ctx", context_length),) if context_length != default_context_length else ()
    return tuple(sorted((*own, *context)))


def default_runner_options(facts: ModelFacts, pin: Pin | None, default_context_length: int) -> RunnerOptions:
    """Of a load for nobody in particular: as the Modelfile says, with the context that the model is pinned to."""
    pinned = None if pin is None else pin.context_length
    context = default_context_length_of(facts, default_context_length) if pinned is None else pinned
    return with_context(facts, context, default_context_length)


def explicit_options(facts: ModelFacts, options: RunnerOptions, default_context_length: int) -> RunnerOptions:
    """The options with those defaults that the Modelfile would overrule: what a load must say for its runner to be so.

    Where a request does not name an option, a server takes the Modelfile's, and its own default only without one.
    """
    defaults = {**RUNNER_OPTIONS, "num_ctx": default_context_length}
    explain_override = {name: defaults[name] for name, _ in runner_options(facts, {}, default_context_length)}
    told = {name: value for name, value in explain_override.items() if value is not None}
    return tuple(sorted({**told, **dict(options)}.items()))


def sets_num_gpu(facts: ModelFacts) -> bool:
    """True where the Modelfile says how many layers go to the GPUs: then it is not for the router to say."""
    return any(name == "num_gpu" for name, _ in facts.parameters)


def _typed(name: str, given: object) -> int | bool | None:
    """The value as the server keeps it, a fraction cut off; None for one of another type than the option has."""
    if name in _BOOLEANS or isinstance(given, bool):
        return given if name in _BOOLEANS and isinstance(given, bool) else None
    return int(given) if isinstance(given, int | float) else None


def _parsed(text: str) -> int | bool | None:
    if text in ("true", "false"):
        return text == "true"
    try:
        return int(text)
    except ValueError:
        return None
