"""The options of a request that determine its runner, and that runner's context and number of slots.

Ollama starts another runner if one of them differs from the loaded one (server/sched.go, `needsReload`; verified on
0.11.4 and 0.24.0). Values equal to the default are dropped, so that a request that sets a default explicitly shares the
runner with one that does not. A context above the trained one is cut to it, so both are written in one way; before 0.30
a server compares the numbers as written, so bodies repeat what the load wrote (`written_context`). `num_gpu` and
`main_gpu` are never included, because the router decides the placement.
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
"""Name -> default of the server; None if it is not a single value."""

_BOOLEANS = frozenset({"use_mmap"})

PLACEMENT_OPTIONS = ("num_gpu", "main_gpu")
RUNNER_OPTION_NAMES = frozenset((*RUNNER_OPTIONS, *PLACEMENT_OPTIONS))
"""Options whose change makes a server reload the model. Matched exactly, because `options` is a map in Go."""

_INT_LIMIT = 1 << 63
_CONTEXT_MIN = 4
"""What a server takes for a smaller `num_ctx`."""

SINGLE_SLOT_ARCHITECTURES = frozenset(
    ("lfm2", "lfm2moe", "mllama", "nemotron_h", "qwen35", "qwen35moe", "qwen3next", "qwen3vl", "qwen3vlmoe")
)
"""Architectures for which Ollama runs one request at a time (server/sched.go, v0.24 and v0.33)."""


def slots_of(model: ModelFacts, spec: InstanceSpec) -> int:
    """Parallel requests for the model on this server; 1 for embedding models and some architectures."""
    return 1 if has_one_slot(model) else spec.num_parallel


def has_one_slot(facts: ModelFacts) -> bool:
    """Returns True if a server runs one request at a time for the model, whatever its settings."""
    return facts.is_embedding or facts.architecture in SINGLE_SLOT_ARCHITECTURES


def context_of(options: RunnerOptions, model: ModelFacts, spec: InstanceSpec) -> int:
    """Context of one slot in tokens: requested or the instance's default, limited to the trained context."""
    requested = requested_context(options)
    context = spec.context_length if requested is None else requested
    return cut_context(model, context)


def cut_context(facts: ModelFacts, context_length: int) -> int:
    """Tokens of context that a slot gets if `context_length` are asked for: at most the trained context."""
    trained = facts.context_length
    return max(_CONTEXT_MIN, min(context_length, trained) if trained > 0 else context_length)


def requested_context(options: RunnerOptions) -> int | None:
    """The requested context in tokens, without limits; None if the options do not set it."""
    for name, value in options:
        if name == "num_ctx":
            return int(value)
    return None


def differ_in_context_only(one: RunnerOptions, other: RunnerOptions) -> bool:
    """Whether two runners differ in nothing but their context, if in anything."""
    return [pair for pair in one if pair[0] != "num_ctx"] == [pair for pair in other if pair[0] != "num_ctx"]


def sets_context(facts: ModelFacts) -> bool:
    """True where the Modelfile says how much context a runner has."""
    return any(name == "num_ctx" for name, _ in facts.parameters)


def runner_parameters(written: Iterable[tuple[str, str]]) -> tuple[tuple[str, str], ...]:
    """The parameters of a Modelfile that affect a runner, as in `ModelFacts.parameters`: the last value of each name.

    Whole numbers that Go has printed as floats (`1.048576e+06`) are converted.
    """
    relevant = ((name, text.strip()) for name, text in written if name in RUNNER_OPTION_NAMES)
    return tuple(sorted({name: _plain_number(text) for name, text in relevant}.items()))


def _plain_number(text: str) -> str:
    try:
        number = float(text)
    except ValueError:
        return text
    return str(int(number)) if number.is_integer() else text


def runner_options(facts: ModelFacts, requested: Mapping[str, object], default_context_length: int) -> RunnerOptions:
    """The options that a request needs of its runner: `requested`, then those of the Modelfile, without defaults.

    Values of a type that Ollama refuses are left out; see `refused_option`.
    """
    merged: dict[str, int | bool] = {}
    modelfile_options = ((name, _parsed(text)) for name, text in facts.parameters)
    for name, given in (*modelfile_options, *requested.items()):
        value = _typed(name, given)
        if name in RUNNER_OPTIONS and value is not None:
            merged[name] = value
    defaults = {**RUNNER_OPTIONS, "num_ctx": default_context_length}
    if "num_ctx" in merged:
        merged["num_ctx"] = _one_spelling(facts, merged["num_ctx"], default_context_length)
    return tuple(sorted((name, value) for name, value in merged.items() if value != defaults[name]))


