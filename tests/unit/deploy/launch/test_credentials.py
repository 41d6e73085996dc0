"""What settings name of certificates and keys is read before anything starts."""

from __future__ import annotations

from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import PrivateFormat
from support.certificates import write_certificates
from support.command import fedphd

from fedphd.common.config.links import NodeConfig
from fedphd.common.config.roles import CloudConfig, load_config
from fedphd.common.errors import ConfigError
from fedphd.deploy.keys.files import read_certificate, write_private_key
from fedphd.deploy.launch.credentials import Expiry, check_node, check_server


def test_what_is_there_and_fits_is_taken(tmp_path: Path) -> None:
    values = {**write_certificates(tmp_path), "superlink.node_keys": str(tmp_path)}
    check_server(load_config(CloudConfig, overrides=values).superlink)
    key = ec.generate_private_key(ec.SECP384R1())
    write_private_key(tmp_path / "a-node", key, PrivateFormat.OpenSSH)
    root = tmp_path / "ca.pem"
    check_node(NodeConfig(root_certificates=root, private_key=tmp_path / "a-node"))


@pytest.mark.parametrize(
    ("key", "why"),
    [
        ("superlink.ssl_certfile", r"in \[superlink\]: .*none: cannot be read: No such file"),
        ("superlink.node_keys", r"in \[superlink.node_keys\]: .*none: is not a folder with the no"),
    ],
)
def test_what_a_server_lacks_is_named_with_its_setting(key: str, why: str, tmp_path: Path) -> None:
    values = {**write_certificates(tmp_path), key: str(tmp_path / "none")}
    config = load_config(CloudConfig, overrides=values).superlink
    with pytest.raises(ConfigError, match=why):
        check_server(config)


def test_what_a_node_lacks_is_named_with_its_setting(tmp_path: Path) -> None:
    write_certificates(tmp_path)
    none, root = tmp_path / "none", tmp_path / "ca.pem"
    with pytest.raises(ConfigError, match=r"in \[node.root_certificates\]: .*none: cannot be"):
        check_node(NodeConfig(root_certificates=none))
    with pytest.raises(ConfigError, match=r"in \[node.private_key\]: .*none: cannot be read"):
        check_node(NodeConfig(root_certificates=root, private_key=none))


def test_a_certificates_end_is_said_once_a_day_from_two_weeks_before_it(tmp_path: Path) -> None:
    write_certificates(tmp_path)
    path, day_s = tmp_path / "server.pem", 24 * 3600
    end = read_certificate(path).not_valid_after_utc
    said, now_s = list[str](), [end.timestamp() - 15 * day_s]
    watch = Expiry(path, said.append, clock=lambda: now_s[0])
    # A process that runs keeps the one that it has read.
    path.unlink()
    watch.follow()
    assert said == []
    for _ in range(2):
        now_s[0] += 1.5 * day_s
        watch.follow()
        watch.follow()
    at = f"{end:%Y-%m-%d %H:%M} UTC"
    fix = "have a new one signed, and start this process again"
    assert said == [f"its certificate {path} ends on {at}; {fix}"] * 2
    now_s[0] = end.timestamp() + 1
    watch.follow()
    assert said[2:] == [
        f"its certificate {path} has expired on {at}, and nobody new can connect; {fix}"
    ]


@pytest.mark.parametrize("dry", [True, False])
@pytest.mark.parametrize("role", ["cloud", "edge", "client"])
def test_they_are_read_before_anything_starts(role: str, dry: bool, tmp_path: Path) -> None:
    server = ["--set", "superlink.node_keys=none"]
    for key, value in write_certificates(tmp_path).items():
        server += ["--set", f"{key}={value}"]
    node = ["--set", "node.root_certificates=ca.pem", "--set", "node.private_key=none"]
    flags = {"cloud": server, "edge": [*server[2:], *node], "client": node}[role]
    before = sorted(tmp_path.iterdir())
    done = fedphd(role, *(["--dry-run"] if dry else []), *flags, cwd=tmp_path)
    assert done.returncode == 2
    named = "superlink.node_keys" if role == "cloud" else "node.private_key"
    assert done.stderr.startswith(f"fedphd: in [{named}]: none: ")
    assert sorted(tmp_path.iterdir()) == before
