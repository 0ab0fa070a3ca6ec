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
from router.engines.ollama.blob_store import LICENSE, MESSAGES, MODEL, PARAMETERS, SYSTEM, TEMPLATE, Layer, StoredModel
from router.engines.ollama.gguf_facts import architecture, number
from router.lab.emulator.config import now_text
from router.lab.emulator.context import Service
from router.lab.emulator.go_json import dump
from router.lab.emulator.http_server import Request, Response
from router.lab.emulator.response_writer import JSON, NDJSON, PLAIN_JSON, ApiError, send_error_body
from router.lab.emulator.store import config_for

_NAME = {"model": "string", "name": "string"}
_CREATE = {**_NAME, "from": "string", "files": "map", "template": "string", "system": "string", "license": "any",
           "parameters": "map", "messages": "slice", "stream": "bool", "quantize": "string"}  # fmt: skip
_DIGEST = re.compile(r"sha256[:-][0-9a-fA-F]{64}")


class Progress:
    """Progress of a long operation: a stream of lines, or only the final result."""

    def __init__(self, service: Service, response: Response, streams: bool) -> None:
        self._response = response
        self._streams = streams
        self._is_old = service.config.is_pre_0_12

    async def send(self, **fields: Any) -> None:
        """Sends one line, such as `status="writing manifest"`."""
        if self._streams:
            await self._response.chunk(dump(fields) + b"\n", NDJSON)

    async def fail(self, status: int, message: str) -> None:
        if self._response.started or (self._streams and self._is_old):
            await self.send(error=message)
            return
        await send_error_body(self._response, status, dump({"error": message}), self._streams)

    async def succeed(self) -> None:
        if self._streams:
            await self.send(status="success")
        else:
            self._response.send_whole(200, dump({"status": "success"}), PLAIN_JSON)


def requested_name(body: Mapping[str, Any]) -> str:
    """The model name, from the current key or the legacy one."""
    return body.get("model") or body.get("name") or ""


def details(stored: StoredModel, parent: str = "") -> dict[str, Any]:
    """The `details` object of lists and of `/api/show`."""
    config = stored.config
    return {
        "parent_model": parent,
        "format": config.get("model_format", "gguf"),
        "family": config.get("model_family", ""),
        "families": config.get("model_families", []),
        "parameter_size": config.get("model_type", ""),
        "quantization_level": config.get("file_type", ""),
    }


def _parent(stored: StoredModel) -> str:
    """The model it was created from."""
    return stored.config.get("parent_model", "")


async def tags(service: Service, request: Request, response: Response) -> None:
    """`/api/tags`."""
    del request
    models: list[dict[str, Any]] = []
    for stored in service.store.all():
        name = stored.name.shortest
        entry: dict[str, Any] = {
            "name": name,
            "model": name,
            "modified_at": now_text(stored.modified),
            "size": stored.size,
            "digest": stored.digest,
            "details": details(stored, _parent(stored) if service.config.is_0_30 else ""),
        }
        if service.config.is_0_30:
            header = service.header(stored)
            entry["details"] |= {"context_length": number(header, "context_length"),
                                 "embedding_length": number(header, "embedding_length")}  # fmt: skip
            entry["capabilities"] = service.capabilities(stored)
        models.append(entry)
    response.send_whole(200, dump({"models": models}), JSON)


async def ps(service: Service, request: Request, response: Response) -> None:
    """`/api/ps`. Unlike 0.24, it never answers 500 because of a missing lock."""
    del request
    loaded = sorted(service.scheduler.loaded.values(), key=lambda model: model.expiry(), reverse=True)
    models = [
        {
            "name": model.stored.name.shortest,
            "model": model.stored.name.shortest,
            "size": model.size_bytes,
            "digest": model.stored.digest,
            "details": details(model.stored),
            "expires_at": now_text(model.expiry()),
            "size_vram": model.size_vram_bytes,
            "context_length": model.context_length,
        }
        for model in loaded
    ]
    response.send_whole(200, dump({"models": models}), JSON)


# --- show -------------------------------------------------------------------------------------------------


