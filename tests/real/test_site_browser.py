"""The built site in a real browser: light, dark and on a phone, nothing overflows, and the picture of the scheme shows.

Needs `make docs` before it, selenium, and Chromium with its driver (`make test-report` sees to all of it).
"""

import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

selenium = pytest.importorskip("selenium.webdriver", reason="needs selenium and Chromium: make test-report")
SITE = Path(__file__).parents[2] / "build" / "site"
SIZES = {"desk": (1280, 900), "phone": (390, 844)}
PAGES = sorted(page.parent.relative_to(SITE).as_posix() for page in SITE.rglob("index.html"))
SEEN = """
    const shown = [...document.images].filter(i => i.getBoundingClientRect().width > 0);
    return {
        page: document.documentElement.scrollWidth,
        shown: shown.map(i => i.src.split("/").pop()), broken: shown.filter(i => !i.naturalWidth).map(i => i.src),
        ink: getComputedStyle(document.querySelector("article")).color,
        paper: getComputedStyle(document.body).backgroundColor,
    };
"""


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def address():
    assert (SITE / "index.html").is_file(), "make docs has not been run"
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(SITE)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.fixture
def browser():
    """One that remembers no scheme."""
    options = selenium.ChromeOptions()
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = selenium.Chrome(options=options)
    yield driver
    driver.quit()


def as_seen(browser, size: str, scheme: str) -> None:
    width, height = SIZES[size]
    metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": size == "phone"}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})


def is_light(seen: dict) -> bool:
    """Whether the text is darker than what it stands on, and far enough from it to be read."""
    bright = {
        name: sum(float(n) for n in seen[name].split("(")[1].strip(")").split(",")[:3]) for name in ("paper", "ink")
    }
    assert abs(bright["paper"] - bright["ink"]) > 300
    return bright["paper"] > bright["ink"]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_page(browser, address, size, scheme):
    assert {".", "results", "api", "quickstart"} <= set(PAGES)
    as_seen(browser, size, scheme)
    for page in PAGES:
        browser.get(f"{address}/{page}/")
        seen = browser.execute_script(SEEN)
        assert seen["page"] <= SIZES[size][0], page
        assert seen["broken"] == [], page
        assert is_light(seen) == (scheme == "light"), page
        if page in (".", "results"):
            assert seen["shown"] == [f"kv-bytes-{scheme}.png#only-{scheme}"]
    assert [entry for entry in browser.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")] == []


def test_the_toggle_changes_scheme_and_picture(browser, address):
    as_seen(browser, "desk", "dark")
    browser.get(f"{address}/")
    assert not is_light(browser.execute_script(SEEN))
    browser.find_element("css selector", "label[for=__palette_1]:not([hidden])").click()
    seen = browser.execute_script(SEEN)
    assert is_light(seen)
    assert seen["shown"] == ["kv-bytes-light.png#only-light"]
