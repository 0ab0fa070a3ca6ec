"""What the doctor reads of a real machine: the kernel log, variables, the port, the disk."""

from __future__ import annotations

import os
import socket
import stat
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from router.app import host_reader
from router.doctor.facts import Unread
from router.doctor.kernel_log import Xid, xids
from tests.support.ollama_server import free_port

RECORDS = """\
6,1,5,-;Linux version 6.8
3,2,9,-;NVRM: Xid (PCI:0000:41:00): 79, pid='<unknown>', name=<unknown>, GPU has fallen off the bus.
 SUBSYSTEM=pci
 DEVICE=+pci:0000:41:00.0
"""


def test_the_kernel_log_is_read_record_by_record(tmp_path: Path) -> None:
    (tmp_path / "kmsg").write_text(RECORDS)
    lines = host_reader.kernel_log({}, tmp_path / "kmsg")
    assert isinstance(lines, tuple)
    assert xids(lines) == (Xid("0000:41:00", 79, 1),)
    assert lines[0] == "Linux version 6.8"


def test_a_kernel_log_that_cannot_be_read_says_so(tmp_path: Path) -> None:
    found = host_reader.kernel_log({"PATH": str(tmp_path)}, tmp_path / "kmsg")
    assert isinstance(found, Unread)
    assert "run the doctor with sudo" in found.reason


def test_only_variables_of_a_server_are_named() -> None:
    given = {"OLLAMA_HOST": "x", "OLLAMA_NUM_PARALLEL": "4", "CUDA_VISIBLE_DEVICES": "1", "PATH": "/bin"}
    assert host_reader.server_variables(given) == {"OLLAMA_NUM_PARALLEL": "4", "CUDA_VISIBLE_DEVICES": "1"}


def _program(folder: Path, name: str, script: str) -> dict[str, str]:
    path = folder / name
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return {"PATH": f"{folder}:{os.environ['PATH']}"}


@pytest.mark.parametrize(
    ("printed", "version"),
    [
        ("ollama version is 0.34.0", "0.34.0"),
        ("Warning: could not connect to a running Ollama instance\nWarning: client version is 0.24.0", "0.24.0"),
    ],
)
def test_the_version_is_that_of_the_program(printed: str, version: str, tmp_path: Path) -> None:
    environment = _program(tmp_path, "ollama", f"echo '{printed}'")
    assert host_reader.ollama_version("ollama", environment) == version


def test_a_program_that_tells_no_version_is_not_taken_for_good(tmp_path: Path) -> None:
    environment = _program(tmp_path, "ollama", "echo broken >&2; exit 1")
    found = host_reader.ollama_version("ollama", environment)
    assert isinstance(found, Unread)
    assert "broken" in found.reason


def test_variables_of_the_stock_unit_are_read(tmp_path: Path) -> None:
    environment = _program(tmp_path, "systemctl", "echo 'OLLAMA_KEEP_ALIVE=24h \"OLLAMA_ORIGINS=* a\" PATH=/bin'")
    assert host_reader.service_environment(environment) == {"OLLAMA_KEEP_ALIVE": "24h", "OLLAMA_ORIGINS": "* a"}


def test_an_active_stock_unit_is_reported(tmp_path: Path) -> None:
    assert host_reader.stock_service(_program(tmp_path, "systemctl", "echo active")) == "ollama.service is active"


class _Stock(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200 if self.path == "/" else 404)
        self.end_headers()
        self.wfile.write(b"Ollama is running")

    def log_message(self, format: str, *args: object) -> None:
        """Silent."""


def test_a_stock_server_on_the_port_is_recognised() -> None:
    server = HTTPServer(("127.0.0.1", 0), _Stock)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        assert host_reader.port_holder("127.0.0.1", server.server_port) == "a stock Ollama"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class _Locked(BaseHTTPRequestHandler):
    """A router that wants a key."""

    def do_GET(self) -> None:
        self.send_response(401)
        self.send_header("X-Llamayard-Error", "unauthorized")
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        """Silent."""


def test_a_router_is_known_by_its_errors_too() -> None:
    server = HTTPServer(("127.0.0.1", 0), _Locked)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        assert host_reader.port_holder("127.0.0.1", server.server_port) == ""
        assert host_reader.port_holder("127.0.0.1", server.server_port, is_tls=True) == (
            "a program that does not speak HTTPS"
        )
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_a_free_port_is_free_and_a_silent_program_is_not_taken_for_a_router() -> None:
    assert host_reader.port_holder("127.0.0.1", free_port()) == ""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        assert "does not speak HTTP" in str(host_reader.port_holder("127.0.0.1", listener.getsockname()[1]))


def test_a_store_without_large_files_is_not_measured(tmp_path: Path) -> None:
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / "sha256-1").write_bytes(b"small")
    store = host_reader.store_facts(tmp_path)
    assert store.read_bytes_per_second == Unread("no model is large enough to measure the disk with")
    assert (store.exists, store.is_readable, store.is_writable, store.free_bytes > 0) == (True, True, True, True)


def test_a_store_that_does_not_exist_is_measured_where_it_would_be(tmp_path: Path) -> None:
    store = host_reader.store_facts(tmp_path / "a" / "b")
    assert (store.exists, store.total_bytes > 0) == (False, True)
    assert isinstance(store.read_bytes_per_second, Unread)
