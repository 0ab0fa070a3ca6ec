"""Lists, descriptions and changes of the EMULATED server's models: tags, ps, show, copy, delete, blobs, create."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

from router.domain.model_names import Name
from router.lab.emulator.config import now_text
from router.lab.emulator.context import Service
from router.lab.emulator.go_json import dump
from router.lab.emulator.http_server import Request, Response
from router.lab.emulator.model_facts import architecture, number
from router.lab.emulator.response_writer import JSON, NDJSON, PLAIN_JSON, ApiError
from router.lab.emulator.store import (
    LICENSE,
    MESSAGES,
    MODEL,
    PARAMETERS,
    SYSTEM,
    TEMPLATE,
    Layer,
    Stored,
    config_of,
)

_NAME = {"model": "string", "name": "string"}
_CREATE = {**_NAME, "from": "string", "files": "map", "template": "string", "system": "string", "license": "any",
           "parameters": "map", "messages": "slice", "stream": "bool", "quantize": "string"}  # fmt: skip
_DIGEST = re.compile(r"sha256[:-][0-9a-fA-F]{64}")


class Progress:
    """Lines of a long change: a stream, or only the last one."""

    def __init__(self, service: Service, response: Response, streams: bool) -> None:
        self._response = response
        self._streams = streams
        self._is_old = service.config.is_old

    async def say(self, **fields: Any) -> None:
        """One line, such as `status="writing manifest"`."""
        if self._streams:
            await self._response.chunk(dump(fields) + b"\n", NDJSON)

    async def fail(self, status: int, message: str) -> None:
        if self._response.begun or (self._streams and self._is_old):
            await self.say(error=message)
        elif self._streams:
            await self._response.chunk(dump({"error": message}), PLAIN_JSON, status)
        else:
            self._response.whole(status, dump({"error": message}), PLAIN_JSON)

    async def succeed(self) -> None:
        if self._streams:
            await self.say(status="success")
        else:
            self._response.whole(200, dump({"status": "success"}), PLAIN_JSON)


def asked_name(body: Mapping[str, Any]) -> str:
    """The model, under its new key or the old one."""
    return body.get("model") or body.get("name") or ""


def details(stored: Stored, parent: str = "") -> dict[str, Any]:
    """As in lists and descriptions."""
    config = stored.config
    return {
        "parent_model": parent,
        "format": config.get("model_format", "gguf"),
        "family": config.get("model_family", ""),
        "families": config.get("model_families", []),
        "parameter_size": config.get("model_type", ""),
        "quantization_level": config.get("file_type", ""),
    }


async def tags(service: Service, request: Request, response: Response) -> None:
    """`/api/tags`."""
    del request
    models: list[dict[str, Any]] = []
    for one in service.store.all():
        name = one.name.shortest
        entry: dict[str, Any] = {"name": name, "model": name, "modified_at": now_text(one.modified), "size": one.size,
                 "digest": one.digest, "details": details(one)}  # fmt: skip
        if service.config.is_0_30:
            header = service.header(one)
            entry["details"] |= {"context_length": number(header, "context_length"),
                                 "embedding_length": number(header, "embedding_length")}  # fmt: skip
            entry["capabilities"] = service.capabilities(one)
        models.append(entry)
    response.whole(200, dump({"models": models}), JSON)


async def ps(service: Service, request: Request, response: Response) -> None:
    """`/api/ps`. Kinder than 0.24, which answers 500 once in many thousand polls for want of a lock."""
    del request
    loaded = sorted(service.scheduler.loaded.values(), key=lambda one: one.expiry(), reverse=True)
    models = [
        {
            "name": one.stored.name.shortest,
            "model": one.stored.name.shortest,
            "size": one.size_bytes,
            "digest": one.stored.digest,
            "details": details(one.stored),
            "expires_at": now_text(one.expiry()),
            "size_vram": one.size_vram_bytes,
            "context_length": one.context_length,
        }
        for one in loaded
    ]
    response.whole(200, dump({"models": models}), JSON)


# --- show -------------------------------------------------------------------------------------------------


async def show(service: Service, request: Request, response: Response) -> None:
    """`/api/show`."""
    fields = {**_NAME, "verbose": "bool", "system": "string", "template": "string", "options": "map"}
    body = await service.read(request, "api.ShowRequest", fields)
    name = asked_name(body)
    if not name:
        raise ApiError(400, "model is required")
    stored = service.find(name)
    if stored is None:
        raise ApiError(404, f"model '{name}' not found")
    path = str(service.store.blob(stored.weights.digest))
    header = service.header(stored)
    told: dict[str, Any] = {
        "license": stored.texts.get(LICENSE),
        "modelfile": _modelfile(stored, path),
        "parameters": _parameters(stored),
        "template": stored.template,
        "system": stored.texts.get(SYSTEM),
        "details": details(stored, path),
        "messages": json.loads(stored.texts.get(MESSAGES) or "null"),
        "model_info": {key: _value(value, body.get("verbose", False)) for key, value in sorted(header.metadata.items())
                       if key not in ("general.name", "tokenizer.chat_template")},
        "tensors": [{"name": n, "type": kind, "shape": list(shape)} for n, kind, shape in header.tensors],
        "capabilities": service.capabilities(stored),
        "modified_at": now_text(stored.modified),
    }  # fmt: skip
    response.whole(200, dump({key: value for key, value in told.items() if value not in (None, "", [])}), JSON)


def _value(value: Any, is_verbose: bool) -> Any:
    return None if isinstance(value, list | tuple) and not is_verbose else cast("Any", value)


def _parameters(stored: Stored) -> str:
    lines: list[str] = []
    for key, value in sorted(stored.parameters.items()):
        values = cast("list[Any]", value) if isinstance(value, list) else [value]
        lines += [f"{key:<30} {_go_text(one, True)}" for one in values]
    return "\n".join(lines)


def _go_text(value: Any, quotes: bool = False) -> str:
    """As Go prints a decoded JSON value: numbers of a million and more with an exponent."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return f'"{value}"' if quotes else value
    number_ = float(value)
    if abs(number_) >= 1e21 or (number_ and abs(number_) < 1e-4) or abs(number_) >= 1e6:
        mantissa, _, exponent = f"{number_:.15e}".partition("e")
        return f"{mantissa.rstrip('0').rstrip('.')}e{exponent[0]}{exponent[1:]:>02}"
    return f"{number_:g}" if not number_.is_integer() else str(int(number_))


