"""The benchmark of remedies at its smallest: what rows of a seed share, and what its intervals say."""

from __future__ import annotations

import csv
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.append(str(BENCHMARKS))

import remedies_rows as rows_of  # noqa: E402
from remedies_sets import Held, drawn, grocery, long_tail, shrink_grocery  # noqa: E402
from remedies_tell import against_first, paired_interval, plot, table  # noqa: E402

from pipeline import Loader  # noqa: E402
from pipeline.stream.batches import Rows  # noqa: E402

STEPS = 10
NAMES = ("balanced", "few", "other")


@pytest.fixture(scope="module")
def held(tmp_path_factory: pytest.TempPathFactory) -> Held:
    return drawn(7, tmp_path_factory.mktemp("drawn"), num_test=4)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# ---- The set


def test_the_drawn_set_is_long_tailed_and_shows_its_singletons(held: Held) -> None:
    assert held.counts.max() == 300
    assert (held.counts == 1).sum() == 3
    assert len(held.train) == held.counts.sum()
    assert held.snapshot.rejects.num_rows == 0
    assert np.bincount(held.test_labels).tolist() == [4] * 30


def test_another_seed_draws_other_images_of_other_classes(held: Held, tmp_path: Path) -> None:
    other = drawn(8, tmp_path, num_test=4)
    assert not torch.equal(other.test, held.test)


def test_the_image_in_memory_is_that_of_its_row_and_class(held: Held, tmp_path: Path) -> None:
    """Rows of a loader over the same manifest are the rows that training takes."""
    loader = Loader(held.manifests["square-root"], batch_size=64, seed=7, transform=lambda image: image)
    images, labels = next(iter(loader))
    chosen = rows_of.drawn_rows(held, "square-root", 7, 64).row
    assert torch.equal(images, held.train[chosen].permute(0, 3, 1, 2))
    assert (np.searchsorted(held.class_starts, chosen, side="right") - 1).tolist() == labels.tolist()


