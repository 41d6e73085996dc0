"""Numbers, words and pictures of the report, worked out by hand."""

from __future__ import annotations

import csv
import io
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.finished import comparison, write_finished

from fedphd.common.errors import FedPhDError
from fedphd.common.events import write_json
from fedphd.deploy.compare.comparison import Comparison
from fedphd.deploy.compare.plan import CommonSettings
from fedphd.deploy.compare.plots import mean_curve
from fedphd.deploy.compare.results import MethodResults, collect, mean_and_spread
from fedphd.deploy.compare.sheets import to_csv
from fedphd.deploy.compare.table import failures

PROTOCOL = (
    "features classifier(digits), num_samples 4, sampler DDIM, sampling_steps 2, seed 1234, "
    "num_reference_images 0"
)


@pytest.fixture
def made(common: CommonSettings) -> Comparison:
    """FedAvg has seeds 0, 1 and 2, FedPhD only 0 and 1."""
    made = comparison(common, ["fedavg", "fedphd"], [0, 1, 2])
    final = {
        "fedavg-seed-0": 10.0, "fedavg-seed-1": 20.0, "fedavg-seed-2": 60.0,
        "fedphd-seed-0": 6.0, "fedphd-seed-1": 12.0,
    }  # fmt: skip
    for run in made.runs():
        if run.name in final:
            write_finished(
                run, distances=[100.0, 50.0, final[run.name]],
                bytes_per_round=4000 if run.method.name == "fedavg" else 1000,
                brightness=50 if run.method.name == "fedavg" else 250,
            )  # fmt: skip
    made.plan.write(common.out)
    return made


def results_of(made: Comparison) -> dict[str, MethodResults]:
    return {results.method.name: results for results in collect(made.runs(), {})}


def test_spread_is_the_sample_standard_deviation() -> None:
    # Deviations -20, -10, 30 from 30: (400 + 100 + 900) / 2 = 700.
    assert mean_and_spread([10.0, 20.0, 60.0]) == (30.0, pytest.approx(math.sqrt(700)))
    assert mean_and_spread([7.0]) == (7.0, None)


def test_training_flops_are_those_that_the_runs_reported(made: Comparison) -> None:
    found = results_of(made)
    # 2 cloud rounds x 60 images x 100 MACs x 6.
    for name in ("fedavg", "fedphd"):
        assert found[name].runs[0].costs["training_flops"] == 72_000
        assert [point.training_flops for point in found[name].runs[0].curve] == [
            0, 36_000, 72_000,
        ]  # fmt: skip


def test_curves_say_what_had_been_spent(made: Comparison) -> None:
    found = results_of(made)
    bytes_spent = {
        name: [point.cloud_bytes for point in found[name].runs[0].curve] for name in found
    }
    assert bytes_spent == {"fedavg": [0, 4000, 8000], "fedphd": [0, 1000, 2000]}
    curve = mean_curve(found["fedphd"], lambda point: point.cloud_bytes)
    assert [(x, mean) for x, mean, _ in curve] == [(0, 100), (1000, 50), (2000, 9)]
    # 6 and 12: deviations of 3, so the root of 9 + 9.
    assert curve[-1][2] == pytest.approx(math.sqrt(18))


def test_csv_has_a_line_per_run(made: Comparison) -> None:
    made.report({}, command="c")
    lines = read_csv(made.common.out / "table.csv")
    assert [(line["method"], line["seed"], float(line["frechet_distance"])) for line in lines] == [
        ("fedavg", "0", 10), ("fedavg", "1", 20), ("fedavg", "2", 60),
        ("fedphd", "0", 6), ("fedphd", "1", 12),
    ]  # fmt: skip
    first, last = lines[0], lines[-1]
    assert (first["cloud_rounds"], first["commit"]) == ("2", "abc123")
    # Three edge rounds of two epochs are six in one go.
    assert (first["training.local_amount"], last["training.local_amount"]) == ("6", "2")
    assert "training.batch_size" not in first
    assert float(last["cloud_bytes"]) == 2000
    # 10 times as much between clients and edges.
    assert (float(last["client_edge_bytes"]), float(first["client_edge_bytes"])) == (20_000, 0)
    assert float(last["seconds"]) == 60


