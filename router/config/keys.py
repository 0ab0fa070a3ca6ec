"""The names of configuration keys, read from the pydantic models: all of them, and those that were renamed.

A dotted key is the path to a value: `server.port`. Reads no value and checks none.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from types import UnionType
from typing import Union, get_args, get_origin

from pydantic import BaseModel

RENAMED_KEYS: Mapping[str, str] = {
    "placement.loads_at_once": "placement.concurrent_loads_max",
    "placement.patience_seconds": "placement.ttft_target_seconds",
}
"""Old dotted key -> new dotted key. An old key is refused with its new name."""


def dotted_keys(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Every key of the model in the order of declaration; a list or a mapping counts as one key."""
    for name, info in model.model_fields.items():
        section, in_list = section_of(info.annotation)
        if section is not None and not in_list:
            yield from dotted_keys(section, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


def section_of(annotation: object) -> tuple[type[BaseModel] | None, bool]:
    """The model that a field holds, if any, and whether the field holds a list of them."""
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
    """The model of each entry of a mapping with names of the user's choice, such as `models`; None for other fields."""
    return section_of(get_args(annotation)[1])[0] if get_origin(annotation) is dict else None


def accepts_null(annotation: object) -> bool:
    """Whether null is a value of the field; elsewhere null unsets the key."""
    return type(None) in get_args(annotation)


def nearest_key(location: Sequence[int | str], settings: type[BaseModel]) -> str:
    """What to write instead of the unknown key at a location such as `("server", "prot")`: a clause for a message."""
    *parents, name = location
    prefix = "".join(f"{part}." for part in parents)
    section = _section_at(parents, settings)
    keys = list(section.model_fields)
    near = difflib.get_close_matches(str(name).lower(), keys, n=1)
    if near:
        return f"did you mean `{prefix}{near[0]}`?"
    if not parents:
        everywhere = list(dotted_keys(settings))
        by_last_part = {key.rpartition(".")[2]: key for key in everywhere}
        near = difflib.get_close_matches(str(name).lower(), [*by_last_part, *everywhere], n=1)
        if near:
            return f"did you mean `{by_last_part.get(near[0], near[0])}`?"
    return f"valid keys here are {', '.join(keys)}"


def _section_at(location: Sequence[int | str], model: type[BaseModel]) -> type[BaseModel]:
    """`("instances", 0)` -> InstanceSettings. List positions and names of the user's choice are passed over."""
    for part in location:
        info = model.model_fields.get(part) if isinstance(part, str) else None
        if info is not None:
            model = section_of(info.annotation)[0] or named_section_of(info.annotation) or model
    return model
