"""The page on a run: what it says of one that finished, failed, was stopped, or is under way."""

from __future__ import annotations

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml
from support.manuals import ROOT, text_of
from support.told import write_told

from fedphd.common.errors import ConfigError
from fedphd.common.events import EventLog, Verdict
from fedphd.common.history.events import EdgeFigures, IntervalEnded
from fedphd.deploy.launch.runs import CONFIG, EVENTS
from fedphd.deploy.report.leaving import leave_report
from fedphd.deploy.report.page import run_page, write_report

MOST_BYTES = 2_000_000
PARTS = (
    "samples", "curves", "places", "balance", "traffic", "time", "pruning", "settings", "about",
)  # fmt: skip


class Page(HTMLParser):
    """Elements with their attributes, and the text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data.replace("\u00a0", " ")

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


def page_of(folder: Path) -> Page:
    return Page(run_page(folder))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_told(tmp_path_factory.mktemp("told") / "20261124-154906")


@pytest.fixture(scope="module")
def page(finished: Path) -> Page:
    return page_of(finished)


def test_how_good_each_class_is_of_a_network_that_was_told(finished: Path) -> None:
    page = run_page(finished)
    assert "How good each class is" in page
    assert "Frechet distance of the samples of each class: 0 30.0, 1 40.5, 3 70.0." in page
    assert ">75%<" in page


def test_it_has_every_part(page: Page) -> None:
    assert [section["id"] for section in page.all("section")] == list(PARTS)
    linked = [a["href"] for a in page.all("a")]
    assert linked == [f"#{part}" for part in PARTS]


def test_it_says_in_words_what_came_out(page: Page) -> None:
    for sentence in (
        "3 intervals in 75 s.",
        "The samples' Frechet distance to real images came down from 300.0 before training to "
        "20.0 after interval 3.",
        "20.0 is 1.3 times what real images of half of the classes (15.0) get; those of all "
        "classes get 2.0.",
        "The network was pruned after interval 1 to 75% of its widths",
        # 12 client rounds x 2 x 1000 parameters x 4 bytes, once per interval of 2 edge rounds.
        "The cloud's links carried 12.0 kB, 75% less than flat FedAvg in fp32, in as many cloud "
        "rounds (48.0 kB); those between clients and edges carried 27.0 kB.",
        "3 clients trained at 2 edges; once one was left out of an edge round.",
    ):
        assert sentence in page.text, sentence


def test_a_flat_runs_bytes_are_compared_with_what_averages_as_often(
    finished: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(finished, tmp_path / "run")
    config = json.loads((folder / CONFIG).read_text("utf-8"))
    (folder / CONFIG).write_text(json.dumps({**config, "topology": "flat"}), "utf-8")
    page = page_of(folder)
    # 12 client rounds x 2 x 1000 parameters x 4 bytes: each of them is a visit to the cloud.
    assert "carried 12.0 kB, 88% less than flat FedAvg in fp32, unpruned (96.0 kB)." in page.text
    assert "12.0 kB\u221288% against flat FedAvg in fp32, unpruned" in page.text.replace("\n", "")
    assert "as many cloud rounds" not in page.text
    assert "every edge round" not in page.text
    assert "counts in the cloud's average" not in page.text


def test_grids_that_cannot_be_shown_are_left_out_and_named(
    finished: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = shutil.copytree(finished, tmp_path / "run")
    first, *_ = sorted((folder / "grids").glob("interval-*.png"))
    shutil.copy(first, folder / "grids/interval-0002 (copy).png")
    (folder / "grids/interval-0007.png").write_bytes(b"")
    (folder / "grids/interval-0008.png").write_bytes(first.read_bytes()[:60])
    assert len(page_of(folder).all("img")) == len(page_of(finished).all("img"))
    for name in ("interval-0002 (copy).png", "interval-0007.png", "interval-0008.png"):
        assert f"{name}: is left out of the report" in caplog.text


def test_a_file_of_a_run_that_holds_no_object_is_said_to_be_unreadable(
    finished: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(finished, tmp_path / "run")
    (folder / "partition.json").write_text("[1]", "utf-8")
    with pytest.raises(ConfigError, match=r"cannot be read: partition\.json holds no JSON object"):
        run_page(folder)


def test_who_never_trained_is_named(tmp_path: Path) -> None:
    text = page_of(write_told(tmp_path / "one", intervals=1)).text
    assert "2 of 3 clients trained at 2 edges; once one was left out of an edge round." in text
    assert "Who never trained: client-2." in text


def test_its_cards_say_when_and_beside_what(page: Page) -> None:
    for text in (
        "Frechet distance20.0after interval 3, from 300.0; real images 2.0",
        "12.0 kB\u221275% against flat FedAvg in fp32, in as many cloud rounds; 27.0 kB "
        "between clients and edges",
        # The total of summary.json, as the terminal has it.
        "Time75 s3 of 3 intervals",
    ):
        assert text in page.text.replace("\n", ""), text


def test_it_says_what_homogeneity_is(page: Page) -> None:
    assert "Homogeneity is 2 less the distance of the labels" in page.text
    assert "homogeneity 0.90" in page.text


def test_what_concerns_moon_alone_is_said_of_moon_alone(finished: Path, tmp_path: Path) -> None:
    assert "3 x 2 x MACs x images" in run_page(finished)
    assert "MOON" not in run_page(finished)
    folder = shutil.copytree(finished, tmp_path / "run")
    config = (folder / CONFIG).read_text("utf-8")
    assert '"method": "fedavg"' in config
    (folder / CONFIG).write_text(config.replace('"method": "fedavg"', '"method": "moon"'), "utf-8")
    assert "MOON's two further forward passes" in page_of(folder).text


def test_how_long_an_evaluation_was_waited_for_is_part_of_its_interval(
    finished: Path, tmp_path: Path
) -> None:
    assert "an evaluation was waited for" not in run_page(finished)
    folder = shutil.copytree(finished, tmp_path / "run")
    lines = [json.loads(line) for line in (folder / EVENTS).read_text("utf-8").splitlines()]
    for event in lines:
        if event["event"] == "interval" and event["interval"] == 2:
            event["phases"] = {"waiting_for_evaluation": 5.0}
    (folder / EVENTS).write_text("".join(f"{json.dumps(one)}\n" for one in lines), "utf-8")
    alt = "from 20 s to 20 s; an evaluation was waited for 5 s after interval 2."
    assert alt in run_page(folder)


def test_a_chart_that_is_left_over_has_its_row_for_itself(finished: Path, tmp_path: Path) -> None:
    """Distance, two losses and how good each class is come before: with the last it is alone."""
    folder = shutil.copytree(finished, tmp_path / "run")
    wide = 'role="region" aria-label="Classes of the samples after interval 3"'
    assert wide in run_page(folder)
    log = (folder / EVENTS).read_text("utf-8")
    (folder / EVENTS).write_text(log.replace('"class_distances"', '"unknown"'), "utf-8")
    assert wide not in run_page(folder)


def test_it_has_settings_versions_split_and_citation(page: Page) -> None:
    for text in ("schedule.intervals", "abc123", "9.9", "digits-split-7f", "2507.06449"):
        assert text in page.text


def test_what_peers_wrote_is_text(page: Page) -> None:
    assert "reply <b>late</b>" in page.text
    assert page.all("b") == []


def test_it_is_one_small_file_without_an_address(finished: Path) -> None:
    text = write_report(finished).read_text("utf-8")
    assert len(text.encode()) < MOST_BYTES
    assert "http:" not in text
    assert "https:" not in text
    sources = [element.get("src") for _, element in Page(text).elements if element.get("src")]
    assert sources
    assert all(str(source).startswith("data:image/") for source in sources)


def test_every_picture_says_what_it_shows(page: Page) -> None:
    images = page.all("img")
    assert len(images) == 5  # before training, three intervals, and the one of the slider
    assert all(image["alt"] for image in images)
    figures = [svg for svg in page.all("svg") if svg.get("aria-hidden") != "true"]
    assert len(figures) == 13
    assert all(svg["role"] == "img" and len(svg["aria-label"] or "") > 20 for svg in figures)


def test_pixels_stay_squares_where_the_picture_is_not_made_smaller(page: Page) -> None:
    crisp = [image for image in page.all("img") if image.get("class") == "crisp"]
    assert len(crisp) == 1
    assert ".viewer .crisp { image-rendering: pixelated; }" in page.text


def test_axes_say_what_they_are_in(finished: Path) -> None:
    words = re.findall(r">([^<>\n]+)</text>", run_page(finished))
    assert {"distance, logarithmic", "loss", "seconds", "kB", "share of the samples"} <= {*words}
    assert not {"0 k", "0 s", "0 B"} & {*words}


def test_alternative_texts_have_the_numbers(page: Page) -> None:
    texts = " ".join(svg.get("aria-label") or "" for svg in page.all("svg"))
    for text in (
        "300.0 before training, 80.0 after interval 1, 60.0 after interval 2, 20.0 after",
        # (0.15 + 0.05 + 0.05 + 0.15) / 2 of edge-0's labels.
        "exchange: edge-0 20%, edge-1 0%",
        "edge rounds 1 to 6: 12 times, 6 at edge-0, 6 at edge-1; 1 times",
        "most left in up_blocks.0.conv: 440 to 260",
    ):
        assert text in texts, text


def test_names_are_there_once(finished: Path) -> None:
    names = re.findall(r'\sid="([^"]+)"', run_page(finished))
    assert len(names) == len(set(names))


def test_a_failed_run_says_how_and_why(tmp_path: Path) -> None:
    reason = "after 300 s there are 1 of 2 edges (edge-0)"
    page = page_of(write_told(tmp_path / "run", intervals=1, verdict=Verdict(4, reason)))
    assert "Failed" in page.text
    assert reason in page.text
    assert "1 of 3 intervals" in page.text
    assert "too few participants (exit code 4). Start the missing ones" in page.text


def test_a_run_that_was_stopped_says_how_to_go_on(tmp_path: Path) -> None:
    page = page_of(write_told(tmp_path / "run", intervals=2, verdict=Verdict(130, "stopped")))
    assert "Interrupted" in page.text
    assert "Go on with --resume" in page.text


def test_a_run_under_way_says_how_far_it_is(tmp_path: Path) -> None:
    page = page_of(write_told(tmp_path / "run", intervals=1, verdict=None))
    assert "Under way" in page.text
    assert "1 of 3 intervals are done" in page.text


def test_a_run_that_was_measured_before_training_alone_says_so(tmp_path: Path) -> None:
    folder = write_told(tmp_path / "run", intervals=1, verdict=None)
    log = folder / EVENTS
    lines = log.read_text("utf-8").splitlines(keepends=True)
    log.write_text("".join(one for one in lines if '"what": "after interval 1"' not in one))
    page = page_of(folder)
    for text in (
        # The last of 3; every fourth is evaluated.
        "Before training the samples' Frechet distance to real images was 300.0; it is measured "
        "next after interval 3.",
        "Frechet distance300.0before training; real images 2.0",
        "Classes of the samples before training",
        "drawn early, not measured",
    ):
        assert text in page.text.replace("\n", ""), text


def test_a_run_that_could_not_start_has_a_page(tmp_path: Path) -> None:
    folder = write_told(tmp_path / "run", verdict=Verdict(3, "port in use"))
    for name in ("metrics.jsonl", "partition.json", "samples.png"):
        (folder / name).unlink()
    for path in [*folder.glob("grids/*"), *folder.glob("state/*/*")]:
        path.unlink()
    page = page_of(folder)
    assert [section["id"] for section in page.all("section")] == ["settings", "about"]
    assert "port in use" in page.text


def test_a_report_that_fails_is_only_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    said: list[str] = []
    leave_report(tmp_path / "nothing", said.append)
    assert said == []
    assert "no report was written: " in caplog.text
    assert "no run here" in caplog.text


def test_a_run_that_has_ended_says_where_its_report_is(finished: Path) -> None:
    said: list[str] = []
    leave_report(finished, said.append)
    assert said == [f"report    {finished / 'report.html'}"]


def test_it_goes_where_it_is_asked_to(finished: Path, tmp_path: Path) -> None:
    assert write_report(finished, tmp_path / "a.html") == tmp_path / "a.html"
    with pytest.raises(ConfigError, match="no run here"):
        write_report(tmp_path)


def test_the_citation_is_the_repositorys(page: Page) -> None:
    citation = yaml.safe_load(text_of(ROOT / "CITATION.cff"))
    paper = citation["preferred-citation"]
    authors = (f"{a['family-names']}, {a['given-names']}" for a in paper["authors"])
    for text in (
        citation["title"], paper["title"], " and ".join(authors), str(paper["year"]),
        paper["identifiers"][0]["value"],
    ):  # fmt: skip
        assert text in page.text


def test_many_clients_and_rounds_fit(tmp_path: Path) -> None:
    """600 clients in 40 edge rounds: 24,000 places."""
    folder = write_told(tmp_path / "run", intervals=0, verdict=None)
    log = EventLog(folder / EVENTS, role="cloud", node="cloud", before=9)
    for interval in range(1, 21):
        edges = {
            f"edge-{edge}": EdgeFigures(
                trained=[[f"client-{n}" for n in range(edge, 600, 12)]] * 2,
                label_distribution=[0.25] * 4,
            )
            for edge in range(12)
        }
        log.write(
            IntervalEnded(
                interval=interval, edges=edges, sparse=False, intervals=20, parameters=1000,
                macs=1, client_edge_bytes=interval, edge_cloud_bytes=interval, training_flops=1.0,
                left_s=0.0,
            )
        )  # fmt: skip
    log.close()
    text = run_page(folder)
    assert len(text.encode()) < MOST_BYTES
    assert "Where each of 600 clients trained in edge rounds 1 to 40: 24000 times" in text
