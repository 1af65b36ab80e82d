"""The drawn set is what the demo promises: repeatable, long-tailed, and damaged where it says so."""

import hashlib
import io
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image, UnidentifiedImageError

from pipeline.demo import run
from pipeline.demo.draw import Photo, PhotoPlan, draw_photos, plan_photos
from pipeline.demo.product import COLOURS, PATTERNS, SHAPES, Product, draw_product
from pipeline.errors import EvenshardError, MissingExtraError, StoreError


def digest(photos: tuple[Photo, ...]) -> str:
    total = hashlib.sha256()
    for photo in photos:
        total.update(photo.path.encode() + hashlib.sha256(photo.make()).digest())
    return total.hexdigest()


def sample(plan: PhotoPlan) -> tuple[Photo, ...]:
    return plan.photos[:40:2] + plan.photos[-20:] + plan.damaged


def small(plan: PhotoPlan, num_photos: int = 6) -> PhotoPlan:
    return PhotoPlan(
        seed=plan.seed,
        quick=plan.quick,
        classes=plan.classes,
        photos=plan.photos[:num_photos],
        damaged=plan.damaged[4:6],
    )


@pytest.mark.parametrize("seed", range(3))
def test_the_same_seed_draws_the_same_bytes(seed: int) -> None:
    assert digest(sample(plan_photos(seed))) == digest(sample(plan_photos(seed)))


def test_another_process_draws_the_same_bytes() -> None:
    program = (
        "import hashlib; from pipeline.demo.draw import plan_photos; plan = plan_photos(7);"
        "print(hashlib.sha256(b''.join(photo.make() for photo in plan.photos[:3] + plan.damaged[:2])).hexdigest())"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "5"}
    told = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    plan = plan_photos(7)
    here = hashlib.sha256(b"".join(photo.make() for photo in plan.photos[:3] + plan.damaged[:2])).hexdigest()
    assert told.stdout.strip() == here


def test_another_seed_draws_other_photos() -> None:
    first, second = (plan_photos(seed).photos[0].make() for seed in (0, 1))
    assert first != second


def test_a_photo_does_not_depend_on_the_ones_drawn_before() -> None:
    plan = plan_photos(0)
    alone = plan.photos[30].make()
    for photo in plan.photos[25:30]:
        photo.make()
    assert plan.photos[30].make() == alone


@pytest.mark.parametrize("seed", range(3))
def test_the_set_has_the_promised_long_tail(seed: int) -> None:
    plan = plan_photos(seed)
    counts = np.array([known.num_train for known in plan.classes])
    assert len({known.name for known in plan.classes}) == len(counts) >= 60
    assert counts.sum() == plan.num_train >= 3000
    assert np.count_nonzero(counts <= 5) * 2 >= len(counts)
    assert counts.max() >= 300
    assert counts.min() == 1


@pytest.mark.parametrize("quick", [False, True])
def test_planned_paths_match_the_counts(quick: bool) -> None:
    plan = plan_photos(0, quick=quick)
    folders = Counter(photo.path.rpartition("/")[0] for photo in plan.photos)
    for known in plan.classes:
        assert folders[known.folder("train")] == known.num_train
        assert folders[known.folder("test")] == known.num_test > 0
    every = [photo.path for photo in plan.photos + plan.damaged]
    assert len(set(every)) == len(every) == plan.num_train + plan.num_test + len(plan.damaged)


def test_every_part_of_a_rare_class_is_shown_by_frequent_ones() -> None:
    frequent = [known.product for known in plan_photos(0).classes if known.num_train >= 20]
    assert {product.shape for product in frequent} == set(SHAPES)
    assert {product.colour for product in frequent} == set(COLOURS)
    assert {product.pattern for product in frequent} == set(PATTERNS)


def test_class_folders_are_nested_unevenly() -> None:
    depths = {known.folder("train").count("/") for known in plan_photos(0).classes}
    assert depths == {1, 2, 3, 4}


def test_large_classes_hold_every_format_and_all_are_readable() -> None:
    kinds: set[tuple[str | None, str]] = set()
    for photo in plan_photos(0).photos[:40]:
        with Image.open(io.BytesIO(photo.make())) as image:
            image.load()
            kinds.add((image.format, image.mode))
    assert kinds >= {("JPEG", "RGB"), ("JPEG", "CMYK"), ("JPEG", "L"), ("PNG", "RGB"), ("WEBP", "RGB")}


def test_a_sideways_photo_says_so() -> None:
    sideways = next(photo for photo in plan_photos(0).photos if photo.path.endswith("IMG_0031.jpg"))
    assert Image.open(io.BytesIO(sideways.make())).getexif()[0x0112] == 6


def test_photos_are_distinct() -> None:
    photos = plan_photos(0).photos
    assert len({photo.make() for photo in photos[:60] + photos[-60:]}) == 120


def damage(name: str) -> list[Photo]:
    return [photo for photo in plan_photos(0).damaged if name in photo.path]


def test_uploads_are_truncated() -> None:
    for photo in damage("upload_"):
        image = Image.open(io.BytesIO(photo.make()))
        with pytest.raises(OSError, match="truncated"):
            image.load()
    assert len(damage("upload_")) == 4


