"""The table of methods."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedphd.common.config.text import setting_keys
from fedphd.common.errors import ConfigError
from fedphd.deploy.compare.methods import check_common, choose_methods, read_methods

PAPER = ["fedavg", "fedprox", "moon", "scaffold", "feddiffuse", "fedphd", "fedphd_os"]


def test_table_has_the_papers_methods_and_ablations() -> None:
    table = read_methods()
    assert [name for name, method in table.items() if method.paper] == PAPER
    assert set(table) - {*PAPER} == {
        "fedphd_dense", "fedphd_random", "fedphd_published", "fedphd_dense_random",
        "hierarchical_fedavg", "centralised",
    }  # fmt: skip
    assert {name for name, m in table.items() if m.topology == "flat"} == {
        *PAPER[:5], "centralised",
    }  # fmt: skip
    assert all(method.reference.startswith("arXiv:") for method in table.values())


def test_base_gives_what_an_entry_does_not_say(tmp_path: Path) -> None:
    file = tmp_path / "more.toml"
    file.write_text(
        '[mine]\nbase = "fedphd"\ntitle = "Mine"\n[mine.settings]\n"aggregation.factor" = 1.5\n',
        encoding="utf-8",
    )
    table = read_methods(file)
    mine = table["mine"]
    assert (mine.title, mine.topology, mine.reference) == (
        "Mine", "hierarchical", "arXiv:2507.06449",
    )  # fmt: skip
    assert mine.settings == {"pruning.mode": "scheduled", "aggregation.factor": 1.5}
    assert table["fedphd"].settings == {"pruning.mode": "scheduled"}
    assert [method.name for method in choose_methods(table, ["mine", "fedavg"])] == [
        "fedavg", "mine",
    ]  # fmt: skip


def test_without_a_title_an_entry_goes_by_its_name_and_not_by_its_bases(tmp_path: Path) -> None:
    file = tmp_path / "more.toml"
    text = '[mine]\nbase = "fedavg"\n[mine_too]\nbase = "mine"\ntitle = "Mine"\n'
    file.write_text(text, encoding="utf-8")
    table = read_methods(file)
    titles = {name: table[name].title for name in ("fedavg", "mine", "mine_too")}
    assert titles == {"fedavg": "FedAvg", "mine": "mine", "mine_too": "Mine"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[a]\nbase = "b"', r"method 'b': there is no \[b\]"),
        ('[a]\nbase = "b"\n[b]\nbase = "a"', "method 'b': base = 'a' leads back to itself"),
        ('[a]\nbase = "fedavg"\ntopology = "ring"', "topology = 'ring'"),
        ('[a]\nbase = "fedavg"\nspeed = 1', "speed: unknown key"),
        ('[fedavg]\nbase = "fedphd"', "fedavg: a method with this name exists already"),
        ("[a", "not valid TOML"),
        ('["a b"]\nbase = "fedavg"', "'a b' is not a valid name"),
    ],
)
def test_wrong_entries_are_named(text: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "more.toml"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=message):
        read_methods(file)


def test_names_that_are_no_methods_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"--methods: fedpdh: unknown; choose among fedavg, "):
        choose_methods(read_methods(), ["fedavg", "fedpdh"])
    with pytest.raises(ConfigError, match=r"no\.toml: cannot be read"):
        read_methods(Path("no.toml"))


def test_a_method_that_needs_a_setting_which_is_not_there_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "more.toml"
    text = '[later]\nbase = "fedavg"\n[later.settings]\n"training.novelty" = 1\n'
    file.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=r"method 'later' \(later\) needs training.novelty: no"):
        choose_methods(read_methods(file), ["later"])
    known = set(setting_keys())
    usable = [n for n, method in read_methods().items() if set(method.settings) <= known]
    assert {"fedavg", "fedphd", "fedphd_os", "fedphd_dense"} <= set(usable)
    assert len(choose_methods(read_methods(), usable)) == len(usable)


@pytest.mark.parametrize("key", ["topology", "seed", "pruning.mode", "objective.method"])
def test_what_makes_a_method_cannot_be_common(key: str) -> None:
    with pytest.raises(ConfigError, match=f"{key} cannot be set for all methods"):
        check_common(["training.batch_size", key])
    check_common(["training.batch_size", "aggregation.factor", "pruning.ratio"])
