"""The pages in a real browser: of a real run, of one with everything on it, of a comparison."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from selenium.webdriver import Chrome
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from support.browser import addresses, browser, complaints, low_contrasts, prefer, resize
from support.finished import comparison, write_finished
from support.same import Outcome
from support.told import write_told

from fedphd.common.events import Verdict
from fedphd.deploy.compare.plan import CommonSettings
from fedphd.deploy.report.page import write_report
from fedphd.deploy.simulation.run_config import SimulatedClients

SCHEMES = ("light", "dark")


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chrome]:
    with browser(tmp_path_factory.mktemp("profile")) as driver:
        yield driver


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


def opened(driver: Chrome, path: Path) -> Chrome:
    """The page, with nothing logged before it."""
    driver.get("about:blank")
    complaints(driver)
    addresses(driver)
    resize(driver, 1280)
    prefer(driver, "light")
    driver.get(path.absolute().as_uri())
    return driver


def check_page(driver: Chrome, path: Path) -> None:
    """What holds of every page."""
    opened(driver, path)
    assert {address.partition(":")[0] for address in addresses(driver)} <= {"file", "data"}
    driver.execute_script("for (const one of document.querySelectorAll('details')) one.open = true")
    for width in (1280, 400):
        resize(driver, width)
        wide: int = driver.execute_script("return document.documentElement.scrollWidth")
        assert wide <= width
    for scheme in SCHEMES:
        prefer(driver, scheme)
        number, low = low_contrasts(driver)
        assert number > 40
        assert low == [], scheme
    for picture in driver.find_elements(By.CSS_SELECTOR, "img, figure svg"):
        assert picture.get_attribute("alt") or picture.get_attribute("aria-label")
        assert picture.get_attribute("aria-label") or natural_width(driver, picture) > 0
    assert complaints(driver) == []


def natural_width(driver: Chrome, image: Any) -> int:
    return int(driver.execute_script("return arguments[0].naturalWidth", image))


def test_a_run_with_everything_on_it(driver: Chrome, told: Path) -> None:
    check_page(driver, told)


def test_a_run_that_failed(driver: Chrome, tmp_path: Path) -> None:
    folder = write_told(tmp_path / "run", intervals=1, verdict=Verdict(4, "too few edges"))
    check_page(driver, write_report(folder))


def test_a_real_run_leaves_its_page(driver: Chrome, local_run: Outcome) -> None:
    check_page(driver, local_run.folder / "report.html")
    assert "Finished" in driver.find_element(By.TAG_NAME, "h1").text
    # Three clients at two edges, two intervals of two edge rounds.
    heat = driver.find_element(By.CSS_SELECTOR, "#places figure svg").get_attribute("aria-label")
    assert "3 clients trained in edge rounds 1 to 4" in str(heat)
    # Before training, the first grid, and the evaluation at the end.
    assert len(driver.find_elements(By.CSS_SELECTOR, "#samples .strip li")) == 3
    assert "conv_in" in str(driver.find_element(By.ID, "pruning").get_attribute("textContent"))


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
