"""Each method's own settings: what is tried, what wins, and that results are made with it."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import replace

import pytest
from support.finished import METHODS, comparison, write_finished

from fedphd.common.errors import ConfigError, FedPhDError
from fedphd.deploy.compare.comparison import Comparison
from fedphd.deploy.compare.methods import tuned_keys
from fedphd.deploy.compare.plan import CommonSettings, Plan, PlannedRun, Tuning
from fedphd.deploy.compare.runner import Keep, Runner
from fedphd.deploy.compare.tuning import read_grid, take_over

RATE, FACTOR, POLICY = "training.learning_rate", "aggregation.factor", "selection.policy"
RATIO, GROUPS = "pruning.ratio", "model.norm_num_groups"


class Finisher(Runner):
    """Leaves what runs would leave; ``distance`` of a run by its settings stands for training."""

    def __init__(
        self,
        common: CommonSettings,
        distances: dict[tuple[float, float], float],
        keep: Keep = lambda _: None,
    ) -> None:
        super().__init__(common.out / "logs", jobs=1, say=print, keep=keep)
        self.distances, self.started = distances, list[str]()
        self.disturbed: set[int] = set()

    def run(self, runs: Sequence[PlannedRun], stop: threading.Event) -> dict[str, str]:
        failed = {}
        for run in runs:
            if run.finished:
                continue
            self.started.append(run.name)
            config = run.config
            distance = self.distances[config.training.learning_rate, config.aggregation.factor]
            if distance < 0:
                failed[run.name] = "diverged; lower training.learning_rate"
            elif distance == 0:
                failed[run.name] = "killed by signal 9"
            else:
                write_finished(
                    run,
                    distances=[90.0, distance + run.seed - 100],
                    failures=["client-1: late"] if run.seed in self.disturbed else [],
                )
                self._keep(run)
        return failed


def asked(common: CommonSettings, methods: Sequence[str], **grid: list[object]) -> Comparison:
    tuning = Tuning(
        grid={key.replace("__", "."): values for key, values in grid.items()},
        seeds=[100, 102],
        intervals=2,
    )
    return comparison(common, methods, [0], tuning=tuning)


def test_methods_tune_what_is_common_or_their_own() -> None:
    keys = ["training.learning_rate", "objective.moon_mu", "selection.policy", "exchange.parts"]
    found = {name: tuned_keys(METHODS[name], METHODS, keys) for name in METHODS}
    assert found["moon"] == [RATE, "objective.moon_mu", "exchange.parts"]
    assert found["fedavg"] == found["centralised"] == [RATE, "exchange.parts"]
    assert found["fedphd"] == [RATE, POLICY, "exchange.parts"]
    # What defines a method is not tuned, nor is one that follows another.
    assert found["feddiffuse"] == [RATE]
    assert found["fedphd_os"] == found["fedphd_random"] == []


def test_one_setting_is_tuned_after_the_other_and_results_use_both(common: CommonSettings) -> None:
    made = asked(
        common, ["fedavg", "fedphd_os"], training__learning_rate=[0.002, 0.004],
        aggregation__factor=[2.0, 0.0, 20.0],
    )  # fmt: skip
    tuner = made.tuner
    assert tuner is not None
    # FedAvg 2, FedPhD 2 and two more factors, on two seeds.
    assert tuner.most_runs == 2 * (2 + 2 + 2)
    # FedAvg has its default factor in every run.
    runner = Finisher(common, {
        (0.002, 2.0): 50.0, (0.004, 2.0): 40.0, (0.004, 0.0): 30.0, (0.004, 20.0): 30.0,
    })  # fmt: skip
    tuner.choose(runner, threading.Event(), print)
    assert len(runner.started) == 12
    stored = Plan.read(common.out)
    assert stored is not None
    assert stored.tuning is not None
    # At equality the first value wins.
    assert stored.tuning.chosen == {"fedavg": {RATE: 0.004}, "fedphd": {RATE: 0.004, FACTOR: 0.0}}
    configs = {run.method.name: run.config for run in made.runs()}
    assert configs["fedavg"].training.learning_rate == 0.004
    assert configs["fedphd_os"].training.learning_rate == 0.004
    assert configs["fedphd_os"].aggregation.factor == 0.0
    # A second time there is nothing to do, and the same is chosen.
    again = Finisher(common, {})
    tuner.choose(again, threading.Event(), print)
    assert again.started == []
    section = tuner.section()
    assert "disturbed" not in section
    assert "| FedAvg | training.learning_rate | 0.002 | 50.0 | 52.0 | 51.0 |" in section
    assert "| FedPhD | aggregation.factor | **0.0** | 30.0 | 32.0 | **31.0** |" in section
    assert "| FedPhD | aggregation.factor | 20.0 | 30.0 | 32.0 | 31.0 |" in section


def test_tuning_runs_are_kept_apart_from_results(common: CommonSettings) -> None:
    made = asked(common, ["fedavg"], training__learning_rate=[0.002, 0.004])
    assert made.tuner is not None
    distances = {(0.002, 2.0): 50.0, (0.004, 2.0): 40.0}
    runner = Finisher(common, distances, keep=lambda run: made.keep([run]))
    made.tuner.choose(runner, threading.Event(), print)
    for run in made.runs():
        write_finished(run, distances=[90.0, 50.0, 20.0])
    made.report({}, command="c")
    rows = made.rows.all.values()
    assert sorted((row.seed, row.tuning) for row in rows) == [
        (0, False), (100, True), (100, True), (102, True), (102, True),
    ]  # fmt: skip
    assert (common.out / "table.csv").read_text("utf-8").count("\n") == 2
    assert "| FedAvg | 1 | 20 |" in (common.out / "table.md").read_text("utf-8")


def test_a_run_in_which_clients_failed_is_marked(common: CommonSettings) -> None:
    made = asked(common, ["fedavg"], training__learning_rate=[0.002])
    assert made.tuner is not None
    runner = Finisher(common, {(0.002, 2.0): 50.0})
    runner.disturbed = {102}
    made.tuner.choose(runner, threading.Event(), print)
    section = made.tuner.section()
    assert "| **0.002** | 50.0 | 52.0 (!) | **51.0** |" in section
    assert section.endswith("\n\n(!) disturbed: clients or edges failed in this run.")


def test_a_value_that_diverges_loses_and_all_of_them_are_an_error(common: CommonSettings) -> None:
    made = asked(common, ["fedavg"], training__learning_rate=[0.002, 0.004])
    assert made.tuner is not None
    assert made.plan.tuning is not None
    made.tuner.choose(
        Finisher(common, {(0.002, 2.0): -1.0, (0.004, 2.0): 70.0}), threading.Event(), print
    )
    assert made.plan.tuning.chosen["fedavg"][RATE] == 0.004
    # Its runs can never finish, and are not tried again.
    again = Finisher(common, {})
    made.tuner.choose(again, threading.Event(), print)
    assert again.started == []
    out = replace(common, out=common.out / "other")
    other = asked(out, ["fedavg"], training__learning_rate=[0.002])
    assert other.tuner is not None
    with pytest.raises(FedPhDError, match=r"no value of .* works for fedavg: diverged"):
        other.tuner.choose(Finisher(out, {(0.002, 2.0): -1.0}), threading.Event(), print)


def test_nothing_is_chosen_where_a_run_failed_for_a_reason_of_the_machine(
    common: CommonSettings,
) -> None:
    made = asked(common, ["fedavg"], training__learning_rate=[0.002, 0.004])
    assert made.tuner is not None
    assert made.plan.tuning is not None
    with pytest.raises(FedPhDError, match=r"nothing is chosen; .* killed by signal 9"):
        made.tuner.choose(
            Finisher(common, {(0.002, 2.0): 60.0, (0.004, 2.0): 0.0}), threading.Event(), print
        )
    assert made.plan.tuning.chosen == {}
    # The same again, on a machine that is well.
    made.tuner.choose(
        Finisher(common, {(0.002, 2.0): 60.0, (0.004, 2.0): 50.0}), threading.Event(), print
    )
    assert made.plan.tuning.chosen["fedavg"][RATE] == 0.004


def test_seeds_of_tuning_and_of_results_differ(common: CommonSettings) -> None:
    tuning = Tuning(grid={RATE: [0.1]}, seeds=[0, 100], intervals=2)
    with pytest.raises(ConfigError, match=r"--tuning-seeds: both have \[0\]"):
        comparison(common, ["fedavg"], [0], tuning=tuning)
    asked(common, ["fedavg"], training__learning_rate=[0.002]).plan.write(common.out)
    with pytest.raises(ConfigError, match=r"--tuning-seeds: both have \[100\]"):
        comparison(common, ["fedavg"], [100])
    longer = Tuning(grid={RATE: [0.002]}, seeds=[100, 102], intervals=3)
    with pytest.raises(ConfigError, match=r"--tuning-intervals = 2, now 3"):
        comparison(common, ["fedavg"], [0], tuning=longer)


def test_a_grid_is_read_from_its_text() -> None:
    assert read_grid([f"{RATE}=0.002, 1e-3", f"{POLICY}=balanced,random"]) == {
        RATE: [0.002, 0.001], POLICY: ["balanced", "random"],
    }  # fmt: skip


@pytest.mark.parametrize(
    ("texts", "problem"),
    [
        (["training.learning_rate"], "write KEY=V1,V2, such as training.learning_rate=0.002"),
        (["training.rate=1"], "training.rate is not a setting of a run"),
        ([f"{RATE}=0.1", f"{RATE}=0.2"], "is given twice"),
        ([f"{RATE}=0.1,0.10"], "has a value twice"),
        (["training.local_amount=1,4"], "is the same for all methods"),
    ],
)
def test_a_wrong_grid_is_named(texts: list[str], problem: str) -> None:
    with pytest.raises(ConfigError, match=f"--tune {texts[-1]}: .*{problem}"):
        read_grid(texts)


@pytest.mark.parametrize(
    ("grid", "told"),
    [
        ({RATE: [0.002, -1.0]}, rf"^--tune {RATE}=-1.0: method 'fedavg' "),
        ({RATE: [0.002], FACTOR: [2.0, -3.0]}, rf"^--tune {FACTOR}=-3.0: method 'fedphd' "),
        # Not the key before it, with which it is first tried.
        ({RATE: [0.002], FACTOR: [-3.0]}, rf"^--tune {FACTOR}=-3.0: method 'fedphd' "),
        # Either could be, but not both.
        ({RATIO: [0.2], GROUPS: [4]}, rf"^--tune {RATIO}=0.2 --tune {GROUPS}=4: method 'fedphd' "),
    ],
)
def test_a_value_that_cannot_be_is_named_before_anything_starts_or_is_stored(
    grid: dict[str, list[object]], told: str, common: CommonSettings
) -> None:
    made = asked(common, ["fedavg", "fedphd_os"], **grid)
    stopped = threading.Event()
    stopped.set()
    with pytest.raises(ConfigError, match=told):
        made.execute(jobs=1, stop=stopped, say=print)
    assert not common.out.exists()


def test_a_value_must_be_possible_for_a_method_that_takes_it_over(common: CommonSettings) -> None:
    coarse = METHODS["fedphd_os"].model_copy(
        update={"name": "coarse", "settings": {"pruning.mode": "one_shot", GROUPS: 16}}
    )
    common = replace(common, settings={**common.settings, RATIO: 0.4})
    made = asked(common, ["fedphd"], **{RATIO: [0.4, 0.2]})
    made.check()
    made.table = {**METHODS, "coarse": coarse}
    made.plan.methods.append("coarse")
    del made.tuner
    with pytest.raises(ConfigError, match=rf"^--tune {RATIO}=0.2: method 'coarse' "):
        made.check()


def test_what_no_value_is_to_blame_for_names_none(common: CommonSettings) -> None:
    """A tuning run of one cloud round has no half to prune after."""
    made = asked(common, ["fedphd"], **{RATE: [0.002]})
    assert made.plan.tuning is not None
    made.plan.tuning.intervals = 1
    with pytest.raises(ConfigError, match=r"^method 'fedphd' prunes after half"):
        made.check()


def test_centralised_training_takes_the_steps_of_all_on_all_images(common: CommonSettings) -> None:
    (run,) = comparison(common, ["centralised"], [0]).runs()
    schedule, training = run.config.schedule, run.config.training
    assert (schedule.min_clients, schedule.participation, schedule.edge_rounds) == (1, 1.0, 1)
    # Six clients with 299 or 300 digits: ten batches of 32 in each of six epochs.
    assert (training.local_unit, training.local_amount) == ("steps", 6 * 6 * 10)
    assert run.decisive["data.partition.kind"] == "iid"


def test_what_clients_hold_out_is_no_step_of_centralised_training(common: CommonSettings) -> None:
    half = {**common.clients.data, "data.validation_fraction": 0.5}
    halved = replace(common, clients=replace(common.clients, data=half))
    (run,) = comparison(halved, ["centralised"], [0]).runs()
    # 149 or 150 digits: five batches of 32 in each of six epochs.
    assert run.config.training.local_amount == 6 * 6 * 5


def test_results_that_were_not_tuned_are_not_tuned_afterwards(common: CommonSettings) -> None:
    (run,) = comparison(common, ["fedphd_os"], [0]).runs()
    write_finished(run, distances=[90.0, 50.0, 20.0])
    # FedPhD-OS takes what FedPhD chooses.
    made = asked(common, ["fedphd_os"], training__learning_rate=[0.002, 0.004])
    told = r"--tune: .* holds finished runs of .* chosen \(fedphd_os-seed-0\); choose another --out"
    with pytest.raises(ConfigError, match=told):
        made.execute(jobs=1, stop=threading.Event(), say=print)
    assert Plan.read(common.out) is None


def test_choices_are_taken_over_where_there_are_some(common: CommonSettings) -> None:
    made = asked(
        common, ["fedavg", "fedphd_os"], training__learning_rate=[0.002, 0.004],
        aggregation__factor=[2.0],
    )  # fmt: skip
    # As if somebody had tuned FedAvg, and FedPhD's first setting only.
    assert made.plan.tuning is not None
    made.plan.tuning.chosen.update({"fedavg": {RATE: 0.004}, "fedphd": {RATE: 0.002}})
    made.plan.write(common.out)

    def taken(*names: str) -> Tuning:
        return take_over(common.out, [METHODS[name] for name in names], METHODS)

    assert taken("fedavg").taken_from == common.out.name
    assert taken("fedavg").of(METHODS["fedavg"]) == {RATE: 0.004}
    told = r"for hierarchical_fedavg, fedphd; tune .* --methods hierarchical_fedavg,fedphd --tune"
    with pytest.raises(ConfigError, match=told):
        taken("fedavg", "hierarchical_fedavg", "fedphd_random", "fedphd_os")
    made.plan.tuning.chosen["fedphd"][FACTOR] = 2.0
    made.plan.write(common.out)
    assert taken("fedphd_random").of(METHODS["fedphd_random"]) == {RATE: 0.002, FACTOR: 2.0}


def test_a_folder_that_has_chosen_nothing_is_refused(common: CommonSettings) -> None:
    asked(common, ["fedavg"], training__learning_rate=[0.002, 0.004]).plan.write(common.out)
    with pytest.raises(ConfigError, match=r"--tuning-from .*: no comparison that has tuned"):
        take_over(common.out, [METHODS["fedavg"]], METHODS)
