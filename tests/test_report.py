"""report: the page says what the snapshot says, stands alone, and stays inert whatever the source is called."""

from __future__ import annotations

import base64
import csv
import hashlib
import json
import re
import shutil
from dataclasses import dataclass, field
from html.parser import HTMLParser
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hostile_names import HOSTILE
from PIL import Image

import pipeline
from pipeline import schema
from pipeline.cli import run
from pipeline.cli.checks import report as report_command
from pipeline.errors import StoreError
from pipeline.plan.manifest import WEIGHTS
from pipeline.report import write_report
from pipeline.report.page import NUM_REPEATED, render
from pipeline.report.pictures import encode_png, shrink, thumbnail
from pipeline.report.refused import MEANING
from pipeline.report.words import MAX_SHOWN, num_bytes, visible
from pipeline.schema import Reason
from pipeline.snapshot import Snapshot, open_snapshot

NUM_CLASSES = 6 + len(HOSTILE)


@pytest.fixture(scope="module")
def built(tiny_images: Path, tmp_path_factory: pytest.TempPathFactory, local_ray: None) -> Path:
    """The tiny images from a table, and under each hostile label one image and one file that is not there."""
    folder = tmp_path_factory.mktemp("report")
    source = folder / "source"
    shutil.copytree(tiny_images, source)
    rows = [(path.relative_to(source).as_posix(), path.parent.name) for path in sorted(source.glob("*/*"))]
    for number, label in enumerate(HOSTILE):
        shade = Image.new("RGB", (150 + number, 20), (17 * number, 200, 90))
        shade.save(source / f"hostile {number}.png")
        rows += [(f"hostile {number}.png", label), (f"gone {label}".replace("/", "∕"), label)]
    with open(source / "table.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("path", "label"), *rows])
    pipeline.build(source / "table.csv", folder / "root", workers=2)
    return folder / "root"


@pytest.fixture(scope="module")
def snapshot(built: Path) -> Snapshot:
    return open_snapshot(built)


@pytest.fixture(scope="module")
def html(snapshot: Snapshot) -> str:
    return render(snapshot)


@dataclass
class Page(HTMLParser):
    """What a browser would make of it: elements with their attributes, text outside scripts, scripts by type."""

    elements: list[tuple[str, dict[str, str | None]]] = field(default_factory=list)
    text: str = ""
    scripts: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self._raw = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self.text += " "
        if tag in ("script", "style"):
            self._raw = dict(attrs).get("type") or tag

    def handle_endtag(self, tag: str) -> None:
        self._raw = ""

    def handle_data(self, data: str) -> None:
        if self._raw:
            self.scripts[self._raw] = self.scripts.get(self._raw, "") + data
        else:
            self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attrs for name, attrs in self.elements if name == tag]


@pytest.fixture(scope="module")
def page(html: str) -> Page:
    parser = Page()
    parser.feed(html)
    parser.close()
    return parser


# ---- inert


def test_hostile_names_are_in_the_snapshot(snapshot: Snapshot) -> None:
    assert set(HOSTILE) <= set(snapshot.classes["name"].to_pylist())
    assert snapshot.record.num_rejects == len(HOSTILE)


def test_there_is_one_script_one_style_and_one_piece_of_data(page: Page) -> None:
    assert page.all("script") == [{"type": "application/json", "id": "data"}, {}]
    assert len(page.all("style")) == 1


def test_no_element_came_from_a_name(page: Page) -> None:
    known = {
        *(
            "html",
            "head",
            "meta",
            "title",
            "style",
            "body",
            "header",
            "main",
            "footer",
            "section",
            "figure",
            "figcaption",
        ),
        *("h1", "h2", "h3", "p", "a", "ul", "li", "dl", "dt", "dd", "div", "span", "small", "code", "bdi", "img"),
        *("table", "thead", "tbody", "tr", "th", "td", "svg", "path", "line", "text", "script", "noscript"),
        *("label", "input", "output", "button", "nav", "ol", "b", "wbr", "rect", "select", "option"),
    }
    assert {name for name, _ in page.elements} <= known


def test_no_attribute_runs_styles_or_loads_anything(page: Page) -> None:
    for tag, attributes in page.elements:
        assert not [name for name in attributes if name.startswith("on") or name in ("style", "srcdoc", "action")]
        for name in ("src", "href", "xlink:href", "data", "poster"):
            if name in attributes:
                assert re.fullmatch(r"#[a-z]+|data:image/png;base64,[A-Za-z0-9+/=]+", attributes[name] or ""), tag


def test_the_page_names_no_other_place(html: str, built: Path) -> None:
    body = html[html.index("<body>") :]
    assert "://" not in body
    assert body.count(str(built)) == 1  # in the command that made it


