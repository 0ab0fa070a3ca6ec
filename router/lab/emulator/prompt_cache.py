"""Prompt cache of an EMULATED runner: evaluated prompts in its slots and, from 0.30, saved in host memory.

A prompt is evaluated from the end of its longest cached prefix. Up to 0.24 only the free slots are searched. From 0.30
a slot's prompt is saved to host memory before it is overwritten, up to a token limit, and restored if it shares a
longer prefix with a new prompt. Does no waiting and counts no users.

Modelled on `findLongestCacheSlot` (runner/llamarunner/cache.go, v0.24) and llama-server's `get_available_slot` and
`server_prompt_cache` (llama.cpp).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

_MIN_SIMILARITY = 0.1
"""Minimum shared prefix, as a share of the new prompt, for a slot to be chosen by similarity."""
_MIN_KEPT_SHARE = 0.5
"""A slot's prompt is saved if less than this share of it would be kept."""
_MIN_RESTORED_SHARE = 0.25
"""A saved prompt is restored only if at least this share of it would be used."""


@dataclass(slots=True)
class Slot:
    """One slot; `text` is the prompt and answer that it has evaluated."""

    text: str = ""
    is_taken: bool = False
    last_used: int = 0
    """Sequence number of its last release."""


@dataclass(slots=True)
class PromptCache:
    """Prompt cache of one runner. With `max_saved_tokens` 0 no prompts are saved."""

    slots: Sequence[Slot]
    max_saved_tokens: int
    tokens_of: Callable[[str], int]
    _saved: list[tuple[str, int]] = field(default_factory=list[tuple[str, int]])
    """Text and token count, oldest first."""
    _release_count: int = 0

    def acquire(self, prompt: str) -> Slot:
        """Takes the best free slot for the prompt; there must be one. Its `text` is the best cached prefix."""
        free = [slot for slot in self.slots if not slot.is_taken]
        slot = max(free, key=lambda slot: common_prefix_length(slot.text, prompt))
        if self.max_saved_tokens:
            slot = self._choose_as_llama_server(free, slot, prompt)
        slot.is_taken = True
        return slot

    def release(self, slot: Slot) -> None:
        """Frees the slot."""
        self._release_count += 1
        slot.is_taken, slot.last_used = False, self._release_count

    def _choose_as_llama_server(self, free: Sequence[Slot], best: Slot, prompt: str) -> Slot:
        is_similar = common_prefix_length(best.text, prompt) > _MIN_SIMILARITY * len(prompt)
        slot = best if is_similar else min(free, key=lambda slot: slot.last_used)
        if not is_similar or common_prefix_length(slot.text, prompt) < _MIN_KEPT_SHARE * len(slot.text):
            self._save(slot.text)
            slot.text = self._restore(prompt, slot.text)
            self._trim()
        return slot

    def _save(self, text: str) -> None:
        """Saves the text unless a saved one contains it as a prefix; drops saved prefixes of it."""
        if any(other.startswith(text) for other, _ in self._saved):
            return
        self._saved = [entry for entry in self._saved if not text.startswith(entry[0])]
        if text:
            self._saved.append((text, self.tokens_of(text)))

    def _trim(self) -> None:
        while sum(tokens for _, tokens in self._saved) > self.max_saved_tokens:
            del self._saved[0]

    def _restore(self, prompt: str, text: str) -> str:
        """Returns the saved text with the longest common prefix if that is longer than that of `text`, else `text`."""
        best_entry = max(self._saved, key=lambda entry: common_prefix_length(entry[0], prompt), default=("", 0))
        common = common_prefix_length(best_entry[0], prompt)
        if common <= common_prefix_length(text, prompt) or common < _MIN_RESTORED_SHARE * len(best_entry[0]):
            return text
        self._saved.remove(best_entry)
        return best_entry[0]


def common_prefix_length(first: str, second: str) -> int:
    """Length of the common prefix of two texts, in characters."""
    low, high = 0, min(len(first), len(second))
    while low < high:
        middle = (low + high + 1) // 2
        if first[:middle] == second[:middle]:
            low = middle
        else:
            high = middle - 1
    return low
