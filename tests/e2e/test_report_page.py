"""The pages in a real browser: of a run with everything on it, of a comparison."""

from __future__ import annotations

from pathlib import Path

import pytest
from selenium.webdriver import Chrome
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from support.browser import check_page, complaints, opened
from support.finished import comparison, write_finished
from support.told import write_told

from fedphd.common.events import Verdict
from fedphd.deploy.compare.plan import CommonSettings
from fedphd.deploy.report.page import write_report
from fedphd.deploy.simulation.run_config import SimulatedClients


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_report(write_told(tmp_path_factory.mktemp("told") / "run"))


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """FedAvg moves 999 bytes and then 1 kB, FedPhD 20 kB: not in the order of their digits."""
    out = tmp_path_factory.mktemp("compared")
    common = CommonSettings(None, {"schedule.intervals": 2}, SimulatedClients({}), out)
    made = comparison(common, ["fedavg", "fedphd"], [0])
    for run in made.runs():
        cheap = run.method.name == "fedavg"
        write_finished(
            run, distances=[90.0, 9.5 if cheap else 30.0], bytes_per_round=999 if cheap else 20_000
        )
    made.plan.write(out)
    return next(path for path in made.report({}, command="c") if path.name == "report.html")


def test_a_run_with_everything_on_it(driver: Chrome, told: Path) -> None:
    check_page(driver, told)


def test_a_run_that_failed(driver: Chrome, tmp_path: Path) -> None:
    folder = write_told(tmp_path / "run", intervals=1, verdict=Verdict(4, "too few edges"))
    check_page(driver, write_report(folder))


def test_a_comparison(driver: Chrome, compared: Path) -> None:
    check_page(driver, compared)


def test_the_slider_moves_through_the_samples(driver: Chrome, told: Path) -> None:
    opened(driver, told)
    slider = driver.find_element(By.ID, "interval")
    shown = driver.find_element(By.CSS_SELECTOR, ".viewer img")
    now = driver.find_element(By.CSS_SELECTOR, ".viewer .now")
    assert now.text == "After interval 3"
    seen = {shown.get_attribute("src")}
    for text in ("After interval 2", "After interval 1", "Before training"):
        slider.send_keys(Keys.ARROW_LEFT)
        assert now.text == text
        assert slider.get_attribute("aria-valuetext") == text
        seen.add(shown.get_attribute("src"))
    assert len(seen) == 4
    driver.find_elements(By.CSS_SELECTOR, ".strip button")[1].click()
    assert (now.text, slider.get_attribute("value")) == ("After interval 1", "1")
    assert complaints(driver) == []


def test_without_scripts_all_samples_are_there(driver: Chrome, told: Path) -> None:
    driver.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": True})
    try:
        opened(driver, told)
        images = driver.find_elements(By.CSS_SELECTOR, ".strip img")
        assert [image.is_displayed() for image in images] == [True] * 4
        assert not driver.find_element(By.ID, "interval").is_displayed()
    finally:
        driver.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})


def test_tables_are_sorted_by_their_numbers(driver: Chrome, compared: Path) -> None:
    opened(driver, compared)
    table = driver.find_element(By.CSS_SELECTOR, "#costs table")
    heads = table.find_elements(By.CSS_SELECTOR, "thead th")
    at = next(n for n, head in enumerate(heads) if head.text.startswith("bytes over cloud links"))
    orders = []
    for order in ("ascending", "descending"):
        heads[at].find_element(By.TAG_NAME, "button").click()
        assert heads[at].get_attribute("aria-sort") == order
        rows = table.find_elements(By.CSS_SELECTOR, "tbody th")
        orders.append([row.text for row in rows])
    # 2.0 kB against 40.0 kB.
    assert orders == [["FedAvg", "FedPhD"], ["FedPhD", "FedAvg"]]
