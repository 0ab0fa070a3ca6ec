"""Reads a model out of Ollama's store on disk, without a server: its manifest and its layers.

`manifests/HOST/NAMESPACE/MODEL/TAG` are JSON texts that name blobs; `blobs/sha256-…` are the layers. It reads no
weights and writes nothing.

Source: Ollama v0.24, `manifest/manifest.go`, `types/model/name.go`; the same layout since v0.1.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from router.domain.model_names import Name

MODEL_LAYER = "application/vnd.ollama.image.model"
PROJECTOR_LAYER = "application/vnd.ollama.image.projector"
PARAMETERS_LAYER = "application/vnd.ollama.image.params"


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


def manifest_path(folder: Path, name: Name) -> Path:
    """The manifest of a name in this store."""
    return folder / "manifests" / name.host / name.namespace / name.model / name.tag


def find_model(folder: Path, name: Name) -> StoredModel | None:
    """The model of that name; None if the store has none.

    Raises:
        StoreError: its manifest or a layer cannot be read, or it has no weights here (a cloud model).
    """
    path = _matching_path(folder, name)
    if path is None:
        return None
    manifest = _json_object(path)
    layers = _layers(manifest, path)
    config = cast("dict[str, Any]", manifest["config"]) if isinstance(manifest.get("config"), dict) else {}
    weights = next((_blob(folder, layer) for layer in layers if layer["mediaType"] == MODEL_LAYER), None)
    if weights is None:
        raise StoreError(f"{path} names no weights: a cloud model has none here")
    if not weights.is_file():
        raise StoreError(f"{path} names {weights.name}, which is not in {folder / 'blobs'}")
    parameters = next((_blob(folder, layer) for layer in layers if layer["mediaType"] == PARAMETERS_LAYER), None)
    return StoredModel(
        size_bytes=sum(int(layer["size"]) for layer in layers) + int(config.get("size", 0)),
        weights=weights,
        has_projector_file=any(layer["mediaType"] == PROJECTOR_LAYER for layer in layers),
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


def _blob(folder: Path, layer: Mapping[str, Any]) -> Path:
    return folder / "blobs" / str(layer["digest"]).replace(":", "-")
