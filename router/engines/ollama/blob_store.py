"""Ollama's model store on disk, read only.

`manifests/HOST/NAMESPACE/MODEL/TAG` are JSON files that name blobs; `blobs/sha256-…` are the layers. Every query reads
the disk, because Ollama servers change it. Nothing is cached and nothing is loaded.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from router.domain.model_names import Name

MODEL = "application/vnd.ollama.image.model"
PROJECTOR = "application/vnd.ollama.image.projector"
TEMPLATE = "application/vnd.ollama.image.template"
SYSTEM = "application/vnd.ollama.image.system"
PARAMETERS = "application/vnd.ollama.image.params"
MESSAGES = "application/vnd.ollama.image.messages"
LICENSE = "application/vnd.ollama.image.license"

DEFAULT_TEMPLATE = "{{ .Prompt }}"
"""Ollama's template for a model without one."""


@dataclass(frozen=True, slots=True)
class Layer:
    """One blob of a model."""

    media_type: str
    digest: str
    size: int
    from_: str = ""


@dataclass(frozen=True, slots=True)
class StoredModel:
    """One model in the store."""

    name: Name
    digest: str
    """Manifest digest, without `sha256:`."""
    modified: datetime
    config: Mapping[str, Any]
    layers: tuple[Layer, ...]
    config_bytes: int = 0
    texts: Mapping[str, str] = field(default_factory=dict[str, str])
    """Media type -> content, of all layers but the weights."""

    @property
    def weights(self) -> Layer:
        return next(layer for layer in self.layers if layer.media_type == MODEL)

    @property
    def size(self) -> int:
        return sum(layer.size for layer in self.layers) + self.config_bytes

    @property
    def template(self) -> str:
        return self.texts.get(TEMPLATE, DEFAULT_TEMPLATE)

    @property
    def parameters(self) -> dict[str, Any]:
        return json.loads(self.texts.get(PARAMETERS, "{}"))


class BlobStore:
    """The store in a folder, which need not exist."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def blob(self, digest: str) -> Path:
        return self.folder / "blobs" / digest.replace(":", "-")

    def manifest(self, name: Name) -> Path:
        """Path of the manifest for a name, whether or not it exists."""
        return self.folder / "manifests" / name.host / name.namespace / name.model / name.tag

    def get(self, name: Name) -> StoredModel | None:
        """The model with that name; None if it is missing or its manifest is invalid."""
        path = self.manifest(name)
        try:
            data = path.read_bytes()
            manifest = json.loads(data)
            config = json.loads(self.blob(manifest["config"]["digest"]).read_bytes())
            layers = tuple(
                Layer(entry["mediaType"], entry["digest"], entry["size"], entry.get("from", ""))
                for entry in manifest["layers"]
            )
            modified = datetime.fromtimestamp(path.stat().st_mtime, UTC)
        except (OSError, ValueError, KeyError):
            return None
        return StoredModel(
            name=name,
            digest=hashlib.sha256(data).hexdigest(),
            modified=modified,
            config=config,
            layers=layers,
            config_bytes=manifest["config"].get("size", 0),
            texts={layer.media_type: self.text(layer.digest) for layer in layers if layer.media_type != MODEL},
        )

    def text(self, digest: str) -> str:
        """Content of a small blob; empty if it cannot be read."""
        try:
            return self.blob(digest).read_text(encoding="utf-8")
        except OSError:
            return ""

    def all(self) -> list[StoredModel]:
        """All models, newest first."""
        found = [stored for name in self._names() if (stored := self.get(name)) is not None]
        return sorted(found, key=lambda stored: (-stored.modified.timestamp(), stored.name.full))

    def _names(self) -> Iterator[Name]:
        root = self.folder / "manifests"
        for path in sorted(root.glob("*/*/*/*")):
            host, namespace, model, tag = path.relative_to(root).parts
            if not tag.startswith("."):
                yield Name(host, namespace, model, tag)
