"""Finds out what a model is from its name or file, without a server: for `llamayard plan`.

A model is a GGUF file, a saved reply of `/api/show`, a name in Ollama's store, or a name of the emulator's catalogue,
tried in this order. All of them end in `model_metadata.read_facts`, as the reply of a running server does. Blocking: it
reads files.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import msgspec

from router.domain.model import ModelFacts
from router.domain.model_names import Name, parse_name
from router.engines.ollama.blob_store import BlobStore
from router.engines.ollama.client import ShowReply, TagRow
from router.engines.ollama.gguf_header import Header, Tensor, read_header
from router.engines.ollama.gguf_show import active_share, show_reply, tensors_bytes
from router.engines.ollama.manifest_reader import StoredModel, StoreError, find_model
from router.engines.ollama.model_metadata import needs_verbose, read_facts
from router.errors import UNREADABLE_JSON
from router.lab.emulator.catalogue import MAGIC, catalogue

_ANY_WEIGHTS = "FROM sha256:" + "0" * 64
"""Stands in for the Modelfile's line that names the weights, where a source has no Modelfile."""
_FILE_ENDINGS = (".gguf", ".json")
_PART = re.compile(r"-(\d{5})-of-(\d{5})\.gguf$")
_EMULATED_SIZE_MAX = 1 << 22


class ModelSourceError(ValueError):
    """The model cannot be read; one sentence that names what was tried."""


@dataclass(frozen=True, slots=True)
class ModelSource:
    """A model with what a plan needs to know of it."""

    facts: ModelFacts
    origin: str
    """Where the facts come from, for people: a path, `store` or `emulated catalogue`."""
    active_share: float = 1.0
    """Share of the weights that one token reads."""
    notes: tuple[str, ...] = ()
    """What may make the figures less sure, a sentence each."""


def find_source(text: str, store: Path) -> ModelSource:
    """The model that `text` names. `store`: Ollama's folder of models.

    Raises:
        ModelSourceError: nothing of that name, or what is there cannot be read.
    """
    path = Path(text).expanduser()
    if path.is_file():
        return _from_file(path)
    if path.suffix.lower() in _FILE_ENDINGS or text.startswith(("/", "./", "../", "~")):
        raise ModelSourceError(f"{text}: {'is a folder, not a file' if path.is_dir() else 'there is no such file'}")
    return _named(text, store)


def _named(text: str, store: Path) -> ModelSource:
    try:
        name = parse_name(text)
    except ValueError as error:
        raise ModelSourceError(f"{text}: neither a file nor a valid model name") from error
    try:
        stored = find_model(store, name)
    except StoreError as error:
        raise ModelSourceError(f"{text}: {error}") from error
    if stored is not None:
        return _from_store(name, stored)
    entry = catalogue().get(name.shortest)
    if entry is None:
        raise ModelSourceError(_not_found(text, store, name))
    reply = show_reply(entry.metadata, entry.tensors)
    return _source(name.shortest, "emulated catalogue", reply, entry.size_bytes, entry.metadata)


def _not_found(text: str, store: Path, name: Name) -> str:
    close = difflib.get_close_matches(name.shortest, catalogue(), n=1, cutoff=0.5)
    known = f"nearest there: {close[0]}" if close else f"there are: {', '.join(sorted(catalogue()))}"
    manifest = BlobStore(store).manifest(name)
    return f"{text}: no file of that name, no manifest {manifest}, and not in the emulated catalogue ({known})"


# --- files ------------------------------------------------------------------------------------------------------


def _from_file(path: Path) -> ModelSource:
    try:
        with path.open("rb") as file:
            start = file.read(4)
    except OSError as error:
        raise ModelSourceError(f"{path}: cannot be read: {error.strerror}") from error
    return _from_gguf(path) if start == b"GGUF" else _from_show_reply(path)


def _from_gguf(path: Path) -> ModelSource:
    files = _parts(path)
    headers = [_header(file) for file in files]
    metadata = headers[0].metadata
    tensors = [tensor for header in headers for tensor in header.tensors]
    size = sum(file.stat().st_size for file in files)
    return _source(path.name, str(path), show_reply(metadata, _rows(tensors)), size, metadata)


def _header(path: Path) -> Header:
    header = read_header(path)
    if header is None:
        raise ModelSourceError(f"{path}: begins like a GGUF file, but its header is broken or of an unknown version")
    return header


