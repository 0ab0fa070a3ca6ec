"""The whole configuration: its sections from `router/config/schema.py`, and how it is loaded.

YAML file < environment (`LLAMAYARD_SERVER__PORT`) < flags, merged by pydantic-settings. Unknown keys are refused.
Nothing here decides what a value means for a request.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar, Self

from pydantic import Field, ValidationError, model_validator
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from router.config.inputs import (
    ENVIRONMENT_PREFIX,
    BlankFile,
    ConfigError,
    absolute,
    expanded,
    find_config,
    home_of,
    process_environment,
)
from router.config.problems import explain
from router.config.schema import (
    RESERVED_VARIABLES,
    AdminSettings,
    DashboardSettings,
    EngineSettings,
    FallbackSettings,
    InstanceSettings,
    LogSettings,
    ManagementSettings,
    ModelSettings,
    OllamaSettings,
    PlacementSettings,
    PollSettings,
    QueueSettings,
    ServerSettings,
    StreamSettings,
    UsageSettings,
    without_unset,
)
from router.config.sources import EnvironmentSource, FileSource, FlagSource
from router.domain.model_names import ANY_MODEL, canonical, rule_key

__all__ = [
    "ENVIRONMENT_PREFIX",
    "RESERVED_VARIABLES",
    "BlankFile",
    "ConfigError",
    "InstanceSettings",
    "Settings",
    "find_config",
    "key_origins",
    "load_settings",
    "process_environment",
]


class Settings(BaseSettings):
    """The whole configuration, frozen. `Settings()` is the defaults; `load_settings` reads file and environment."""

    model_config = SettingsConfigDict(extra="forbid", frozen=True, case_sensitive=True)
    sources: ClassVar[tuple[PydanticBaseSettingsSource, ...]] = ()
    """Sources that are read after the arguments of the class, highest priority first."""

    server: ServerSettings = Field(default_factory=ServerSettings)
    admin: AdminSettings = Field(default_factory=AdminSettings)
    management: ManagementSettings = Field(default_factory=ManagementSettings)
    ollama: OllamaSettings = Field(default_factory=OllamaSettings)
    instances: tuple[InstanceSettings, ...] = Field(
        default=(),
        description="Instances declared by hand: several servers without GPUs, or servers that already run.",
    )
    discover: bool | None = Field(
        default=None,
        description="Creates one instance per GPU and one over all GPUs; unset: if `instances` declares no Ollama.",
    )
    engines: dict[str, EngineSettings] = Field(
        default_factory=dict,
        description="Servers for models that name one (`models.NAME.engine`), such as vLLM or llama-server.",
    )
    models: dict[str, ModelSettings] = Field(
        default_factory=dict, description="Rules for single models by name; `*` applies to models without an entry."
    )
    aliases: dict[str, str] = Field(
        default_factory=dict,
        description="Alternative model names, for clients with fixed names: `{gpt-4o: llama3.3:70b}`. "
        "An alias takes precedence over a model of the same name.",
    )
    fallbacks: dict[str, FallbackSettings] = Field(
        default_factory=dict,
        description="Models that answer when a model cannot, by its name; `*` applies to models without an entry.",
    )
    placement: PlacementSettings = Field(default_factory=PlacementSettings)
    queue: QueueSettings = Field(default_factory=QueueSettings)
    stream: StreamSettings = Field(default_factory=StreamSettings)
    poll: PollSettings = Field(default_factory=PollSettings)
    log: LogSettings = Field(default_factory=LogSettings)
    dashboard: DashboardSettings = Field(default_factory=DashboardSettings)
    usage: UsageSettings = Field(default_factory=UsageSettings)
    state_directory: Path = Field(
        default=Path("~/.local/state/llamayard"),
        description="Directory for the router's state: measured model sizes, and its child processes, so that a new "
        "start finds those that a killed router left; in $XDG_STATE_HOME if that is set.",
    )
    rig: str | None = Field(
        default=None,
        min_length=1,
        description="EMULATED GPUs and servers instead of real ones: 2x3090, 4090+3090, h100 or a file.",
    )

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """`sources` replace the library's defaults, which read the environment of the process."""
        del settings_cls, env_settings, dotenv_settings, file_secret_settings
        return (init_settings, *cls.sources)

    @model_validator(mode="before")
    @classmethod
    def _null_unsets_a_key(cls, data: Any) -> Any:
        return without_unset(cls, data)

    @property
    def discovers(self) -> bool:
        """Whether instances are created from the GPUs found."""
        if self.discover is not None:
            return self.discover
        return not any(instance.kind == "ollama" for instance in self.instances)

    @property
    def starts_servers(self) -> bool:
        """Whether the router starts servers itself, not only uses running ones."""
        return self.discovers or any(instance.url is None for instance in self.instances)

    @model_validator(mode="after")
    def _has_unique_instances(self) -> Self:
        if not self.discovers and not self.instances:
            raise ValueError("discover is false and instances is empty: declare an instance or set discover: true")
        for field in ("name", "url"):
            values = [value for instance in self.instances if (value := getattr(instance, field)) is not None]
            duplicate = next((value for at, value in enumerate(values) if value in values[:at]), None)
            if duplicate is not None:
                raise ValueError(f"two instances have the {field} {duplicate!r}: give each its own")
        return self

    @model_validator(mode="after")
    def _has_the_engines_of_its_models(self) -> Self:
        for name, rules in self.models.items():
            if rules.engine is None:
                continue
            if rules.engine not in self.engines:
                there = ", ".join(sorted(self.engines)) or "none"
                raise ValueError(f"models.{name}.engine: {rules.engine!r} is not in engines; there are: {there}")
            if name == ANY_MODEL:
                raise ValueError("models.*.engine: each model with an engine needs an entry of its own")
        return self

    @model_validator(mode="after")
    def _has_valid_model_names(self) -> Self:
        fallback_names = [name for fallback in self.fallbacks.values() for name in fallback.to]
        _check_names("models", self.models)
        for instance in self.instances:
            _check_names(f"instances: {instance.name or instance.url}: models", instance.models)
            _check_spellings(f"instances: {instance.name or instance.url}: models", instance.models)
        _check_names("fallbacks", [*self.fallbacks, *fallback_names])
        _check_names("aliases", [*self.aliases, *self.aliases.values()])
        _check_spellings("models", self.models)
        _check_spellings("fallbacks", self.fallbacks)
        _check_spellings("aliases", self.aliases)
        aliases = {canonical(name) for name in self.aliases if name != ANY_MODEL}
        chained = next((name for name, target in self.aliases.items() if canonical(target) in aliases), None)
        if chained is not None:
            raise ValueError(f"aliases: {chained!r} points to another alias: name the model itself")
        return self


