"""The report in a real browser: light, dark and on a phone, nothing overflows and nothing fails to load.

Needs selenium, and Chromium with its driver (`make test-report`); writes its screenshots beside what it tests.
"""

import os
from pathlib import Path

import pytest

import kvprune

selenium = pytest.importorskip("selenium.webdriver", reason="needs selenium and Chromium: make test-report")
SIZES = {"desk": (1280, 900), "phone": (360, 780)}
QUICK = {"calibration_tokens": 512, "eval_tokens": 512, "windows": (64,), "align": 2, "min_width": 4}


@pytest.fixture(scope="module")
def browser():
    options = selenium.ChromeOptions()
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = selenium.Chrome(options=options)
    yield driver
    driver.quit()


@pytest.fixture
def page(checkpoint, texts, tmp_path):
    given = os.environ.get("KVPRUNE_REPORT")
    if given:
        return Path(given)
    kvprune.prune(checkpoint, tmp_path / "half", ratio=0.5, **QUICK)
    bench = tmp_path / "bench.json"
    kvprune.bench(checkpoint, tmp_path / "half", batch=(1, 2), context=(8, 16), new_tokens=2, rounds=1, out=bench)
    return kvprune.report(tmp_path / "half", bench=bench)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_report(browser, page, size, scheme):
    width, height = SIZES[size]
    metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": size == "phone"}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    browser.get(page.resolve().as_uri())
    browser.save_screenshot(str(page.with_name(f"{page.stem}-{size}-{scheme}.png")))
    seen = browser.execute_script(
        """
        const images = [...document.images];
        const wide = [...document.querySelectorAll("body *")].filter(e => !e.closest(".wide") || e.matches(".wide"))
            .filter(e => e.getBoundingClientRect().right > window.innerWidth + 1).map(e => e.tagName);
        return {
            page: document.documentElement.scrollWidth, window: window.innerWidth, wide,
            images: images.length, broken: images.filter(i => !i.complete || !i.naturalWidth).length,
            shown: images.map(i => i.currentSrc.length),
            paper: getComputedStyle(document.body).backgroundColor, ink: getComputedStyle(document.body).color,
        };
        """
    )
    assert seen["page"] <= seen["window"] == width
    assert seen["wide"] == []
    assert seen["images"] >= 2
    assert seen["broken"] == 0
    brightness = {name: sum(map(int, seen[name][4:-1].split(","))) for name in ("paper", "ink")}
    assert (brightness["paper"] > brightness["ink"]) == (scheme == "light")
    assert [entry for entry in browser.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")] == []
