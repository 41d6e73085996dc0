"""What a comparison keeps of its runs once their folders are gone."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest
from support.finished import METHODS, comparison, write_finished

from fedphd.common.errors import ConfigError
from fedphd.deploy.compare.comparison import Comparison
from fedphd.deploy.compare.plan import CommonSettings
from fedphd.deploy.compare.rows import Rows


@pytest.fixture
def made(common: CommonSettings) -> Comparison:
    """FedAvg and FedPhD with one seed, reported on."""
    made = comparison(common, ["fedavg", "fedphd"], [0])
    for run in made.runs():
        write_finished(run, distances=[90.0, 50.0, 20.0 if run.method.name == "fedavg" else 9.0])
    made.plan.write(common.out)
    made.report({}, command="c")
    return made


def test_the_report_needs_the_rows_alone(made: Comparison) -> None:
    out = made.common.out
    names = ["table.csv", "pairs.csv", "table.md", "quality-rounds.png", "sample-grids.png"]
    before = {name: (out / name).read_bytes() for name in names}
    for name in ("fedavg", "fedphd"):
        shutil.rmtree(out / name)
    for name in names:
        (out / name).unlink()
    Comparison.stored(out, METHODS).report({}, command="c")
    assert {name: (out / name).read_bytes() for name in names} == before


def test_the_report_knows_the_preset_that_it_was_made_with(common: CommonSettings) -> None:
    photographs = replace(common, settings={**common.settings, "preset": "cifar10-16"})
    made = comparison(photographs, ["fedavg"], [0])
    for run in made.runs():
        write_finished(run, distances=[90.0, 50.0, 20.0])
    made.plan.write(common.out)
    made.report({}, command="c")
    stored = Comparison.stored(common.out, METHODS)
    assert [run.config.preset for run in stored.runs()] == ["cifar10-16"]
    shutil.rmtree(common.out / "fedavg")
    assert [run.finished for run in Comparison.stored(common.out, METHODS).runs()] == [True]
    with pytest.raises(ConfigError, match=r"comparison with other settings: .* now 'digits'"):
        comparison(common, ["fedavg"], [0])


def test_rows_of_before_the_preset_was_kept_are_of_the_digits(made: Comparison) -> None:
    path = made.common.out / "compare.json"
    plan = json.loads(path.read_text("utf-8"))
    del plan["common"]["preset"]
    path.write_text(json.dumps(plan), "utf-8")
    assert len(Comparison.stored(made.common.out, METHODS).runs()) == 2
    assert all(run.finished for run in comparison(made.common, ["fedavg"], [0]).runs())


def test_a_run_that_has_a_row_is_finished_and_a_further_seed_is_not(made: Comparison) -> None:
    for name in ("fedavg", "fedphd"):
        shutil.rmtree(made.common.out / name)
    later = comparison(made.common, ["fedavg"], [0, 1])
    assert {run.name: run.finished for run in later.runs()} == {
        "fedavg-seed-0": True, "fedphd-seed-0": True,
        "fedavg-seed-1": False, "fedphd-seed-1": False,
    }  # fmt: skip


def test_a_row_with_other_settings_is_refused_by_name(made: Comparison) -> None:
    for name in ("fedavg", "fedphd"):
        shutil.rmtree(made.common.out / name)
    own = METHODS["fedphd"].settings | {"aggregation.factor": 5.0}
    table = {**METHODS, "fedphd": METHODS["fedphd"].model_copy(update={"settings": own})}
    with pytest.raises(ConfigError, match=r"fedphd.seed-0 holds .*: aggregation.factor = 2.0, now"):
        Comparison(made.common, table, made.plan).runs()


def test_a_damaged_line_is_named(made: Comparison) -> None:
    path = made.common.out / "rows.jsonl"
    path.write_text(path.read_text("utf-8") + "{}\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"rows.jsonl, line 3"):
        Rows.read(made.common.out)


def test_a_new_row_takes_the_place_of_the_old_one(made: Comparison) -> None:
    rows = Rows.read(made.common.out)
    row = rows.find("fedavg-seed-0")
    assert row is not None
    assert row.settings["topology"] == "flat"
    assert "training.batch_size" not in row.settings
    rows.keep([(row.model_copy(update={"quality": {"frechet_distance": 3.0}}), None)])
    again = Rows.read(made.common.out)
    assert sorted(again.all) == ["fedavg-seed-0", "fedphd-seed-0"]
    assert again.all["fedavg-seed-0"].quality == {"frechet_distance": 3.0}
    assert again.picture(row).exists()
