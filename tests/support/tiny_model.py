"""Writes small GGUF models with random weights that real Ollama can load, generate and embed with.

`write_model(path, TINY)` is deterministic: the same spec gives the same bytes. The models generate made-up words.
Useful properties:

- The output rows of control and byte tokens are zero, so that ordinary sampling never selects them: an answer ends only
  at `num_predict`, at a stop sequence or at the end of the context, and every token is one printable word.
- No words can be merged from bytes, so that each prompt byte is one token.

Nothing is downloaded or trained.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import gguf
import numpy as np
import numpy.typing as npt

_HEAD_WIDTH = 32
"""Elements per attention head; a multiple of the q8_0 and q4_0 block sizes, so that these cache types work."""
_WORD_COUNT = 512
_CONTROLS = ("<unk>", "<s>", "</s>")
_BERT_CONTROLS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """Model to write. `context` is the trained context in tokens; sizes are in elements."""

    kind: Literal["chat", "embed"]
    layers: int
    width: int
    feed_forward: int
    heads: int
    kv_heads: int
    context: int
    seed: int = 1
    """A different seed gives different weights of the same shape: another blob and another runner."""


TINY = ModelSpec("chat", layers=2, width=64, feed_forward=128, heads=2, kv_heads=1, context=8192)
"""0.4 MB; about 0.2 ms per token."""
BIG = ModelSpec("chat", layers=8, width=768, feed_forward=2048, heads=24, kv_heads=8, context=8192)
"""About 100 MB; tens of milliseconds per token, so that streams last long enough for tests."""
EMBED = ModelSpec("embed", layers=2, width=64, feed_forward=128, heads=2, kv_heads=2, context=512)
"""0.3 MB sentence embedding model with 64 dimensions."""


def write_model(path: Path, spec: ModelSpec) -> str:
    """Writes the file and returns its digest in Ollama's form: `sha256:` and 64 hex digits."""
    writer = gguf.GGUFWriter(path, {"chat": "llama", "embed": "bert"}[spec.kind])
    _add_metadata(writer, spec)
    {"chat": _write_chat, "embed": _write_embed}[spec.kind](writer, spec, _RandomWeights(spec.seed))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with path.open("rb") as file:
        return "sha256:" + hashlib.file_digest(file, "sha256").hexdigest()


class _RandomWeights:
    """Random weights from one seeded generator per file."""

    def __init__(self, seed: int) -> None:
        self._generator = np.random.Generator(np.random.PCG64(seed))

    def matrix(self, rows: int, columns: int, spread: float = 0.05) -> npt.NDArray[np.float32]:
        return self._generator.standard_normal((rows, columns), dtype=np.float32) * np.float32(spread)

    def weights(self, rows: int, columns: int, spread: float = 0.05) -> npt.NDArray[np.float16]:
        return self.matrix(rows, columns, spread).astype(np.float16)


def _add_metadata(writer: gguf.GGUFWriter, spec: ModelSpec) -> None:
    writer.add_name("noise")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    writer.add_context_length(spec.context)
    writer.add_block_count(spec.layers)
    writer.add_embedding_length(spec.width)
    writer.add_feed_forward_length(spec.feed_forward)
    writer.add_head_count(spec.heads)


def _vocabulary(
    writer: gguf.GGUFWriter,
    model: str,
    tokens: list[str],
    types: Iterable[gguf.TokenType],
    score: Callable[[int], float],
) -> None:
    writer.add_tokenizer_model(model)
    writer.add_vocab_size(len(tokens))
    writer.add_token_list(tokens)
    writer.add_token_types(list(types))
    writer.add_token_scores([score(index) for index in range(len(tokens))])