def _one_spelling(facts: ModelFacts, context_length: int, default_context_length: int) -> int:
    """The number that stands for all with the same effect: the default, else the Modelfile's, else the cut one.

    A number below the least stands for itself: the runner has the least, yet texts to embed are cut to the number.
    """
    if context_length < _CONTEXT_MIN:
        return context_length
    cut = cut_context(facts, context_length)
    named = _modelfile_context(facts)
    for number in (default_context_length, default_context_length if named is None else named):
        if cut_context(facts, number) == cut:
            return number
    return cut


def _modelfile_context(facts: ModelFacts) -> int | None:
    """The `num_ctx` of the Modelfile, as written."""
    written = dict(facts.parameters).get("num_ctx")
    value = None if written is None else _typed("num_ctx", _parsed(written))
    return None if value is None else int(value)


def written_context(facts: ModelFacts, options: RunnerOptions, default_context_length: int) -> int:
    """The `num_ctx` as a runner with these options was loaded: a request that writes another one would reload it."""
    requested = requested_context(options)
    if requested is not None:
        return requested
    named = _modelfile_context(facts)
    if named is not None and _one_spelling(facts, named, default_context_length) == default_context_length:
        return named  # the load wrote none, and the server took the Modelfile's
    return default_context_length


def default_context_length_of(facts: ModelFacts, default_context_length: int) -> int:
    """Context in tokens of a request that does not set it: that of the Modelfile, or the server's default."""
    return int(dict(runner_options(facts, {}, default_context_length)).get("num_ctx", default_context_length))


def with_context(facts: ModelFacts, context_length: int, default_context_length: int) -> RunnerOptions:
    """The runner options of the Modelfile with another context."""
    return runner_options(facts, {"num_ctx": context_length}, default_context_length)


def default_runner_options(facts: ModelFacts, pin: Pin | None, default_context_length: int) -> RunnerOptions:
    """The options of a load without a request: those of the Modelfile, with the context of the pin if it has one."""
    pinned = None if pin is None else pin.context_length
    context = default_context_length_of(facts, default_context_length) if pinned is None else pinned
    return with_context(facts, context, default_context_length)


def explicit_options(facts: ModelFacts, options: RunnerOptions, default_context_length: int) -> RunnerOptions:
    """The options that a load has to send: with the defaults that the Modelfile would otherwise override.

    For an option that is not sent, a server uses the value of the Modelfile, and its default only if there is none.
    """
    defaults = {**RUNNER_OPTIONS, "num_ctx": default_context_length}
    overridden = {name: defaults[name] for name, _ in runner_options(facts, {}, default_context_length)}
    restored = {name: value for name, value in overridden.items() if value is not None}
    return tuple(sorted({**restored, **dict(options)}.items()))


def refused_option(requested: Mapping[str, object]) -> str | None:
    """The server's message about the first runner option of a type that it refuses; None where all are accepted.

    Source: api/types.go, `Options.FromMap` (v0.34): numbers with a fraction are cut off, and null counts as absent.
    """
    for name, given in requested.items():
        if given is None or name not in RUNNER_OPTION_NAMES:
            continue
        is_boolean = isinstance(given, bool)
        if name in _BOOLEANS and not is_boolean:
            return f'option "{name}" must be of type boolean'
        if name not in _BOOLEANS and (is_boolean or not isinstance(given, int | float)):
            return f'option "{name}" must be of type integer'
    return None


def sets_num_gpu(facts: ModelFacts) -> bool:
    """Returns True if the Modelfile sets the number of layers on GPUs; the router then does not."""
    return any(name == "num_gpu" for name, _ in facts.parameters)


def _typed(name: str, given: object) -> int | bool | None:
    """The value as the server stores it (fractions are truncated); None if its type is wrong."""
    if name in _BOOLEANS or isinstance(given, bool):
        return given if name in _BOOLEANS and isinstance(given, bool) else None
    return stored_number(given) if isinstance(given, int | float) else None


def stored_number(given: float) -> int:
    """A number of a request's options as a server stores it: Go's `int(float64)` on x86-64.

    What is after the point is cut off; what no 64 bits hold becomes the least number of all.
    """
    number = float(max(-_INT_LIMIT, min(given, _INT_LIMIT)))
    return int(number) if number < _INT_LIMIT else -_INT_LIMIT


def _parsed(text: str) -> int | bool | None:
    if text in ("true", "false"):
        return text == "true"
    try:
        return int(text)
    except ValueError:
        return None