async def show(service: Service, request: Request, response: Response) -> None:
    """`/api/show`."""
    fields = {**_NAME, "verbose": "bool", "system": "string", "template": "string", "options": "map"}
    body = await service.read(request, "api.ShowRequest", fields)
    name = requested_name(body)
    if not name:
        raise ApiError(400, "model is required")
    stored = service.find(name)
    if stored is None:
        raise ApiError(404, f"model '{service.shown_name(name)}' not found")
    path = str(service.store.blob(stored.weights.digest))
    header = service.header(stored)
    answer: dict[str, Any] = {
        "license": stored.texts.get(LICENSE),
        "modelfile": _modelfile(stored, path),
        "parameters": _parameters(stored),
        "template": stored.template,
        "system": stored.texts.get(SYSTEM),
        "details": details(stored, _parent(stored) if service.config.is_0_30 else path),
        "messages": json.loads(stored.texts.get(MESSAGES) or "null"),
        "model_info": {key: _value(value, body.get("verbose", False)) for key, value in sorted(header.metadata.items())
                       if key not in ("general.name", "tokenizer.chat_template")},
        "tensors": [{"name": n, "type": kind, "shape": list(shape)} for n, kind, shape in header.tensors],
        "capabilities": service.capabilities(stored),
        "modified_at": now_text(stored.modified),
    }  # fmt: skip
    response.send_whole(200, dump({key: value for key, value in answer.items() if value not in (None, "", [])}), JSON)


def _value(value: Any, is_verbose: bool) -> Any:
    return None if isinstance(value, list | tuple) and not is_verbose else cast("Any", value)


def _parameters(stored: StoredModel) -> str:
    lines: list[str] = []
    for key, value in sorted(stored.parameters.items()):
        values = cast("list[Any]", value) if isinstance(value, list) else [value]
        lines += [f"{key:<30} {_go_text(item, True)}" for item in values]
    return "\n".join(lines)


