"""Event logs, verdicts and the exit codes that errors stand for."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from support.disk import files_limited_to

from fedphd.common import errors
from fedphd.common.errors import EXIT_OK, FedPhDError, StartError, exit_code_of
from fedphd.common.events import EventLog, Verdict, read_verdict, write_json, write_verdict
from fedphd.common.history.events import PeerChanged, Said


def test_events_are_lines_of_json_and_there_at_once(tmp_path: Path) -> None:
    path = tmp_path / "made" / "events.jsonl"
    log = EventLog(path, role="edge", node="edge-0")
    log.write(PeerChanged(peer="client-0", change="joined", detail=""))
    first = json.loads(path.read_text("utf-8"))
    assert first.pop("time") > 1.7e9
    assert first == {
        "role": "edge", "node": "edge-0", "event": "peer", "peer": "client-0", "change": "joined",
        "detail": "",
    }  # fmt: skip
    log.write(Said(text="two\nlines ü"))
    log.close()
    lines = path.read_text("utf-8").splitlines()
    assert [json.loads(line)["event"] for line in lines] == ["peer", "message"]


def test_events_are_appended_to_what_is_there(tmp_path: Path) -> None:
    for text in ("one", "two"):
        log = EventLog(tmp_path / "e.jsonl", role="cloud", node="cloud")
        log.write(Said(text=text))
        log.close()
    lines = (tmp_path / "e.jsonl").read_text("utf-8").splitlines()
    assert [json.loads(line)["text"] for line in lines] == ["one", "two"]


def test_json_is_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"folder": Path("x/y")})
    assert json.loads(path.read_text("utf-8")) == {"folder": "x/y"}
    loop: list[object] = []
    loop.append(loop)
    with pytest.raises(ValueError, match="Circular"):
        write_json(path, loop)
    assert json.loads(path.read_text("utf-8")) == {"folder": "x/y"}
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.json"]


def test_verdict_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "verdict.json"
    assert read_verdict(path) is None
    write_verdict(path, Verdict(4, "too few"))
    assert read_verdict(path) == Verdict(4, "too few")
    assert Verdict() == Verdict(0, "finished")


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"exit_code": "x", "message": ""}', "3"])
def test_file_that_is_not_a_verdict_is_named(tmp_path: Path, text: str) -> None:
    path = tmp_path / "verdict.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(FedPhDError, match=r"verdict\.json is not a verdict: "):
        read_verdict(path)


def test_exit_codes_are_the_documented_ones() -> None:
    documented = re.findall(r"^ .*?(\w+) +(\d+)   ", str(errors.__doc__), flags=re.MULTILINE)
    codes = {name: int(code) for name, code in documented}
    assert codes == {
        "FedPhDError": 1, "ConfigError": 2, "StartError": 3, "ParticipantsError": 4,
        "ConnectionLostError": 5, "Interrupted": 130, "ReplyError": 1,
        "RefusedError": 1,
    }  # fmt: skip
    assert {name: exit_code_of(getattr(errors, name)("x")) for name in codes} == codes
    assert {cls.__name__ for cls in FedPhDError.__subclasses__()} == codes.keys() - {"FedPhDError"}
    assert EXIT_OK == 0


def test_foreign_errors_have_exit_codes_too() -> None:
    assert exit_code_of(KeyboardInterrupt()) == 130
    assert exit_code_of(RuntimeError()) == 1
    assert exit_code_of(errors.ReplyError("x")) == 1
    assert issubclass(StartError, FedPhDError)


def test_an_event_that_does_not_fit_leaves_no_half_line(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    log = EventLog(path, role="edge", node="edge-0")
    log.write(Said(text="before"))
    whole = path.read_bytes()
    # Room for half an event: the system takes the first part and refuses the second.
    with (
        files_limited_to(len(whole) + 20),
        pytest.raises(FedPhDError, match=r"events.jsonl cannot be written: .*; make room"),
    ):
        log.write(Said(text="too much"))
    assert path.read_bytes() == whole
    log.write(Said(text="after"))
    log.close()
    texts = [json.loads(line)["text"] for line in path.read_text("utf-8").splitlines()]
    assert (texts, log.count) == (["before", "after"], 2)
