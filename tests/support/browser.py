"""The machine's own chromium, driven by selenium, without a network."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from selenium.webdriver import Chrome, ChromeOptions
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By

FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--hide-scrollbars",
)  # fmt: skip
# Contrast of all visible text, as WCAG 2.2 defines it, and of what the figures draw with.
_CONTRAST = """
const parse = (colour) => colour.match(/[\\d.]+/g).map(Number);
const luminance = ([r, g, b]) => [r, g, b].map((v) => v / 255)
  .map((v) => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
  .reduce((sum, v, at) => sum + v * [0.2126, 0.7152, 0.0722][at], 0);
const ratio = (one, other) => {
  const [low, high] = [luminance(one), luminance(other)].sort((a, b) => a - b);
  return (high + 0.05) / (low + 0.05);
};
const behind = (element) => {
  for (let at = element; at; at = at.parentElement) {
    const colour = parse(getComputedStyle(at).backgroundColor);
    if (colour.length === 3 || colour[3] > 0) return colour.slice(0, 3);
  }
  return [255, 255, 255];
};
const found = [];
const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
while (walker.nextNode()) {
  const text = walker.currentNode, element = text.parentElement;
  if (!text.data.trim() || !element.checkVisibility() || element.closest("script, style")) continue;
  const style = getComputedStyle(element);
  const colour = parse(element.closest("svg") ? style.fill : style.color);
  const size = parseFloat(style.fontSize), bold = Number(style.fontWeight) >= 600;
  const large = size >= 24 || (size >= 18.66 && bold);
  found.push([text.data.trim().slice(0, 60), ratio(colour, behind(element)), large ? 3 : 4.5]);
}
for (const shape of document.querySelectorAll("figure svg path, figure svg use")) {
  const style = getComputedStyle(shape), own = shape.getAttribute("style") ?? "";
  // A marker has its colours where it is used; grid lines need not stand out, nor what is pale.
  if (shape.closest("defs") || own.includes("--line") || style.opacity < 1) continue;
  for (const colour of [style.fill, style.stroke])
    if (colour !== "none") found.push([own, ratio(parse(colour), behind(shape)), 3]);
}
return found;
"""


@contextmanager
def browser(folder: Path) -> Iterator[Chrome]:
    """A browser with a profile of its own in ``folder``; skips where there is none."""
    paths = [shutil.which(name) for name in ("chromium", "chromedriver")]
    if None in paths:
        pytest.skip("no chromium and chromedriver here: apt-get install chromium chromium-driver")
    options = ChromeOptions()
    options.binary_location = str(paths[0])
    for flag in (*FLAGS, f"--user-data-dir={folder}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = Chrome(options, Service(executable_path=str(paths[1])))
    try:
        driver.set_page_load_timeout(120)
        yield driver
    finally:
        driver.quit()


def prefer(driver: Chrome, scheme: str) -> None:
    """Show pages in "light" or "dark" from now on."""
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})


def resize(driver: Chrome, width: int) -> None:
    """Make the page as wide as a screen of ``width`` pixels."""
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)


def complaints(driver: Chrome) -> list[Any]:
    """What the page has written to the console since the last call."""
    return list(driver.get_log("browser"))


def addresses(driver: Chrome) -> list[str]:
    """What the browser has asked for since the last call."""
    events = [json.loads(entry["message"])["message"] for entry in driver.get_log("performance")]
    return [
        event["params"]["request"]["url"]
        for event in events
        if event["method"] == "Network.requestWillBeSent"
    ]


def low_contrasts(driver: Chrome) -> tuple[int, list[Any]]:
    """How many contrasts were measured, and (what, ratio, least) of those that are too low."""
    found = driver.execute_script(_CONTRAST)
    return len(found), [entry for entry in found if entry[1] < entry[2]]


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
    for scheme in ("light", "dark"):
        prefer(driver, scheme)
        number, low = low_contrasts(driver)
        assert number > 40
        assert low == [], scheme
    for picture in driver.find_elements(By.CSS_SELECTOR, "img, figure svg"):
        assert picture.get_attribute("alt") or picture.get_attribute("aria-label")
        assert picture.get_attribute("aria-label") or _natural_width(driver, picture) > 0
    assert complaints(driver) == []


def _natural_width(driver: Chrome, image: Any) -> int:
    return int(driver.execute_script("return arguments[0].naturalWidth", image))
