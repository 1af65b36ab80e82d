"""A label map renames and merges classes; images, splits and ids keep their meaning; it is part of what was asked."""

from __future__ import annotations

import csv
import io
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import TINY_COUNTS, draw_image
from containers import put, samples_of, tar_of
from hostile_names import STEERING

import pipeline
from pipeline.cli import cli, run
from pipeline.config import make_config
from pipeline.errors import CommitError, ConfigError, NotFoundError
from pipeline.ingest.summary import equal_command
from pipeline.labels import read_label_map
from pipeline.plan.merging import merge_into, merge_singletons

MERGED = "label,class\nendive,greens\nfig,greens\ndates,Dates\n"


def built(source: Path, root: Path, labels: Path | None = None, **options: Any) -> pipeline.Snapshot:
    pipeline.build(source, root, address="none", workers=1, label_map=labels, **options)
    return pipeline.open_snapshot(root)


def counts_of(snapshot: pipeline.Snapshot) -> dict[str, int]:
    table = snapshot.classes
    return dict(zip(table["name"].to_pylist(), table["count"].to_pylist(), strict=True))


def splits_of(snapshot: pipeline.Snapshot) -> dict[str, str]:
    rows = (row for shard in range(snapshot.shards.num_rows) for row in snapshot.index(shard).to_pylist())
    return {row["path"]: row["split"] for row in rows}


def write(folder: Path, text: str = MERGED, name: str = "labels.csv") -> Path:
    (folder / name).write_text(text, "utf-8")
    return folder / name


# ---- what it does


def test_labels_are_merged_and_renamed_and_the_rest_keep_their_name(tiny_images: Path, tmp_path: Path) -> None:
    snapshot = built(tiny_images, tmp_path / "root", write(tmp_path))
    rest = {name: TINY_COUNTS[name] for name in ("apple", "bread", "cocoa")}
    assert counts_of(snapshot) == {"Dates": 2, **rest, "greens": 2}


def test_it_belongs_to_what_was_asked_and_its_file_name_does_not(tiny_images: Path, tmp_path: Path) -> None:
    first = built(tiny_images, tmp_path / "a", write(tmp_path))
    lines = MERGED.splitlines()
    swapped = "\n".join(["class,label", *(",".join(reversed(line.split(","))) for line in lines[:0:-1]), ""])
    second = built(tiny_images, tmp_path / "b", write(tmp_path, swapped, "other name.csv"))
    assert first.id == second.id
    assert first.record.config["label_map"] == read_label_map(tmp_path / "labels.csv").digest
    assert "label_map" not in built(tiny_images, tmp_path / "c").record.config
    assert built(tiny_images, tmp_path / "a", write(tmp_path)).number == 1  # nothing changed


def test_the_same_from_parquet(tiny_images: Path, tmp_path: Path) -> None:
    rows = list(csv.DictReader(io.StringIO(MERGED)))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "labels.parquet")
    assert read_label_map(tmp_path / "labels.parquet").classes == read_label_map(write(tmp_path)).classes


def test_a_changed_map_meets_the_guardrail_then_ids_and_splits_stay(tiny_images: Path, tmp_path: Path) -> None:
    before = built(tiny_images, tmp_path / "root")
    with pytest.raises(CommitError, match=r"the class map changed.*'endive'.*'greens'"):
        built(tiny_images, tmp_path / "root", write(tmp_path))
    after = built(tiny_images, tmp_path / "root", write(tmp_path), allow=("class-map",))
    names = before.classes["name"].to_pylist()
    assert after.classes["name"].to_pylist() == [*names, "Dates", "greens"]
    assert counts_of(after) == {**TINY_COUNTS, "dates": 0, "endive": 0, "fig": 0, "Dates": 2, "greens": 2}
    assert splits_of(after) == splits_of(before)
    assert np.array_equal(after.manifest("natural").targets, after.classes["train"].to_numpy())
    back = built(tiny_images, tmp_path / "root", allow=("class-map", "class-vanished"))
    assert {name: count for name, count in counts_of(back).items() if count} == TINY_COUNTS
    assert splits_of(back) == splits_of(before)


def test_of_a_folder_a_changed_map_reads_no_image_again(tiny_images: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(tiny_images, tmp_path / "source"))
    built(source, tmp_path / "root")
    done = pipeline.build(
        source, tmp_path / "root", address="none", workers=1, label_map=write(tmp_path), allow=("class-map",)
    )
    assert (done.changed, done.num_read) == (True, 0)


def test_labels_in_tars_are_mapped_too(tiny_images: Path, tmp_path: Path) -> None:
    put(tmp_path / "tars", {"a.tar": tar_of(samples_of(tiny_images))})
    before = built(tmp_path / "tars", tmp_path / "root")
    assert counts_of(before) == TINY_COUNTS
    after = built(tmp_path / "tars", tmp_path / "root", write(tmp_path), allow=("class-map",))
    assert counts_of(after)["greens"] == 2
    assert splits_of(after) == splits_of(before)
    back = built(tmp_path / "tars", tmp_path / "root", allow=("class-map", "class-vanished"))
    assert {name: count for name, count in counts_of(back).items() if count} == TINY_COUNTS


def test_labels_that_the_source_does_not_have_are_told(tiny_images: Path, tmp_path: Path) -> None:
    labels = write(tmp_path, "label,class\nfigg,greens\n")
    done = pipeline.build(tiny_images, tmp_path / "root", address="none", workers=1, label_map=labels)
    assert f"labels of {labels} that this source does not have: 1 ('figg')" in done.notices


