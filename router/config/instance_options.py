"""What one instance is run with: its own values, else its variables, else those for all, else the keys of `ollama`.

A variable that a server obeys (`OLLAMA_NUM_PARALLEL` in `env`) changes what a model takes there, so the router's
books must follow it. Decides nothing else about an instance: neither its GPUs nor its port.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from router.config.settings import ConfigError, InstanceSettings, Settings

_KV_CACHE_TYPES = ("f16", "q8_0", "q4_0")
_NOTHING_OF_ITS_OWN = InstanceSettings(name="discovered")
_FALSE_WORDS = frozenset({"0", "f", "F", "false", "FALSE", "False"})
"""What Go's `strconv.ParseBool` takes as false; to Ollama any other text is true."""


@dataclass(frozen=True, slots=True)
class Tuning:
    """Effective values of one instance; `environment` is its variables as they were given, for a spawned one."""

    num_parallel: int
    context_length: int
    kv_cache_type: str
    flash_attention: bool | None
    """None: the server's own choice."""
    environment: Mapping[str, str]


def tuning(settings: Settings, name: str, declared: InstanceSettings | None = None) -> Tuning:
    """The effective values for the instance of that name, declared by hand or not.

    Raises:
        ConfigError: a variable holds what Ollama would ignore with a warning.
    """
    own = declared or _NOTHING_OF_ITS_OWN
    variables = {**settings.ollama.env, **settings.ollama.instance_env.get(name, {}), **own.env}
    if own.url is not None:
        variables = {}  # another program gave that server its environment
    values = _Variables(name, variables)
    parallel = own.num_parallel or values.whole("OLLAMA_NUM_PARALLEL", 1) or settings.ollama.num_parallel
    context = own.context_length or values.whole("OLLAMA_CONTEXT_LENGTH", 4) or settings.ollama.context_length
    cache = own.kv_cache_type or values.kv_cache_type() or settings.ollama.kv_cache_type
    flash = _first(own.flash_attention, values.flash_attention(), settings.ollama.flash_attention)
    if cache != "f16" and not flash:
        raise ConfigError(
            [f"instance {name}: kv_cache_type {cache} is ignored by Ollama without flash_attention: true"]
        )
    return Tuning(parallel, context, cache, flash, variables)


def _first(*values: bool | None) -> bool | None:
    return next((value for value in values if value is not None), None)


@dataclass(frozen=True, slots=True)
class _Variables:
    """The variables given to an instance, read as Ollama reads them."""

    instance: str
    values: Mapping[str, str]

    def whole(self, variable: str, least: int) -> int | None:
        text = self._text(variable)
        if text is None:
            return None
        if not text.isascii() or not text.isdecimal() or int(text) < least:
            raise self._error(variable, text, f"must be a whole number of at least {least}")
        return int(text)

    def kv_cache_type(self) -> str | None:
        text = self._text("OLLAMA_KV_CACHE_TYPE")
        if text is not None and text not in _KV_CACHE_TYPES:
            raise self._error("OLLAMA_KV_CACHE_TYPE", text, f"must be one of {', '.join(_KV_CACHE_TYPES)}")
        return text

    def flash_attention(self) -> bool | None:
        text = self._text("OLLAMA_FLASH_ATTENTION")
        return None if text is None else text not in _FALSE_WORDS

    def _text(self, variable: str) -> str | None:
        """Blanks and quotes around a value are cut, as Ollama does; an empty one is as if absent."""
        return self.values.get(variable, "").strip().strip("\"'") or None

    def _error(self, variable: str, text: str, words: str) -> ConfigError:
        return ConfigError([f"instance {self.instance}: {variable}={text!r} {words}"])


def tuning_problems(settings: Settings) -> list[str]:
    """What is wrong with the variables of any instance that the configuration names."""
    declared = {instance.name: instance for instance in settings.instances if instance.name is not None}
    names = {**dict.fromkeys(settings.ollama.instance_env), **declared}
    problems: list[str] = []
    for name in names or {"gpu0": None}:
        try:
            tuning(settings, name, declared.get(name))
        except ConfigError as error:
            problems.extend(error.problems)
    return problems