def test_csv_has_each_runs_own_settings(made: Comparison) -> None:
    fedavg, fedphd = collect(made.runs(), {})
    # As what a seed's split of the data brings, while the method's are one run's.
    fedphd.settings = {**fedphd.settings, "num_classes": 9}
    fedphd.runs[1].settings["num_classes"] = 8
    lines = csv.DictReader(io.StringIO(to_csv([fedavg, fedphd])))
    found = [(line["method"], line["num_classes"]) for line in lines]
    assert found == [("fedavg", "10")] * 3 + [("fedphd", "9"), ("fedphd", "8")]


def test_common_settings_are_those_in_which_no_method_differs(made: Comparison) -> None:
    made.report({}, command="c")
    text = (made.common.out / "table.md").read_text("utf-8")
    own, common = text.partition("## Common settings")[::2]
    assert "topology = 'flat'" in own.partition("Settings in which the methods differ")[2]
    assert "    num_classes = 10\n" in common
    assert "    topology = " not in common
    assert " = ''\n" not in common, "what is left to the preset"
    page = (made.common.out / "report.html").read_text("utf-8").partition("Common settings")[2]
    assert "num_classes" in page
    assert "topology" not in page


def test_pairs_are_over_common_seeds(made: Comparison) -> None:
    made.report({}, command="c")
    ours, theirs = sorted(read_csv(made.common.out / "pairs.csv"), key=lambda line: line["method"])
    assert (ours["method"], ours["against"], ours["n"]) == ("fedavg", "fedphd", "2")
    # Over the seeds that both have: 30 against 18, and 18 against 30.
    assert float(ours["relative"]) == pytest.approx(2 / 3)
    assert float(theirs["relative"]) == pytest.approx(-0.4)
    assert (theirs["seeds_better"], ours["seeds_better"], ours["low"]) == ("2", "0", "")


def read_csv(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(path.read_text("utf-8"))))


def test_report_has_all_seeds_and_names_those_that_are_missing(made: Comparison) -> None:
    made.report({"fedphd-seed-2": "too few clients"}, command="fedphd compare --x")
    text = (made.common.out / "table.md").read_text("utf-8")
    assert "| FedAvg | 3 | 30 ± 26 |  |\n" in text
    assert "| FedPhD | 2 | 9 ± 4.2 | -40%, 2 of 2 seeds |\n" in text
    # FedAvg that visits the cloud in each of three edge rounds moves three times as much.
    assert "| FedAvg | 2 | 0.00 M | 0.00 M | 0 B | 8.0 kB |  | -66.7% |" in text
    assert " | 2.0 kB | -75.0% | -91.7% |" in text
    assert "## Missing runs\n\n- fedphd seed 2: too few clients\n" in text
    assert f"- {PROTOCOL}\n" in text
    assert "- 5 run(s): fedphd_version 9.9, commit abc123, machine a test's\n" in text
    assert "\n\nNo client and no edge failed in any run.\n" in text
    assert "a client of a flat method that takes part trains 6 local epochs" in text
    assert "written by `fedphd compare --x`" in text
    assert "- FedPhD (arXiv:2507.06449): pruning.mode = 'scheduled', " in text
    assert "    training.batch_size = 32\n" in text


