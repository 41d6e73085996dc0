"""What is said before more processes start than a machine has room for."""

from __future__ import annotations

from fedphd.common.config.roles import CloudConfig, load_config
from fedphd.deploy.launch.needs import advice, available_memory, cores

GB = 10**9


def federation(num_clients: int, **overrides: object) -> CloudConfig:
    return load_config(CloudConfig, None, {"schedule.min_clients": num_clients, **overrides})


def test_the_demo_on_two_cores_needs_no_advice() -> None:
    assert advice(federation(6), cores=2, free_bytes=8 * GB) is None
    assert advice(federation(8), cores=2, free_bytes=8 * GB) is None


def test_many_clients_are_told_to_simulate() -> None:
    # 0.93 GB for the cloud, 2 x 0.545 for edges and 50 x 0.33 for clients; 50 x 5 s on 2 cores.
    assert advice(federation(50), cores=2, free_bytes=24 * GB) == (
        "53 processes on 2 core(s) need about 18.5 GB of memory (24.0 GB are free), and about "
        "2 min 05 s until all have started; fedphd simulate, with the same flags, runs 50 clients "
        "in one process per core"
    )


def test_too_little_memory_is_told_too() -> None:
    # 0.93 + 2 x 0.545 + 6 x 0.33 GB.
    assert "9 processes on 16 core(s) need about 4.0 GB of memory (3.0 GB are free)" in str(
        advice(federation(6), cores=16, free_bytes=3 * GB)
    )
    # Flat: no edges.
    flat = federation(6, topology="flat")
    assert advice(flat, cores=16, free_bytes=3 * GB) is None


def test_this_machine_has_cores_and_memory() -> None:
    assert cores() >= 1
    assert available_memory() > 10**7
