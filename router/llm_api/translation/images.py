"""Images as Ollama's API has them (base64) as the data URLs of OpenAI's: their type is read from the content. Pure."""

from __future__ import annotations

import base64
import binascii

from router.errors import BadRequest

_BEGINNING = 32
"""Characters of base64 that hold every mark."""
_MARKS = (
    (b"\x89PNG\r\n\x1a\n", "image/png"),
    (b"\xff\xd8\xff", "image/jpeg"),
    (b"GIF8", "image/gif"),
    (b"BM", "image/bmp"),
)


def data_url(given: object, where: str) -> str:
    """`data:image/png;base64,…`. A text that is a data URL already stays as it is.

    Raises:
        BadRequest: it is no image that servers read.
    """
    if not isinstance(given, str):
        raise BadRequest(f"{where}: must be an image in base64")
    if given.startswith("data:image/"):
        return given
    try:
        beginning = base64.b64decode(given[:_BEGINNING] + "=" * (-len(given[:_BEGINNING]) % 4), validate=True)
    except (binascii.Error, ValueError) as error:
        raise BadRequest(f"{where}: is not base64: {error}") from error
    kind = next((kind for mark, kind in _MARKS if beginning.startswith(mark)), None)
    if kind is None and beginning.startswith(b"RIFF") and beginning[8:12] == b"WEBP":
        kind = "image/webp"
    if kind is None:
        raise BadRequest(f"{where}: is no PNG, JPEG, GIF, WebP or BMP image")
    return f"data:{kind};base64,{given}"
