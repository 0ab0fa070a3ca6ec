"""Configuration as a tree of plain values: reading YAML, environment and flags, merging them, finding wrong keys.

Knows the shape of the configuration only through the pydantic model that it is given. It reads no file's default
place and no process environment, and it does not check values: the model does.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import UnionType
from typing import Any, Union, cast, get_args, get_origin

import yaml
from pydantic import BaseModel
from yaml.constructor import ConstructorError

Tree = dict[str, Any]


class ConfigError(Exception):
    """The configuration cannot be used; `problems` has one sentence for each key that is wrong."""

    def __init__(self, problems: list[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


@dataclass(frozen=True, slots=True)
class Layer:
    """Values from one place. `origins` names that place for each dotted key, in the words a message uses."""

    tree: Tree = field(default_factory=dict[str, Any])
    origins: Mapping[str, str] = field(default_factory=dict[str, str])


class _Loader(yaml.SafeLoader):
    """YAML in which a key given twice is an error: the loser would be ignored without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        pairs = cast("list[tuple[yaml.Node, yaml.Node]]", node.value)
        keys = [key.value for key, _ in pairs if isinstance(key, yaml.ScalarNode)]
        twice = next((key for at, key in enumerate(keys) if key in keys[:at]), None)
        if twice is not None:
            raise ConstructorError(None, None, f"the key {twice!r} is given twice", node.start_mark)
        return super().construct_mapping(node, deep=deep)


def file_layer(path: Path) -> Layer:
    """The values of a YAML file.

    Raises:
        ConfigError: it cannot be read, is not YAML, or is not a mapping.
    """
    try:
        loaded: object = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except OSError as error:
        raise ConfigError([f"{path}: cannot be read: {error.strerror}"]) from error
    except UnicodeDecodeError as error:
        raise ConfigError([f"{path}: is not UTF-8 text: {error.reason} at byte {error.start}"]) from error
    except yaml.YAMLError as error:
        raise ConfigError([f"{path}: is not valid YAML: {' '.join(str(error).split())}"]) from error
    if loaded is None:
        return Layer()
    if not isinstance(loaded, dict):
        raise ConfigError([f"{path}: must be a mapping of keys such as `server:`, not a {type(loaded).__name__}"])
    tree = cast("Tree", loaded)
    return Layer(tree, {key: str(path) for key in _paths(tree)})


def environment_layer(environment: Mapping[str, str], prefix: str, ignored: frozenset[str]) -> Layer:
    """`PREFIX_SERVER__PORT=1` -> `server.port`.

    The two leading segments are lower-cased, as keys are; what follows (`…OLLAMA__ENV__OLLAMA_DEBUG`) keeps its case.
    """
    tree: Tree = {}
    origins: dict[str, str] = {}
    for name in sorted(environment):
        if name.upper().startswith(prefix) and name not in ignored:
            segments = name[len(prefix) :].split("__")
            path = [segment.lower() for segment in segments[:2]] + segments[2:]
            origin = f"environment {name}"
            _put(tree, path, _value(environment[name], origin), origin)
            origins[".".join(path)] = origin
    return Layer(tree, origins)


def flag_layer(flags: Mapping[str, object]) -> Layer:
    """Flags by dotted key (`server.port`). A None is a flag that was not given; text is read as in the environment."""
    tree: Tree = {}
    origins: dict[str, str] = {}
    for dotted, given in flags.items():
        if given is not None:
            value = _value(given, f"flag {dotted}") if isinstance(given, str) else given
            _put(tree, dotted.split("."), value, f"flag {dotted}")
            origins[dotted] = "flag"
    return Layer(tree, origins)


def merge(layers: list[Layer]) -> Layer:
    """One tree of all; a later layer wins key by key, and lists are replaced whole."""
    tree: Tree = {}
    origins: dict[str, str] = {}
    for layer in layers:
        tree = _merged(tree, layer.tree)
        origins.update(layer.origins)
    return Layer(tree, origins)