def _modelfile(stored: Stored, path: str) -> str:
    head = '# Modelfile generated by "ollama show"\n# To build a new Modelfile based on this, replace FROM with:\n'
    lines = [f"{head}# FROM {stored.name.shortest}\n", f"FROM {path}", f"TEMPLATE {_quoted(stored.template)}"]
    if stored.texts.get(SYSTEM):
        lines.append(f"SYSTEM {_quoted(stored.texts[SYSTEM])}")
    for key, value in sorted(stored.parameters.items()):
        values = cast("list[Any]", value) if isinstance(value, list) else [value]
        lines += [f"PARAMETER {key} {_quoted(_go_text(one))}" for one in values]
    if stored.texts.get(LICENSE):
        lines.append(f'LICENSE """{stored.texts[LICENSE]}"""')
    return "\n".join(lines) + "\n"


def _quoted(text: str) -> str:
    if "\n" in text or text != text.strip():
        return f'"""{text}"""' if '"' in text else f'"{text}"'
    return text


# --- copy and delete --------------------------------------------------------------------------------------


async def copy(service: Service, request: Request, response: Response) -> None:
    """`/api/copy`."""
    body = await service.read(request, "api.CopyRequest", {"source": "string", "destination": "string"})
    source, target = body.get("source", ""), body.get("destination", "")
    from_name, to_name = service.name(source), service.name(target)
    for text, name, what in ((source, from_name, "source"), (target, to_name, "destination")):
        if name is None:
            raise ApiError(400, f'{what} "{text}" is invalid')
    stored = service.store.get(cast("Name", from_name))
    if stored is None:
        raise ApiError(404, f'model "{source}" not found')
    service.store.copy(stored, cast("Name", to_name))
    response.whole(200)


async def delete(service: Service, request: Request, response: Response) -> None:
    """`/api/delete`. A loaded runner stays."""
    body = await service.read(request, "api.DeleteRequest", _NAME)
    text = asked_name(body)
    name = service.name(text)
    if name is None:
        raise ApiError(400, f'name "{text}" is invalid')
    stored = service.store.get(name)
    if stored is None:
        raise ApiError(404, f"model '{text}' not found")
    service.store.delete(stored)
    response.whole(200)


# --- blobs ------------------------------------------------------------------------------------------------


async def head_blob(service: Service, request: Request, response: Response, digest: str) -> None:
    """`HEAD /api/blobs/:digest`."""
    del request
    if not _DIGEST.fullmatch(digest):
        raise ApiError(400, "invalid digest format")
    if not service.store.blob(digest).exists():
        raise ApiError(404, f'blob "{digest}" not found')
    response.whole(200)