def _go_text(value: Any, quotes: bool = False) -> str:
    """Formats a decoded JSON value as Go does: numbers of a million and more with an exponent."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return f'"{value}"' if quotes else value
    as_float = float(value)
    if abs(as_float) >= 1e21 or (as_float and abs(as_float) < 1e-4) or abs(as_float) >= 1e6:
        mantissa, _, exponent = f"{as_float:.15e}".partition("e")
        return f"{mantissa.rstrip('0').rstrip('.')}e{exponent[0]}{exponent[1:]:>02}"
    return f"{as_float:g}" if not as_float.is_integer() else str(int(as_float))


def _modelfile(stored: StoredModel, path: str) -> str:
    head = '# Modelfile generated by "ollama show"\n# To build a new Modelfile based on this, replace FROM with:\n'
    lines = [f"{head}# FROM {stored.name.shortest}\n", f"FROM {path}", f"TEMPLATE {_quoted(stored.template)}"]
    if stored.texts.get(SYSTEM):
        lines.append(f"SYSTEM {_quoted(stored.texts[SYSTEM])}")
    for key, value in sorted(stored.parameters.items()):
        values = cast("list[Any]", value) if isinstance(value, list) else [value]
        lines += [f"PARAMETER {key} {_quoted(_go_text(item))}" for item in values]
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
    for text, name, field in ((source, from_name, "source"), (target, to_name, "destination")):
        if name is None:
            raise ApiError(400, f'{field} "{text}" is invalid')
    stored = service.store.get(cast("Name", from_name))
    if stored is None:
        raise ApiError(404, f'model "{source}" not found')
    service.store.copy(stored, cast("Name", to_name))
    response.send_whole(200)


async def delete(service: Service, request: Request, response: Response) -> None:
    """`/api/delete`. A loaded model keeps its runner."""
    body = await service.read(request, "api.DeleteRequest", _NAME)
    text = requested_name(body)
    name = service.name(text)
    if name is None:
        raise ApiError(400, f'name "{text}" is invalid')
    stored = service.store.get(name)
    if stored is None:
        raise ApiError(404, f"model '{text}' not found")
    service.store.delete(stored)
    response.send_whole(200)


# --- blobs ------------------------------------------------------------------------------------------------


async def head_blob(service: Service, request: Request, response: Response, digest: str) -> None:
    """`HEAD /api/blobs/:digest`."""
    del request
    if not _DIGEST.fullmatch(digest):
        raise ApiError(400, "invalid digest format")
    if not service.store.blob(digest).exists():
        raise ApiError(404, f'blob "{digest}" not found')
    response.send_whole(200)


async def post_blob(service: Service, request: Request, response: Response, digest: str) -> None:
    """`POST /api/blobs/:digest`. For an existing blob the body is not read."""
    if not _DIGEST.fullmatch(digest):
        raise ApiError(400, "invalid digest format")
    path = service.store.blob(digest)
    if path.exists():
        response.send_whole(200)
        return
    hasher = hashlib.sha256()
    staging = path.with_name(f"sha256-{os.getpid()}-{id(request)}")
    try:
        with staging.open("wb") as file:
            async with contextlib.aclosing(request.chunks()) as chunks:
                async for chunk in chunks:
                    hasher.update(chunk)
                    file.write(chunk)
        actual_digest = "sha256:" + hasher.hexdigest()
        if actual_digest != digest.replace("-", ":"):
            raise ApiError(400, f'digest mismatch, expected "{digest}", got "{actual_digest}"')
        staging.replace(path)
    finally:
        staging.unlink(missing_ok=True)
    response.send_whole(201)


# --- create -----------------------------------------------------------------------------------------------


async def create(service: Service, request: Request, response: Response) -> None:
    """`/api/create`: from uploaded files or from another model. As in real Ollama, a broken header is accepted."""
    body = await service.read(request, "api.CreateRequest", _CREATE)
    name = service.name(requested_name(body))
    if name is None:
        raise ApiError(400, "invalid model name")
    progress = Progress(service, response, body.get("stream", True))
    files = cast("dict[str, str]", body.get("files", {}))
    if body.get("from"):
        source = service.find(body["from"])
        if source is None:
            await progress.fail(404, f"model '{body['from']}' not found")
            return
        layers, config = list(source.layers), {**source.config, "parent_model": source.name.shortest}
    elif files:
        await progress.send(status="parsing GGUF")
        missing = next((d for d in files.values() if not service.store.blob(d).exists()), None)
        if missing is not None:
            await progress.fail(500, f"open {service.store.blob(missing)}: no such file or directory")
            return
        if service.config.is_0_30:
            await progress.send(status="verifying conversion")
        layers, config = [_weights(service, digest) for digest in files.values()], {}
    else:
        await progress.fail(400, "neither 'from' or 'files' was specified")
        return
    for layer in layers:
        if layer.media_type == MODEL:
            await progress.send(status=f"using existing layer {layer.digest}")
    layers = await _with_texts(service, body, layers, progress)
    await _write(service, name, layers, config, progress)


def _weights(service: Service, digest: str) -> Layer:
    return Layer(MODEL, digest, service.store.blob(digest).stat().st_size)


async def _write(
    service: Service, name: Name, layers: Sequence[Layer], config: dict[str, Any], progress: Progress
) -> None:
    weights = next(layer for layer in layers if layer.media_type == MODEL)
    header = service.store.header(weights.digest)
    model_config = {key: value for key, value in config.items() if not key.startswith("_")}
    model_config = model_config or config_for(header, [layer.digest for layer in layers])
    model_config["model_family"] = model_config.get("model_family") or architecture(header)
    await progress.send(status="writing manifest")
    service.store.put(name, model_config, layers)
    await progress.succeed()


async def _with_texts(
    service: Service, body: Mapping[str, Any], layers: list[Layer], progress: Progress
) -> list[Layer]:
    """Adds the texts of the request to the layers, and reports each as new or existing."""
    parameters_layer = next((layer for layer in layers if layer.media_type == PARAMETERS), None)
    base_parameters = service.store.parameters(parameters_layer.digest) if parameters_layer is not None else {}
    request_parameters = body.get("parameters")
    texts: list[tuple[str, str | None]] = [
        (TEMPLATE, body.get("template")),
        (SYSTEM, body.get("system")),
        (LICENSE, _license(body.get("license"))),
        (PARAMETERS, dump({**base_parameters, **request_parameters}).decode() if request_parameters else None),
        (MESSAGES, dump(body["messages"]).decode() if body.get("messages") else None),
    ]
    layers_with_texts = list(layers)
    for media_type, text in texts:
        existing_layer = next((layer for layer in layers_with_texts if layer.media_type == media_type), None)
        if text is None:
            if existing_layer is not None:
                await progress.send(status=f"using existing layer {existing_layer.digest}")
            continue
        layers_with_texts = [layer for layer in layers_with_texts if layer.media_type != media_type]
        digest = "sha256:" + hashlib.sha256(text.encode()).hexdigest()
        exists = service.store.blob(digest).exists()
        layer = replace(service.store.put_blob(text.encode()), media_type=media_type)
        await progress.send(status=f"{'using existing' if exists else 'creating new'} layer {layer.digest}")
        layers_with_texts.append(layer)
    return layers_with_texts


def _license(value: Any) -> str | None:
    if isinstance(value, list):
        return "\n".join(str(item) for item in cast("list[Any]", value)) or None
    return str(value) if value else None
