"""The page in a real browser: it runs, searches and sorts, shows names as text, and gives a CSV that is only data."""

from __future__ import annotations

import csv
import io
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny_snapshot
from browser import Browser, find_browser
from conftest import TINY_TRAINING
from hostile_names import HOSTILE
from PIL import Image

import pipeline
from pipeline.cli import cli, run
from pipeline.learn.evaluation import evaluate
from pipeline.plan.manifest import WEIGHTS
from pipeline.report import write_evaluation, write_report
from pipeline.report.words import visible
from pipeline.snapshot import Snapshot, open_snapshot

PROGRAM = find_browser()
if PROGRAM is None:
    pytest.skip("chromium is not installed", allow_module_level=True)

NUM_CLASSES = 5000
FORMULA = tuple("=+-@\t\r＝＋－＠")
MAX_PAGE_BYTES = 15_000_000


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    assert PROGRAM
    with Browser(PROGRAM) as opened:
        yield opened


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of 5,000 classes of 1 to 400 images, most of them with one."""
    counts = np.maximum(1, 400 // np.arange(1, NUM_CLASSES + 1)).tolist()
    held_out = [min(count // 10, 3) for count in counts]
    root = tmp_path_factory.mktemp("large") / "root"
    policies = {"natural": "natural", "balanced": "balanced:per_class=3", "sqrt": "power:alpha=0.5"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiny_snapshot, "SAMPLES_PER_SHARD", 2000)
        tiny_snapshot.write_snapshot(root, {"train": counts, "val": [0] * NUM_CLASSES, "test": held_out}, policies)
    return Path(write_report(root))


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Snapshot]:
    """The page of a build whose labels are HOSTILE, with rejects, duplicates and label conflicts among them."""
    folder = tmp_path_factory.mktemp("hostile")
    rows: list[tuple[str, str]] = []
    for number, label in enumerate(HOSTILE):
        for copy, name in enumerate((f"{number}-<b>.png", f"{number}-=2.png", f"{number}-same.png")):
            shade = (9 * number, 40 + 90 * (copy == 1), 90)
            Image.new("RGB", (30 + number, 20), shade).save(folder / name)
            rows.append((name, label))
        Image.new("RGB", (9, 9), (255, 0, 0)).save(folder / f"{number}-conflict.png")
        rows += [(f"{number}-conflict.png", label), (f"gone {number} </script>.png", label)]
    with open(folder / "table.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("path", "label"), *rows])
    pipeline.build(folder / "table.csv", folder / "root", workers=1, address="none")
    snapshot = open_snapshot(folder / "root")
    return Path(write_report(folder / "root", originals=lambda path: (folder / path).read_bytes())), snapshot


def rows_of(browser: Browser) -> list[list[str]]:
    return browser.ask(
        "[...document.querySelectorAll('#classes tbody tr')].map(r => [...r.cells].map(c => c.textContent))"
    )


def type_into(browser: Browser, element: str, value: str, event: str = "input") -> None:
    browser.ask(
        f"{{ const e = document.getElementById('{element}'); e.value = {json.dumps(value)}; "
        f"e.dispatchEvent(new Event('{event}')); }}"
    )


def sort_by(browser: Browser, title: str) -> None:
    buttons = "[...document.querySelectorAll('#classes thead button')]"
    browser.ask(f"{buttons}.find(b => b.textContent === {json.dumps(title)}).click()")


def column(browser: Browser, title: str) -> list[str]:
    titles = browser.ask("[...document.querySelectorAll('#classes thead th')].map(h => h.textContent)")
    return [row[titles.index(title)] for row in rows_of(browser)]


# ---- it runs


def test_the_page_of_an_evaluation_is_text_and_fits(
    browser: Browser, hostile: tuple[Path, Snapshot], tmp_path: Path
) -> None:
    snapshot = hostile[1]
    indexes = [snapshot.index(shard).to_pylist() for shard in range(snapshot.shards.num_rows)]
    rows = [row for index in indexes for row in index if row["split"] == "train"]
    num_classes = snapshot.record.num_classes
    scores = [
        [float(c == (row["class_id"] + row["offset"] // 3000) % num_classes) for c in range(num_classes)]
        for row in rows
    ]
    predictions = tmp_path / "p <b>.parquet"
    pq.write_table(pa.table({"path": [row["path"] for row in rows], "scores": scores}), predictions)
    page = tmp_path / "page.html"
    write_evaluation(evaluate(snapshot, predictions, split="train", priors=["uniform", "em"]), str(page))
    for width, dark in ((1200, False), (390, True)):
        browser.open(page, width=width, dark=dark)
        assert browser.problems == []
        assert [url for url in browser.requests if not url.startswith("data:")] == [page.as_uri()]
        assert browser.ask("document.documentElement.scrollWidth") == width
    shown = browser.ask("[...document.querySelectorAll('#worst td:first-child')].map(cell => cell.textContent)")
    assert sorted(shown) == sorted(visible(name) for name in snapshot.classes["name"].to_pylist())
    assert browser.ask("document.querySelectorAll('img, script, b').length") == 0


def test_the_page_of_a_training_is_text_and_fits(
    browser: Browser, hostile: tuple[Path, Snapshot], tmp_path: Path
) -> None:
    root, names = hostile[1].store.url, hostile[1].classes["name"].to_pylist()
    words = ("--stage", "natural:1", "--stage", "balanced:1", "--split", "train", "--out", str(tmp_path / "out"))
    assert run(cli, ["train", root, *words, *TINY_TRAINING]) == 0
    page = tmp_path / "out/index.html"
    for width, dark in ((1200, False), (390, True)):
        browser.open(page, width=width, dark=dark)
        assert browser.problems == []
        assert browser.requests == [page.as_uri()]
        assert browser.ask("document.documentElement.scrollWidth") == width
    shown = browser.ask("[...document.querySelectorAll('#all tbody th')].map(cell => cell.textContent)")
    assert sorted(shown) == sorted(visible(name) for name in names)
    assert browser.ask("document.querySelectorAll('img, script, b').length") == 0


@pytest.mark.parametrize(("width", "dark"), [(1200, False), (1200, True), (390, False), (320, True)])
@pytest.mark.parametrize("which", ["large", "hostile"])
def test_nothing_is_refused_loaded_or_wider_than_the_window(
    browser: Browser, request: pytest.FixtureRequest, which: str, width: int, dark: bool
) -> None:
    made = request.getfixturevalue(which)
    path = made if which == "large" else made[0]
    browser.open(path, width=width, dark=dark)
    assert browser.ask("document.documentElement.dataset.ready") == "yes"
    assert browser.problems == []
    assert [url for url in browser.requests if not url.startswith("data:")] == [path.as_uri()]
    assert browser.ask("document.documentElement.scrollWidth") == width


def test_five_thousand_classes_are_a_small_page_that_is_quick(browser: Browser, large: Path) -> None:
    assert large.stat().st_size < MAX_PAGE_BYTES
    browser.open(large)
    assert len(rows_of(browser)) == 100
    started_s = time.monotonic()
    for _ in range(10):
        type_into(browser, "search", "class 4")
        sort_by(browser, "class")
        type_into(browser, "search", "")
    assert time.monotonic() - started_s < 10  # some 30 ms each where it was measured


# ---- search, sort, pages, columns


def test_search_finds_part_of_a_name_in_any_case(browser: Browser, large: Path) -> None:
    browser.open(large)
    type_into(browser, "search", "CLASS 4999")
    assert column(browser, "class") == ["class 4999"]
    assert browser.ask("document.getElementById('found').textContent") == "1 of 5,000"
    type_into(browser, "search", "no such class")
    assert rows_of(browser) == []


def test_a_click_sorts_and_another_turns_round(browser: Browser, large: Path) -> None:
    browser.open(large)
    assert column(browser, "images")[:3] == ["403", "203", "136"]
    sort_by(browser, "test")
    assert column(browser, "test")[0] == "3"
    sort_by(browser, "test")
    assert set(column(browser, "test")) == {"0"}
    sort_by(browser, "class")
    names = column(browser, "class")
    assert names == sorted(names)
    headings = browser.ask("[...document.querySelectorAll('th[aria-sort=ascending]')].map(h => h.textContent)")
    assert headings == ["class"]


def test_pages_lead_to_every_class(browser: Browser, large: Path) -> None:
    browser.open(large)
    seen = column(browser, "class")
    while not browser.ask("document.getElementById('on').disabled"):
        browser.ask("document.getElementById('on').click()")
        seen += column(browser, "class")
    assert sorted(seen) == sorted(f"class {i}" for i in range(NUM_CLASSES))


def test_classes_that_cannot_be_evaluated_are_a_filter(browser: Browser, large: Path) -> None:
    browser.open(large)
    chosen = browser.ask(
        "[...document.getElementById('group').options].find(o => o.textContent === 'cannot be evaluated').value"
    )
    type_into(browser, "group", chosen, "change")
    assert set(column(browser, "evaluable")) == {"no"}
    assert browser.ask("document.getElementById('found').textContent") == f"{NUM_CLASSES - 40:,} of 5,000"


def test_weights_take_the_place_of_draws(browser: Browser, large: Path) -> None:
    browser.open(large)
    type_into(browser, "measure", "weight, residual", "change")
    assert set(column(browser, "balanced")) == {"1"}
    type_into(browser, "measure", "log_q", "change")
    assert set(column(browser, "balanced")) == {"-8.517"}  # log(1/5000)


def test_pointing_at_the_curve_tells_the_class(browser: Browser, large: Path) -> None:
    browser.open(large)
    browser.ask("document.querySelector('.curve.wide').scrollIntoView()")
    corner = "(b => [b.left, b.top, b.width])"
    box = browser.ask(f"{corner}(document.querySelector('.curve.wide').getBoundingClientRect())")
    x, y = box[0] + box[2] * 66 / 960, box[1] + 100
    browser.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)
    sqrt = int(open_snapshot(large.parents[2]).manifest("sqrt").targets[0])
    assert browser.ask("document.getElementById('readout').textContent") == (
        f"class 0: rank 1, 400 training images; draws: balanced 3, natural 400, sqrt {sqrt}"
    )


def test_the_button_turns_dark_into_light(browser: Browser, large: Path) -> None:
    browser.open(large, dark=True)
    paper = "getComputedStyle(document.body).backgroundColor"
    dark = browser.ask(paper)
    browser.ask("document.getElementById('theme').click()")
    assert browser.ask(paper) == "rgb(255, 255, 255)"
    browser.ask("document.getElementById('theme').click()")
    assert browser.ask(paper) == dark != "rgb(255, 255, 255)"


def test_paper_is_white(browser: Browser, large: Path, tmp_path: Path) -> None:
    browser.open(large, dark=True)
    dark = {"name": "prefers-color-scheme", "value": "dark"}
    browser.call("Emulation.setEmulatedMedia", media="print", features=[dark])
    try:
        assert browser.ask("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
        assert browser.ask("getComputedStyle(document.querySelector('nav')).display") == "none"
    finally:
        browser.call("Emulation.setEmulatedMedia", media="")
    browser.print_to(tmp_path / "page.pdf")
    assert (tmp_path / "page.pdf").read_bytes().startswith(b"%PDF")


# ---- names are text


def test_each_hostile_name_is_found_and_is_text(browser: Browser, hostile: tuple[Path, Snapshot]) -> None:
    browser.open(hostile[0])
    for label in HOSTILE:
        type_into(browser, "search", visible(label))
        assert column(browser, "class") == [visible(label)]
        assert (
            browser.ask("document.querySelectorAll('#classes :not(table,thead,tbody,tr,th,td,button,bdi)').length") == 0
        )
    assert browser.problems == []


def test_no_name_became_an_element(browser: Browser, hostile: tuple[Path, Snapshot]) -> None:
    browser.open(hostile[0])
    assert browser.ask("[...document.querySelectorAll('img')].every(i => i.src.startsWith('data:image/png;base64,'))")
    assert browser.ask("[...document.querySelectorAll('img')].every(i => i.complete && i.naturalWidth > 0)")
    assert browser.ask("document.scripts.length") == 2
    assert browser.ask("document.querySelectorAll('style').length") == 1
    assert browser.ask("document.querySelectorAll('main b').length") == browser.ask(
        "document.querySelectorAll('.repeats b, .cards b, #manifests b').length"
    )
    text = browser.ask("document.body.innerText")
    assert "<img src=x onerror=alert(3)>" in text
    assert "\\u202e" in text


def test_copies_and_conflicts_are_shown_with_their_pictures(browser: Browser, hostile: tuple[Path, Snapshot]) -> None:
    browser.open(hostile[0])
    cards = browser.ask(
        "[...document.querySelectorAll('.cards > li')].map(c => [c.querySelectorAll('img').length, "
        "[...c.querySelectorAll('b')].map(b => b.textContent)])"
    )
    assert cards[0] == [1, ["out"] * 4]  # the red square, under all labels
    assert cards[1:] == [[1, ["in", "out"]]] * 12


# ---- CSV


def table_of(text: str) -> list[dict[str, str]]:
    assert text.startswith("\ufeff")
    return list(csv.DictReader(io.StringIO(text[1:], newline="")))


def test_the_csv_holds_numbers_and_guarded_text(
    browser: Browser, hostile: tuple[Path, Snapshot], tmp_path: Path
) -> None:
    rows = table_of(download(browser, hostile[0], tmp_path))
    snapshot = hostile[1]
    assert {row["class"].removeprefix("'") for row in rows} == {visible(label).removeprefix("'") for label in HOSTILE}
    for row in rows:
        for title, value in row.items():
            assert is_number(value) or not value.startswith(FORMULA), title
    for name in snapshot.manifests:
        manifest = snapshot.manifest(name)
        expected: dict[str, Any] = {"draws": manifest.targets, "log_q": manifest.log_q, "log_prior": manifest.log_prior}
        expected |= {f"weight, {kind.replace('_', ' ')}": manifest.weights(kind) for kind in WEIGHTS}
        for title, values in expected.items():
            told = [float(row[f"{name} {title}"]) for row in rows]
            np.testing.assert_allclose(told, values[[int(row["class_id"]) for row in rows]], rtol=1e-6, err_msg=title)


def download(browser: Browser, page: Path, folder: Path) -> str:
    browser.open(page)
    browser.call("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(folder))
    browser.ask("document.getElementById('csv').click()")
    for _ in range(100):
        if (folder / "classes.csv").exists():
            return (folder / "classes.csv").read_text("utf-8")
        time.sleep(0.1)
    raise AssertionError("nothing was downloaded")


def is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
