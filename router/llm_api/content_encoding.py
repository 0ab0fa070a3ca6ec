"""Decompresses request bodies that an Ollama server decompresses: zstd on `/v1/*`, within the same bounds.

The router must read the model from the bytes that the server reads, so it forwards the decompressed body, without the
header. Any other encoding is no encoding to a server: it reads the bytes as they are, and so does the router.

Sources: cloudPassthroughMiddleware in server/cloud_proxy.go (v0.24.0, v0.34.0): the first value of the header must be
`zstd` exactly, the window is at most 8 MiB, the decompressed body at most 20 MiB. `/v1/audio/*` has no such middleware.
"""

from __future__ import annotations

from typing import Final

import zstandard

from router.errors import BadRequest, BodyTooLarge

WINDOW_BYTES_MAX: Final = 8 << 20
DECOMPRESSED_BYTES_MAX: Final = 20 << 20

_PIECE_BYTES: Final = 1024
"""Compressed bytes fed at a time. Four bytes can stand for 128 KiB, so this bounds what one step can add to 32 MiB."""


def is_zstd(path: str, content_encoding: str | None) -> bool:
    """Whether a server decompresses the body of a POST to this path."""
    return content_encoding == "zstd" and path.startswith("/v1/") and not path.startswith("/v1/audio/")


def decompressed(body: bytes, bytes_max: int = DECOMPRESSED_BYTES_MAX) -> bytes:
    """The content of all frames of `body`.

    Raises:
        BadRequest: it is no zstd, ends early, or needs a larger window than a server accepts.
        BodyTooLarge: it decompresses to more than `bytes_max`.
    """
    decompressor = zstandard.ZstdDecompressor(max_window_size=WINDOW_BYTES_MAX)
    pieces: list[bytes] = []
    decompressed_bytes = position = 0
    try:
        while position < len(body):
            frame = decompressor.decompressobj()
            while not frame.eof:
                if position >= len(body):
                    raise BadRequest("the zstd body cannot be decompressed: it ends within a frame")
                piece = frame.decompress(body[position : position + _PIECE_BYTES])
                position += _PIECE_BYTES
                decompressed_bytes += len(piece)
                if decompressed_bytes > bytes_max:
                    raise BodyTooLarge(f"the zstd body decompresses to more than {bytes_max} bytes")
                pieces.append(piece)
            position = min(position, len(body)) - len(frame.unused_data)
    except zstandard.ZstdError as error:
        raise BadRequest(f"the zstd body cannot be decompressed: {error}") from error
    return b"".join(pieces)
