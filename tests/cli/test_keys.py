"""`llamayard keys`: a key is printed once and kept only as a digest."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest

from router.admission.key_ring import KeyRing, digest_of
from router.cli.main import main
from router.domain.access_key import AccessKey, KeyLimits, RouteClass
from router.domain.request import LayoutKind
from router.storage.key_file import KeyFile

Captured = pytest.CaptureFixture[str]


class Command:
    """Runs the command on a file of its own."""

    def __init__(self, folder: Path, captured: Captured) -> None:
        self.file = KeyFile(folder / "state" / "keys.json")
        self._folder, self._captured = folder, captured

    def __call__(self, *arguments: str) -> tuple[int, str, str]:
        where = ("--set", f"state_directory={self._folder / 'state'}")
        code = main(["keys", *arguments, *where], {"HOME": str(self._folder), "PATH": "/nonexistent"})
        said = self._captured.readouterr()
        return code, said.out, said.err

    def keys(self) -> tuple[AccessKey, ...]:
        return self.file.read() or ()

    def opens(self, secret: str) -> str | None:
        found = KeyRing(self.keys(), 0.0).find({"x-api-key": secret}.get)
        return None if found is None else found.name


@pytest.fixture
def command(tmp_path: Path, capsys: Captured) -> Command:
    return Command(tmp_path, capsys)


def test_a_key_is_printed_once_and_only_its_digest_is_kept(command: Command) -> None:
    code, out, said = command("create", "laptop")
    secret = out.strip()
    assert (code, out) == (0, f"{secret}\n")
    assert "every request needs a key now" in said
    (key,) = command.keys()
    assert (key.name, key.user, key.sha256, key.expires_at) == ("laptop", "laptop", digest_of(secret), None)
    assert (key.classes, key.models, key.limits) == (frozenset({RouteClass.INFERENCE}), ("*",), KeyLimits())
    assert secret not in command.file.path.read_text(encoding="utf-8")
    assert stat.S_IMODE(command.file.path.stat().st_mode) == 0o600
    _, listed, _ = command("list")
    assert "laptop" in listed
    assert secret not in listed


def test_every_flag_becomes_a_rule_and_is_listed(command: Command) -> None:
    flags = (
        "--user anna --expires 90d --class inference --class admin --model qwen* --model llama3.1 --priority high "
        "--requests-per-minute 60 --tokens-per-minute 10000 --tokens-per-day 500000 --concurrent-requests 4 "
        "--context-length-max 32768 --keep-alive-min 1m --keep-alive-max 1h --layout single --forwards-users"
    )
    assert command("create", "ci", *flags.split())[0] == 0
    (key,) = command.keys()
    assert key.expires_at == key.created_at + 90 * 86400
    assert key == AccessKey(
        "ci", key.sha256, "anna", key.created_at, key.expires_at, frozenset({RouteClass.INFERENCE, RouteClass.ADMIN}),
        ("qwen*", "llama3.1"), KeyLimits(60, 10_000, 500_000, 4), 1, 32768, 60.0, 3600.0,
        frozenset({LayoutKind.SINGLE}), forwards_users=True,
    )  # fmt: skip
    listed = command("list")[1]
    for rule in ("anna", "admin,inference", "qwen* llama3.1", "requests_per_minute=60", "tokens_per_day=500000",
                 "priority high", "context_length_max=32768", "keep_alive_seconds_max=3600", "layouts single",
                 "forwards users"):  # fmt: skip
        assert rule in listed


def test_a_revoked_key_opens_nothing_and_keys_stay_on(command: Command) -> None:
    secret = command("create", "laptop")[1].strip()
    assert command.opens(secret) == "laptop"
    code, _, said = command("revoke", "laptop")
    assert (code, "no key is left: requests are refused" in said) == (0, True)
    assert command.opens(secret) is None
    assert command.file.read() == ()  # an empty file lets nobody in


def test_a_rotated_key_keeps_its_rules_and_gets_a_new_secret(command: Command) -> None:
    old = command("create", "laptop", "--model", "qwen*")[1].strip()
    new = command("rotate", "laptop")[1].strip()
    assert old != new
    assert (command.opens(old), command.opens(new)) == (None, "laptop")
    assert command.keys()[0].models == ("qwen*",)


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (("create", "laptop"), "there is a key 'laptop'"),
        (("create", "no good"), "NAME: 'no good': use up to 63 letters"),
        (("create", "x", "--user", "a/b"), "--user: 'a/b': use up to 63"),
        (("create", "x", "--expires", "soon"), "--expires soon: write a number of seconds or a duration"),
        (("create", "x", "--expires", "0"), "--expires 0: must be more than 0"),
        (("create", "x", "--keep-alive-max", "long"), "--keep-alive-max long: write a duration"),
        (("revoke", "nobody"), "there is no key 'nobody': `llamayard keys list` shows those there are"),
        (("rotate", "nobody"), "there is no key 'nobody'"),
    ],
)
def test_a_mistake_ends_in_a_sentence_and_changes_nothing(
    command: Command, arguments: tuple[str, ...], problem: str
) -> None:
    command("create", "laptop")
    before = command.keys()
    code, out, said = command(*arguments)
    assert (code, out) == (2, "")
    assert said.startswith(f"llamayard: {problem}")
    assert command.keys() == before


@pytest.mark.parametrize("value", ["0", "-1", "many", "1.5"])
def test_a_limit_is_a_whole_number_from_one(command: Command, value: str) -> None:
    with pytest.raises(SystemExit):
        command("create", "x", "--requests-per-minute", value)


def test_without_a_file_there_is_nothing_to_list(command: Command) -> None:
    code, out, said = command("list")
    assert (code, out) == (0, "")
    assert "does not exist" in said