def test_the_policy_allows_this_script_and_style_by_hash_and_nothing_else(page: Page) -> None:
    policy = next(meta["content"] for meta in page.all("meta") if "http-equiv" in meta)
    hashes = {
        kind: base64.b64encode(hashlib.sha256(page.scripts[kind].encode()).digest()).decode()
        for kind in ("script", "style")
    }
    assert policy == (
        f"default-src 'none'; style-src 'sha256-{hashes['style']}'; script-src 'sha256-{hashes['script']}'; "
        "img-src data:; base-uri 'none'; form-action 'none'"
    )


def listed(page: Page) -> dict[str, Any]:
    return json.loads(page.scripts["application/json"])


def test_hostile_names_are_text(page: Page) -> None:
    names = listed(page)["names"]
    for label in HOSTILE:
        assert visible(label) in names
        assert visible(label) in page.text  # the contact sheet, and the rejects


def test_hidden_characters_are_spelled_out(html: str, page: Page) -> None:
    assert not set("\u202e\u2066\u2028\x07") & set(html + "".join(listed(page)["names"]))
    assert "gpj.\\u202etxt.exe\\u2066" in page.text
    assert visible("\ud800 \t a\u200db") == "\\ud800 \\t a\u200db"


def test_a_name_of_a_million_characters_does_not_fill_the_page() -> None:
    assert visible("x" * 10**6) == "x" * MAX_SHOWN + f"… and {10**6 - MAX_SHOWN:,} more characters"


def test_equal_snapshots_give_equal_pages(snapshot: Snapshot, html: str) -> None:
    assert render(open_snapshot(snapshot.store)) == html


# ---- true


def test_key_figures(page: Page, snapshot: Snapshot) -> None:
    text = " ".join(page.text.split())
    assert f"{snapshot.record.num_images} images in {snapshot.record.num_classes} classes" in text
    train = snapshot.classes["train"].to_numpy()
    assert train.max() / train.min() != 40  # of all splits
    ratio, singles = train.max() / train.min(), int((train == 1).sum())
    assert f"imbalance in train {ratio:.0f} × training images: largest class {train.max()}, smallest 1" in text
    assert f"single-image classes in train {singles} of {NUM_CLASSES}" in text
    assert "The largest class holds half of the training images; half of the classes have a single one." in text
    assert "Images are those of all splits, unless train, val or test is named" in text


def test_cards_and_advice_tell_one_imbalance(page: Page) -> None:
    text = " ".join(page.text.split())
    card = re.search(r"imbalance in train ([\d,]+) ×", text)
    advice = re.search(r"The largest class has ([\d,]+) times the training images", text)
    assert card
    assert advice
    assert card[1] == advice[1]


def test_the_class_table_holds_every_number(page: Page, snapshot: Snapshot) -> None:
    data = listed(page)
    classes = snapshot.classes.to_pydict()
    ids = data["ids"]
    assert sorted(ids) == list(range(NUM_CLASSES))
    assert data["names"] == [visible(classes["name"][i]) for i in ids]
    for name in ("count", "train", "val", "test", "bytes"):
        assert data["columns"][name] == [classes[name][i] for i in ids]
    assert data["evaluable"] == [classes["evaluable"][i] for i in ids]
    assert [one["draws"] for one in data["manifests"]] == [
        snapshot.manifest(name).targets[ids].tolist() for name in snapshot.manifests
    ]
    assert data["columns"]["count"] == sorted(data["columns"]["count"], reverse=True)


def test_priors_and_weights_are_those_of_the_manifest(page: Page, snapshot: Snapshot) -> None:
    data = listed(page)
    for one in data["manifests"]:
        manifest = snapshot.manifest(one["name"])
        expected = {"repeat factor": manifest.repeat_factor, "log_prior": manifest.log_prior, "log_q": manifest.log_q}
        expected |= {"withheld by max_repeat": manifest.withheld}
        expected |= {f"weight, {kind.replace('_', ' ')}": manifest.weights(kind) for kind in WEIGHTS}
        assert one["measures"].keys() == expected.keys()
        for title, values in expected.items():
            told = np.array([float(value) for value in one["measures"][title]])
            np.testing.assert_allclose(told, values[data["ids"]], rtol=1e-6, err_msg=title)


def test_the_chart_data_lead_from_rank_to_class(page: Page) -> None:
    data = listed(page)
    train = [data["columns"]["train"][row] for row in data["chart"]]
    assert sorted(data["chart"]) == list(range(NUM_CLASSES))
    assert train == sorted(train, reverse=True)


def test_every_manifest_is_a_row_a_line_and_a_column(page: Page, snapshot: Snapshot) -> None:
    for left in ("M64", "M48 ", "M48."):  # wide, for phones, Lorenz
        lines = [path for path in page.all("path") if (path.get("d") or "").startswith(left)]
        assert len(lines) - (left == "M48 ") == 1 + 2 * len(snapshot.manifests)  # and the diagonal
    for name in snapshot.manifests:
        assert page.text.count(name) >= 3


