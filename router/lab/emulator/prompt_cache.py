"""Evaluated prompts that a runner of the EMULATED server still has: those in its slots, and from 0.30 those put away.

A prompt begins where the evaluation of the longest common beginning ends. Up to 0.24 that is looked for in the free
slots. From 0.30 a slot's prompt that would be lost is put away in host memory first, up to a number of tokens, and one
that was put away comes back where it has more of the new one. It waits for nothing and counts no users.

After `findLongestCacheSlot` (runner/llamarunner/cache.go, v0.24) and llama-server's `get_available_slot` and
`server_prompt_cache` (llama.cpp).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

_SIMILAR_SHARE = 0.1
"""Of a new prompt: a slot that has no more of it in common is not chosen for that."""
_LOST_SHARE = 0.5
"""Of a slot's prompt: if less than that stays, it is put away."""
_WORTHWHILE_SHARE = 0.25
"""Of a prompt that was put away: if less than that would be used, it stays away."""


@dataclass(slots=True)
class Slot:
    """One parallel place; `text` is the prompt and answer whose evaluation it still holds."""

    text: str = ""
    is_taken: bool = False
    used: int = 0
    """When it was last let go, counted in uses."""


@dataclass(slots=True)
class PromptCache:
    """All of one runner. `most_tokens` 0: none is put away."""

    slots: Sequence[Slot]
    most_tokens: int
    tokens_of: Callable[[str], int]
    _away: list[tuple[str, int]] = field(default_factory=list[tuple[str, int]])
    """Text and tokens, the oldest first."""
    _uses: int = 0

    def take(self, prompt: str) -> Slot:
        """A free slot for the prompt, there must be one; its `text` is the best that there is."""
        free = [one for one in self.slots if not one.is_taken]
        slot = max(free, key=lambda one: common_length(one.text, prompt))
        if self.most_tokens:
            slot = self._by_llama_server(free, slot, prompt)
        slot.is_taken = True
        return slot

    def let_go(self, slot: Slot) -> None:
        """It is free for others."""
        self._uses += 1
        slot.is_taken, slot.used = False, self._uses

    def _by_llama_server(self, free: Sequence[Slot], best: Slot, prompt: str) -> Slot:
        is_similar = common_length(best.text, prompt) > _SIMILAR_SHARE * len(prompt)
        slot = best if is_similar else min(free, key=lambda one: one.used)
        if not is_similar or common_length(slot.text, prompt) < _LOST_SHARE * len(slot.text):
            self._put_away(slot.text)
            slot.text = self._back(prompt, slot.text)
            self._forget()
        return slot

    def _put_away(self, text: str) -> None:
        """Unless a longer one that begins so is there; shorter ones with which it begins are not needed any more."""
        if any(other.startswith(text) for other, _ in self._away):
            return
        self._away = [entry for entry in self._away if not text.startswith(entry[0])]
        if text:
            self._away.append((text, self.tokens_of(text)))

    def _forget(self) -> None:
        while sum(tokens for _, tokens in self._away) > self.most_tokens:
            del self._away[0]

    def _back(self, prompt: str, text: str) -> str:
        """The one that has most of the prompt, where it has more of it than `text`; else that."""
        found = max(self._away, key=lambda one: common_length(one[0], prompt), default=("", 0))
        common = common_length(found[0], prompt)
        if common <= common_length(text, prompt) or common < _WORTHWHILE_SHARE * len(found[0]):
            return text
        self._away.remove(found)
        return found[0]


def common_length(one: str, other: str) -> int:
    """How many characters two texts begin alike."""
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        if one[:middle] == other[:middle]:
            low = middle
        else:
            high = middle - 1
    return low
