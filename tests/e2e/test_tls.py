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
from support.tiny import CLASSES_PER_CLIENT, TINY, flags

SETTINGS = {**TINY, "schedule.intervals": 2, "schedule.edge_rounds": 1, "pruning.sparse_rounds": 1}


def test_federation_runs_over_tls_on_every_link(tmp_path: Path) -> None:
    certificates = write_certificates(tmp_path)
    with Processes(tmp_path) as processes:
        program = processes.start(
            "local", "--edges", "1", "--clients", "2",
            "--classes-per-client", str(CLASSES_PER_CLIENT + 1), "--run-dir", "run",
            *flags({**SETTINGS, **certificates}),
        )  # fmt: skip
        program.wait_line(r"^edge-0 +client-1 joined")
        for role in ("cloud", "edge-0"):
            config = tomllib.loads((tmp_path / f"run/state/{role}.toml").read_text("utf-8"))
            host, _, port = config["superlink"]["address"].rpartition(":")
            assert_speaks_tls_only(host, int(port), tmp_path / "ca.pem")
        assert program.wait_exit() == 0, program.text
        processes.wait_gone()
    summary = json.loads((tmp_path / "run" / "summary.json").read_text("utf-8"))
    assert summary["client_rounds"] == 2 * 2


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
