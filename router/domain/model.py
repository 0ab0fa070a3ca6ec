"""A model as its files describe it: weights, layers, parameters. Sizes are integer bytes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NewType

from router.domain.instance import InstanceName, InstanceSpec

BlobDigest = NewType("BlobDigest", str)
"""`sha256:…` of a weights file. Residency and slots belong to the weights, not to a model's name.

A digest belongs to one engine: if two engines serve the same file, one of them adds a prefix."""


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What a model's size and behaviour depend on; for Ollama read from `/api/tags` and `/api/show`."""

    name: str
    """Shortest form with the tag, as in `/api/tags`, e.g. `llama3.3:70b`."""
    digest: str
    """Digest of the manifest."""
    blob: BlobDigest
    weights_bytes: int
    architecture: str
    layers: int
    embedding_length: int
    head_count: int
    head_count_kv: tuple[int, ...]
    """KV heads, one value per layer; 0 for layers without attention."""
    key_length: int
    value_length: int
    vocabulary_size: int
    context_length: int
    """Trained context in tokens; a larger requested context is reduced to it."""
    sliding_window: int | None = None
    """Tokens that a sliding layer attends to."""
    sliding_layers: tuple[bool, ...] = ()
    """True for each layer that slides, where the metadata has the pattern itself; () where it does not."""
    key_length_swa: int | None = None
    value_length_swa: int | None = None
    """Head lengths of sliding layers, where they differ from the others'."""
    shared_kv_layers: int = 0
    """The last layers, which use another layer's cache and have none of their own."""
    full_attention_interval: int = 0
    """Hybrids: layer i has a cache where (i + 1) is a multiple of this, else a recurrent state. 0: by KV heads."""
    recurrent_state_elements: int = 0
    """32-bit numbers that one layer without attention keeps for each sequence."""
    nextn_layers: int = 0
    """Layers of the draft head (MTP), which from 0.31 gets a second context."""
    feed_forward_length: int = 0
    expert_used_count: int = 0
    has_vision: bool = False
    projector_bytes: int = 0
    """Vision and audio encoders with their projectors, where the tensor table told their size; part of the weights."""
    per_layer_input_bytes: int = 0
    """Token embeddings for each layer (gemma3n, gemma4), part of `output_bytes`: in host memory from 0.30 on."""
    parameters: tuple[tuple[str, str], ...] = ()
    """PARAMETER lines of the Modelfile that affect a runner, sorted: `("num_ctx", "4096")`."""
    is_embedding: bool = False
    input_bytes: int | None = None
    """Size of the token embedding table, which stays in host memory; None if the tensor table was not read."""
    output_bytes: int | None = None
    """Size of the output layer, which is on the last GPU; None if the tensor table was not read."""
    is_shared: bool = True
    """True if it is in the model store that all spawned instances share."""
    attached_on: frozenset[InstanceName] | None = None
    """Attached servers that have it in their own store; None: assume that all have it."""
    is_opaque: bool = False
    """Whether the format of its weights is unknown: its size is its weights' until the GPUs show what it takes."""
    engine: str = "ollama"
    """Kind of the engine that serves it."""

    def is_on(self, spec: InstanceSpec) -> bool:
        """Returns True if the instance has the model's engine and can load the model."""
        if spec.engine != self.engine:
            return False
        if not spec.attached:
            return self.is_shared
        return self.attached_on is None or spec.name in self.attached_on


NO_MODEL = ModelFacts("", "", BlobDigest(""), 0, "", 0, 0, 0, (), 0, 0, 0, 0)
"""Placeholder where no facts are needed, e.g. in tests of the accounting alone."""
