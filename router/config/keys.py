"""The names of configuration keys, read from the pydantic models: all of them, and those that were renamed.

A dotted key is the path to a value: `server.port`. Reads no value and checks none.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import UnionType
from typing import Annotated, Any, Union, cast, get_args, get_origin

from annotated_types import Ge, Gt, Le
from pydantic import BaseModel
from pydantic.fields import FieldInfo

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


@dataclass(frozen=True, slots=True)
class Bounds:
    """What a number must be."""

    is_whole: bool = False
    unit: str = ""
    """`seconds`, `bytes` or nothing."""
    minimum: float | None = None
    above: float | None = None
    maximum: float | None = None

    def text(self) -> str:
        """`whole number from 0 to 65535`, `number of more than 0 and at most 3600 seconds`."""
        kind = "whole number" if self.is_whole else "number"
        unit = f" {self.unit}" if self.unit else ""
        most = "" if self.maximum is None else f" and at most {self.maximum:.15g}"
        if self.minimum is not None and self.maximum is not None:
            return f"{kind} from {self.minimum:.15g} to {self.maximum:.15g}{unit}"
        if self.above is not None:
            return f"{kind} of more than {self.above:.15g}{most}{unit}"
        if self.minimum is not None:
            return f"{kind} of at least {self.minimum:.15g}{unit}"
        return f"{kind} of{unit}" if unit else kind


def bounds_at(location: Sequence[int | str], settings: type[BaseModel]) -> Bounds:
    """The bounds of the number at a location such as `("server", "port")`; none if it is no field."""
    names = [part for part in location if isinstance(part, str)]
    info = _section_at(location[:-1], settings).model_fields.get(names[-1]) if names else None
    if info is None:
        return Bounds()
    metadata = list(metadata_of(info))
    return Bounds(
        is_whole=holds_int(info.annotation),
        unit=next((unit for unit in ("seconds", "bytes") if names[-1].endswith(f"_{unit}")), ""),
        minimum=next((cast("float", item.ge) for item in metadata if isinstance(item, Ge)), None),
        above=next((cast("float", item.gt) for item in metadata if isinstance(item, Gt)), None),
        maximum=next((cast("float", item.le) for item in metadata if isinstance(item, Le)), None),
    )


def metadata_of(info: FieldInfo) -> Iterator[Any]:
    """Metadata of a field, also that of `X` in `X | None`."""
    parts = [inner for part in get_args(info.annotation) for inner in getattr(part, "__metadata__", ())]
    for item in (*info.metadata, *parts):
        yield from getattr(item, "metadata", None) or (item,)


def holds_int(annotation: object) -> bool:
    """Whether the type is int, or int with metadata or null."""
    if annotation is int:
        return True
    return get_origin(annotation) in (Annotated, Union, UnionType) and any(map(holds_int, get_args(annotation)))


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