def test_grocery_keeps_its_test_part_and_thins_the_rest(tmp_path: Path) -> None:
    from PIL import Image

    rng = np.random.default_rng(0)
    for split, size in (("train", 40), ("test", 3)):
        lines: list[str] = []
        for label in range(5):
            for number in range(size):
                path = f"{split}/{label}/{number}.jpg"
                (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(rng.integers(0, 256, (60, 50, 3), dtype=np.uint8)).save(tmp_path / path)
                lines.append(f"{path}, {label}, 0")
        (tmp_path / f"{split}.txt").write_text("\n".join(lines))
    shrink_grocery(tmp_path, tmp_path / "small")
    made = [grocery(seed, tmp_path, tmp_path / "small", tmp_path / f"seed-{seed}") for seed in (0, 1)]
    for one in made:
        assert sorted(one.counts.tolist(), reverse=True) == np.minimum(40, long_tail(60, 1, 5)).tolist()
        assert np.bincount(one.test_labels).tolist() == [3] * 5
        assert one.train.shape[1:] == (40, 40, 3)
    assert made[0].counts.tolist() != made[1].counts.tolist()


# ---- What rows share


@pytest.mark.parametrize("num_steps", [7, 10, 900])
def test_every_row_has_the_same_number_of_draws(num_steps: int) -> None:
    assert {sum(rows_of.spans(row.stages, num_steps)) for row in rows_of.ROWS} == {num_steps}


class Watch:
    """Which rows of the set, and which pixels, each training took; and the network it began with."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.draws: list[tuple[tuple[int, int], list[int]]] = []
        self.begun: list[torch.Tensor] = []
        augmented, train = rows_of._augmented, rows_of._train

        def watched(pixels: torch.Tensor, rows: torch.Tensor, side: int, draw: tuple[int, int]) -> torch.Tensor:
            self.draws.append((draw, rows.tolist()))
            return augmented(pixels, rows, side, draw)

        def begun(before: Any, *rest: Any) -> Any:
            self.begun.append(before[0].weight.detach().clone())
            return train(before, *rest)

        monkeypatch.setattr(rows_of, "_augmented", watched)
        monkeypatch.setattr(rows_of, "_train", begun)


def test_rows_of_a_seed_begin_with_one_network_and_draw_equally_often(
    held: Held, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seen where they are drawn: each row trained alone takes STEPS batches, numbered from 0, of its manifests."""
    first = None
    for row in rows_of.ROWS:
        watch = Watch(monkeypatch)
        ((_, figures),) = rows_of.run_rows(held, 7, STEPS, (row,))
        monkeypatch.undo()
        first = watch.begun[0] if first is None else first
        assert torch.equal(watch.begun[0], first), row.name
        assert [draw for draw, _ in watch.draws] == [(7, number) for number in range(STEPS)], row.name
        taken = [drawn_row for _, rows in watch.draws for drawn_row in rows]
        steps = rows_of.spans(row.stages, STEPS)
        expected = [
            rows_of.drawn_rows(held, stage.manifest, 7, count * rows_of.BATCH).row
            for stage, count in zip(row.stages, steps, strict=True)
        ]
        assert taken == np.concatenate(expected).tolist(), row.name
        assert all(0 <= value <= 1 for value in figures if not math.isnan(value)), row.name


def test_rows_give_the_same_figures_alone_and_after_others(held: Held) -> None:
    """Sharing a beginning saves time and changes nothing: a second stage must not train the network of the first."""
    chosen = tuple(row for row in rows_of.ROWS if len(row.stages) == 2)
    together = [figures for _, figures in rows_of.run_rows(held, 7, STEPS, chosen)]
    alone = [next(rows_of.run_rows(held, 7, STEPS, (row,)))[1] for row in chosen]
    np.testing.assert_array_equal(together, alone)


def test_a_second_stage_for_the_head_moves_nothing_else(held: Held) -> None:
    row = next(row for row in rows_of.ROWS if row.stages[-1].head_only)
    start = rows_of.small_cnn(30, width=16, seed=7)
    before = rows_of._train(start, held, row.stages[:1], 7, STEPS)
    after = rows_of._train(before, held, row.stages, 7, STEPS)
    moved = [name for name, value in before.state_dict().items() if not torch.equal(value, after.state_dict()[name])]
    assert moved == [f"{len(before) - 1}.weight", f"{len(before) - 1}.bias"]


def test_repeats_are_changed_and_first_views_are_not_but_for_the_control(held: Held) -> None:
    """Over two passes of `natural` each image is new once; `all` treats it as seen often."""
    drawn = rows_of.drawn_rows(held, "natural", 7, 2 * len(held.train))
    assert np.bincount(drawn.repeat).tolist() == [len(held.train)] * 2
    images = held.train[drawn.row].permute(0, 3, 1, 2)[-200:]
    some = drawn.part(len(drawn.row) - 200, len(drawn.row))
    assert (some.repeat == 1).all()
    first = Rows(row=some.row, class_id=some.class_id, position=some.position, repeat=some.repeat * 0, key=some.key)
    assert torch.equal(rows_of._harder(images, first, "repeats"), images)
    change = [(rows_of._harder(images, some, which).float() - images).abs().mean() for which in ("repeats", "all")]
    assert 0 < change[0] < change[1]


def test_draws_follow_the_manifest(held: Held) -> None:
    """Over one epoch of `balanced`, every class as often as its target; undersampling for good keeps its 20 images."""
    manifest = held.manifests["balanced"]
    taken = rows_of.drawn_rows(held, "balanced", 7, manifest.num_draws).row
    classes = np.searchsorted(held.class_starts, taken, side="right") - 1
    assert np.bincount(classes, minlength=30).tolist() == manifest.targets.tolist()
    frozen = rows_of.drawn_rows(held, "undersampled-20-frozen", 7, 5000).row
    rotating = rows_of.drawn_rows(held, "undersampled-20", 7, 5000).row
    largest = int(held.counts.argmax())
    own = range(held.class_starts[largest], held.class_starts[largest + 1])
    assert len(set(frozen.tolist()) & set(own)) == 20
    assert len(set(rotating.tolist()) & set(own)) > 100


def test_the_carried_prior_of_each_row_is_that_of_the_identity(held: Held) -> None:
    """log q + log w - a: natural for plain natural draws, uniform after balanced draws, weights 1/n or `log_q`."""
    natural = held.manifests["natural"].log_prior
    for row in rows_of.ROWS:
        prior, last = rows_of.carried_prior(row, held), row.stages[-1]
        if row.predict == "tau-norm":
            assert prior is None
        elif last.loss in ("log_q", "balanced") or last.manifest == "balanced":
            np.testing.assert_allclose(prior, np.log(1 / 30), atol=0.01)
        elif last == rows_of.Stage("natural"):
            np.testing.assert_allclose(prior, natural, atol=1e-6)
        else:
            assert prior is not None
            assert 0.01 < np.ptp(prior) < np.ptp(natural)


# ---- What is told


def test_the_interval_of_three_seeds_is_the_closed_form() -> None:
    """With two degrees of freedom the quantile of Student's t is (2p - 1) * sqrt(2 / (1 - (2p - 1)^2))."""
    interval = paired_interval([0.31, 0.35, 0.42], [0.30, 0.33, 0.39])
    quantile = 0.95 * math.sqrt(2 / (1 - 0.95**2))
    half = quantile * 0.01 / math.sqrt(3)
    assert (interval.mean, interval.low, interval.high) == pytest.approx((0.02, 0.02 - half, 0.02 + half))


def test_the_interval_of_two_seeds_is_the_closed_form() -> None:
    interval = paired_interval([0.4, 0.6], [0.3, 0.2], level=0.9)
    half = math.tan(0.45 * math.pi) * 0.15
    assert (interval.low, interval.high) == pytest.approx((0.25 - half, 0.25 + half))


def test_one_seed_has_no_interval() -> None:
    interval = paired_interval([0.4], [0.3])
    assert interval.mean == pytest.approx(0.1)
    assert math.isnan(interval.low)
    assert not interval.helps


def made_up() -> dict[str, np.ndarray]:
    """Eight seeds that differ by far more than a better row gains."""
    rng = np.random.default_rng(0)
    base = rng.uniform(0.2, 0.6, (8, 1)) + rng.normal(0, 0.01, (8, 3))
    noise = rng.normal(0, 0.005, (8, 3))
    return {
        "first": base,
        "better": base + 0.03 + noise,
        "equal": base.copy(),
        "noisy": base + noise - noise.mean(0) + 0.0005,
    }


def test_a_better_row_has_an_interval_above_zero_and_an_equal_one_has_not() -> None:
    intervals = against_first(made_up(), 0)
    assert {name: interval.helps for name, interval in intervals.items()} == {
        "better": True,
        "equal": False,
        "noisy": False,
    }
    assert (intervals["equal"].low, intervals["equal"].high) == (0, 0)


def test_the_table_marks_what_helps_and_hides_no_group() -> None:
    found = made_up()
    found["better"][:, 2] = np.nan
    lines = table(found, NAMES, {"few": 9}).splitlines()
    assert lines[0] == "| | balanced | few (9) | other | balanced: difference | few: difference |"
    better, equal = (next(line for line in lines if line.startswith(f"| {name} |")) for name in ("better", "equal"))
    assert better.count("**") == 4
    assert better.split(" | ")[3] == "-"
    assert equal.endswith("| +0.0 [+0.0, +0.0] | +0.0 [+0.0, +0.0] |")


def test_a_group_without_classes_is_left_out_of_the_table() -> None:
    assert "other" not in table(made_up(), NAMES, {"other": 0})


def test_the_plot_is_svg_with_a_bar_for_each_row_and_panel() -> None:
    from xml.etree import ElementTree

    picture = ElementTree.fromstring(plot(made_up(), NAMES, "a < b"))
    assert len(picture.findall("{*}circle")) == 6
    green = [bar for bar in picture.findall("{*}path") if bar.get("stroke") == "#1a7f37"]
    assert len(green) == 2


def test_the_command_runs_at_its_smallest(tmp_path: Path) -> None:
    words = ["--out", str(tmp_path / "out"), "--seeds", "1", "--steps", "5", "--processes", "1"]
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / "remedies.py"), *words],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"TMPDIR": str(tmp_path)},
    )
    assert done.returncode == 0, done.stderr
    with open(tmp_path / "out.csv", newline="") as file:
        told = list(csv.DictReader(file))
    assert [row["row"] for row in told] == [row.name for row in rows_of.ROWS]
    assert (tmp_path / "out.md").read_text() in done.stdout
    assert (tmp_path / "out.svg").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.csv", "out.md", "out.svg"]
