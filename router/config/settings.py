"""The whole configuration: its sections, which stand in `router/config/schema.py`, and how their values are read.

YAML file < environment (`LLAMAYARD_SERVER__PORT`) < flags. Unknown keys are refused with the nearest right name.
Nothing else in the package reads the environment, and nothing here decides what a value means for a request.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Self, cast

from pydantic import Field, ValidationError, model_validator
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from router.config.parsing import problem_text
from router.config.schema import (
    RESERVED_VARIABLES,
    FallbackSettings,
    InstanceSettings,
    LogSettings,
    ModelSettings,
    OllamaSettings,
    PlacementSettings,
    PollSettings,
    QueueSettings,
    ServerSettings,
    StreamSettings,
)
from router.config.sources import (
    ConfigError,
    Layer,
    Tree,
    environment_layer,
    file_layer,
    flag_layer,
    merge,
    origin_of,
    unknown_keys,
    without_unset,
)
from router.domain.model_names import canonical

__all__ = [
    "RESERVED_VARIABLES",
    "ConfigError",
    "InstanceSettings",
    "Settings",
    "find_config",
    "load_layers",
    "load_settings",
    "process_environment",
]

ENVIRONMENT_PREFIX = "LLAMAYARD_"
NOT_SETTINGS = frozenset(
    f"{ENVIRONMENT_PREFIX}{name}"
    for name in ("INSTANCE", "STATE", "RIG_DIR", "RIG_VERSION", "RIG_SPEED", "TEST_OLLAMA")
)
"""Variables that the router sets for its children, those of the emulated rig, and the tests' own."""


class Settings(BaseSettings):
    """The whole configuration, frozen. `Settings()` is the defaults: it reads nothing by itself."""

    model_config = SettingsConfigDict(
        env_prefix=ENVIRONMENT_PREFIX, env_nested_delimiter="__", extra="forbid", frozen=True
    )

    server: ServerSettings = Field(default_factory=ServerSettings)
    ollama: OllamaSettings = Field(default_factory=OllamaSettings)
    instances: tuple[InstanceSettings, ...] = Field(
        default=(), description="Instances by hand, for two or more servers without GPUs or ones that run already."
    )
    discover: bool | None = Field(
        default=None, description="Makes one instance a GPU and a spread one; unset: only if none is declared by hand."
    )
    models: dict[str, ModelSettings] = Field(
        default_factory=dict, description="Rules of single models by name, `*` for all that have none of their own."
    )
    aliases: dict[str, str] = Field(
        default_factory=dict,
        description="Further names of models, for clients whose names are fixed: `{gpt-4o: llama3.3:70b}`. "
        "An alias wins over a model of the same name.",
    )
    fallbacks: dict[str, FallbackSettings] = Field(
        default_factory=dict,
        description="What answers where a model cannot, by the model's name, `*` for all that have none of their own.",
    )
    placement: PlacementSettings = Field(default_factory=PlacementSettings)
    queue: QueueSettings = Field(default_factory=QueueSettings)
    stream: StreamSettings = Field(default_factory=StreamSettings)
    poll: PollSettings = Field(default_factory=PollSettings)
    log: LogSettings = Field(default_factory=LogSettings)
    state_directory: Path = Field(
        default=Path("~/.local/state/llamayard"),
        description="Where the router notes its children, to find those that a killed router left; "
        "under $XDG_STATE_HOME where that is set.",
    )
    rig: str | None = Field(
        default=None,
        min_length=1,
        description="EMULATED GPUs and servers instead of real ones (2x3090, 4090+3090, h100, a file).",
    )

    @property
    def discovers(self) -> bool:
        """Whether instances are made from the GPUs that are found."""
        return self.discover if self.discover is not None else not self.instances

    @model_validator(mode="after")
    def _there_are_instances(self) -> Self:
        if not self.discovers and not self.instances:
            raise ValueError("discover is false and instances is empty: declare an instance or set discover: true")
        for what in ("name", "url"):
            given = [value for instance in self.instances if (value := getattr(instance, what)) is not None]
            twice = next((value for at, value in enumerate(given) if value in given[:at]), None)
            if twice is not None:
                raise ValueError(f"two instances have the {what} {twice!r}: give each its own")
        return self

    @model_validator(mode="after")
    def _names_lead_to_models(self) -> Self:
        behind = [name for fallback in self.fallbacks.values() for name in fallback.to]
        _check_names("models", self.models)
        _check_names("fallbacks", [*self.fallbacks, *behind])
        _check_names("aliases", [*self.aliases, *self.aliases.values()])
        known = {canonical(name) for name in self.aliases if name != "*"}
        twice = next((name for name, target in self.aliases.items() if canonical(target) in known), None)
        if twice is not None:
            raise ValueError(f"aliases: {twice!r} leads to another alias: name the model itself")
        return self

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Only what `load_settings` merged: the library's own sources ignore unknown variables and name no origin."""
        del settings_cls, env_settings, dotenv_settings, file_secret_settings
        return (init_settings,)


