"""Which bodies are decompressed, and within which bounds."""

from __future__ import annotations

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from router.errors import BadRequest, BodyTooLarge
from router.llm_api.content_encoding import WINDOW_BYTES_MAX, decompressed, is_zstd

_BODY = b'{"model":"tiny","messages":[]}'
_SKIPPABLE = b"\x50\x2a\x4d\x18\x04\x00\x00\x00abcd"


def _zstd(data: bytes, *, with_size: bool = True, with_checksum: bool = False) -> bytes:
    return zstandard.ZstdCompressor(write_content_size=with_size, write_checksum=with_checksum).compress(data)


def _with_window(window_log: int, data: bytes) -> bytes:
    parameters = zstandard.ZstdCompressionParameters(window_log=window_log, write_content_size=False)
    compressor = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    return compressor.compress(data) + compressor.flush()


@pytest.mark.parametrize(
    ("path", "encoding", "expected"),
    [
        ("/v1/chat/completions", "zstd", True),
        ("/v1/messages", "zstd", True),
        ("/v1/images/generations", "zstd", True),
        ("/v1/audio/transcriptions", "zstd", False),
        ("/api/chat", "zstd", False),
        ("/v1/responses", "ZSTD", False),
        ("/v1/responses", "gzip, zstd", False),
        ("/v1/responses", None, False),
    ],
)
def test_bodies_are_decompressed_where_a_server_does(path: str, encoding: str | None, expected: bool) -> None:
    assert is_zstd(path, encoding) is expected


@pytest.mark.parametrize(
    "body",
    [
        _zstd(_BODY),
        _zstd(_BODY, with_size=False),
        _zstd(_BODY, with_checksum=True),
        _zstd(_BODY[:9]) + _zstd(_BODY[9:]),
        _SKIPPABLE + _zstd(_BODY) + _SKIPPABLE,
        _with_window(23, _BODY),
    ],
)
def test_frames_of_every_kind_are_read(body: bytes) -> None:
    assert decompressed(body) == _BODY


@given(st.binary(max_size=5000), st.integers(1, 4))
def test_what_was_compressed_comes_back(data: bytes, frames: int) -> None:
    size = len(data) // frames + 1
    assert decompressed(b"".join(_zstd(data[at : at + size]) for at in range(0, len(data), size))) == data


@pytest.mark.parametrize(
    "body",
    [
        _BODY,
        _zstd(_BODY)[:-1],
        _zstd(_BODY) + b"{}",
        _zstd(_BODY, with_checksum=True)[:-1] + b"\x00",
        _with_window(24, _BODY + b" " * (2 * WINDOW_BYTES_MAX)),
        _SKIPPABLE[:-1],
    ],
    ids=["plain", "cut", "bytes behind", "checksum", "window", "skippable, cut"],
)
def test_what_a_server_cannot_decompress_is_refused(body: bytes) -> None:
    with pytest.raises(BadRequest, match="zstd"):
        decompressed(body)


@pytest.mark.parametrize("with_size", [True, False])
def test_a_bomb_is_refused_at_the_bound(with_size: bool) -> None:
    bomb = _zstd(bytes(1000), with_size=with_size)
    assert len(decompressed(bomb, 1000)) == 1000
    with pytest.raises(BodyTooLarge, match="999 bytes"):
        decompressed(bomb, 999)
    with pytest.raises(BodyTooLarge):
        decompressed(_zstd(bytes(64 << 20), with_size=with_size) * 2)
