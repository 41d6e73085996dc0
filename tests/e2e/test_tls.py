"""A federation whose links are all encrypted: real processes, real certificates."""

from __future__ import annotations

import json
import socket
import ssl
import tomllib
from pathlib import Path

import pytest
from support.certificates import write_certificates
from support.processes import Processes
from support.same import Outcome, assert_same, finish, start


@pytest.mark.slow
def test_processes_repeat_to_the_bit_with_tls_on_every_link(
    local_run: Outcome, processes: Processes, tmp_path: Path
) -> None:
    """The second run of processes has all settings of the first, and encrypted links."""
    program = start(processes, "local", "run", **write_certificates(tmp_path))
    for edge in ("edge-0", "edge-1"):
        program.wait_line(rf"^{edge} +client-1 joined")
    for role in ("cloud", "edge-0", "edge-1"):
        config = tomllib.loads((tmp_path / f"run/state/{role}.toml").read_text("utf-8"))
        host, _, port = config["superlink"]["address"].rpartition(":")
        assert_speaks_tls_only(host, int(port), tmp_path / "ca.pem")
    assert_same(local_run, finish(processes, program, "run"))
    summary = json.loads((tmp_path / "run/summary.json").read_text("utf-8"))
    # Two clients in each of two edge rounds of two intervals.
    assert summary["client_rounds"] == 2 * 2 * 2


def assert_speaks_tls_only(host: str, port: int, authority: Path) -> None:
    """Its certificate is good for the test's authority, and not for the system's."""
    trusting = ssl.create_default_context(cafile=str(authority))
    trusting.set_alpn_protocols(["h2"])
    with (
        socket.create_connection((host, port), timeout=10) as plain,
        trusting.wrap_socket(plain, server_hostname=host) as secure,
    ):
        assert secure.version() == "TLSv1.3"
    with (
        socket.create_connection((host, port), timeout=10) as plain,
        pytest.raises(ssl.SSLCertVerificationError),
    ):
        ssl.create_default_context().wrap_socket(plain, server_hostname=host)
