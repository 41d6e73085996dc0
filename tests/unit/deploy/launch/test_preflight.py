"""Each check fails where it should, and says what to do."""

from __future__ import annotations

import ctypes
import datetime
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image
from support.certificates import write_certificates
from support.command import fedphd
from support.disk import unreadable
from support.processes import free_port
from support.tiny import write_toml

from fedphd.common.config.roles import ClientConfig, CloudConfig, EdgeConfig, load_config
from fedphd.common.config.run import ModelConfig
from fedphd.common.errors import StartError
from fedphd.deploy.cli.preflight import Role, guess
from fedphd.deploy.launch import preflight, versions
from fedphd.deploy.launch.leftovers import PROCESSES, Process
from fedphd.deploy.launch.preflight import Check, RoleConfig, checks

SMALL = ModelConfig(block_out_channels=(8, 8), attention_head_dim=8, norm_num_groups=4)


def found(config: RoleConfig, model: ModelConfig | None = SMALL) -> dict[str, Check]:
    return {check.name: check for check in checks(config, model)}


def test_a_machine_that_is_ready_has_no_failure(tmp_path: Path) -> None:
    certificates = write_certificates(tmp_path)
    os.chmod(tmp_path / "server.key", 0o600)
    values = {**certificates, "superlink.address": "127.0.0.1:0", "out_dir": str(tmp_path)}
    values["superlink.address"] = f"127.0.0.1:{free_port()}"
    result = found(load_config(CloudConfig, overrides=values))
    assert [check for check in result.values() if check.outcome == "failed"] == []
    assert "for localhost, 127.0.0.1" in result["certificate"].found
    # It is good for two days.
    assert (result["certificate"].outcome, bool(result["certificate"].fix)) == ("warning", True)


def test_a_certificate_that_has_expired_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = write_certificates(tmp_path)
    config = load_config(CloudConfig, overrides=values)
    assert found(config)["certificate"].outcome == "warning"
    later = datetime.datetime.now(datetime.UTC) + datetime.timedelta(days=3)
    monkeypatch.setattr(preflight, "_now", lambda: later)
    assert found(config)["certificate"].outcome == "failed"


def test_a_key_of_another_certificate_or_open_to_others_fails(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    other = write_certificates(tmp_path / "other")
    values = {
        **write_certificates(tmp_path),
        "superlink.ssl_keyfile": other["superlink.ssl_keyfile"],
    }
    os.chmod(other["superlink.ssl_keyfile"], 0o644)
    result = found(load_config(CloudConfig, overrides=values))
    assert result["certificate's key"].outcome == "failed"
    key = result["superlink.ssl_keyfile"]
    assert (key.outcome, key.fix) == ("failed", f"chmod 600 {other['superlink.ssl_keyfile']}")


def test_a_port_in_use_and_a_server_that_is_not_found_fail(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        here = f"127.0.0.1:{taken.getsockname()[1]}"
        away = f"127.0.0.1:{free_port()}"
        values = {"superlink.address": here, "cloud": away, "state_dir": str(tmp_path)}
        result = found(load_config(EdgeConfig, overrides=values))
        assert result["port"].outcome == "failed"
        # It may be started later.
        assert result[f"reach {away}"].outcome == "warning"
        config = load_config(EdgeConfig, overrides={**values, "cloud": "edge.invalid:9092"})
        assert found(config)["reach edge.invalid:9092"].outcome == "failed"
        # The port is this edge's own while it runs.
        with subprocess.Popen(["sleep", "60"]) as running:
            process = Process.of(running.pid)
            assert process is not None
            record = json.dumps({"launcher": process.model_dump()})
            (tmp_path / PROCESSES).write_text(record, encoding="utf-8")
            port = found(load_config(EdgeConfig, overrides=values))["port"]
            running.kill()
        assert (port.outcome, f"process {running.pid} runs" in port.found) == ("ok", True)
        reached = load_config(EdgeConfig, overrides={"cloud": here})
        assert found(reached)[f"reach {here}"].outcome == "ok"


def test_plain_text_is_fine_on_this_machine_only() -> None:
    near, far = {"edges": ["127.0.0.1:1"]}, {"superlink.address": "0.0.0.0:1"}
    local = load_config(ClientConfig, overrides={**near, "node.insecure": True})
    assert found(local)["authority"].outcome == "ok"
    config = load_config(CloudConfig, overrides={**far, "superlink.insecure": True})
    assert found(config)["certificate"].outcome == "warning"
    # Nobody asked for it.
    assert found(load_config(ClientConfig, overrides=near))["authority"].outcome == "failed"
    assert found(load_config(CloudConfig, overrides=far))["certificate"].outcome == "failed"


def test_data_and_device_are_looked_at(tmp_path: Path) -> None:
    good = found(load_config(ClientConfig, overrides={"edges": ["127.0.0.1:1"]}))
    assert good["data"].found == "1797 images of 10 classes to train on; 64 were decoded"
    values = {"edges": ["127.0.0.1:1"], "data.source": str(tmp_path / "none"), "device": "cuda"}
    bad = found(load_config(ClientConfig, overrides=values))
    assert (bad["data"].outcome, bad["device"].outcome) == ("failed", "failed")
    assert "no such file or folder" in bad["data"].found


def test_a_broken_image_of_a_client_is_named(tmp_path: Path) -> None:
    for name in ("cat/1", "cat/2", "dog/3"):
        path = tmp_path / "images" / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8)).save(path)
    values = {"edges": ["127.0.0.1:1"], "data.source": str(tmp_path / "images")}
    config = load_config(ClientConfig, overrides=values)
    text = "3 images of 2 classes to train on; all were decoded"
    assert found(config)["data"] == Check("data", "ok", text)
    path.write_bytes(b"")
    check = found(config)["data"]
    assert (check.outcome, check.fix) == ("failed", "correct [data]")
    assert f"image 2 (from 0), '{path}', cannot be decoded" in check.found


