"""The errors that clients can receive, each with an HTTP status and a stable code."""

from __future__ import annotations

import errno
from collections.abc import Mapping

import msgspec

UNREADABLE_JSON = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)
"""What decoding bytes from outside as JSON may raise: not valid, not of the type, not UTF-8, nested too deeply."""

UNREACHABLE_RETRY_AFTER_SECONDS = 5
"""A server that is down is not back sooner."""


class RouterError(Exception):
    """An error that ends a request.

    `code` is stable and machine-readable. `message` is for people: it names the cause and, if there is one, the fix.
    `status` overrides the default HTTP status of the class. `headers` belong on the response.
    """

    status = 500
    code = "internal_error"
    retry_reason = "server_error"
    """Why a request is sent again after it, where it is: a label of the metrics."""

    def __init__(
        self,
        message: str,
        *,
        status: int | None = None,
        retry_after_seconds: int | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.retry_after_seconds = retry_after_seconds
        self.headers = headers or {}
        if status is not None:
            self.status = status


class BadRequest(RouterError):
    status, code = 400, "bad_request"


class Unauthorized(RouterError):
    """The request presents no valid access key where one is required."""

    status, code = 401, "unauthorized"


class Forbidden(RouterError):
    status, code = 403, "forbidden"


class ModelNotFound(RouterError):
    status, code = 404, "model_not_found"


class NotSupported(RouterError):
    """The Ollama servers are too old for this request."""

    status, code = 404, "not_supported"


class LayoutUnavailable(RouterError):
    """The GPUs that the request asked for cannot serve it; the message says why."""

    status, code = 409, "layout_unavailable"


class BodyTooLarge(RouterError):
    status, code = 413, "body_too_large"


class ModelTooLarge(RouterError):
    """The model does not fit on all GPUs together; the message has the bytes needed and the bytes there are."""

    status, code = 422, "model_too_large"


class RateLimited(RouterError):
    """The access key has used up one of its limits."""

    status, code = 429, "rate_limited"


class ServerRefused(RouterError):
    """The server's error, with its message and status, when its response can no longer be forwarded as it is."""

    status, code = 502, "server_error"


class LoadFailed(RouterError):
    """The instance could not load the model; its message and status are passed on."""

    status, code = 502, "load_failed"


class InstanceLost(RouterError):
    """The instance died during the request."""

    status, code = 502, "instance_lost"
    retry_reason = "connection_lost"


class InstanceUnreachable(InstanceLost):
    """No connection to the instance could be opened, so that nothing was lost: it has just gone away."""

    status, code = 503, "no_instance"
    retry_reason = "unreachable"

    def __init__(self, message: str) -> None:
        super().__init__(message, retry_after_seconds=UNREACHABLE_RETRY_AFTER_SECONDS)


class RunnerDied(InstanceLost):
    """The instance answered that the runner of the model has died."""

    retry_reason = "runner_died"


class StreamTruncated(RouterError):
    """The server ended a stream without its protocol's end mark."""

    status, code = 502, "stream_truncated"


class QueueFull(RouterError):
    status, code = 503, "queue_full"


class NoInstance(RouterError):
    status, code = 503, "no_instance"


class ShuttingDown(RouterError):
    status, code = 503, "shutting_down"


class WaitTimeout(RouterError):
    """The request was not served before its deadline."""

    status, code = 504, "wait_timeout"


class LoopDetected(RouterError):
    """A server of this router led the request back to it."""

    status, code = 508, "loop_detected"


class DiskFull(RouterError):
    """The disk of the model store has too little room."""

    status, code = 507, "disk_full"


_BY_CODE: dict[str, type[RouterError]] = {
    error.code: error
    for error in (
        BadRequest,
        Unauthorized,
        Forbidden,
        ModelNotFound,
        NotSupported,
        LayoutUnavailable,
        BodyTooLarge,
        ModelTooLarge,
        RateLimited,
        ServerRefused,
        LoadFailed,
        InstanceLost,
        StreamTruncated,
        QueueFull,
        NoInstance,
        ShuttingDown,
        WaitTimeout,
        LoopDetected,
        DiskFull,
    )
}
RETRY_REASONS = tuple(error.retry_reason for error in (InstanceLost, InstanceUnreachable, RunnerDied, RouterError))
ERROR_CODES = tuple(_BY_CODE)
"""Every code that a client can receive."""


def error_for(
    code: str, message: str, status: int | None = None, retry_after_seconds: int | None = None
) -> RouterError:
    """Makes the error with this code, as in the dispatcher's `Reject`.

    Raises:
        KeyError: no error has this code.
    """
    return _BY_CODE[code](message, status=status, retry_after_seconds=retry_after_seconds)


def is_out_of_descriptors(error: BaseException | None) -> bool:
    """Whether this process, and not its peer, is why a connection failed: no file descriptor or buffer was left."""
    return isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS)
