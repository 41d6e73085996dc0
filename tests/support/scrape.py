"""What ``/metrics`` answers, read as Prometheus reads it."""

from __future__ import annotations

from urllib.request import urlopen

from prometheus_client.parser import text_string_to_metric_families

Values = dict[tuple[str, frozenset[tuple[str, str]]], float]


def parse(text: str) -> Values:
    """Each sample's value by its name and labels."""
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def kinds(text: str) -> dict[str, str]:
    """Each series' type by its name, as the manual names it."""
    found = {}
    for family in text_string_to_metric_families(text):
        ending = "_total" if family.type == "counter" else ""
        found[family.name + ending] = family.type
    return found


def scrape(address: str) -> str:
    """The text that the process at ``address`` answers."""
    with urlopen(f"http://{address}/metrics", timeout=60) as answer:
        assert answer.headers["Content-Type"].startswith("text/plain; version=0.0.4")
        return str(answer.read().decode())
