"""The files of the dashboard's page, served from memory with a policy that lets the page load nothing else."""

from __future__ import annotations

import hashlib
import mimetypes
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from aiohttp import hdrs, web

from router.errors import RouterError

STATIC_FILES = Path(__file__).parent / "static"
_PAGE = "index.html"
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'"
)
_HEADERS = {
    "Content-Security-Policy": _POLICY,
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    hdrs.CACHE_CONTROL: "no-cache",
}
_TYPES = {".js": "text/javascript", ".svg": "image/svg+xml"}
"""Those that a machine's own table may lack or have otherwise."""


class NoSuchFile(RouterError):
    status, code = 404, "not_found"


@dataclass(frozen=True, slots=True)
class _File:
    body: bytes
    content_type: str
    tag: str


class StaticFiles:
    """All files of one folder, which has no folders that are served."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    @cached_property
    def _files(self) -> Mapping[str, _File]:
        return {path.name: _read(path) for path in self._folder.iterdir() if path.is_file()}

    def response(self, request: web.BaseRequest, extra: Mapping[str, str]) -> web.Response:
        """`/ui` is the page, `/ui/NAME` a file.

        Raises:
            NoSuchFile: there is none of that name.
        """
        name = request.path.removeprefix("/ui").lstrip("/") or _PAGE
        file = self._files.get(name)
        if file is None:
            raise NoSuchFile(f"the dashboard has no file '{name[:100]}'")
        headers = {**_HEADERS, hdrs.ETAG: file.tag, **extra}
        if request.headers.get(hdrs.IF_NONE_MATCH) == file.tag:
            return web.Response(status=304, headers=headers)
        response = web.Response(body=file.body, headers={**headers, hdrs.CONTENT_TYPE: file.content_type})
        if len(file.body) > 1024:
            response.enable_compression()
        return response


def _read(path: Path) -> _File:
    body = path.read_bytes()
    kind = _TYPES.get(path.suffix) or mimetypes.guess_type(path.name)[0] or "application/octet-stream"
    if kind.startswith("text/"):
        kind += "; charset=utf-8"
    return _File(body, kind, f'"{hashlib.sha256(body).hexdigest()[:32]}"')
