"""Which runs are planned, and what happens to finished ones."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from support.finished import METHODS, ORIGIN, comparison, planned, write_finished

from fedphd.common.errors import ConfigError
from fedphd.common.events import write_json
from fedphd.common.history.summary import SUMMARY
from fedphd.deploy.compare.comparison import Comparison
from fedphd.deploy.compare.methods import read_methods
from fedphd.deploy.compare.plan import PLAN, CommonSettings
from fedphd.deploy.launch.client_data import CLASSES, SOURCE
from fedphd.deploy.launch.runs import SIMULATION
from fedphd.deploy.simulation.run_config import SimulatedClients


def changed(common: CommonSettings, **values: object) -> CommonSettings:
    return dataclasses.replace(common, settings={**common.settings, **values})


def test_every_method_of_a_seed_comes_before_the_next_seed(common: CommonSettings) -> None:
    runs = planned(common)
    assert [run.name for run in runs] == [
        "fedavg-seed-0", "fedphd-seed-0", "fedavg-seed-1", "fedphd-seed-1",
    ]  # fmt: skip
    assert [run.folder.relative_to(common.out).as_posix() for run in runs[:2]] == [
        "fedavg/seed-0", "fedphd/seed-0",
    ]  # fmt: skip


def test_a_seed_reaches_weights_participation_and_split_but_not_the_evaluation(
    common: CommonSettings,
) -> None:
    first, _, other, _ = planned(common)
    assert (first.config.seed, other.config.seed) == (0, 1)
    assert [common.clients.record(run.config)["seed"] for run in (first, other)] == [0, 1]
    assert first.config.evaluation == other.config.evaluation
    # Runs that share out_dir share its cache of feature classifiers.
    assert first.config.out_dir == other.config.out_dir == common.out.resolve()


def test_an_impossible_setting_names_the_method(common: CommonSettings) -> None:
    wide = changed(common, **{"pruning.ratio": 0.01})
    with pytest.raises(
        ConfigError, match=r"(?s)method 'fedphd' \(FedPhD\): .*ratio = 0.01 removes"
    ):
        planned(wide)


def test_a_finished_run_with_the_same_settings_is_taken_as_it_is(common: CommonSettings) -> None:
    run = planned(common)[0]
    assert not run.finished
    write_finished(run, distances=[9.0, 5.0, 4.0])
    again = planned(common)[0]
    assert again.finished
    again.check(common.fixed())
    # How long processes wait for one another decides no number.
    patient = planned(changed(common, **{"waits.round_s": 99.0}))[0]
    patient.check(common.fixed())


def test_a_finished_run_with_other_settings_is_refused_by_name(common: CommonSettings) -> None:
    write_finished(planned(common)[0], distances=[9.0, 5.0, 4.0])
    fast = planned(changed(common, **{"training.learning_rate": 0.01}))[0]
    with pytest.raises(
        ConfigError, match=r"seed-0 holds a finished run .*: training.learning_rate = 0.002, now "
    ):
        fast.check(common.fixed())
    others = SimulatedClients({SOURCE: "digits", CLASSES: 3})
    with pytest.raises(
        ConfigError, match=r"data.partition.classes_per_partition = 2, now 3; set them as"
    ):
        planned(dataclasses.replace(common, clients=others))[0].check(common.fixed())


def test_a_run_goes_on_only_as_it_was_begun(common: CommonSettings) -> None:
    run = planned(common)[0]
    assert not run.goes_on(ORIGIN)
    write_finished(run, distances=[9.0, 5.0])
    (run.folder / SUMMARY).unlink()
    assert run.goes_on(ORIGIN)
    record = json.loads((run.folder / SIMULATION).read_text("utf-8"))
    changed_checkout = {**ORIGIN, "commit": "abc123-dirty"}
    assert not run.goes_on({**ORIGIN, "commit": "def456"})
    write_json(run.folder / SIMULATION, {**record, "origin": changed_checkout})
    assert not run.goes_on(changed_checkout)
    write_json(run.folder / SIMULATION, record)
    assert not planned(changed(common, **{"training.learning_rate": 0.01}))[0].goes_on(ORIGIN)
    others = SimulatedClients({SOURCE: "digits", CLASSES: 3})
    assert not planned(dataclasses.replace(common, clients=others))[0].goes_on(ORIGIN)
    (run.folder / SIMULATION).write_text("{", encoding="utf-8")
    assert not run.goes_on(ORIGIN)


def test_settings_that_an_older_version_did_not_have_count_as_their_defaults(
    common: CommonSettings,
) -> None:
    run = planned(common)[0]
    write_finished(run, distances=[9.0, 5.0, 4.0])
    stored = json.loads((run.folder / "config.json").read_text("utf-8"))
    del stored["schedule"]["query_batch"]
    write_json(run.folder / "config.json", stored)
    run.check(common.fixed())


def test_what_was_asked_for_once_stays_in_the_comparison(common: CommonSettings) -> None:
    first = comparison(common, ["fedphd"], [0, 1])
    first.plan.write(common.out)
    later = comparison(common, ["fedavg"], [2])
    assert [method.name for method in later.methods] == ["fedavg", "fedphd"]
    assert later.plan.seeds == [0, 1, 2]
    assert len(later.runs()) == 6
    stored = Comparison.stored(common.out, METHODS)
    assert stored.plan == first.plan


def test_a_comparison_keeps_its_common_settings(common: CommonSettings) -> None:
    comparison(common, ["fedavg"], [0]).plan.write(common.out)
    with pytest.raises(ConfigError, match=r"other settings: training.batch_size = 32, now 16;"):
        comparison(changed(common, **{"training.batch_size": 16}), ["fedavg"], [0])
    with pytest.raises(ConfigError, match=r"budget = 'rounds', now 'cloud-bytes'"):
        comparison(common, ["fedavg"], [0], budget="cloud-bytes")


def test_a_comparison_of_before_some_settings_goes_on_with_their_defaults(
    common: CommonSettings,
) -> None:
    comparison(common, ["fedavg"], [0]).plan.write(common.out)
    stored = json.loads((common.out / PLAN).read_text("utf-8"))
    for key in ("data.validation_fraction", "schedule.query_batch"):
        del stored["common"][key]
    write_json(common.out / PLAN, stored)
    later = comparison(common, ["fedavg"], [1])
    assert later.plan.seeds == [0, 1]
    half = {**common.clients.data, "data.validation_fraction": 0.5}
    halved = dataclasses.replace(common, clients=SimulatedClients(half))
    with pytest.raises(ConfigError, match=r"data.validation_fraction = '', now 0.5"):
        comparison(halved, ["fedavg"], [1])


def test_a_report_needs_a_comparison(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no comparison here; run it without --report-only"):
        Comparison.stored(tmp_path, METHODS)


def test_bytes_decide_the_rounds_and_one_method_may_not_fit(common: CommonSettings) -> None:
    names, budget = ["fedavg", "fedphd"], {"budget": "cloud-bytes", "cloud_bytes": 1000}
    by_bytes = comparison(common, names, [0], **budget)
    assert by_bytes.runs() == []
    by_bytes.plan.intervals = {"fedavg": 5, "fedphd": 0}
    (run,) = by_bytes.runs()
    assert (run.method.name, run.config.schedule.intervals) == ("fedavg", 5)
    # Every round of 2 is evaluated, so every third of 5: 5 / 2 rounded up.
    assert run.config.evaluation.every_intervals == 3


def test_a_report_needs_no_file_of_methods(common: CommonSettings, tmp_path: Path) -> None:
    file = tmp_path / "more.toml"
    file.write_text('[mine]\nbase = "fedphd"\ntitle = "Mine"\n', encoding="utf-8")
    mine = read_methods(file)["mine"]
    plan = comparison(common, ["fedphd"], [0]).plan
    plan.model_copy(update={"methods": ["mine"], "defined": {"mine": mine}}).write(common.out)
    assert Comparison.stored(common.out, METHODS).methods == [mine]
    # Nor does who goes on with other methods.
    later = comparison(common, ["fedavg"], [0]).plan
    assert later.defined == {"mine": mine}