def unknown_keys(tree: Mapping[str, Any], model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """One sentence for each key that the model does not have, with the nearest one that it has."""
    known = list(model.model_fields)
    for key, value in tree.items():
        name = str(key)
        if key not in known:
            yield f"{prefix}{name}: unknown key; {_nearest(name, known, model, prefix)}"
            continue
        section, in_list = section_of(model.model_fields[name].annotation)
        named = named_section_of(model.model_fields[name].annotation)
        if named is not None and isinstance(value, Mapping):
            for own, item in cast("Mapping[str, object]", value).items():
                if isinstance(item, Mapping):
                    yield from unknown_keys(cast("Mapping[str, Any]", item), named, f"{prefix}{name}.{own}.")
        elif section is not None and not in_list and isinstance(value, Mapping):
            yield from unknown_keys(cast("Mapping[str, Any]", value), section, f"{prefix}{name}.")
        elif section is not None and in_list and isinstance(value, list | tuple):
            for at, item in enumerate(cast("list[object]", value)):
                if isinstance(item, Mapping):
                    yield from unknown_keys(cast("Mapping[str, Any]", item), section, f"{prefix}{name}.{at}.")


def without_unset(tree: Mapping[str, Any], model: type[BaseModel]) -> Tree:
    """The tree without nulls that stand for no value, such as a section whose keys are all commented out."""
    result: Tree = {}
    for key, value in tree.items():
        annotation = model.model_fields[key].annotation if key in model.model_fields else None
        if value is None and type(None) not in get_args(annotation):
            continue
        section, in_list = section_of(annotation)
        nested = section is not None and not in_list and isinstance(value, Mapping)
        result[key] = without_unset(cast("Tree", value), section) if nested and section is not None else value
    return result


def section_of(annotation: object) -> tuple[type[BaseModel] | None, bool]:
    """The model that a field holds, if it holds one, and whether it holds a list of them."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation, False
    origin = get_origin(annotation)
    if origin in (tuple, list, Union, UnionType):
        for part in get_args(annotation):
            section, _ = section_of(part)
            if section is not None:
                return section, origin in (tuple, list)
    return None, False


def named_section_of(annotation: object) -> type[BaseModel] | None:
    """The model of each entry, where a field holds a mapping of them by names of the user's own."""
    return section_of(get_args(annotation)[1])[0] if get_origin(annotation) is dict else None


def dotted_keys(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Every key of the model by its dotted name, in the order of declaration; a list or mapping counts as one key."""
    for name, info in model.model_fields.items():
        section, in_list = section_of(info.annotation)
        if section is not None and not in_list:
            yield from dotted_keys(section, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


def origin_of(dotted: str, origins: Mapping[str, str]) -> str | None:
    """Where a key's value was given; None: nowhere, so it is the default."""
    found = [origin for key, origin in origins.items() if key == dotted or key.startswith(f"{dotted}.")]
    return ", ".join(dict.fromkeys(found)) or None


def _nearest(name: str, known: list[str], model: type[BaseModel], prefix: str) -> str:
    near = difflib.get_close_matches(name.lower(), known, n=1)
    if near:
        return f"did you mean `{prefix}{near[0]}`?"
    if not prefix:
        elsewhere = list(dotted_keys(model))
        last = {key.rpartition(".")[2]: key for key in elsewhere}
        near = difflib.get_close_matches(name.lower(), [*last, *elsewhere], n=1)
        if near:
            return f"did you mean `{last.get(near[0], near[0])}`?"
    return f"known here are {', '.join(known)}"


def _value(text: str, origin: str) -> object:
    """Text that opens a list or mapping is read as YAML, `null` as nothing; all else stays text for the model."""
    if text.strip() == "null":
        return None
    if text.lstrip()[:1] not in ("[", "{"):
        return text
    try:
        return cast("object", yaml.load(text, _Loader))
    except yaml.YAMLError as error:
        raise ConfigError([f"{origin}: is not a YAML list or mapping: {' '.join(str(error).split())}"]) from error


def _put(tree: Tree, path: list[str], value: object, origin: str) -> None:
    *parents, last = path
    for parent in parents:
        inner = tree.setdefault(parent, {})
        if not isinstance(inner, dict):
            raise ConfigError([f"{origin}: {parent} is given as a whole already"])
        tree = cast("Tree", inner)
    tree[last] = value


def _merged(below: Tree, above: Tree) -> Tree:
    result = dict(below)
    for key, value in above.items():
        old: object = result.get(key)
        if isinstance(value, dict) and isinstance(old, dict):
            result[key] = _merged(cast("Tree", old), cast("Tree", value))
        else:
            result[key] = value
    return result


def _paths(tree: Mapping[Any, Any], prefix: str = "") -> Iterator[str]:
    for key, value in tree.items():
        dotted = f"{prefix}{key}"
        if isinstance(value, dict) and value:
            yield from _paths(cast("Tree", value), f"{dotted}.")
        else:
            yield dotted