def _parts(path: Path) -> list[Path]:
    """All files of a model that is split as llama.cpp splits them (`-00001-of-00003.gguf`)."""
    match = _PART.search(path.name)
    if match is None:
        return [path]
    stem, count = path.name[: match.start()], int(match[2])
    files = [path.with_name(f"{stem}-{part:05}-of-{count:05}.gguf") for part in range(1, count + 1)]
    missing = next((file for file in files if not file.is_file()), None)
    if missing is not None or not files:
        raise ModelSourceError(f"{path}: is one of {count} files, and {missing} is missing")
    return files


def _rows(tensors: Sequence[Tensor]) -> list[tuple[str, str, tuple[int, ...]]]:
    return [(tensor.name, tensor.type, tensor.shape) for tensor in tensors]


class _SavedReply(ShowReply, frozen=True):
    """A reply of `/api/show` in a file, with what somebody may have added to it."""

    size: int = 0
    name: str = ""
    model: str = ""
    remote_host: str = ""


def _from_show_reply(path: Path) -> ModelSource:
    expected = "a GGUF file or a saved reply of /api/show (model_info, tensors, capabilities, size) is needed"
    try:
        saved = msgspec.json.decode(path.read_bytes(), type=_SavedReply)
    except OSError as error:
        raise ModelSourceError(f"{path}: cannot be read: {error.strerror}") from error
    except UNREADABLE_JSON as error:
        raise ModelSourceError(f"{path}: {expected}: {error}") from error
    if saved.remote_host:
        raise ModelSourceError(f"{path}: is a cloud model, which runs at {saved.remote_host} and takes no memory here")
    if not saved.model_info:
        raise ModelSourceError(f"{path}: has no model_info; {expected}")
    size = saved.size if saved.size > 0 else tensors_bytes(saved.tensors or ())
    if size is None:
        raise ModelSourceError(
            f"{path}: has no size, and its tensors do not tell one; add the size that /api/tags gives, in bytes"
        )
    notes = () if saved.size > 0 else ("size: not in the file, taken to be the sum of the tensors",)
    if needs_verbose(saved):
        notes += (
            'per-layer figures are missing: save the reply to {"model": …, "verbose": true}; taken as the largest',
        )
    metadata = {key: _decoded(value) for key, value in saved.model_info.items()}
    return _source(saved.name or saved.model or path.stem, str(path), saved, size, metadata, notes)


def _decoded(value: msgspec.Raw) -> Any:
    try:
        return msgspec.json.decode(value)
    except UNREADABLE_JSON:
        return None


# --- the store --------------------------------------------------------------------------------------------------


def _from_store(name: Name, stored: StoredModel) -> ModelSource:
    header = read_header(stored.weights) or _emulated_header(stored.weights)
    if header is None:
        raise ModelSourceError(f"{name.shortest}: {stored.weights} is not a GGUF file of a known version")
    reply = show_reply(
        header.metadata, _rows(header.tensors), stored.parameters, has_projector_file=stored.has_projector_file
    )
    return _source(name.shortest, "store", reply, stored.size_bytes, header.metadata)


def _emulated_header(path: Path) -> Header | None:
    """The header of an EMULATED server's placeholder for weights; None if it is none."""
    try:
        if path.stat().st_size > _EMULATED_SIZE_MAX:
            return None
        document: object = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None
    if not isinstance(document, dict):
        return None
    fields = cast("dict[str, Any]", document)
    if fields.get("format") != MAGIC:
        return None
    tensors = tuple(Tensor(name, kind, tuple(shape)) for name, kind, shape in fields["tensors"])
    return Header(fields["metadata"], tensors)


def _source(
    name: str,
    origin: str,
    reply: ShowReply,
    size: int,
    metadata: Mapping[str, Any],
    notes: tuple[str, ...] = (),
) -> ModelSource:
    tag = TagRow(name=name, size=size)
    facts = read_facts(tag, msgspec.structs.replace(reply, modelfile=_ANY_WEIGHTS))
    if facts is None or not facts.architecture:
        raise ModelSourceError(f"{name} ({origin}): its metadata names no general.architecture")
    if not facts.layers:
        notes += ("the number of layers is not known: it can only go to one GPU",)
    if any(key == "num_gpu" for key, _ in facts.parameters):
        notes += (
            "its Modelfile sets num_gpu, so its server splits it by its own rule; planned with all layers on GPUs",
        )
    return ModelSource(facts, origin, active_share(metadata, reply.tensors or ()), notes)
