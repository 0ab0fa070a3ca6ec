"""Reads a model out of Ollama's store on disk, without a server: its manifest and its layers.

Unlike `BlobStore.get` it says what is wrong with a model that cannot be read. It reads no weights and writes nothing.

Source: Ollama v0.24, `manifest/manifest.go`, `types/model/name.go`; the same layout since v0.1.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from router.domain.model_names import Name
from router.engines.ollama.blob_store import MODEL, PARAMETERS, PROJECTOR, BlobStore


class StoreError(ValueError):
    """The model is in the store but cannot be read; the text names the file."""


@dataclass(frozen=True, slots=True)
class StoredModel:
    """One model of a store."""

    size_bytes: int
    """All layers, as `/api/tags` counts them."""
    weights: Path
    has_projector_file: bool
    parameters: Mapping[str, Any]
    """The Modelfile's PARAMETER lines."""


def find_model(folder: Path, name: Name) -> StoredModel | None:
    """The model of that name; None if the store has none.

    Raises:
        StoreError: its manifest or a layer cannot be read, or it has no weights here (a cloud model).
    """
    path = _matching_path(folder, name)
    if path is None:
        return None
    store, manifest = BlobStore(folder), _json_object(path)
    layers = _layers(manifest, path)
    config = cast("dict[str, Any]", manifest["config"]) if isinstance(manifest.get("config"), dict) else {}
    weights = _blob(store, layers, MODEL)
    if weights is None:
        raise StoreError(f"{path} names no weights: a cloud model has none here")
    if not weights.is_file():
        raise StoreError(f"{path} names {weights.name}, which is not in {weights.parent}")
    parameters = _blob(store, layers, PARAMETERS)
    return StoredModel(
        size_bytes=sum(int(layer["size"]) for layer in layers) + int(config.get("size", 0)),
        weights=weights,
        has_projector_file=any(layer["mediaType"] == PROJECTOR for layer in layers),
        parameters=_json_object(parameters) if parameters is not None else {},
    )


def _matching_path(folder: Path, name: Name) -> Path | None:
    """Names ignore letter case; the folders of a store keep it."""
    path = folder / "manifests"
    for part in (name.host, name.namespace, name.model, name.tag):
        try:
            match = next((child for child in sorted(path.iterdir()) if child.name.lower() == part.lower()), None)
        except OSError:
            return None
        if match is None:
            return None
        path = match
    return path


def _json_object(path: Path) -> dict[str, Any]:
    try:
        document: object = json.loads(path.read_bytes())
    except OSError as error:
        raise StoreError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise StoreError(f"{path} is not JSON") from error
    if not isinstance(document, dict):
        raise StoreError(f"{path} is not a JSON object")
    return cast("dict[str, Any]", document)


def _layers(manifest: Mapping[str, Any], path: Path) -> Sequence[Mapping[str, Any]]:
    layers: object = manifest.get("layers")
    if isinstance(layers, list) and all(_is_layer(layer) for layer in cast("list[object]", layers)):
        return cast("list[Mapping[str, Any]]", layers)
    raise StoreError(f"{path} has no list of layers with media type, digest and size")


def _is_layer(layer: object) -> bool:
    if not isinstance(layer, dict):
        return False
    fields = cast("dict[str, object]", layer)
    return (
        isinstance(fields.get("mediaType"), str)
        and isinstance(fields.get("digest"), str)
        and isinstance(fields.get("size"), int)
    )


def _blob(store: BlobStore, layers: Sequence[Mapping[str, Any]], media_type: str) -> Path | None:
    """The first layer of that type; None if there is none."""
    return next((store.blob(layer["digest"]) for layer in layers if layer["mediaType"] == media_type), None)