def _words() -> list[str]:
    """Distinct made-up words of two syllables, in an order that mixes first syllables."""
    syllables = ["".join(pair) for pair in itertools.product("bdfghklmnprstvz", "aeiou")]
    pairs = (syllables[n % 75] + syllables[(8 * n // 75 + n) % 75] for n in itertools.count())
    return list(itertools.islice(dict.fromkeys(itertools.islice(pairs, 4 * _WORD_COUNT)), _WORD_COUNT))


def _write_chat(writer: gguf.GGUFWriter, spec: ModelSpec, random_weights: _RandomWeights) -> None:
    """Architecture llama with a SentencePiece vocabulary: controls, all bytes, then words."""
    writer.add_head_count_kv(spec.kv_heads)
    writer.add_key_length(_HEAD_WIDTH)
    writer.add_value_length(_HEAD_WIDTH)
    writer.add_rope_dimension_count(_HEAD_WIDTH)
    writer.add_layer_norm_rms_eps(1e-5)
    tokens = [*_CONTROLS, *(f"<0x{byte:02X}>" for byte in range(256)), *("▁" + word for word in _words())]
    word_start = len(tokens) - _WORD_COUNT
    token_type = gguf.TokenType
    types = (
        [token_type.UNKNOWN, token_type.CONTROL, token_type.CONTROL]
        + [token_type.BYTE] * 256
        + [token_type.NORMAL] * _WORD_COUNT
    )
    _vocabulary(writer, "llama", tokens, types, lambda index: -float(index))
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_add_bos_token(True)

    attention, key = spec.heads * _HEAD_WIDTH, spec.kv_heads * _HEAD_WIDTH
    writer.add_tensor("token_embd.weight", random_weights.weights(len(tokens), spec.width, 1.0))
    for layer in range(spec.layers):
        block = f"blk.{layer}."
        writer.add_tensor(block + "attn_norm.weight", np.ones(spec.width, np.float32))
        writer.add_tensor(block + "attn_q.weight", random_weights.weights(attention, spec.width))
        writer.add_tensor(block + "attn_k.weight", random_weights.weights(key, spec.width))
        writer.add_tensor(block + "attn_v.weight", random_weights.weights(key, spec.width))
        writer.add_tensor(block + "attn_output.weight", random_weights.weights(spec.width, attention))
        writer.add_tensor(block + "ffn_norm.weight", np.ones(spec.width, np.float32))
        writer.add_tensor(block + "ffn_gate.weight", random_weights.weights(spec.feed_forward, spec.width))
        writer.add_tensor(block + "ffn_up.weight", random_weights.weights(spec.feed_forward, spec.width))
        writer.add_tensor(block + "ffn_down.weight", random_weights.weights(spec.width, spec.feed_forward))
    writer.add_tensor("output_norm.weight", np.ones(spec.width, np.float32))
    # The final norm gives rows of length sqrt(width): this spread gives word logits a standard deviation of about 3.
    output = random_weights.weights(len(tokens), spec.width, 3.0 / spec.width**0.5)
    output[:word_start] = 0
    writer.add_tensor("output.weight", output)


def _write_embed(writer: gguf.GGUFWriter, spec: ModelSpec, random_weights: _RandomWeights) -> None:
    """Architecture bert with a WordPiece vocabulary of single characters, mean pooling."""
    writer.add_layer_norm_eps(1e-12)
    writer.add_causal_attention(False)
    writer.add_pooling_type(gguf.PoolingType.MEAN)
    characters = [chr(code) for code in range(33, 127)]
    tokens = [*_BERT_CONTROLS, *("▁" + character for character in characters), *characters]
    types = [gguf.TokenType.CONTROL] * len(_BERT_CONTROLS) + [gguf.TokenType.NORMAL] * (2 * len(characters))
    _vocabulary(writer, "bert", tokens, types, lambda _: -1000.0)
    writer.add_token_type_count(2)
    writer.add_pad_token_id(0)
    writer.add_unk_token_id(1)
    writer.add_bos_token_id(2)
    writer.add_sep_token_id(3)

    def add_with_bias(name: str, weight: npt.NDArray[np.float16] | npt.NDArray[np.float32]) -> None:
        writer.add_tensor(name + ".weight", weight)
        writer.add_tensor(name + ".bias", np.zeros(len(weight), np.float32))

    writer.add_tensor("token_embd.weight", random_weights.weights(len(tokens), spec.width, 1.0))
    writer.add_tensor("token_types.weight", random_weights.matrix(2, spec.width))
    writer.add_tensor("position_embd.weight", random_weights.matrix(spec.context, spec.width))
    add_with_bias("token_embd_norm", np.ones(spec.width, np.float32))
    for layer in range(spec.layers):
        block = f"blk.{layer}."
        for part in ("attn_q", "attn_k", "attn_v", "attn_output"):
            add_with_bias(block + part, random_weights.weights(spec.width, spec.width))
        add_with_bias(block + "attn_output_norm", np.ones(spec.width, np.float32))
        add_with_bias(block + "ffn_up", random_weights.weights(spec.feed_forward, spec.width))
        add_with_bias(block + "ffn_down", random_weights.weights(spec.width, spec.feed_forward))
        add_with_bias(block + "layer_output_norm", np.ones(spec.width, np.float32))