def test_memory_and_disk_are_compared_with_what_is_needed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = load_config(CloudConfig, overrides={"out_dir": str(tmp_path / "runs")})
    assert found(config)["memory"].outcome == found(config)["disk"].outcome == "ok"
    assert found(config, None)["memory"].outcome == "skipped"
    monkeypatch.setattr(preflight, "available_memory", lambda: 1000)
    monkeypatch.setattr(preflight, "LEAST_DISK", 2**60)
    assert found(config)["memory"].outcome == found(config)["disk"].outcome == "failed"


def test_a_folder_that_this_user_may_not_look_into_fails(tmp_path: Path) -> None:
    for role, key in ((CloudConfig, "out_dir"), (EdgeConfig, "state_dir")):
        folder = tmp_path / "closed" / "runs"
        folder.parent.mkdir(exist_ok=True)
        with unreadable(folder.parent):
            check = found(load_config(role, overrides={key: str(folder)}))["disk"]
        text = f"{folder} cannot be looked at: Permission denied"
        assert check == Check("disk", "failed", text, "choose another folder")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="asks Linux")
@pytest.mark.parametrize(
    ("state", "outcome", "text"),
    [
        (0, "ok", ", synchronised"),
        (5, "warning", ", not synchronised"),
        (-1, "skipped", "; this machine does not say whether it is kept in step"),
    ],
)
def test_a_clock_is_taken_for_what_the_system_says(
    state: int, outcome: str, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = SimpleNamespace(adjtimex=lambda buffer: state)
    monkeypatch.setattr(ctypes, "CDLL", lambda name: library)
    check = preflight._clock()
    assert (check.outcome, check.found.endswith(f"+00:00{text}")) == (outcome, True)


def test_few_descriptors_and_another_flower_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight, "LEAST_DESCRIPTORS", 10**9)
    monkeypatch.setattr(versions, "version", lambda name: "1.32.0")
    result = found(load_config(CloudConfig))
    assert result["open files"].outcome == "failed"
    assert result["versions"].outcome == "failed"
    problem = "Flower 1.32.0 is installed; this version of fedphd works with flwr<1.32,>=1.31"
    assert problem in result["versions"].fix
    with pytest.raises(StartError, match=r"Flower 1.32.0 is installed"):
        versions.check_flower()


def test_the_file_tells_the_role(tmp_path: Path) -> None:
    for keys, role in (
        ({"client_id": "a"}, Role.client),
        ({"data.source": "digits"}, Role.client),
        ({"edge_id": "a"}, Role.edge),
        ({"preset": "digits"}, Role.cloud),
    ):
        assert guess(write_toml(tmp_path / "role.toml", keys)) == role


def test_the_command_ends_with_2_if_something_must_be_mended(tmp_path: Path) -> None:
    path = write_toml(
        tmp_path / "client.toml",
        {"edges": ["edge.invalid:9192"]},
    )
    done = fedphd("preflight", "--config", str(path), "--insecure", "--json", cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    outcomes = {check["name"].split()[0]: check["outcome"] for check in json.loads(done.stdout)}
    assert (outcomes["reach"], outcomes["data"], outcomes["memory"]) == ("failed", "ok", "skipped")
    outcome = [
        check["outcome"] for check in json.loads(done.stdout) if check["name"] == "authority"
    ]
    assert outcome == ["warning"]
    text = fedphd("preflight", "--config", str(path), cwd=tmp_path).stdout
    assert "checks of a machine for the client, 2 failed" in text
