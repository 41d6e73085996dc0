"""``fedphd compare`` as a user meets it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from support.command import fedphd
from support.finished import METHODS, write_finished

from fedphd.deploy.cli.compare import CLAIM
from fedphd.deploy.compare.plan import CommonSettings, plan_run
from fedphd.deploy.launch.leftovers import claimed
from fedphd.deploy.simulation.run_config import SimulatedClients


def test_list_names_methods_and_where_they_are_described(tmp_path: Path) -> None:
    done = fedphd("compare", "--list", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert "* fedphd_os " in done.stdout
    assert "  fedphd_dense " in done.stdout
    assert "arXiv:1602.05629" in done.stdout


def test_common_settings_need_not_fit_a_pruning_that_no_method_has(tmp_path: Path) -> None:
    flags = ["--set", "schedule.intervals=2", "--set", "schedule.edge_rounds=2"]
    done = fedphd("compare", "--dry-run", "--methods", "fedavg", *flags, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")


def test_dry_run_prints_the_arithmetic_and_starts_nothing(tmp_path: Path) -> None:
    flags = ["--clients", "20", "--set", "schedule.participation=0.4"]
    flags += ["--set", "training.local_amount=1", "--set", "schedule.intervals=10"]
    done = fedphd("compare", "--dry-run", "--methods", "fedavg,fedphd", *flags, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    work = "local epochs = 400 local epochs (40 per cloud round)"
    assert f"10 cloud rounds x 1 training round(s) x 8 clients x 5 {work}" in done.stdout
    assert f"10 cloud rounds x 5 training round(s) x 8 clients x 1 {work}" in done.stdout
    assert "2 methods x seeds 0, 1, 2 = 6 runs into runs/compare; 20 clients" in done.stdout
    assert "  pruning.sparse_rounds = 25\n" in done.stdout
    assert "schedule.participation = 1.0, now 0.4" in done.stdout
    assert not list(tmp_path.iterdir())


def test_edges_may_be_given_before_there_is_a_method_that_has_them(tmp_path: Path) -> None:
    """Whoever adds one later must give the same settings as in the beginning."""
    flags = ["--methods", "fedavg", "--edges", "3", "--seeds", "0"]
    done = fedphd("compare", "--dry-run", *flags, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--methods", "fedsgd"], "--methods: fedsgd: unknown; choose among fedavg, "),
        (["--seeds", "0,0"], "--seeds 0,0: write different whole numbers from 0, such as 0,1,2"),
        (["--seeds", "many"], "--seeds many: write different whole numbers"),
        (["--set", "pruning.mode=none"], "pruning.mode cannot be set for all methods"),
        (["--set", "training.batch_size=0"], "training.batch_size = 0: input should be"),
        (["--data", "/no/data"], "source = '/no/data': no such file or folder"),
        (
            ["--tune", "training.learning_rate=0.1,x"],
            "--tune training.learning_rate=x: method 'fedavg' (FedAvg): ",
        ),
        (
            ["--tune", "training.learning_rate=0.1,0.2", "--set", "evaluation.reference=none"],
            "--tune: the value with the least distance is chosen, but samples are compared with no",
        ),
        (
            ["--budget", "cloud-bytes", "--byte-reference", "fedsgd"],
            "--byte-reference fedsgd: unknown; choose among fedavg, ",
        ),
        (["--cloud-bytes", "1000"], "--cloud-bytes 1000: says nothing without --budget cloud-byt"),
        (["--byte-reference", "fedavg"], "says nothing without --budget cloud-bytes; give both"),
        (["--tuning-seeds", "7"], "--tuning-seeds 7: says nothing without --tune; give both or"),
        (["--tuning-intervals", "7"], "--tuning-intervals 7: says nothing without --tune;"),
        (["--report-only"], "--out runs/compare: no comparison here; run it without"),
    ],
)
def test_wrong_words_exit_2_before_anything_starts(
    arguments: list[str], text: str, tmp_path: Path
) -> None:
    # So that a mistake here would not begin to train.
    dry = [] if "--report-only" in arguments else ["--dry-run"]
    done = fedphd("compare", "--methods", "fedavg", *dry, *arguments, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert text in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


def test_folder_that_cannot_be_made_is_a_start_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    done = fedphd("compare", "--methods", "fedavg", "--out", "file/x", cwd=tmp_path)
    assert done.returncode == 3
    assert done.stderr.startswith("fedphd: --out = file/x: cannot be created: Not a directory; ")


ONE_RUN = ["--methods", "fedavg", "--seeds", "0"]


@pytest.mark.parametrize("arguments", [ONE_RUN, ["--report-only"]])
def test_a_folder_in_which_another_process_works_is_left_alone(
    arguments: list[str], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    common = CommonSettings(None, {}, SimulatedClients({}), out)
    run = plan_run(common, METHODS["fedavg"], 0)
    write_finished(run, distances=[9.0] * (run.config.schedule.intervals + 1))
    done = fedphd("compare", "--out", "out", *ONE_RUN, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert "1 of 1 runs are finished already" in done.stdout
    # It goes when the work is over, since the folder may be committed.
    assert not (out / CLAIM).exists()
    before = times(out)
    with claimed(out, name="--out", file=CLAIM):
        refused = fedphd("compare", "--out", "out", *arguments, cwd=tmp_path)
        assert (refused.returncode, refused.stdout) == (3, "")
        assert f"--out = out: process {os.getpid()} uses it; stop that process" in refused.stderr
    assert times(out) == before


def times(folder: Path) -> dict[Path, int]:
    """When each file was written last."""
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def test_help_explains_every_flag(tmp_path: Path) -> None:
    text = " ".join(fedphd("compare", "--help", cwd=tmp_path).stdout.split())
    for flag in ("--out", "--methods", "--seeds", "--budget", "--cloud-bytes", "--jobs", "--list",
                 "--dry-run", "--report-only", "--byte-reference", "--methods-file"):  # fmt: skip
        assert flag in text
    assert "[default: 0,1,2]" in text
    assert "[default: (the paper's)]" in text
    assert "[default: (100,101)]" in text
