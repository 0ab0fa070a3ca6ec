"""The file with the access keys: JSON, mode 0600, digests only. Read by the router, changed by `llamayard keys`.

Changes are atomic and made one at a time: a reader sees the file before or after a change, never in between.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import stat
from collections.abc import Callable, Generator
from dataclasses import asdict
from pathlib import Path

import msgspec

from router.domain.access_key import AccessKey
from router.errors import UNREADABLE_JSON

KEYS_MAX = 10_000
_MODE = 0o600
_OTHERS = 0o077
_OTHERS_OF_ROOTS = 0o037
"""A file of root's that is mounted for the router, as Kubernetes mounts a Secret, may be readable by its group."""
_DIGEST = re.compile(r"[0-9a-f]{64}")


class KeyFileError(Exception):
    """The file cannot be used; the text says why and what to do."""


class _Document(msgspec.Struct, forbid_unknown_fields=True):
    keys: list[AccessKey]
    version: int = 1


Stamp = tuple[int, int, int]
"""Changes whenever the file is replaced or written."""


class KeyFile:
    """Blocking: the file is small."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def stamp(self) -> Stamp | None:
        """None if there is no such file.

        Raises:
            KeyFileError: its directory may not be read.
        """
        try:
            found = self.path.stat()
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise KeyFileError(f"{self.path}: cannot be read: {error.strerror}") from error
        return found.st_mtime_ns, found.st_size, found.st_ino

    def read(self) -> tuple[AccessKey, ...] | None:
        """All keys; None if there is no file.

        Raises:
            KeyFileError: it cannot be read, others may read it, or it is not as `llamayard keys` writes it.
        """
        try:
            with self.path.open("rb") as file:
                found = os.fstat(file.fileno())
                raw = file.read()
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise KeyFileError(
                f"{self.path}: cannot be read by the user with id {os.geteuid()}: {error.strerror}"
            ) from error
        if not is_private(found.st_mode, found.st_uid, os.geteuid()):
            raise KeyFileError(f"{self.path}: others may read or write it: run `chmod 600 {self.path}`")
        try:
            keys = tuple(msgspec.json.decode(raw, type=_Document).keys)
        except UNREADABLE_JSON as error:
            raise KeyFileError(f"{self.path}: not a file of `llamayard keys`: {error}") from error
        _check(self.path, keys)
        return keys

    def change(self, change: Callable[[tuple[AccessKey, ...]], tuple[AccessKey, ...]]) -> None:
        """Replaces the keys by those that `change` returns; creates the file and its directory.

        Raises:
            KeyFileError: as `read`; or the file cannot be written.
        """
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            with self._alone():
                keys = change(self.read() or ())
                _check(self.path, keys)
                self._write(keys)
        except OSError as error:
            raise KeyFileError(f"{self.path}: cannot be written: {error.strerror}") from error

    def _write(self, keys: tuple[AccessKey, ...]) -> None:
        temporary = self.path.with_name(f".{self.path.name}.{os.getpid()}")
        text = msgspec.json.format(msgspec.json.encode(_Document(list(keys))), indent=2) + b"\n"
        try:
            descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, _MODE)
            with os.fdopen(descriptor, "wb") as file:
                os.fchmod(descriptor, _MODE)
                self._give_to_owner(descriptor)
                file.write(text)
                file.flush()
                os.fsync(descriptor)
            temporary.replace(self.path)
        finally:
            temporary.unlink(missing_ok=True)

    def _give_to_owner(self, descriptor: int) -> None:
        """Root may run the command for a service: the file stays that of the service's user."""
        if os.geteuid() == 0:
            owner = (self.path if self.path.exists() else self.path.parent).stat()
            os.fchown(descriptor, owner.st_uid, owner.st_gid)

    @contextlib.contextmanager
    def _alone(self) -> Generator[None]:
        """Waits for other commands that change the file. The directory is the lock, so that no file is left over."""
        descriptor = os.open(self.path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)


def _check(path: Path, keys: tuple[AccessKey, ...]) -> None:
    """Raises KeyFileError: a key's digest or limit is none, two have one name or digest, or there are too many."""
    if len(keys) > KEYS_MAX:
        raise KeyFileError(f"{path}: more than {KEYS_MAX} keys")
    for key in keys:
        if _DIGEST.fullmatch(key.sha256) is None:
            raise KeyFileError(f"{path}: key {key.name!r}: sha256 is no digest of 64 hexadecimal digits in lower case")
        for field, limit in asdict(key.limits).items():
            if limit is not None and limit < 1:
                raise KeyFileError(f"{path}: key {key.name!r}: {field} is {limit}: must be at least 1, or null")
    for field in ("name", "sha256"):
        values = [getattr(key, field) for key in keys]
        if len(set(values)) < len(values):
            double = next(value for at, value in enumerate(values) if value in values[:at])
            raise KeyFileError(f"{path}: two keys have the {field} {double!r}")


def is_private(mode: int, owner: int, user: int) -> bool:
    """Whether only `user` may read a file. One that root owns and others are given may be readable by its group."""
    return not stat.S_IMODE(mode) & (_OTHERS_OF_ROOTS if owner == 0 != user else _OTHERS)