def _check_names(key: str, names: Iterable[str]) -> None:
    """Raises ValueError for the first name that is not a valid model name for Ollama."""
    for name in names:
        try:
            rule_key(name)
        except ValueError as error:
            raise ValueError(f"{key}: {error}: write the name as `ollama list` shows it") from error


def _check_spellings(key: str, entries: Mapping[str, object]) -> None:
    """Raises ValueError for two entries of one model that differ: only one of them would apply."""
    first: dict[str, str] = {}
    for name, entry in entries.items():
        earlier = first.setdefault(rule_key(name), name)
        if entries[earlier] != entry:
            raise ValueError(
                f"{key}: {earlier!r} and {name!r} are two spellings of one model with different values: keep one entry"
            )


def load_settings(
    config: Path | None,
    environment: Mapping[str, str],
    overrides: Mapping[str, object] | None = None,
    *,
    may_be_blank: bool = True,
) -> Settings:
    """Reads and checks the whole configuration.

    `overrides` are flags by dotted key (`server.port`); None is a flag that was not given.

    Raises:
        ConfigError: one sentence for each problem: the key, its value, where it was set and what would be right.
        BlankFile: the file has no keys, and may not be so.
    """
    read_sources = _sources(config, environment, overrides, may_be_blank=may_be_blank)

    class LoadedSettings(Settings):
        sources = read_sources

    try:
        loaded = LoadedSettings()
    except ValidationError as error:
        raise ConfigError(explain(error, Settings, _origins(read_sources))) from error
    return _with_home(loaded, environment)


def key_origins(
    config: Path | None, environment: Mapping[str, str], overrides: Mapping[str, object] | None = None
) -> dict[str, str]:
    """Where each key that is set gets its value, by dotted key.

    Raises:
        ConfigError: a source cannot be read.
    """
    return _origins(_sources(config, environment, overrides))


_Sources = tuple[FlagSource | EnvironmentSource | FileSource, ...]


def _sources(
    config: Path | None,
    environment: Mapping[str, str],
    overrides: Mapping[str, object] | None,
    *,
    may_be_blank: bool = True,
) -> _Sources:
    """Highest priority first."""
    file = () if config is None else (FileSource(Settings, config, may_be_blank=may_be_blank),)
    return (FlagSource(Settings, overrides or {}), EnvironmentSource(Settings, environment), *file)


def _origins(sources: _Sources) -> dict[str, str]:
    origins: dict[str, str] = {}
    for source in reversed(sources):
        origins.update(source.origins)
    return origins


def _with_home(loaded: Settings, environment: Mapping[str, str]) -> Settings:
    """The settings with `~` replaced by $HOME of the given environment, so that nothing later asks the process."""
    home = home_of(environment)
    state_home = environment.get("XDG_STATE_HOME")
    state = loaded.state_directory
    if state_home and "state_directory" not in loaded.model_fields_set:
        state = Path(state_home, "llamayard")
    server, ollama = loaded.server, loaded.ollama
    paths: dict[str, object] = {
        "state_directory": absolute(state, home),
        "instances": tuple(
            each.model_copy(update={"api_key_file": each.api_key_file and absolute(each.api_key_file, home)})
            for each in loaded.instances
        ),
        "server": server.model_copy(
            update={
                "tls_certificate": server.tls_certificate and absolute(server.tls_certificate, home),
                "tls_key": server.tls_key and absolute(server.tls_key, home),
                "keys_file": server.keys_file and absolute(server.keys_file, home),
            }
        ),
        "ollama": ollama.model_copy(
            update={"models": absolute(ollama.models, home), "binary": expanded(ollama.binary, home)}
        ),
    }
    return Settings.model_construct(loaded.model_fields_set, **{**dict(loaded), **paths})