async def post_blob(service: Service, request: Request, response: Response, digest: str) -> None:
    """`POST /api/blobs/:digest`. One that is there is answered at once, unread."""
    if not _DIGEST.fullmatch(digest):
        raise ApiError(400, "invalid digest format")
    path = service.store.blob(digest)
    if path.exists():
        response.whole(200)
        return
    total = hashlib.sha256()
    staging = path.with_name(f"sha256-{os.getpid()}-{id(request)}")
    try:
        with staging.open("wb") as file:
            async with contextlib.aclosing(request.chunks()) as chunks:
                async for chunk in chunks:
                    total.update(chunk)
                    file.write(chunk)
        got = "sha256:" + total.hexdigest()
        if got != digest.replace("-", ":"):
            raise ApiError(400, f'digest mismatch, expected "{digest}", got "{got}"')
        staging.replace(path)
    finally:
        staging.unlink(missing_ok=True)
    response.whole(201)


# --- create -----------------------------------------------------------------------------------------------


async def create(service: Service, request: Request, response: Response) -> None:
    """`/api/create`: from files that were uploaded, or from another model. A broken header passes, as there."""
    body = await service.read(request, "api.CreateRequest", _CREATE)
    name = service.name(asked_name(body))
    if name is None:
        raise ApiError(400, "invalid model name")
    progress = Progress(service, response, body.get("stream", True))
    files = cast("dict[str, str]", body.get("files", {}))
    if body.get("from"):
        source = service.find(body["from"])
        if source is None:
            await progress.fail(404, f"model '{body['from']}' not found")
            return
        layers, config = list(source.layers), dict(source.config)
    elif files:
        await progress.say(status="parsing GGUF")
        missing = next((d for d in files.values() if not service.store.blob(d).exists()), None)
        if missing is not None:
            await progress.fail(500, f"open {service.store.blob(missing)}: no such file or directory")
            return
        layers, config = [_weights(service, digest) for digest in files.values()], {}
    else:
        await progress.fail(400, "neither 'from' or 'files' was specified")
        return
    for layer in layers:
        if layer.media_type == MODEL:
            await progress.say(status=f"using existing layer {layer.digest}")
    layers = await _with_texts(service, body, layers, progress)
    await _write(service, name, layers, config, progress)


def _weights(service: Service, digest: str) -> Layer:
    return Layer(MODEL, digest, service.store.blob(digest).stat().st_size)


async def _write(
    service: Service, name: Name, layers: Sequence[Layer], config: dict[str, Any], progress: Progress
) -> None:
    weights = next(layer for layer in layers if layer.media_type == MODEL)
    header = service.store.header(weights.digest)
    kept = {key: value for key, value in config.items() if not key.startswith("_")}
    kept = kept or config_of(header, [layer.digest for layer in layers])
    kept["model_family"] = kept.get("model_family") or architecture(header)
    await progress.say(status="writing manifest")
    service.store.put(name, kept, layers)
    await progress.succeed()


async def _with_texts(
    service: Service, body: Mapping[str, Any], layers: list[Layer], progress: Progress
) -> list[Layer]:
    """The layers with those texts that the request gives, each told as new or as there already."""
    base = next((one for one in layers if one.media_type == PARAMETERS), None)
    old = service.store.parameters(base.digest) if base is not None else {}
    given = body.get("parameters")
    texts: list[tuple[str, str | None]] = [
        (TEMPLATE, body.get("template")),
        (SYSTEM, body.get("system")),
        (LICENSE, _license(body.get("license"))),
        (PARAMETERS, dump({**old, **given}).decode() if given else None),
        (MESSAGES, dump(body["messages"]).decode() if body.get("messages") else None),
    ]
    found = list(layers)
    for kind, text in texts:
        kept = next((one for one in found if one.media_type == kind), None)
        if text is None:
            if kept is not None:
                await progress.say(status=f"using existing layer {kept.digest}")
            continue
        found = [one for one in found if one.media_type != kind]
        digest = "sha256:" + hashlib.sha256(text.encode()).hexdigest()
        is_there = service.store.blob(digest).exists()
        layer = replace(service.store.put_blob(text.encode()), media_type=kind)
        await progress.say(status=f"{'using existing' if is_there else 'creating new'} layer {layer.digest}")
        found.append(layer)
    return found


def _license(value: Any) -> str | None:
    if isinstance(value, list):
        return "\n".join(str(one) for one in cast("list[Any]", value)) or None
    return str(value) if value else None
