"""Every error a client can meet, with its HTTP status and a stable code. A leaf: imports nothing of the router."""

from __future__ import annotations


class RouterError(Exception):
    """An error that ends a request. `code` is stable and machine-readable; `message` names the cause and the fix."""

    status = 500
    code = "internal_error"

    def __init__(self, message: str, *, status: int | None = None, retry_after_seconds: int | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.retry_after_seconds = retry_after_seconds
        if status is not None:
            self.status = status


class BadRequest(RouterError):
    status, code = 400, "bad_request"


class Forbidden(RouterError):
    status, code = 403, "forbidden"


class ModelNotFound(RouterError):
    status, code = 404, "model_not_found"


class NotSupported(RouterError):
    """The servers behind are too old for what was asked."""

    status, code = 404, "not_supported"


class LayoutUnavailable(RouterError):
    """The GPUs that the request insists on cannot serve it; the message says why."""

    status, code = 409, "layout_unavailable"


class BodyTooLarge(RouterError):
    status, code = 413, "body_too_large"


class UnsupportedEncoding(RouterError):
    """The body is compressed in a way that the router cannot read, and what it cannot read it does not route."""

    status, code = 415, "unsupported_encoding"


class ModelTooLarge(RouterError):
    """Fits nowhere, not even over all GPUs; the message says bytes needed and bytes there are."""

    status, code = 422, "model_too_large"


class ServerRefused(RouterError):
    """The server's own error, with its words and status, where its answer itself cannot be passed on any more."""

    status, code = 502, "server_error"


class LoadFailed(RouterError):
    """The instance refused or failed to load the model; its words and status are passed on."""

    status, code = 502, "load_failed"


class InstanceLost(RouterError):
    """The instance died under the request."""

    status, code = 502, "instance_lost"


class QueueFull(RouterError):
    status, code = 503, "queue_full"


class NoInstance(RouterError):
    status, code = 503, "no_instance"


class ShuttingDown(RouterError):
    status, code = 503, "shutting_down"


class WaitTimeout(RouterError):
    """Waited its whole deadline."""

    status, code = 504, "wait_timeout"


_BY_CODE: dict[str, type[RouterError]] = {
    kind.code: kind
    for kind in (
        BadRequest,
        Forbidden,
        ModelNotFound,
        NotSupported,
        LayoutUnavailable,
        BodyTooLarge,
        UnsupportedEncoding,
        ModelTooLarge,
        ServerRefused,
        LoadFailed,
        InstanceLost,
        QueueFull,
        NoInstance,
        ShuttingDown,
        WaitTimeout,
    )
}


def error_for(
    code: str, message: str, status: int | None = None, retry_after_seconds: int | None = None
) -> RouterError:
    """The error of a stable code, as the dispatcher's `Reject` names it; an unknown code is a programming error."""
    return _BY_CODE[code](message, status=status, retry_after_seconds=retry_after_seconds)
