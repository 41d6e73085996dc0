"""Finding a Ray cluster: what is not there is said with the fix."""

from __future__ import annotations

import pytest
from support.command import fedphd
from support.processes import free_port

from fedphd.common.errors import StartError
from fedphd.deploy.simulation.cluster import Cluster


@pytest.mark.parametrize("address", ["auto", "ray://10.0.0.1", "10.0.0.1", ":6379"])
def test_what_is_no_address_is_refused(address: str) -> None:
    with pytest.raises(StartError, match=f"--ray-address {address}: not host:port"):
        Cluster.at(address)


def test_where_nobody_answers_the_command_that_starts_a_head_is_named() -> None:
    port = free_port()
    with pytest.raises(StartError, match=f"no Ray cluster answers .* --port {port}`"):
        Cluster.at(f"127.0.0.1:{port}")


def test_the_command_ends_with_3_before_it_leaves_a_folder(tmp_path: object) -> None:
    address = f"127.0.0.1:{free_port()}"
    done = fedphd("simulate", "--ray-address", address, "--run-dir", f"{tmp_path}/run")
    assert done.returncode == 3, done.stderr
    assert f"--ray-address {address}: no Ray cluster answers there" in done.stderr
    assert not done.stdout.strip()


def test_it_says_what_it_has() -> None:
    assert str(Cluster("a:1", 3, 12, 0)) == "Ray at a:1: 3 nodes, 12 cores"
    assert str(Cluster("a:1", 3, 12, 2)) == "Ray at a:1: 3 nodes, 12 cores, 2 GPUs"
