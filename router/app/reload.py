"""Hot reload: the configuration is read and checked as a whole, then applied as a whole, or not at all.

Rules for models, names, placement, the queue and streams change while the router runs. Keys that are used once, at the
start (addresses, servers and their environment, directories), are named as needing a restart and keep their values.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import structlog

from router.app.preflight import PreflightResult, check_machine
from router.app.run_time_pins import RunTimePins, with_pins
from router.app.startup_checks import startup_problems
from router.config.instance_options import tuning_problems
from router.config.keys import dotted_keys
from router.config.schema import ModelSettings
from router.config.settings import BlankFile, ConfigError, Settings
from router.config.values import json_value
from router.errors import BadRequest

LIVE_SECTIONS = ("models", "aliases", "fallbacks", "placement", "queue", "stream")
"""Sections all of whose keys can change while the router runs."""
LIVE_OLLAMA = ("keep_alive", "load_timeout_seconds", "context_length_max")
LIVE_SERVER = ("list_aliases",)
Apply = Callable[[Settings, RunTimePins], RunTimePins]
"""Changes everything, and returns the pins that differ from the configuration, or raises ConfigError."""
_SECRET_KEYS = ("ollama.env", "ollama.instance_env", "instances", "engines")
"""Keys whose values may be secrets: only that they change is logged."""


class ReadSettings(Protocol):
    """Reads the configuration as the start would see it. Raises ConfigError; BlankFile where it may not be blank."""

    def __call__(self, *, may_be_blank: bool) -> Settings: ...


@dataclass(frozen=True, slots=True)
class Change:
    """One key with its value before and after, as JSON."""

    key: str
    before: object
    after: object

    def document(self) -> dict[str, object]:
        if self.key in _SECRET_KEYS:
            return {"key": self.key}
        return {"key": self.key, "from": self.before, "to": self.after}


@dataclass(frozen=True, slots=True)
class ReloadResult:
    """What was applied, what needs a restart, and what is probably not meant."""

    changed: tuple[Change, ...]
    needs_restart: tuple[Change, ...]
    warnings: tuple[str, ...]

    def document(self) -> dict[str, Any]:
        return {
            "changed": [change.document() for change in self.changed],
            "needs_restart": [change.document() for change in self.needs_restart],
            "warnings": list(self.warnings),
        }


class Reloader:
    """Reloads one at a time. A file without keys is taken for one that is being written, if anything would change.

    `check`, in a thread, returns warnings or raises ConfigError. Pins that
    an operator set at run time stay over a reload, until the configuration says the same.
    """

    def __init__(
        self,
        running: Settings,
        read: ReadSettings,
        check: Callable[[Settings], Sequence[str]],
        apply: Apply,
    ) -> None:
        self._running = running
        self._read = read
        self._check = check
        self._apply = apply
        self._pins: RunTimePins = {}
        self._lock = asyncio.Lock()
        self._log = structlog.get_logger("router")

    async def reload(self) -> ReloadResult:
        """
        Raises:
            ConfigError: the new configuration cannot be used; nothing has changed.
        """
        async with self._lock:
            try:
                result, settings = await asyncio.to_thread(self._prepare)
                self._pins = self._apply(settings, self._pins)
            except ConfigError as error:
                self._log.error("reload_refused", problems=list(error.problems))
                raise
            self._running = settings
        self._log.info("reloaded", **result.document())
        return result

    async def answer(self) -> Mapping[str, Any]:
        """The same, for a client.

        Raises:
            BadRequest: the new configuration cannot be used; nothing has changed.
        """
        try:
            return (await self.reload()).document()
        except ConfigError as error:
            raise BadRequest("nothing was changed: " + "; ".join(error.problems)) from error

    async def pin(self, model: str, gpus: tuple[str, ...]) -> Sequence[str]:
        """Pins a model to GPUs by UUID until the router restarts, or to none; returns warnings.

        Raises:
            BadRequest: that contradicts the configuration or does not fit; nothing has changed.
        """
        async with self._lock:
            pins = {**self._pins, model: gpus}
            try:
                warnings = await asyncio.to_thread(self._check_pins, pins)
                self._pins = self._apply(self._running, pins)
            except ConfigError as error:
                raise BadRequest("nothing was changed: " + "; ".join(error.problems)) from error
        self._log.info("pinned" if gpus else "unpinned", model=model, gpus=list(gpus))
        return warnings

    def _check_pins(self, pins: RunTimePins) -> Sequence[str]:
        """The warnings that these pins bring; raises ConfigError with the problems that they bring."""
        before, there = self._verdict(self._pins)
        after, then = self._verdict(pins)
        problems = [problem for problem in after if problem not in before]
        if problems:
            raise ConfigError(problems)
        return [warning for warning in then if warning not in there]

    def _verdict(self, pins: RunTimePins) -> tuple[list[str], Sequence[str]]:
        """Problems and warnings of what runs with these pins."""
        try:
            return [], self._check(with_pins(self._running, pins))
        except ConfigError as error:
            return error.problems, ()

    async def reload_on_signal(self) -> None:
        """The same, for a caller that nobody answers: problems are only logged."""
        try:
            await self.reload()
        except ConfigError:
            return
        except Exception:  # the outermost edge of a signal handler
            self._log.exception("reload_crashed")

    def _prepare(self) -> tuple[ReloadResult, Settings]:
        wanted = self._wanted()
        warnings = tuple(self._checked(wanted))
        effective = with_live_keys(self._running, wanted)
        changed = changes(self._running, effective)
        return ReloadResult(changed, changes(effective, wanted), warnings), effective

    def _checked(self, wanted: Settings) -> Sequence[str]:
        try:
            return self._check(with_pins(wanted, self._pins))
        except ConfigError as error:
            named = [name for name in self._pins if any(name in problem for problem in error.problems)]
            hints = [f"{name} is pinned at run time: llamayard unpin {name}" for name in named]
            raise ConfigError([*error.problems, *hints]) from error

    def _wanted(self) -> Settings:
        try:
            return self._read(may_be_blank=False)
        except BlankFile:
            wanted = self._read(may_be_blank=True)
            if changes(self._running, wanted):
                raise
            return wanted


def check_reload(settings: Settings, environment: Mapping[str, str]) -> tuple[str, ...]:
    """The checks of `check-config`, blocking; returns warnings.

    Raises:
        ConfigError: the configuration cannot be used on this machine.
    """
    problems = [*tuning_problems(settings), *startup_problems(settings)]
    found = PreflightResult() if problems else check_machine(settings, environment)
    if problems or found.problems:
        raise ConfigError([*problems, *found.problems])
    return found.warnings


def with_live_keys(running: Settings, wanted: Settings) -> Settings:
    """The running configuration with the new values of all keys that can change."""
    ollama = running.ollama.model_copy(update={name: getattr(wanted.ollama, name) for name in LIVE_OLLAMA})
    server = running.server.model_copy(update={name: getattr(wanted.server, name) for name in LIVE_SERVER})
    sections = {name: getattr(wanted, name) for name in LIVE_SECTIONS}
    sections["models"] = _live_models(running, wanted)
    return running.model_copy(update={**sections, "ollama": ollama, "server": server})


def _live_models(running: Settings, wanted: Settings) -> dict[str, ModelSettings]:
    """The new rules, but those of models with an engine as they were: their servers' commands are made at the start."""
    fixed = {name for each in (running, wanted) for name, rules in each.models.items() if rules.engine is not None}
    kept = {name: rules for name, rules in running.models.items() if name in fixed}
    return {**{name: rules for name, rules in wanted.models.items() if name not in fixed}, **kept}


def changes(before: Settings, after: Settings) -> tuple[Change, ...]:
    """The keys that differ, in the order of declaration."""
    found = (Change(key, json_value(before, key), json_value(after, key)) for key in dotted_keys(Settings))
    return tuple(change for change in found if change.before != change.after)