def _check_names(key: str, names: Iterable[str]) -> None:
    """ValueError for the first that Ollama takes for no model's name."""
    for name in names:
        try:
            if name != "*":
                canonical(name)
        except ValueError as error:
            raise ValueError(f"{key}: {error}: write it as it stands in `ollama list`") from error


def find_config(given: Path | None, directory: Path) -> Path | None:
    """The file given, else `llamayard.yaml` in the directory, else `/etc/llamayard/config.yaml`, else none."""
    usual = (directory / "llamayard.yaml", Path("/etc/llamayard/config.yaml"))
    return given or next((path for path in usual if path.is_file()), None)


def load_layers(
    config: Path | None, environment: Mapping[str, str], overrides: Mapping[str, object] | None = None
) -> Layer:
    """File, environment and flags as one tree with the origin of each key; ConfigError where one cannot be read."""
    layers = [
        file_layer(config) if config is not None else Layer(),
        environment_layer(environment, ENVIRONMENT_PREFIX, NOT_SETTINGS),
        flag_layer(overrides or {}),
    ]
    return merge(layers)


def load_settings(
    config: Path | None, environment: Mapping[str, str], overrides: Mapping[str, object] | None = None
) -> Settings:
    """Reads and checks the whole configuration.

    `overrides` are flags by dotted key (`server.port`); a None there counts as not given.

    Raises:
        ConfigError: one sentence for each problem, naming the key, the value, where it was given and what would do.
    """
    merged = load_layers(config, environment, overrides)
    problems = list(unknown_keys(merged.tree, Settings))
    try:
        settings = Settings(**_with_home_paths(without_unset(merged.tree, Settings), environment))
    except ValidationError as error:
        for detail in error.errors():
            if detail["type"] != "extra_forbidden":
                dotted = ".".join(str(part) for part in detail["loc"])
                problems.append(problem_text(dotted, detail, origin_of(dotted, merged.origins)))
        raise ConfigError(problems) from error
    if problems:
        raise ConfigError(problems)
    return settings


def process_environment() -> dict[str, str]:
    """The environment of this process: what children inherit and where `LLAMAYARD_*` keys come from."""
    return dict(os.environ)  # noqa: TID251 - the one place


def _with_home_paths(tree: Tree, environment: Mapping[str, str]) -> dict[str, Any]:
    """The tree with `~` resolved by the given environment, so that nothing later asks the process for its home."""
    home = environment.get("HOME") or str(Path.home())
    state_home = environment.get("XDG_STATE_HOME") or f"{home}/.local/state"
    result: dict[str, Any] = {"state_directory": f"{state_home}/llamayard", **tree}
    result["state_directory"] = _expanded(result["state_directory"], home)
    server = result.get("server", {})
    if isinstance(server, Mapping):
        named = cast("Mapping[str, object]", server)
        result["server"] = {k: _expanded(v, home) if k.startswith("tls_") else v for k, v in named.items()}
    ollama = result.get("ollama", {})
    if isinstance(ollama, Mapping):
        defaults: dict[str, Any] = {"models": "~/.ollama/models", **ollama}
        result["ollama"] = {
            key: _expanded(value, home) if key in ("models", "binary") else value for key, value in defaults.items()
        }
    return result


def _expanded(value: object, home: str) -> object:
    return home + value[1:] if isinstance(value, str) and (value == "~" or value.startswith("~/")) else value