def test_bytes_are_those_of_a_cloud_round_where_methods_have_different_numbers_of_them(
    common: CommonSettings,
) -> None:
    made = comparison(
        common, ["fedavg", "fedphd"], [0, 1], budget="cloud-bytes", cloud_bytes=16_000
    )
    made.plan.intervals = {"fedavg": 4, "fedphd": 16}
    for run in made.runs():
        rounds = run.config.schedule.intervals
        write_finished(run, distances=[9.0] * (rounds + 1), bytes_per_round=16_000 // rounds)
    made.report({}, command="c")
    text = (common.out / "table.md").read_text("utf-8")
    # 1000 bytes a round against 4000, or 12,000 with the cloud in each of three edge rounds.
    assert "| FedAvg | 4 | 0.00 M | 0.00 M | 0 B | 16.0 kB |  | -66.7% |" in text
    assert " | 16.0 kB | -75.0% | -91.7% |" in text


def test_runs_in_which_clients_failed_are_named(common: CommonSettings) -> None:
    made = comparison(common, ["fedavg"], [0, 1])
    for run in made.runs():
        failures = ["client-3: no memory"] if run.seed else []
        write_finished(run, distances=[9.0, 5.0, 4.0], failures=failures)
    made.report({}, command="c")
    out = made.common.out
    # One in each of two cloud rounds.
    said = "clients or edges failed, so often, in fedavg seed 1 (2). Move the folders"
    assert said in (out / "table.md").read_text("utf-8")
    assert said in (out / "report.html").read_text("utf-8")
    assert [line["failures"] for line in read_csv(out / "table.csv")] == ["0", "2"]


def test_rows_of_before_failures_were_counted_do_not_claim_that_there_were_none(
    made: Comparison,
) -> None:
    every = [*results_of(made).values()]
    assert failures(every) == "No client and no edge failed in any run."
    every[0].runs[0].failures = None
    assert failures(every) == (
        "Of 1 run(s) it is not recorded whether somebody failed. No client and no edge failed in "
        "any other run."
    )
    for run in (run for one in every for run in one.runs):
        run.failures = None
    assert failures(every) == "Of 5 run(s) it is not recorded whether somebody failed."


def test_runs_that_were_not_evaluated_alike_are_pointed_out(made: Comparison) -> None:
    summary = made.runs()[0].folder / "summary.json"
    text = summary.read_text("utf-8").replace("classifier(digits)", "another(digits)")
    summary.write_text(text, encoding="utf-8")
    made.report({}, command="c")
    report = (made.common.out / "table.md").read_text("utf-8")
    assert "the runs were NOT all evaluated alike" in report
    other = PROTOCOL.replace("classifier", "another")
    assert f"- {other}: fedavg seed 0\n" in report


def test_pictures_show_every_method(made: Comparison) -> None:
    files = made.report({}, command="c")
    pictures = [path for path in files if path.suffix == ".png"]
    assert [path.name for path in pictures] == [
        "quality-rounds.png", "quality-cloud-bytes.png", "quality-compute.png", "sample-grids.png",
    ]  # fmt: skip
    for path in pictures[:3]:
        colours = colours_of(path)
        # matplotlib's first two colours, of the two methods' lines.
        assert {(31, 119, 180), (255, 127, 14)} <= colours, path
    grids = colours_of(pictures[3])
    assert {(50, 50, 50), (250, 250, 250)} <= grids
    assert all(f"]({path.name})" in files[2].read_text("utf-8") for path in pictures)


def test_the_page_has_what_the_tables_have(made: Comparison) -> None:
    made.report({"fedphd-seed-2": "too few <clients>"}, command="c")
    page = (made.common.out / "report.html").read_text("utf-8")
    # The mean of 10, 20 and 60, and of 6 and 12; FedPhD's against FedAvg's over the same seeds.
    for text in (
        "FedPhD has the least Frechet distance, 9.0 \u00b1 4.2; FedAvg has 15.0, "
        "over the seeds that all methods have (0, 1).",
        '<td class="nowrap" data-value="30.0">30 \u00b1 26</td>',
        '<td class="nowrap" data-value="-40.0">-40%, 2 of 2 seeds</td>',
        "fedphd seed 2: too few &lt;clients&gt;",
        'alt="Grid of samples of FedPhD, seed 1"',
    ):
        assert text in page, text
    assert len(page.encode()) < 2_000_000
    assert "http:" not in page
    assert "https:" not in page


def test_the_page_tells_methods_of_one_title_apart(made: Comparison) -> None:
    table = {**made.table, "fedphd": made.table["fedphd"].model_copy(update={"title": "FedAvg"})}
    replace(made, table=table).report({}, command="c")
    page = (made.common.out / "report.html").read_text("utf-8")
    assert "FedAvg has the least Frechet distance, 9.0 \u00b1 4.2; FedAvg has 15.0, over" in page
    assert page.count('alt="Grid of samples of FedAvg, seed 1"') == 2


def test_a_page_that_fails_leaves_the_tables(
    made: Comparison, caplog: pytest.LogCaptureFixture
) -> None:
    (made.common.out / "report.html").mkdir()
    files = made.report({}, command="c")
    assert "report.html" not in [path.name for path in files]
    assert "no report was written" in caplog.text
    assert (made.common.out / "table.md").exists()


def colours_of(path: Path) -> set[tuple[int, ...]]:
    with Image.open(path) as picture:
        pixels = np.asarray(picture.convert("RGB")).reshape(-1, 3)
    return {tuple(int(c) for c in colour) for colour in np.unique(pixels, axis=0)}


def test_without_distances_there_are_samples_but_no_curves(common: CommonSettings) -> None:
    made = comparison(common, ["fedavg"], [0])
    write_finished(made.runs()[0], distances=[None, None, None])
    files = made.report({}, command="c")
    assert [path.name for path in files] == [
        "table.csv", "pairs.csv", "table.md", "sample-grids.png", "report.html",
    ]  # fmt: skip


def test_every_real_number_of_an_evaluation_becomes_a_column(made: Comparison) -> None:
    for run in made.runs():
        if run.finished:
            file = run.folder / "summary.json"
            text = file.read_text("utf-8").replace(
                '"raw": null', '"raw": {"frechet_distance": 33.5}'
            )
            text = text.replace('"kernel_distance": null', '"kernel_distance": 0.25')
            file.write_text(text, encoding="utf-8")
    made.report({}, command="c")
    row = read_csv(made.common.out / "table.csv")[0]
    assert (float(row["raw.frechet_distance"]), float(row["kernel_distance"])) == (33.5, 0.25)
    report = (made.common.out / "table.md").read_text("utf-8")
    assert "| against fedavg | by raw weights | rank (raw) |" in report
    # The least of the averaged weights; by raw weights both are equal.
    assert "| FedPhD | 2 | 9 ± 4.2 | -40%, 2 of 2 seeds | 33.5 ± 0 | 1 (1) |" in report
    assert "| FedAvg | 3 | 30 ± 26 |  | 33.5 ± 0 | 2 (1) |" in report
    assert "| method | Kernel distance |" in report
    assert f"- {PROTOCOL}\n" in report


def test_shares_of_the_gap_and_changes_of_one_thing(common: CommonSettings) -> None:
    names = ["fedavg", "fedphd", "fedphd_random", "centralised"]
    made = comparison(common, names, [0, 1, 2])
    final = {"fedavg": 50.0, "fedphd": 20.0, "fedphd_random": 25.0, "centralised": 10.0}
    for run in made.runs():
        write_finished(run, distances=[100.0, 40.0, final[run.method.name] + run.seed])
    made.report({}, command="c")
    text = (common.out / "table.md").read_text("utf-8")
    # Means of 51, 21, 26 and 11: 30 and 25 of 40.
    assert "| FedPhD | 3 | 21 ± 1 | -59% [-60%, -58%; t: -62%, -56%], 3 of 3 seeds | 75% |" in text
    assert (
        ", random edges | 3 | 26 ± 1 | -49% [-50%, -48%; t: -51%, -47%], 3 of 3 seeds | 62% |"
        in text
    )
    assert (
        "- FedPhD against FedPhD, random edges: -19% [-20%, -19%; t: -21%, -17%], 3 of 3 seeds\n"
        in text
    )


def test_a_variant_of_a_variant_is_compared_with_what_it_builds_on(common: CommonSettings) -> None:
    names = ["fedphd", "fedphd_dense", "fedphd_dense_random"]
    made = comparison(common, names, [0, 1, 2])
    final = {"fedphd": 20.0, "fedphd_dense": 10.0, "fedphd_dense_random": 12.0}
    for run in made.runs():
        write_finished(run, distances=[100.0, 40.0, final[run.method.name] + run.seed])
    made.report({}, command="c")
    text = (common.out / "table.md").read_text("utf-8")
    assert "- FedPhD without pruning against FedPhD without pruning, random edges: -" in text
    assert "- FedPhD against FedPhD without pruning, random edges" not in text


def test_the_change_over_the_last_quarter_is_that_of_the_means(common: CommonSettings) -> None:
    made = comparison(replace(common, settings={**common.settings, "schedule.intervals": 4}),
                      ["fedavg"], [0, 1])  # fmt: skip
    for run, end in zip(made.runs(), (19.0, 17.0), strict=True):
        write_finished(run, distances=[90.0, 50.0, 30.0, 20.0, end])
    made.report({}, command="c")
    text = (common.out / "table.md").read_text("utf-8")
    assert "- FedAvg's distance changed by -10.0% over the last quarter\n" in text


def test_a_run_of_a_version_without_some_figures_is_read(made: Comparison) -> None:
    folder = made.runs()[0].folder
    summary = json.loads((folder / "summary.json").read_text("utf-8"))
    for row in (summary["evaluation"], *summary["evaluations"]):
        del row["kernel_distance"], row["num_reference_images"]
    write_json(folder / "summary.json", summary)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        line.pop("validation_loss", None)
        line.pop("client_rounds", None)
    text = "".join(f"{json.dumps(line)}\n" for line in [{"event": "of an age past"}, *lines])
    (folder / "metrics.jsonl").write_text(text, encoding="utf-8")
    run = results_of(made)["fedavg"].runs[0]
    assert (run.quality, run.protocol["num_reference_images"]) == ({"frechet_distance": 10.0}, 0)
    assert [point.cloud_bytes for point in run.curve] == [0, 4000, 8000]


@pytest.mark.parametrize(
    ("name", "text", "problem"),
    [
        ("summary.json", "{}", "ValidationError: .* fedphd_version Field required"),
        ("simulation.json", "{}", "KeyError: 'origin'"),
        ("metrics.jsonl", '{"event": "interval"}\n', "ValidationError: .* interval Field required"),
        # The last line may have come in part; that it is the only one shows all the same.
        ("metrics.jsonl", "x\n", "ValueError: its log has no interval"),
    ],
)
def test_a_damaged_file_is_named_by_its_folder(
    name: str, text: str, problem: str, made: Comparison
) -> None:
    runs = made.runs()
    (runs[0].folder / name).write_text(text, encoding="utf-8")
    with pytest.raises(FedPhDError, match=rf"seed-0: not a complete finished run \({problem}"):
        collect(runs, {})


def test_a_run_that_was_never_evaluated_is_named(made: Comparison) -> None:
    file = made.runs()[0].folder / "summary.json"
    summary = json.loads(file.read_text("utf-8"))
    write_json(file, {**summary, "evaluation": None})
    with pytest.raises(FedPhDError, match=r"seed-0: not a .*ValueError: its summary has no eval"):
        made.report({}, command="c")


def test_a_title_with_signs_of_markup_is_shown_as_it_is(
    made: Comparison, monkeypatch: pytest.MonkeyPatch
) -> None:
    title = r"FedPhD, $\lamda$ = 0 | 1"
    method = made.table["fedphd"].model_copy(update={"title": title})
    monkeypatch.setattr(made, "table", {**made.table, "fedphd": method})
    made.report({}, command="c")
    table = (made.common.out / "table.md").read_text("utf-8")
    assert r"| FedPhD, $\lamda$ = 0 \| 1 |" in table
    assert (made.common.out / "sample-grids.png").exists()
    assert title in (made.common.out / "report.html").read_text("utf-8")
