"""When the rest of one request's body must have come."""

from __future__ import annotations

from router.llm_api.limits import RequestLimits


class BodyDeadline:
    """Three bounds: silence between two pieces, a least average rate, and the time for the whole body.

    A sender may be slower than the least rate for `body_timeout_seconds`. Time in which the router itself does not read
    counts for none of them but the last.
    """

    __slots__ = ("_bytes", "_ends_at", "_limits", "_since", "due")

    def __init__(self, limits: RequestLimits, now: float, *, is_bounded: bool = True) -> None:
        """`is_bounded`: False for uploads of any length, which may take any time at the least rate."""
        self._limits = limits
        self._ends_at = now + limits.body_total_timeout_seconds if is_bounded else float("inf")
        self._since = now
        self._bytes = 0
        self.due = 0.0
        """In seconds of the same clock as `now`."""
        self.received(0, now)

    def received(self, piece_bytes: int, now: float) -> None:
        """A piece has come."""
        limits = self._limits
        self._bytes += piece_bytes
        allowed_seconds = limits.body_timeout_seconds + self._bytes / limits.body_bytes_per_second_min
        self.due = min(now + limits.body_timeout_seconds, self._since + allowed_seconds, self._ends_at)

    def not_read(self, now: float) -> None:
        """The router does not read at the moment: the rate is measured from now on."""
        self._since, self._bytes = now, 0
        self.received(0, now)
