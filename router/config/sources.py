"""Where configuration values come from: a YAML file, the environment and flags, as sources of pydantic-settings.

pydantic-settings merges them; each source here also says which dotted keys it sets and where (`origins`). No source
looks for a file or reads the environment of the process: both are given.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import yaml
from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings, EnvSettingsSource, InitSettingsSource

from router.config.inputs import (
    ENVIRONMENT_PREFIX,
    NOT_SETTINGS,
    ConfigError,
    Tree,
    YamlLoader,
    read_yaml,
    yaml_problem,
)

_Entry = tuple[list[str], object, str]
"""Path of the key, value, origin."""


class FileSource(InitSettingsSource):
    """The values of a YAML file.

    Raises:
        ConfigError: the file cannot be read, is not YAML, or is not a mapping.
        BlankFile: it has no keys, and may not be so.
    """

    def __init__(self, settings_cls: type[BaseSettings], path: Path, *, may_be_blank: bool = True) -> None:
        tree = read_yaml(path, may_be_blank=may_be_blank)
        self.origins = {key: str(path) for key in _paths(tree)}
        super().__init__(settings_cls, init_kwargs=tree)


class _TextSource(EnvSettingsSource):
    """Values by name, nested by a delimiter in the name. Text is parsed as YAML where it is a list or a mapping."""

    def __init__(
        self, settings_cls: type[BaseSettings], prefix: str, delimiter: str, entries: Sequence[_Entry]
    ) -> None:
        self._entries = [(path, _parsed(value, origin), origin) for path, value, origin in entries]
        self._variables = {
            prefix + delimiter.join(path): value for path, value, _ in self._entries if value is not None
        }
        super().__init__(settings_cls, case_sensitive=True, env_prefix=prefix, env_nested_delimiter=delimiter)

    def _load_env_vars(self) -> Mapping[str, Any]:
        return self._variables

    def decode_complex_value(self, field_name: str, field: FieldInfo, value: Any) -> Any:
        """Values are parsed already."""
        del field_name, field
        return value

    def __call__(self) -> Tree:
        """The values as a tree.

        pydantic-settings leaves out nulls and names that are no field. Both are added: null unsets a key, and the
        model refuses a key that it does not have.
        """
        tree = super().__call__()
        for path, value, origin in self._entries:
            _add(tree, path, value, origin)
        return tree


class EnvironmentSource(_TextSource):
    """`LLAMAYARD_SERVER__PORT=1` sets `server.port`.

    The first two segments are lower-cased, as keys are; `LLAMAYARD_OLLAMA__ENV__OLLAMA_DEBUG` keeps the case of its
    third.
    """

    def __init__(self, settings_cls: type[BaseSettings], environment: Mapping[str, str]) -> None:
        entries: list[_Entry] = []
        for name in sorted(environment):
            if name.upper().startswith(ENVIRONMENT_PREFIX) and name not in NOT_SETTINGS:
                segments = name[len(ENVIRONMENT_PREFIX) :].split("__")
                path = [segment.lower() for segment in segments[:2]] + segments[2:]
                entries.append((path, environment[name], f"environment {name}"))
        self.origins = {".".join(path): origin for path, _, origin in entries}
        super().__init__(settings_cls, ENVIRONMENT_PREFIX, "__", entries)


class FlagSource(_TextSource):
    """Flags by dotted key (`server.port`); None is a flag that was not given."""

    def __init__(self, settings_cls: type[BaseSettings], flags: Mapping[str, object]) -> None:
        entries: list[_Entry] = [
            (key.split("."), value, f"flag {key}") for key, value in flags.items() if value is not None
        ]
        self.origins = {".".join(path): "flag" for path, _, _ in entries}
        super().__init__(settings_cls, "", ".", entries)


def _parsed(value: object, origin: str) -> object:
    """Text that opens a list or a mapping is parsed as YAML and `null` is None; other text is left to the model."""
    if not isinstance(value, str):
        return value
    if value.strip() == "null":
        return None
    if value.lstrip()[:1] not in ("[", "{"):
        return value
    try:
        return cast("object", yaml.load(value, YamlLoader))
    except yaml.YAMLError as error:
        raise ConfigError([f"{origin}: is not a YAML list or mapping: {value!r}: {yaml_problem(error)}"]) from error
    except RecursionError as error:
        raise ConfigError([f"{origin}: is nested too deeply"]) from error


def _add(tree: Tree, path: Sequence[str], value: object, origin: str) -> None:
    """Sets the value of a path that the tree does not have.

    Raises:
        ConfigError: a part of the path, or null and parts of the same key, are set at the same time.
    """
    *parents, last = path
    for at, parent in enumerate(parents):
        inner = tree.setdefault(parent, {})
        if not isinstance(inner, dict):
            raise ConfigError([f"{origin}: {'.'.join(path[: at + 1])} is already given as a whole"])
        tree = cast("Tree", inner)
    if value is None and tree.get(last) is not None:
        raise ConfigError([f"{origin}: unsets {'.'.join(path)}, but parts of it are given as well"])
    tree.setdefault(last, value)


def _paths(tree: Mapping[Any, Any], prefix: str = "") -> Iterator[str]:
    """Dotted keys of all values in a tree."""
    for key, value in tree.items():
        dotted = f"{prefix}{key}"
        if isinstance(value, dict) and value:
            yield from _paths(cast("Tree", value), f"{dotted}.")
        else:
            yield dotted
