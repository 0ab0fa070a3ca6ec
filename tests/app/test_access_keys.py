"""A running router takes over changes of its keys' file whole, never opens itself, and ends keys on time."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from router.admission.key_budgets import KeyBudgets
from router.admission.key_ring import KeyStore, digest_of, new_key
from router.app.access_keys import KeyWatcher, change_keys, has_keys, keys_path, read_keys
from router.app.startup_checks import exposure_problems
from router.config.settings import ConfigError, load_settings
from router.domain.access_key import AccessKey
from router.storage.key_file import KeyFile

SECRET = new_key()
_BROKEN = {"broken": b"{", "null": b"null", "no text": b'{"keys": [{"name": "\xff"}]}'}
KEY = AccessKey("laptop", digest_of(SECRET), "anna", 0.0)


@dataclass
class _Watched:
    folder: Path
    now: float = 100.0
    changes: int = 0
    store: KeyStore = field(default_factory=KeyStore)

    def __post_init__(self) -> None:
        self.file = KeyFile(self.folder / "keys.json")
        self.watcher = KeyWatcher(self.file.path, self.store, KeyBudgets(lambda: 0.0), lambda: self.now, self._changed)

    def _changed(self) -> None:
        self.changes += 1

    def names(self) -> set[str] | None:
        return None if self.store.ring is None else set(self.store.ring.names)


def test_keys_are_off_without_a_file_and_on_with_one(tmp_path: Path) -> None:
    watched = _Watched(tmp_path)
    watched.watcher.load()
    watched.watcher.check()
    assert (watched.names(), watched.changes) == (None, 0)
    watched.file.change(lambda _: (KEY,))
    watched.watcher.check()
    assert (watched.names(), watched.changes) == ({"laptop"}, 1)
    watched.watcher.check()
    assert watched.changes == 1
    watched.file.change(lambda _: ())
    watched.watcher.check()
    assert (watched.names(), watched.changes) == (set(), 2)


@pytest.mark.parametrize("damage", ["removed", "broken", "null", "no text", "readable by others"])
def test_a_file_that_cannot_be_used_any_more_changes_nothing(tmp_path: Path, damage: str) -> None:
    watched = _Watched(tmp_path)
    watched.file.change(lambda _: (KEY,))
    watched.watcher.load()
    path = watched.file.path
    if damage == "removed":
        path.unlink()
    elif damage in _BROKEN:
        path.write_bytes(_BROKEN[damage])
    else:
        watched.file.change(lambda _: ())
        path.chmod(0o644)
    watched.watcher.check()
    watched.watcher.check()
    assert (watched.names(), watched.changes) == ({"laptop"}, 1)
    assert watched.store.problem.startswith(f"server.keys_file: {path}")
    path.unlink(missing_ok=True)
    watched.file.change(lambda _: (replace(KEY, name="other"),))
    watched.watcher.check()
    assert (watched.names(), watched.store.problem) == ({"other"}, "")


def test_a_key_ends_when_it_expires_though_the_file_stays(tmp_path: Path) -> None:
    watched = _Watched(tmp_path)
    watched.file.change(lambda _: (replace(KEY, expires_at=150.0), replace(KEY, name="b", sha256="0" * 64)))
    watched.watcher.load()
    watched.now = 149.0
    watched.watcher.check()
    assert (watched.names(), watched.changes) == ({"laptop", "b"}, 1)
    watched.now = 150.0
    watched.watcher.check()
    assert (watched.names(), watched.changes) == ({"b"}, 2)


def test_a_file_that_cannot_be_used_at_start_is_a_problem(tmp_path: Path) -> None:
    watched = _Watched(tmp_path)
    watched.file.path.write_text("{", encoding="utf-8")
    watched.file.path.chmod(0o600)
    with pytest.raises(ConfigError, match=r"server\.keys_file: .*keys\.json: not a file of `llamayard keys`"):
        watched.watcher.load()


@pytest.mark.parametrize(
    ("flags", "key"),
    [
        ({"server.host": "0.0.0.0"}, "server.host: 0.0.0.0"),
        ({"server.host": "::"}, "server.host: ::"),
        ({"admin.listen": "0.0.0.0:9000"}, "admin.listen: 0.0.0.0"),
    ],
)
def test_an_open_listener_without_keys_is_refused_with_both_fixes(
    tmp_path: Path, flags: dict[str, object], key: str
) -> None:
    state = {"state_directory": str(tmp_path)}
    settings = load_settings(None, {"HOME": str(tmp_path)}, {**state, **flags})
    (problem,) = exposure_problems(settings)
    assert problem.startswith(f"{key} can be reached from other machines")
    assert "llamayard keys create NAME" in problem
    assert "server.allow_anonymous: true" in problem
    anonymous = load_settings(None, {"HOME": str(tmp_path)}, {**state, **flags, "server.allow_anonymous": True})
    assert exposure_problems(anonymous) == []
    change_keys(settings, lambda _: (KEY,))
    assert exposure_problems(settings) == []


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1"])
def test_a_listener_on_loopback_needs_no_keys(tmp_path: Path, host: str) -> None:
    flags = {"state_directory": str(tmp_path), "server.host": host, "admin.listen": f"unix:{tmp_path}/admin.sock"}
    assert exposure_problems(load_settings(None, {"HOME": str(tmp_path)}, flags)) == []


def test_the_file_is_in_the_state_directory_unless_configured(tmp_path: Path) -> None:
    home = {"HOME": str(tmp_path)}
    settings = load_settings(None, home, {"state_directory": "~/state"})
    assert keys_path(settings) == tmp_path / "state" / "keys.json"
    assert (has_keys(settings), read_keys(settings)) == (False, None)
    assert keys_path(load_settings(None, home, {"server.keys_file": "~/k.json"})) == tmp_path / "k.json"
