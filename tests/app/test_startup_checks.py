"""What `serve` and `check-config` refuse before anything is started: TLS files, addresses, the state directory."""

from __future__ import annotations

import ipaddress
import subprocess
from pathlib import Path

import pytest

from router.app.startup_checks import (
    Address,
    adoption_problems,
    loop_problems,
    resolve,
    startup_problems,
    state_directory_problems,
    tls_context,
)
from router.config.settings import ConfigError, Settings, load_settings

TLS = Path(__file__).parent.parent / "proxy" / "tls"
ADDRESSES = {
    "127.0.0.1": "127.0.0.1", "0.0.0.0": "0.0.0.0", "localhost": "127.0.0.1", "box": "127.0.0.1", "::1": "::1",
    "elsewhere": "203.0.113.9", "127.0.0.2": "127.0.0.2",
}  # fmt: skip


def _resolve(host: str) -> tuple[Address, ...]:
    if host not in ADDRESSES:
        raise OSError(-2, "Name or service not known")
    return (ipaddress.ip_address(ADDRESSES[host]),)


def _settings(folder: Path, **flags: object) -> Settings:
    values = {key.replace("__", "."): value for key, value in flags.items()}
    return load_settings(None, {"HOME": str(folder)}, {"state_directory": str(folder / "state"), **values})


def _problems(folder: Path, **flags: object) -> list[str]:
    return startup_problems(_settings(folder, **flags), _resolve)


def test_the_defaults_have_no_problem_and_nothing_is_created(tmp_path: Path) -> None:
    assert _problems(tmp_path) == []
    assert list(tmp_path.iterdir()) == []


def test_servers_can_outlive_their_router_on_linux_only(tmp_path: Path) -> None:
    settings = _settings(tmp_path, ollama__adopt=True)
    assert adoption_problems(settings, "linux") == adoption_problems(_settings(tmp_path), "darwin") == []
    assert adoption_problems(settings, "darwin") == [
        "ollama.adopt: servers can outlive their router on Linux only: leave it out"
    ]


def test_a_name_that_cannot_be_resolved_is_refused(tmp_path: Path) -> None:
    assert _problems(tmp_path, server__host="nowhere") == [
        "server.host: 'nowhere' cannot be resolved: Name or service not known"
    ]


@pytest.mark.parametrize("host", ["a" * 300, "a..b", "."])
def test_a_text_that_is_no_host_name_is_refused(host: str) -> None:
    with pytest.raises(OSError, match=r"host name|not known"):
        resolve(host)


def test_missing_tls_files_are_named_each_with_its_key(tmp_path: Path) -> None:
    missing = tmp_path / "none.pem"
    assert _problems(tmp_path, server__tls_certificate=missing, server__tls_key=missing) == [
        f"server.tls_certificate: {missing}: cannot be read: No such file or directory",
        f"server.tls_key: {missing}: cannot be read: No such file or directory",
    ]


def _new_key(path: Path, *options: str) -> Path:
    subprocess.run(["openssl", "genrsa", *options, "-out", str(path), "2048"], check=True, capture_output=True)
    return path


def test_a_key_of_another_certificate_is_refused(tmp_path: Path) -> None:
    certificate, key = TLS / "certificate.pem", _new_key(tmp_path / "key.pem")
    assert tls_context(_settings(tmp_path, server__tls_certificate=certificate, server__tls_key=TLS / "key.pem"))
    assert _problems(tmp_path, server__tls_certificate=certificate, server__tls_key=key) == [
        f"server.tls_key: {key} is not the key of the certificate in server.tls_certificate, {certificate}"
    ]


def test_a_key_with_a_password_and_a_file_that_is_no_pem_are_refused(tmp_path: Path) -> None:
    certificate = TLS / "certificate.pem"
    text = tmp_path / "text.pem"
    text.write_text("hello", encoding="utf-8")
    for key in (_new_key(tmp_path / "key.pem", "-aes128", "-passout", "pass:secret"), text):
        with pytest.raises(ConfigError, match="must be PEM files, the key without a password"):
            tls_context(_settings(tmp_path, server__tls_certificate=certificate, server__tls_key=key))


def test_a_state_directory_that_is_a_file_or_below_one_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    for path in (file, file / "state"):
        assert state_directory_problems(path) == [f"state_directory: {path}: {file} is a file, not a directory"]


def test_a_state_directory_that_cannot_be_written_or_created_is_refused(tmp_path: Path) -> None:
    def read_only(directory: Path) -> bool:
        del directory
        return False

    (problem,) = state_directory_problems(tmp_path, read_only)
    assert problem.startswith(f"state_directory: {tmp_path} cannot be written by the user with id ")
    (problem,) = state_directory_problems(tmp_path / "a" / "b", read_only)
    assert f"{tmp_path / 'a' / 'b'} cannot be created: {tmp_path} cannot be written by the user" in problem
    assert state_directory_problems(tmp_path / "a" / "b", lambda _: True) == []


@pytest.mark.parametrize(
    ("host", "url"),
    [
        ("127.0.0.1", "http://127.0.0.1:11434"),
        ("127.0.0.1", "http://localhost:11434"),
        ("127.0.0.1", "http://0.0.0.0:11434"),
        ("box", "http://127.0.0.1:11434"),
        ("0.0.0.0", "http://localhost:11434"),
        ("0.0.0.0", "http://127.0.0.2:11434"),
    ],
)
def test_an_attached_server_that_is_the_router_itself_is_refused(tmp_path: Path, host: str, url: str) -> None:
    flags: dict[str, object] = {"server__host": host, "server__allow_anonymous": True, "instances": [{"url": url}]}
    assert _problems(tmp_path, **flags) == [
        f"instances: {url} is the router's own address ({host}:11434): name the port of an Ollama server"
    ]


@pytest.mark.parametrize(
    ("host", "url"),
    [
        ("127.0.0.1", "http://127.0.0.1:11435"),
        ("127.0.0.1", "http://127.0.0.2:11434"),
        ("0.0.0.0", "http://elsewhere:11434"),
        ("127.0.0.1", "http://unresolvable:11434"),
        ("127.0.0.1", "http://localhost"),
    ],
)
def test_other_attached_servers_are_allowed(tmp_path: Path, host: str, url: str) -> None:
    assert list(loop_problems(_settings(tmp_path, server__host=host, instances=[{"url": url}]), _resolve)) == []
