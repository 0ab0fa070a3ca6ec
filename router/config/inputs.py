"""What the configuration is read from: file, environment and home. The only product code that reads the environment.

Imports nothing that checks values, so that a command which needs a few of them starts quickly.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import yaml
from yaml.constructor import ConstructorError

ENVIRONMENT_PREFIX = "LLAMAYARD_"
NOT_SETTINGS = frozenset(
    f"{ENVIRONMENT_PREFIX}{name}"
    for name in ("API_KEY", "INSTANCE", "STATE", "RIG_DIR", "RIG_VERSION", "RIG_SPEED", "TEST_OLLAMA")
)
"""Variables that have the prefix but are no settings: set for child processes, or read by commands, the
emulator or tests."""

Tree = dict[str, Any]


class ConfigError(Exception):
    """The configuration cannot be used; `problems` has one sentence for each wrong key."""

    def __init__(self, problems: list[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


class BlankFile(ConfigError):
    """The file of the configuration holds no keys, not even `{}`."""


def find_config(given: Path | None, directory: Path) -> Path | None:
    """The given file, else `llamayard.yaml` in the directory, else `/etc/llamayard/config.yaml`, else None."""
    default_paths = (directory / "llamayard.yaml", Path("/etc/llamayard/config.yaml"))
    return given or next((path for path in default_paths if path.is_file()), None)


def process_environment() -> dict[str, str]:
    """The environment of this process: what children inherit, and the source of `LLAMAYARD_*` keys."""
    return dict(os.environ)  # noqa: TID251 - the one place


def home_of(environment: Mapping[str, str]) -> str:
    """The user's home directory."""
    return environment.get("HOME") or str(Path.home())


def absolute(path: Path, home: str) -> Path:
    """The path with a leading `~` replaced by `home`."""
    return Path(expanded(str(path), home))


def expanded(path: str, home: str) -> str:
    """The same for a path as text, such as the name of a program."""
    return home + path[1:] if path == "~" or path.startswith("~/") else path


class YamlLoader(yaml.SafeLoader):
    """YAML in which a duplicate key is an error; by default the last one wins silently."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        pairs = cast("list[tuple[yaml.Node, yaml.Node]]", node.value)
        keys = [key.value for key, _ in pairs if isinstance(key, yaml.ScalarNode)]
        duplicate = next((key for at, key in enumerate(keys) if key in keys[:at]), None)
        if duplicate is not None:
            raise ConstructorError(None, None, f"the key {duplicate!r} is given twice", node.start_mark)
        return super().construct_mapping(node, deep=deep)

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        """PyYAML lets the errors of Python's own constructors through, as of `!!int x`."""
        try:
            value = cast("object", super().construct_object(node, deep=deep))  # pyright: ignore[reportUnknownMemberType]
        except (ValueError, TypeError, AttributeError, LookupError, ArithmeticError) as error:
            raise ConstructorError(None, None, f"not a value of {node.tag}", node.start_mark) from error
        if isinstance(value, str) and "\0" in value:  # no path, name or variable may have one
            raise ConstructorError(None, None, "a text with a NUL character", node.start_mark)
        return value


def read_yaml(path: Path, *, may_be_blank: bool = True) -> Tree:
    """The mapping in a YAML file; empty for an empty file, or one with comments only.

    Raises:
        BlankFile: it is such a file, and may not be.
        ConfigError: the file cannot be read, is not YAML, or is not a mapping.
    """
    try:
        loaded: object = yaml.load(path.read_text(encoding="utf-8"), YamlLoader)
    except OSError as error:
        raise ConfigError([f"{path}: cannot be read: {error.strerror}"]) from error
    except UnicodeDecodeError as error:
        raise ConfigError([f"{path}: is not UTF-8 text: {error.reason} at byte {error.start}"]) from error
    except yaml.YAMLError as error:
        raise ConfigError([f"{path}: is not valid YAML: {yaml_problem(error)}"]) from error
    except RecursionError as error:
        raise ConfigError([f"{path}: is nested too deeply"]) from error
    if loaded is None and may_be_blank:
        return {}
    if loaded is None:
        raise BlankFile(
            [f"{path}: is empty, or has comments only; write {{}} into it to mean the default of every key"]
        )
    if not isinstance(loaded, dict):
        raise ConfigError([f"{path}: must be a mapping of keys such as `server:`, not a {type(loaded).__name__}"])
    return {str(key): value for key, value in cast("dict[object, object]", loaded).items()}


def yaml_problem(error: yaml.YAMLError) -> str:
    """`line 3, column 7: expected ',' or ']'`, without PyYAML's name of the source and its excerpt."""
    if not isinstance(error, yaml.MarkedYAMLError):
        return " ".join(str(error).split()).replace('"<unicode string>", ', "")
    mark = error.problem_mark or error.context_mark
    place = f"line {mark.line + 1}, column {mark.column + 1}: " if mark is not None else ""
    problem = (error.problem or error.context or "cannot be parsed").replace("<stream end>", "the end of the text")
    return f"{place}{problem}"
