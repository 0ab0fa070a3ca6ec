"""Remembers loaded models whose facts could not be read, so that their servers are not asked at every poll.

A model is unreadable when its file is damaged, or when it was deleted while it was loaded. Each failed attempt doubles
the time until the next, up to a minute.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from router.engines.ollama.client import OllamaError

_FIRST_SECONDS = 1.0
_LONGEST_SECONDS = 60.0


@dataclass(frozen=True, slots=True)
class _Attempt:
    until: float
    pause_seconds: float
    status: int
    message: str
    """Of the error; "" if the servers answered that they do not have the model."""


class UnreadableFacts:
    """By digest of the manifest. `clock` is monotonic, in seconds."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._attempts: dict[str, _Attempt] = {}

    def failed(self, digest: str, error: OllamaError | None) -> None:
        """An attempt ended in `error`, or with the answer that there is no such model."""
        before = self._attempts.get(digest)
        pause = _FIRST_SECONDS if before is None else min(_LONGEST_SECONDS, 2 * before.pause_seconds)
        status, message = (0, "") if error is None else (error.status, error.message)
        self._attempts[digest] = _Attempt(self._clock() + pause, pause, status, message)

    def is_held(self, digest: str) -> bool:
        """Returns True if the servers shall not be asked yet."""
        attempt = self._attempts.get(digest)
        return attempt is not None and self._clock() < attempt.until

    def outcome(self, digest: str) -> None:
        """The outcome of the last attempt: None for a model that the servers do not have.

        Raises:
            OllamaError: the last attempt failed.
        """
        attempt = self._attempts[digest]
        if attempt.message:
            raise OllamaError(attempt.status, attempt.message)

    def clear(self) -> None:
        """What the servers have has changed: any of them may be readable now."""
        self._attempts.clear()