def test_one_file_is_empty_and_one_is_a_text() -> None:
    assert damage("empty")[0].make() == b""
    with pytest.raises(UnidentifiedImageError):
        Image.open(io.BytesIO(damage("notes.jpg")[0].make()))


def test_one_file_copies_a_photo_of_its_class() -> None:
    copied = damage(" copy")[0]
    original = next(
        photo for photo in plan_photos(0).photos if photo.path == copied.path.replace("IMG_0000 copy", "IMG_0000")
    )
    assert copied.make() == original.make()


def test_one_photo_lies_in_two_classes() -> None:
    first, second = damage("which one")
    assert first.make() == second.make()
    assert first.path.split("/")[-2] != second.path.split("/")[-2]


@pytest.mark.parametrize(("shape", "colour", "pattern"), [("can", "red", "striped"), ("bag", "blue", "dotted")])
def test_a_product_shows_its_colour(shape: str, colour: str, pattern: str) -> None:
    rng = np.random.default_rng(0)
    product = Product(shape=shape, colour=colour, pattern=pattern)
    pixels = np.mean([np.asarray(draw_product(product, rng), float)[32:64, 32:64].mean((0, 1)) for _ in range(12)], 0)
    assert pixels.argmax() == {"red": 0, "blue": 2}[colour]


def test_a_second_run_draws_only_what_is_missing(tmp_path: Path) -> None:
    plan, photos = small(plan_photos(0)), tmp_path / "photos"
    assert draw_photos(plan, photos) == 8
    lost = photos / plan.photos[2].path
    before = lost.read_bytes()
    lost.unlink()
    assert draw_photos(plan, photos) == 1
    assert lost.read_bytes() == before


def test_nothing_but_photos_lies_in_the_photo_folder(tmp_path: Path) -> None:
    plan, photos = small(plan_photos(0)), tmp_path / "photos"
    draw_photos(plan, photos)
    found = {path.relative_to(photos).as_posix() for path in photos.rglob("*") if path.is_file()}
    assert found == {photo.path for photo in plan.photos + plan.damaged}


def test_a_broken_run_leaves_no_half_photo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def write_half(path: Path, data: bytes) -> int:
        with path.open("wb") as file:
            file.write(data[: len(data) // 2])
        raise OSError("No space left on device")

    plan, photos = small(plan_photos(0)), tmp_path / "photos"
    monkeypatch.setattr(Path, "write_bytes", write_half)
    with pytest.raises(OSError, match="No space"):
        draw_photos(plan, photos)
    monkeypatch.undo()
    assert not [path for path in photos.rglob("*") if path.is_file()]
    assert draw_photos(plan, photos) == 8


def test_drawings_of_another_seed_are_not_mixed_in(tmp_path: Path) -> None:
    draw_photos(small(plan_photos(0)), tmp_path / "photos")
    with pytest.raises(StoreError, match="another directory"):
        draw_photos(small(plan_photos(1)), tmp_path / "photos")


def test_files_of_the_user_are_not_touched(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "mine.jpg").write_bytes(b"mine")
    with pytest.raises(StoreError, match="may be yours"):
        draw_photos(small(plan_photos(0)), tmp_path / "photos")
    assert [path.name for path in (tmp_path / "photos").iterdir()] == ["mine.jpg"]


def test_missing_packages_are_named_before_anything_is_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "find_spec", lambda name: None if name == "torch" else object())
    with pytest.raises(MissingExtraError, match=r"the demo needs torch: pip install 'evenshard\[all\]'"):
        run.run_demo(tmp_path, echo=str)
    assert not list(tmp_path.iterdir())


def built(plan: PhotoPlan, **changes: int) -> tuple[pa.Table, pa.Table]:
    """The classes and rejects of a build that lost nothing, but for ``changes`` of the first class."""
    rows = [{"name": known.name, "train": known.num_train, "test": known.num_test} for known in plan.classes]
    rows[0] |= changes
    return pa.Table.from_pylist(rows), pa.table({"path": [photo.path for photo in plan.damaged]})


def test_a_build_with_more_photos_than_drawn_is_fine() -> None:
    plan = plan_photos(0)
    run.check_nothing_lost(plan, *built(plan, train=1000))


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_build_that_lost_a_photo_is_an_error(split: str) -> None:
    plan = plan_photos(0)
    with pytest.raises(EvenshardError, match=r"the build lost photos of 1 classes.*drew 450 for train and 10 for test"):
        run.check_nothing_lost(plan, *built(plan, **{split: 1}))


def test_a_build_that_lost_a_class_is_an_error() -> None:
    plan = plan_photos(0)
    classes, rejects = built(plan)
    with pytest.raises(EvenshardError, match=f"{plan.classes[0].name}.*found 0 and 0"):
        run.check_nothing_lost(plan, classes.slice(1), rejects)


def test_a_build_that_let_damage_in_is_an_error() -> None:
    plan = plan_photos(0)
    classes, rejects = built(plan)
    with pytest.raises(EvenshardError, match="9 damaged files were drawn, but only 8 turned away"):
        run.check_nothing_lost(plan, classes, rejects.slice(1))
