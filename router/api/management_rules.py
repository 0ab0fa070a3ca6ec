"""What clients may do to the model store: which models may be pulled, how large, and what stays free on the disk.

A server connects to the registry that a model's name names, so a name is checked before any server sees it. How large a
model is shows only while it is being pulled: `PullWatch` follows the progress lines and ends a pull that may not go on.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from router.domain.access_key import matches
from router.errors import DiskFull, Forbidden

_LAYERS_MAX = 1000
"""Layers of one model; a manifest with more is not one of Ollama's."""


def _unknown() -> int | None:
    return None


@dataclass(frozen=True, slots=True)
class ManagementRules:
    """The operator's."""

    pull: tuple[str, ...] = ("*",)
    """Patterns of names; see `matches`."""
    pull_max_bytes: int | None = None
    disk_free_min_bytes: int = 0
    push: bool = True
    free_bytes: Callable[[], int | None] = _unknown
    """What is free on the disk of the store; None if this cannot be told."""

    def refuse_pull(self, name: str) -> None:
        """
        Raises:
            Forbidden: models of this name may not be pulled.
        """
        if not matches(self.pull, name):
            allowed = ", ".join(self.pull) or "none"
            raise Forbidden(f"model '{name}' may not be pulled (management.pull allows: {allowed})")

    def refuse_push(self) -> None:
        """
        Raises:
            Forbidden: models may not be pushed.
        """
        if not self.push:
            raise Forbidden("models may not be pushed through the router (management.push)")

    def check_disk(self, added_bytes: int) -> None:
        """
        Raises:
            DiskFull: too little would stay free.
        """
        free_bytes = self.free_bytes()
        if free_bytes is not None and free_bytes - added_bytes < self.disk_free_min_bytes:
            raise DiskFull(
                f"the disk of the model store has {free_bytes} bytes free; {added_bytes} more would leave less than "
                f"{self.disk_free_min_bytes} (management.disk_free_min_bytes)"
            )


class PullWatch:
    """Follows the progress of one pull."""

    __slots__ = ("_rules", "_sizes")

    def __init__(self, rules: ManagementRules) -> None:
        self._rules = rules
        self._sizes: dict[str, tuple[int, int]] = {}
        """Bytes of each layer, and how many of them are there."""

    def progressed(self, digest: str, total_bytes: int, completed_bytes: int) -> None:
        """
        Raises:
            Forbidden: the model is larger than may be pulled.
            DiskFull: the rest of it would leave too little free.
        """
        rules = self._rules
        if not digest or total_bytes <= 0:
            return
        self._sizes[digest] = (total_bytes, completed_bytes)
        whole_bytes = sum(total for total, _ in self._sizes.values())
        if len(self._sizes) > _LAYERS_MAX or (rules.pull_max_bytes is not None and whole_bytes > rules.pull_max_bytes):
            raise Forbidden(
                f"the model has {whole_bytes} bytes or more, and at most {rules.pull_max_bytes} may be pulled "
                "(management.pull_max_bytes)"
            )
        rules.check_disk(whole_bytes - sum(completed for _, completed in self._sizes.values()))
