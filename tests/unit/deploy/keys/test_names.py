"""What a certificate may be good for, and how somebody else's words are shown."""

from __future__ import annotations

import pytest

from fedphd.deploy.keys.names import check_host, check_name, checked_hosts, shown


@pytest.mark.parametrize(
    ("host", "certified"),
    [
        ("edge-0.example.org", "edge-0.example.org"),
        ("edge_0", "edge_0"),
        ("h", "h"),
        ("10.0.0.7", "10.0.0.7"),
        ("2001:DB8:0::1", "2001:db8::1"),
        (f"{'a' * 63}.org", f"{'a' * 63}.org"),
    ],
)
def test_names_and_addresses_are_hosts(host: str, certified: str) -> None:
    assert check_host(host) == certified


@pytest.mark.parametrize(
    "host",
    [
        "",
        " ",
        "a b",
        "a\n",
        "box:9092",
        "10.0.0.7:9092",
        "[::1]",
        "https://box",
        "box/path",
        "*.example.org",
        "box.",
        ".box",
        "-box",
        "a..b",
        "ed\x1b[2Kge",
        "ed\u0261e.org",
        "10.0.0",
        "300.0.0.1",
        "10.0.0.0/8",
        "a" * 64,
        ".".join(["a" * 60] * 5),
    ],
)
def test_what_is_no_host_is_refused_and_can_be_printed(host: str) -> None:
    with pytest.raises(ValueError, match=r"is not a host; write a DNS name, such as") as refused:
        check_host(host)
    assert str(refused.value).isprintable()
    assert str(refused.value).isascii()


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "224.0.0.1", "fe80::1%eth0"])
def test_addresses_at_which_nobody_reaches_a_server_are_refused(host: str) -> None:
    with pytest.raises(ValueError, match=f"'{host}' is not an address at which others reach"):
        check_host(host)


def test_hosts_are_few_and_different() -> None:
    assert checked_hosts(["b", "a", "::1"]) == ("b", "a", "::1")
    with pytest.raises(ValueError, match=r"host BOX is named twice; name each host once"):
        checked_hosts(["box", "BOX"])
    with pytest.raises(ValueError, match=r"33 hosts are named; name 32 at the most"):
        checked_hosts([f"h{number}" for number in range(33)])


def test_a_name_that_is_refused_can_be_printed() -> None:
    assert check_name("hospital-7") == "hospital-7"
    # The letter is Cyrillic.
    for name in ("h\u043espital", "a\x1b[1A", "a" * 70_000):
        with pytest.raises(ValueError, match=r"is not a valid name; use 1 to 64") as refused:
            check_name(name)
        assert str(refused.value).isprintable()
        assert str(refused.value).isascii()
        assert len(str(refused.value)) < 250
    assert shown("a\x1b") == r"'a\x1b'"