def test_rejects_are_told_by_reason_with_examples(page: Page) -> None:
    text = " ".join(page.text.split())
    assert f"{len(HOSTILE)} gone" in text
    assert "named in the source, and not there" in text
    assert f"and {len(HOSTILE) - 5} more" in text


def test_every_reason_has_a_meaning() -> None:
    assert set(MEANING) == set(Reason)


def test_rare_and_repeated_classes_are_shown_as_pixels_of_our_own(page: Page, snapshot: Snapshot) -> None:
    images = [Image.open(BytesIO(base64.b64decode((a["src"] or "").partition(",")[2]))) for a in page.all("img")]
    repeating = [one for one in map(snapshot.manifest, snapshot.manifests) if (one.targets > one.pool).any()]
    assert len(images) == NUM_CLASSES + sum(min(NUM_REPEATED, int((m.targets > m.pool).sum())) for m in repeating)
    assert {image.format for image in images} == {"PNG"}
    assert max(max(image.size) for image in images) == 112
    assert not any(image.info for image in images)


def test_each_picture_says_how_often_it_will_be_drawn(page: Page, snapshot: Snapshot) -> None:
    balanced = snapshot.manifest("balanced")
    rarest = " ".join(page.text.split()).partition("Every class, rarest first")[2]
    repeat = int(balanced.targets[balanced.available == 1][0])
    assert f"1 image {repeat}× balanced 1× natural" in rarest


def test_a_damaged_image_costs_its_tile_not_the_page(built: Path, tmp_path: Path) -> None:
    root = Path(shutil.copytree(built, tmp_path / "root"))
    row = open_snapshot(root).shards.to_pylist()[0]
    path = root / schema.tar_path(row["tar_sha256"])
    path.write_bytes(bytes(path.stat().st_size))
    page = Page()
    page.feed(render(open_snapshot(root)))
    assert "XXH3-64" in page.text
    assert page.all("img") == []


# ---- where it goes


def test_it_lies_below_root_and_is_written_anew(built: Path, html: str) -> None:
    path = Path(write_report(built))
    assert path == built / "reports/00000001/index.html"
    path.write_text("old")
    write_report(built, at=1)
    assert path.read_text("utf-8") == html


def test_it_may_go_elsewhere(built: Path, tmp_path: Path) -> None:
    out = str(tmp_path / "page.html")
    assert write_report(built, out=out) == out
    with pytest.raises(StoreError, match="name another file"):
        write_report(built, out=str(tmp_path / "no" / "page.html"))


def test_the_command_says_where(built: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(report_command, [str(built), "--out", str(tmp_path / "x.html")]) == 0
    assert capsys.readouterr().out == f"wrote {tmp_path / 'x.html'}\n"


# ---- pictures


def test_a_png_of_ours_is_read_back_exactly() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (7, 5, 3), dtype=np.uint8)
    assert np.array_equal(np.asarray(Image.open(BytesIO(encode_png(pixels)))), pixels)


def test_shrinking_takes_means_of_blocks() -> None:
    pixels = np.zeros((4, 8, 3), np.uint8)
    pixels[:, ::2] = 201
    assert shrink(pixels, 4).tolist() == np.full((2, 4, 3), 101).tolist()


@pytest.mark.parametrize("shape", [(1, 1000), (1000, 1), (113, 7), (112, 112), (3, 3)])
def test_a_picture_fits_whatever_its_shape(shape: tuple[int, int]) -> None:
    small = shrink(np.full((*shape, 3), 9, np.uint8), 112)
    assert max(small.shape) <= 112
    assert min(small.shape) >= 1
    assert (small == 9).all()


def test_a_thumbnail_carries_nothing_of_the_file() -> None:
    out = BytesIO()
    Image.new("RGB", (300, 200), "red").save(out, "JPEG", comment=b"<script>", exif=b"Exif\0\0secret")
    data = base64.b64decode(thumbnail(out.getvalue()).partition(",")[2])
    assert Image.open(BytesIO(data)).size == (112, 75)
    assert b"script" not in data
    assert b"secret" not in data


def test_sizes_are_told_as_people_do() -> None:
    assert [num_bytes(n) for n in (0, 999, 1000, 12_345_678, 10**16)] == [
        "0 bytes",
        "999 bytes",
        "1.0 kB",
        "12.3 MB",
        "10,000.0 TB",
    ]


def test_a_table_of_very_many_classes_is_cut_and_says_so(snapshot: Snapshot, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.report.page.MAX_LISTED", 5)
    page = Page()
    page.feed(render(snapshot))
    data = listed(page)
    assert {len(column) for column in (data["names"], data["ids"], *data["columns"].values())} == {5}
    assert data["chart"] == []
    assert f"The {NUM_CLASSES - 5} rarest classes are not in this table" in page.text