def test_the_command_of_a_run_names_the_file(tmp_path: Path) -> None:
    config = make_config({}, source="a", root="b", label_map=write(tmp_path))
    assert f"--label-map {tmp_path}/labels.csv" in equal_command(config)


# ---- what is no label map


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("label,class,weight\na,b,1\n", "expected the columns label and class, found 'label', 'class', 'weight'"),
        ("label\na\n", "expected the columns label and class, found 'label'"),
        ("", "expected the columns label and class, found none"),
        ("label,class\n", "expected rows"),
        ("label,class\na\n", "row 1 has 1 cells, expected 2"),
        ("label,class\na,b\na,c\n", "row 2: label 'a' is 'c' here, and was 'b' before"),
        ("label,class\n,b\n", "row 1 has no label"),
        ("label,class\na,\n", "row 1: '' is no class"),
        ("label,class\na, b\n", "no blanks around it"),
        ('label,class\na,"b\nc"\n', "one line"),
        ('label,class\na,"b\n', "neither CSV"),
    ],
)
def test_what_is_no_label_map_is_a_wrong_call(tmp_path: Path, text: str, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        make_config({}, source="a", root="b", label_map=write(tmp_path, text))


def test_a_file_that_is_not_there_is_not_found(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match=r"label map .*none\.csv' cannot be read: No such file"):
        make_config({}, source="a", root="b", label_map=tmp_path / "none.csv")


def test_class_names_and_a_label_map_contradict_each_other(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="classes and label_map both say what labels are called: choose one"):
        make_config({}, source="a", root="b", label_map=write(tmp_path), classes=["a"])


def test_columns_of_numbers_are_none(tmp_path: Path) -> None:
    pq.write_table(pa.table({"label": [1], "class": ["a"]}), tmp_path / "labels.parquet")
    with pytest.raises(ConfigError, match="column 'label' is int64, expected text"):
        make_config({}, source="a", root="b", label_map=tmp_path / "labels.parquet")


# ---- the map that the command prints


def printed(capsys: pytest.CaptureFixture[str], root: Path, *words: str) -> str:
    capsys.readouterr()
    assert run(cli, ["classes", str(root), "natural", *words]) == 0
    return capsys.readouterr().out


def test_the_map_that_classes_prints_merges_the_small_ones(
    tiny_images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = built(tiny_images, tmp_path / "root")
    train = dict(zip(before.classes["name"].to_pylist(), before.classes["train"].to_pylist(), strict=True))
    text = printed(capsys, tmp_path / "root", "--merge-below", "2", "--into", "other")
    small = [name for name, count in train.items() if count == 1]
    assert text == "".join(["label,class\n", *(f"{name},other\n" for name in small)])
    after = built(tiny_images, tmp_path / "root", write(tmp_path, text), allow=("class-map",))
    assert counts_of(after)["other"] == sum(TINY_COUNTS[name] for name in small)
    assert run(cli, ["classes", str(tmp_path / "root"), "natural", "--merge-below", "2", "--into", "other"]) == 1
    assert "was built with a label map" in capsys.readouterr().err


def test_into_the_parent_by_paths(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "source"
    for place, (folder, number) in enumerate({"fruit": 6, "fruit/apple": 5, "fruit/apple/gala": 1, "nut": 1}.items()):
        (source / folder).mkdir(parents=True, exist_ok=True)
        for i in range(number):
            draw_image(place, i).save(source / folder / f"{i}.png")
    built(source, tmp_path / "root", label_from="path")
    text = printed(capsys, tmp_path / "root", "--merge-below", "2", "--into", "parent")
    assert text == "label,class\nfruit/apple/gala,fruit/apple\n"
    labels = write(tmp_path, text)
    after = built(source, tmp_path / "root", labels, label_from="path", allow=("class-map",))
    assert counts_of(after) == {"fruit": 6, "fruit/apple": 6, "fruit/apple/gala": 0, "nut": 1}


def test_hostile_names_go_through_the_csv_and_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "photos").mkdir()
    rows = [("path", "label")]
    for place, name in enumerate([*STEERING, "'=quoted", "plain"]):
        for i in range(1 + 9 * (name == "plain")):
            draw_image(place, i).save(tmp_path / f"photos/{place}-{i}.png")
            rows.append((f"{place}-{i}.png", name))
    with open(tmp_path / "table.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)
    built(tmp_path / "table.csv", tmp_path / "root", images=str(tmp_path / "photos"))
    text = printed(capsys, tmp_path / "root", "--merge-below", "2", "--into", "other")
    assert "'=1+1,other" in text
    found = read_label_map(write(tmp_path, text)).classes
    assert {"<img src=x onerror=alert(1)>", "=1+1", "@SUM(A1)", "-2", "+3"} <= set(found) <= {name for _, name in rows}
    assert not any(name in found for name in STEERING if "\x1b" in name or "\n" in name or "\u202e" in name)


def test_thresholds_beyond_singletons() -> None:
    names = ["a", "a/b", "a/b/c", "d"]
    assert merge_singletons(names, np.array([9, 3, 2, 3]), 4).tolist() == [0, 0, 0, 3]
    assert merge_into(names, np.array([9, 3, 0, 3]), "d", 4) == {"a/b": "d"}


def test_halves_of_the_option_and_other_formats_are_wrong_calls(capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["--into", "other"], ["--merge-below", "2"], ["--merge-below", "2", "--into", "other", "--json"]):
        assert run(cli, ["classes", "nowhere", "natural", *words]) == 2
    assert json.dumps("contradict") not in capsys.readouterr().out
