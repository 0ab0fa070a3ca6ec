"""The file of the access keys: private, whole at any time, and refused rather than half understood."""

from __future__ import annotations

import stat
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from router.domain.access_key import AccessKey, KeyLimits, RouteClass
from router.domain.request import LayoutKind
from router.storage.key_file import KEYS_MAX, KeyFile, KeyFileError, is_private

KEY = AccessKey(
    "laptop", "ab" * 32, "anna", 1.0, 2.0, frozenset(RouteClass), ("qwen*",), KeyLimits(1, 2, 3, 4), 1, 8192, 1.0, -1.0,
    frozenset({LayoutKind.SINGLE}), forwards_users=True,
)  # fmt: skip


def test_what_is_written_is_read_and_only_the_owner_may_read_it(tmp_path: Path) -> None:
    file = KeyFile(tmp_path / "state" / "keys.json")
    assert (file.stamp(), file.read()) == (None, None)
    file.change(lambda keys: (*keys, KEY))
    assert file.read() == (KEY,)
    assert stat.S_IMODE(file.path.stat().st_mode) == 0o600
    assert [entry.name for entry in file.path.parent.iterdir()] == ["keys.json"]


def test_each_change_gives_another_stamp(tmp_path: Path) -> None:
    file = KeyFile(tmp_path / "keys.json")
    file.change(lambda _: (KEY,))
    first = file.stamp()
    file.change(lambda _: (replace(KEY, sha256="cd" * 32),))
    assert file.stamp() != first is not None


def test_commands_at_the_same_time_lose_nothing(tmp_path: Path) -> None:
    file = KeyFile(tmp_path / "keys.json")

    def add(number: int) -> None:
        file.change(lambda keys: (*keys, replace(KEY, name=f"k{number}", sha256=f"{number:064x}")))

    threads = [threading.Thread(target=add, args=(number,)) for number in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {key.name for key in file.read() or ()} == {f"k{number}" for number in range(12)}


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660])
def test_a_file_that_others_may_read_is_refused_with_the_fix(tmp_path: Path, mode: int) -> None:
    file = KeyFile(tmp_path / "keys.json")
    file.change(lambda _: (KEY,))
    file.path.chmod(mode)
    with pytest.raises(KeyFileError, match=r"run `chmod 600 .*keys\.json`"):
        file.read()


@pytest.mark.parametrize(
    "text",
    [
        "", "{", "[]", "null", "{}",
        '{"keys": null}', '{"keys": 1}', '{"keys": [{"name": "x"}]}', '{"keys": [], "more": 1}',
        '{"keys": [null]}', '{"keys": [{"name": "\xff"}]}', '{"keys": ' + "[" * 100_000,
    ],
)  # fmt: skip
def test_anything_else_is_refused_with_its_path(tmp_path: Path, text: str) -> None:
    file = KeyFile(tmp_path / "keys.json")
    file.path.write_bytes(text.encode("latin-1"))
    file.path.chmod(0o600)
    with pytest.raises(KeyFileError, match=r"keys\.json: not a file of `llamayard keys`"):
        file.read()


def test_keys_that_cannot_be_told_apart_or_used_and_too_many_are_refused(tmp_path: Path) -> None:
    file = KeyFile(tmp_path / "keys.json")
    with pytest.raises(KeyFileError, match="two keys have the name 'laptop'"):
        file.change(lambda _: (KEY, replace(KEY, sha256="cd" * 32)))
    with pytest.raises(KeyFileError, match="two keys have the sha256"):
        file.change(lambda _: (KEY, replace(KEY, name="other")))
    with pytest.raises(KeyFileError, match="key 'laptop': sha256 is no digest"):
        file.change(lambda _: (replace(KEY, sha256="AB" * 32),))
    with pytest.raises(KeyFileError, match="key 'laptop': tokens_per_day is 0: must be at least 1"):
        file.change(lambda _: (replace(KEY, limits=KeyLimits(tokens_per_day=0)),))
    many = tuple(replace(KEY, name=f"k{number}", sha256=f"{number:064x}") for number in range(KEYS_MAX + 1))
    with pytest.raises(KeyFileError, match=f"more than {KEYS_MAX} keys"):
        file.change(lambda _: many)
    assert file.read() is None


def test_a_directory_that_cannot_be_written_is_a_problem_with_its_path(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(KeyFileError, match="cannot be written"):
        KeyFile(tmp_path / "file" / "keys.json").change(lambda _: (KEY,))


@pytest.mark.parametrize(
    ("mode", "owner", "user", "is_it"),
    [
        (0o600, 1000, 1000, True),
        (0o640, 1000, 1000, False),
        (0o440, 0, 10001, True),  # a Secret that Kubernetes mounts with fsGroup
        (0o460, 0, 10001, False),
        (0o444, 0, 10001, False),
        (0o640, 0, 0, False),
    ],
)
def test_the_group_may_read_only_what_root_mounted(mode: int, owner: int, user: int, is_it: bool) -> None:
    assert is_private(mode, owner, user) is is_it
