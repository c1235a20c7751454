"""The report as a reader sees it on a phone and on a desk: a run of 40 clients and 12 experts, and a causal LM."""

from __future__ import annotations

import random

import chromium
import pytest
from told_runs import BASE, HOSTILE, TROUBLES, causal, make_events, make_run

from molehill.config import parse
from molehill_simulation.report import write_report
from molehill_simulation.summary import summarise

# Elements that reach beyond the page, but those in a box that scrolls by itself.
BEYOND = """[...document.body.querySelectorAll('*')].filter((each) => {
  const {left, right, width} = each.getBoundingClientRect();
  const scrolls = (box) => box && (getComputedStyle(box).overflowX === 'auto' || scrolls(box.parentElement));
  return width && (right > document.documentElement.clientWidth + 0.5 || left < -0.5) && !scrolls(each.parentElement);
}).map((each) => `${each.tagName} ${each.className} ${each.textContent.slice(0, 40)}`)"""
BOXES = """[...document.querySelectorAll('.scroll')].map((box) => {
  box.scrollLeft = 1e6;
  const names = [...box.querySelectorAll('tbody th')].map((name) => name.getBoundingClientRect());
  return {title: box.getAttribute('aria-label'), hidden: box.scrollWidth - box.clientWidth,
          left: Math.max(...names.map((name) => Math.abs(name.left - box.getBoundingClientRect().left))),
          width: Math.max(...names.map((name) => name.width))};
})"""


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """Reports by name."""
    if chromium.PROGRAM is None:
        pytest.skip("there is no Chromium here: apt-get install chromium")
    folder, rng = tmp_path_factory.mktemp("pages"), random.Random(0)
    clients = [*(f"client-{number}" for number in range(39)), "a-hospital-with-a-name-of-sixty-letters-" + "x" * 20]
    many = make_events(clients, 12)
    for event in many:
        if event["event"] == "evaluation" and event["tokens"]:
            event["tokens"] = {f"e{i}": rng.expovariate(1.0) for i in range(12)} | {"shared0": 12.0}
            gain = rng.gauss(0.01, 0.05)
            told = {"value": gain, "interval": [gain - 0.04, gain + 0.04]}
            event["gains"] = {"accuracy": told, "macro_f1": told}
    many += [event | {"client": clients[3]} if "client" in event else event for event in TROUBLES]
    labels = ("positive", "negative", "a class with a long name", *"abcdefgh")
    summary = summarise(many, BASE, "ab" * 32, classes={client: dict.fromkeys(labels, (20, 7)) for client in clients})
    wide = make_run(folder / "many", many)
    (wide / "summary.json").write_text(summary.to_json())
    events = causal(make_events(["client-1", "client-2", HOSTILE]))
    for event in events:
        event.update({"cut": 3, "lost": 1} if event["event"] == "evaluation" else {})
        for scores in event.get("stages", {}).values():
            loss = scores["loss"] = 4.7 + rng.random() / 10
            scores |= {"loss_interval": [loss - 0.1, loss + 0.1], "accuracy_interval": [0.1, 0.8]}
        if "global" in event.get("stages", {}):
            event["gains"] = {"loss": {"value": -1234567.8, "interval": [-2234567.8, 1234567.8]}}
    writer = make_run(folder / "writer", events)
    (writer / "config.toml").write_text(parse({"task": {"kind": "causal-lm"}}).to_toml())
    (writer / "summary.json").write_text(summarise(events, BASE, "ab" * 32, "causal-lm").to_json())
    return {name: write_report(run) for name, run in (("many", wide), ("writer", writer))}


@pytest.fixture(scope="module")
def page(pages):
    with chromium.browser() as opened:
        yield opened.page()
        assert opened.errors == []


@pytest.mark.parametrize("name", ["many", "writer"])
@pytest.mark.parametrize("width", [360, 768, 1280])
def test_nothing_reaches_beyond_the_page_and_names_stay_in_sight(pages, page, name, width):
    page.call("Emulation.setDeviceMetricsOverride", width=width, height=844, deviceScaleFactor=1, mobile=width < 600)
    url = pages[name].as_uri()
    page.call("Page.navigate", url=url)
    page.until(f"location.href === {url!r} && document.readyState === 'complete'")
    assert page.do(BEYOND) == []
    assert page.do("document.documentElement.scrollWidth <= innerWidth")
    boxes = page.do(BOXES)
    assert len(boxes) >= 2
    for box in boxes:
        assert box["left"] <= 0.5, box
        assert box["width"] < 0.45 * width, box
        assert box["hidden"] <= 0 or width < 1280 or box["title"] == "Classes", box


def test_on_paper_no_table_is_cut(pages, page):
    """Within the margins of A4, where nothing scrolls."""
    page.call("Emulation.setEmulatedMedia", media="print")
    page.call("Emulation.setDeviceMetricsOverride", width=718, height=1000, deviceScaleFactor=1, mobile=False)
    try:
        url = pages["writer"].as_uri()
        page.call("Page.navigate", url=url)
        page.until(f"location.href === {url!r} && document.readyState === 'complete'")
        assert page.do(BEYOND) == []
        assert page.do("getComputedStyle(document.querySelector('.scroll')).overflowX") == "visible"
    finally:
        page.call("Emulation.setEmulatedMedia", media="")
