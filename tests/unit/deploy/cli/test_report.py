"""``fedphd report``, and the reports that commands leave."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
from support.told import write_told

from fedphd.common.config.roles import CloudConfig, load_config
from fedphd.common.data.partition import PARTITION_FILE
from fedphd.common.errors import ConfigError, FedPhDError, StartError
from fedphd.common.events import Verdict, read_verdict, write_verdict
from fedphd.deploy.cli.flags import Federation
from fedphd.deploy.cli.report import report
from fedphd.deploy.cli.top import top
from fedphd.deploy.launch.runs import CONFIG, EVENTS, Split, prepare


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


@pytest.mark.parametrize("out", [".", "..", "pages", "/"])
def test_a_folder_is_no_place_for_the_page(
    tmp_path: Path, out: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_told(tmp_path / "run")
    (tmp_path / "pages").mkdir()
    monkeypatch.chdir(tmp_path)
    named = re.escape(f"--out {out}: is a folder; name a file in it, such as ")
    with pytest.raises(ConfigError, match=rf"^{named}.*report\.html$"):
        report(folder, Path(out))


def test_a_log_whose_end_was_cut_gives_a_page_and_another_broken_line_is_named(
    tmp_path: Path,
) -> None:
    folder = write_told(tmp_path / "run")
    log = folder / EVENTS
    whole = log.read_bytes()
    log.write_bytes(whole + b"\0\0\0\0\n")
    report(folder)
    first, _, rest = whole.partition(b"\n")
    log.write_bytes(first + b"\ngarbage\n" + rest)
    with pytest.raises(ConfigError, match=r"metrics\.jsonl, line 2: is not an event"):
        report(folder)
    # `fedphd top` and a run that goes on read the same log.
    with pytest.raises(ConfigError, match=r"metrics\.jsonl, line 2: is not an event"):
        top(folder)


def die(
    federation: Federation,
    run_dir: Path,
    *,
    report: bool,
    verdict: Verdict | None = None,
    error: type[FedPhDError] = FedPhDError,
) -> None:
    """A run that raises an ``error``, after its ServerApp left a ``verdict``."""
    with federation.begin(run_dir, plain=True, report=report) as begun:
        prepare("simulation", federation.config, begun.folder)
        if verdict:
            write_verdict(begun.folder / "verdict.json", verdict)
        raise error("the ServerApp died")


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


def test_a_run_that_could_not_start_leaves_no_report(
    tmp_path: Path, federation: Federation
) -> None:
    folder = tmp_path / "run"
    with pytest.raises(StartError):
        die(federation, folder, report=True, error=StartError)
    assert read_verdict(folder / "verdict.json") == Verdict(3, "the ServerApp died")
    assert not (folder / "report.html").exists()


def test_a_run_that_is_interrupted_before_it_begins_leaves_nothing(
    tmp_path: Path, federation: Federation, caplog: pytest.LogCaptureFixture
) -> None:
    config = federation.config.model_copy(update={"out_dir": tmp_path / "runs"})
    with replace(federation, config=config).begin(None, plain=True, report=True) as begun:
        begun.verdict = Verdict(130, "interrupted")
    assert not begun.folder.exists()
    assert caplog.text == ""


def test_what_ended_a_run_before_is_not_what_ends_it_now(
    tmp_path: Path, federation: Federation
) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    write_verdict(folder / "verdict.json", Verdict(130, "stopped"))
    again = replace(federation, resumed=folder)
    with pytest.raises(StartError), again.begin(None, plain=True, report=False):
        raise StartError("no port is free")
    assert read_verdict(folder / "verdict.json") == Verdict(3, "no port is free")


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
