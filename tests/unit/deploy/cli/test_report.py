"""``fedphd report``, and the reports that commands leave."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.told import write_told

from fedphd.common.config.roles import CloudConfig, load_config
from fedphd.common.data.partition import PARTITION_FILE
from fedphd.common.errors import ConfigError, FedPhDError
from fedphd.common.events import Verdict, read_verdict, write_verdict
from fedphd.deploy.cli.flags import Federation
from fedphd.deploy.cli.report import report
from fedphd.deploy.launch.runs import CONFIG, Split, prepare


@pytest.fixture
def federation() -> Federation:
    return Federation(load_config(CloudConfig), {}, Split("a-split", (1, 2)))


def test_it_says_where_the_page_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_told(tmp_path / "run")
    report(folder)
    assert capsys.readouterr().out == f"wrote     {folder / 'report.html'}\n"
    report(folder, tmp_path / "a.html")
    assert (tmp_path / "a.html").read_text("utf-8").startswith("<!doctype html>")


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    folder = write_told(tmp_path / "run")
    with pytest.raises(ConfigError, match=r"nowhere/a\.html: cannot be written: No such file"):
        report(folder, tmp_path / "nowhere" / "a.html")


def die(
    federation: Federation, run_dir: Path, *, report: bool, verdict: Verdict | None = None
) -> None:
    """A run that raises, after its ServerApp left a ``verdict``."""
    with federation.begin(run_dir, plain=True, report=report) as begun:
        prepare("simulation", federation.config, begun.folder)
        if verdict:
            write_verdict(begun.folder / "verdict.json", verdict)
        raise FedPhDError("the ServerApp died")


def test_a_run_that_raises_leaves_verdict_and_report(
    tmp_path: Path, federation: Federation
) -> None:
    folder = tmp_path / "run"
    with pytest.raises(FedPhDError, match="the ServerApp died"):
        die(federation, folder, report=True)
    assert read_verdict(folder / "verdict.json") == Verdict(1, "the ServerApp died")
    page = (folder / "report.html").read_text("utf-8")
    assert "the ServerApp died" in page
    assert "a-split" in page


def test_a_verdict_that_is_there_stays(tmp_path: Path, federation: Federation) -> None:
    folder = tmp_path / "run"
    with pytest.raises(FedPhDError):
        die(federation, folder, report=False, verdict=Verdict(4, "too few"))
    assert read_verdict(folder / "verdict.json") == Verdict(4, "too few")
    assert (folder / PARTITION_FILE).exists()
    assert not (folder / "report.html").exists()


def test_a_finished_run_ends_well_without_a_report(
    tmp_path: Path, federation: Federation, caplog: pytest.LogCaptureFixture
) -> None:
    with federation.begin(tmp_path / "run", plain=True, report=True) as begun:
        (begun.folder / CONFIG).write_text("{", "utf-8")
    assert "no report was written" in caplog.text
    assert not (begun.folder / "report.html").exists()
