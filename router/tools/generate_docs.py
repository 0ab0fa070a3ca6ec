"""Writes the documents that are drawn from code: `python -m router.tools.generate_docs` in the project's folder.

docs/configuration.md and config/llamayard.example.yaml from the settings, docs/instances.md from the lifecycle table,
docs/routes.md from the table of routes.
It holds no fact of its own about a key or a state; a test fails when a written file differs from what this gives.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, cast, get_args, get_origin

import yaml
from annotated_types import Ge, Gt, Le
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from router.config.keys import named_section_of, section_of
from router.config.parsing import bytes_text
from router.config.settings import ENVIRONMENT_PREFIX, RESERVED_VARIABLES, InstanceSettings, Settings
from router.domain.instance_lifecycle import state_diagram
from router.llm_api.routes import KIND_WORDS, ROUTES, Kind

_WIDTH = 116
_SAMPLES: Mapping[str, object] = {
    "server.tls_certificate": "/etc/llamayard/certificate.pem",
    "server.tls_key": "/etc/llamayard/key.pem",
    "ollama.flash_attention": True,
    "discover": True,
    "rig": "2x3090",
}
"""What the example file shows, commented out, for keys whose default is to be unset."""

_NAMED_SAMPLES = {
    "ollama.env": '{OLLAMA_DEBUG: "1"}',
    "ollama.instance_env": '{spread: {OLLAMA_GPU_OVERHEAD: "0"}}',
    "models": "{qwen3:8b: {options: pass}}",
    "aliases": "{gpt-4o: llama3.3:70b}",
    "fallbacks": "{llama3.3:70b: {to: [qwen3:8b], reasons: [too_large, queue_full]}}",
}
"""What the example file shows behind mappings, which are empty by default."""

_INSTANCE_SAMPLES = """\
# instances:
#   - name: a                         # spawned, on two GPUs
#     gpus: [GPU-0a0a0a0a-0a0a-0a0a-0a0a-0a0a0a0a0a0a, GPU-1b1b1b1b-1b1b-1b1b-1b1b-1b1b1b1b1b1b]
#     num_parallel: 4
#   - name: b                         # spawned, without a GPU
#     gpus: []
#   - url: http://127.0.0.1:11500     # attached: something else runs it
#     gpus: ["1"]
"""


def documents() -> dict[str, str]:
    """Every generated document: its path in the project and its whole text."""
    return {
        "docs/configuration.md": configuration_document(),
        "config/llamayard.example.yaml": example_file(),
        "docs/instances.md": instances_document(),
        "docs/routes.md": routes_document(),
    }


def configuration_document() -> str:
    """Each key with its type, bounds, default, environment variable and reason, as Markdown."""
    lines = [
        "# Configuration",
        "",
        "<!-- Written by `make docs` from router/config/settings.py; change it there. -->",
        "",
        "Every key can stand in a YAML file (`--config FILE`, else `llamayard.yaml` in the working folder, else",
        "`/etc/llamayard/config.yaml`), in the environment, or in a flag (`--set key=value`; `--host`, `--port` and",
        "`--rig` have their own). A flag wins over the environment, and that over the file. In the environment and in",
        "`--set`, lists and mappings are written as YAML (`[a, b]`, `{NAME: value}`), `null` unsets a key, and one",
        f"entry of a mapping has a name of its own: `{ENVIRONMENT_PREFIX}OLLAMA__ENV__OLLAMA_DEBUG=1`.",
        "",
        "An unknown key is refused, with the nearest one that exists. `llamayard check-config` shows every key's",
        "effective value and where it comes from. Bytes may carry a unit (`512MiB`, `2GB`); durations are seconds.",
        "",
    ]
    lines += _section_lines("General", "", Settings, "Keys without a section.")
    for name, info in Settings.model_fields.items():
        section, in_list = section_of(info.annotation)
        if section is not None and not in_list:
            lines += _section_lines(name, f"{name}.", section, (section.__doc__ or "").strip())
    lines += _section_lines("instances[]", "instances[].", InstanceSettings, (InstanceSettings.__doc__ or "").strip())
    for name, info in Settings.model_fields.items():
        named = named_section_of(info.annotation)
        if named is not None:
            lines += _section_lines(f"{name}.NAME", f"{name}.NAME.", named, (named.__doc__ or "").strip())
    lines += ["## Variables that cannot be set", ""]
    lines += ["In `ollama.env`, `ollama.instance_env` and `instances[].env`:", ""]
    lines += [f"- `{name}`: {reason}." for name, reason in RESERVED_VARIABLES.items()]
    return "\n".join(lines) + "\n"


def example_file() -> str:
    """A configuration file that holds every key at its default, each with its reason."""
    lines = [
        "# Every configuration key with its default and its reason. Keep only the lines that you change.",
        "# Written by `make docs` from router/config/settings.py. Use: llamayard serve --config FILE",
    ]
    for name, info in Settings.model_fields.items():
        section, in_list = section_of(info.annotation)
        if section is None or in_list:
            lines += ["", *_example_lines(name, name, info, "")]
            continue
        lines += ["", *_comment((section.__doc__ or "").strip(), ""), f"{name}:"]
        for key, inner in section.model_fields.items():
            lines += _example_lines(f"{name}.{key}", key, inner, "  ")
    return "\n".join(lines) + "\n"


def instances_document() -> str:
    """The life of an instance as a diagram of the table that the supervisor obeys."""
    return (
        "# The life of an instance\n\n"
        "<!-- Written by `make docs` from the table in router/domain/instance_lifecycle.py; change it there. -->\n\n"
        "Each `ollama serve` that the router runs is in one of these states, and moves only as drawn. A server is\n"
        "READY once `/api/version` answers and, where GPUs are expected, it has reported them; after repeated quick\n"
        "deaths it is FATAL and its last log lines stand in the reason that `llamayard status` shows.\n\n"
        f"```mermaid\n{state_diagram().strip()}\n```\n"
    )


def routes_document() -> str:
    """Every path that the router answers, and how."""
    lines = [
        "# Routes",
        "",
        "<!-- Written by `make docs` from router/llm_api/routes.py; change it there. -->",
        "",
        "What is not listed is 404, as an Ollama server answers an unknown path; another method is 405. What the",
        "servers' version lacks is their own 404, but that `/v1/responses` and `/v1/messages` are refused in the form",
        "of their API, with the version. `*` is one more segment; after `/v1/models/` a whole name with its slashes.",
        "[clients.md](clients.md) says which clients were tried, and which headers the router reads and writes.",
        "",
    ]
    for kind in Kind:
        lines += [f"## {kind.value.capitalize()}", "", f"{_sentence(KIND_WORDS[kind])}", "", "| methods | path |"]
        lines += ["|---|---|"]
        lines += [f"| {', '.join(route.methods)} | `{route.path}` |" for route in ROUTES if route.kind is kind]
        lines += [""]
    return "\n".join(lines).rstrip() + "\n"


def _sentence(words: str) -> str:
    return words[:1].upper() + words[1:] + "."


def main() -> int:
    """Writes each document that has changed into the current folder and names it."""
    for path, text in documents().items():
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        if not target.is_file() or target.read_text(encoding="utf-8") != text:
            target.write_text(text, encoding="utf-8")
            sys.stdout.write(f"wrote {path}\n")
    return 0


def _section_lines(title: str, prefix: str, model: type[BaseModel], words: str) -> list[str]:
    rows = list(_rows(prefix, model))
    return [f"## {title}", "", words, "", "| key | type | default | why |", "|---|---|---|---|", *rows, ""]


def _rows(prefix: str, model: type[BaseModel]) -> Iterator[str]:
    for name, info in model.model_fields.items():
        section, in_list = section_of(info.annotation)
        if section is not None and not in_list:
            continue
        key, variable = f"`{prefix}{name}`", f"{ENVIRONMENT_PREFIX}{prefix}{name}".upper().replace(".", "__")
        cell = key if "[]" in prefix or ".NAME." in prefix else f"{key}<br>`{variable}`"
        kind = "list, see below" if in_list else kind_of(name, info)
        kind = "mapping, see below" if named_section_of(info.annotation) is not None else kind
        yield f"| {cell} | {kind} | {_default_words(name, info)} | {info.description} |".replace("*", "\\*")


def kind_of(name: str, info: FieldInfo) -> str:
    """Type and bounds of a field in words."""
    kind = "bytes" if name.endswith("_bytes") else _type_words(info.annotation)
    kind = "seconds" if name.endswith("_seconds") and kind == "number" else kind
    kind = "duration" if name == "keep_alive" else kind
    bounds = _bounds([*info.metadata, *_nested_metadata(info.annotation)])
    return f"{kind}, {bounds}" if bounds else kind


def _type_words(annotation: object) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _type_words(arguments[0])
    if origin in (Union, UnionType):
        return " or ".join(_type_words(part) for part in arguments if part is not NoneType)
    if origin is Literal:
        return " or ".join(f"`{value}`" for value in arguments)
    if origin is tuple:
        return "list of text"
    if origin is dict:
        if named_section_of(annotation) is not None:
            return "mapping"
        return "mapping of mappings" if get_origin(arguments[1]) is Annotated else "mapping of text"
    names: dict[object, str] = {str: "text", int: "whole number", float: "number", bool: "`true` or `false`"}
    return names.get(annotation, "path")


def _nested_metadata(annotation: object) -> list[Any]:
    """Metadata of the `X` in `X | None`."""
    return [item for part in get_args(annotation) for item in getattr(part, "metadata", ())]


def _bounds(metadata: list[Any]) -> str:
    nested = [inner for item in metadata for inner in cast("list[object]", getattr(item, "metadata", [item]))]
    words: list[str] = []
    for item in nested:
        match item:
            case Ge(ge=value):
                words.append(f"≥ {value}")
            case Gt(gt=value):
                words.append(f"> {value}")
            case Le(le=value):
                words.append(f"≤ {value}")
            case _:
                pass
    return ", ".join(words)


def _default(info: FieldInfo) -> object:
    return info.get_default(call_default_factory=True, validated_data={})


def _plain(value: object) -> object:
    if isinstance(value, tuple):
        return list(cast("tuple[object, ...]", value))
    return str(value) if isinstance(value, Path) else value


def _long_list(value: object) -> list[object] | None:
    """The value where it is a list that needs lines of its own."""
    items = cast("list[object]", value) if isinstance(value, list) else []
    return items if len(items) > 6 else None


def _default_words(name: str, info: FieldInfo) -> str:
    if info.is_required():
        return "must be given"
    value = _plain(_default(info))
    if value is None:
        return "unset"
    if name.endswith("_bytes"):
        return f"`{bytes_text(cast('int', value))}`"
    if _long_list(value):
        return "Ollama's own: localhost, 127.0.0.1 and 0.0.0.0 with any port, app, file, tauri and vscode origins"
    return f"`{_yaml(value)}`"


def _yaml(value: object) -> str:
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    text = yaml.safe_dump(value, default_flow_style=True, width=10_000)
    return text.removesuffix("...\n").strip()


def _example_lines(dotted: str, key: str, info: FieldInfo, indent: str) -> list[str]:
    lines = _comment(f"{info.description} [{kind_of(key, info)}]", indent) if dotted != "instances" else []
    if dotted == "instances":
        return [*_comment(str(info.description), ""), "instances: []", _INSTANCE_SAMPLES.rstrip()]
    value = _plain(_default(info))
    if value is None:
        return [*lines, f"{indent}# {key}: {_yaml(_SAMPLES[dotted])}"]
    if items := _long_list(value):
        return [*lines, f"{indent}{key}:", *(f"{indent}  - {_yaml(item)}" for item in items)]
    text = bytes_text(cast("int", value)) if key.endswith("_bytes") else _yaml(value)
    sample = f"   # e.g. {_NAMED_SAMPLES[dotted]}" if dotted in _NAMED_SAMPLES else ""
    return [*lines, f"{indent}{key}: {text}{sample}"]


def _comment(text: str, indent: str) -> list[str]:
    lines: list[str] = []
    current = ""
    for word in text.replace("`", "").split():
        if current and len(indent) + len(current) + len(word) + 3 > _WIDTH:
            lines.append(f"{indent}# {current}")
            current = word
        else:
            current = f"{current} {word}".strip()
    return [*lines, f"{indent}# {current}"]


if __name__ == "__main__":
    raise SystemExit(main())
