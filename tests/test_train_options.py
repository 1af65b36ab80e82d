"""Options of a training beyond stages: repeats that are augmented harder, losses of pairs and of agreement."""

from __future__ import annotations

import os
import re
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from tiny_snapshot import COUNTS, write_snapshot

from pipeline.errors import EvenshardError, StateError, UsageError
from pipeline.learn import checkpoints
from pipeline.learn.losses import CrossEntropy, PairwiseAUC, kappa_loss
from pipeline.learn.objectives import objective
from pipeline.learn.recipe import Recipe, parse_stages
from pipeline.learn.stepping import Batch, Stepper, draw_seed
from pipeline.learn.trainer import Step, train
from pipeline.snapshot import Manifest, Snapshot
from pipeline.stream.loader import Loader
from pipeline.stream.transforms import RandomResizedCropFlip

SMALL: dict[str, Any] = {"model": "small_cnn", "norm": "group", "side": 16, "batch_size": 24, "workers": 1, "lr": 0.05}


@pytest.fixture(scope="module")
def snapshot(tmp_path_factory: pytest.TempPathFactory) -> Snapshot:
    return write_snapshot(tmp_path_factory.mktemp("options"))


def recipe(snapshot: Snapshot, out: Path, stages: str, **more: Any) -> Recipe:
    return Recipe(root=snapshot.store.url, out=str(out), stages=parse_stages([stages]), **{**SMALL, **more})


# -- repeats that are augmented harder


def test_only_repeats_look_different_and_each_stage_counts_its_own(
    snapshot: Snapshot, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown: list[torch.Tensor] = []
    step = Stepper.step

    def noted(self: Stepper, batch: Batch, *rest: Any) -> torch.Tensor:
        shown.append(batch.images.clone())
        return step(self, batch, *rest)

    monkeypatch.setattr(Stepper, "step", noted)
    train(recipe(snapshot, tmp_path / "out", "natural:1 -> balanced:1", augment="harder-repeats"))
    firsts, repeats = list[bool](), list[bool]()
    for stage, name in enumerate(("natural", "balanced")):
        crop = RandomResizedCropFlip(16, quality="exact")  # harder repeats are made of exact crops
        loader = Loader(snapshot.manifest(name), 24, transform=crop, seed=draw_seed(0, stage), details=True)
        for plain, _, details in loader:
            seen = shown.pop(0)
            for one, other, repeat in zip(seen, plain, details.repeats.tolist(), strict=True):
                (repeats if repeat else firsts).append(torch.equal(one, other))
    assert not shown
    assert firsts
    assert all(firsts)
    assert np.mean(repeats) < 0.3  # the mildest changes leave so few pixels as they are


def interrupted(snapshot: Snapshot, out: Path, **more: Any) -> None:
    def terminate(step: Step) -> None:
        if step.number == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(KeyboardInterrupt):
        train(recipe(snapshot, out, "natural:3", **more), observe=terminate)


@pytest.mark.parametrize(("begun", "resumed"), [("crop", "harder-repeats"), ("harder-repeats", "crop")])
def test_it_is_gone_on_with_as_it_was_begun(begun: str, resumed: str, snapshot: Snapshot, tmp_path: Path) -> None:
    interrupted(snapshot, tmp_path, augment=begun)
    with pytest.raises(StateError, match=re.escape(f"augment was '{begun}' and is '{resumed}' now")):
        train(recipe(snapshot, tmp_path, "natural:3", augment=resumed, resume=True))


def test_a_checkpoint_from_before_there_was_a_choice_is_of_crops(snapshot: Snapshot, tmp_path: Path) -> None:
    interrupted(snapshot, tmp_path)
    state = checkpoints.load_newest(tmp_path, print)
    assert state is not None
    del state["fixed"]["augment"]
    checkpoints.save(tmp_path, 0, state["progress"]["num_steps"] + 1, state)
    with pytest.raises(StateError, match="augment was 'crop'"):
        train(recipe(snapshot, tmp_path, "natural:3", augment="harder-repeats", resume=True))
    train(recipe(snapshot, tmp_path, "natural:3", resume=True))


def test_an_augmentation_that_is_none_is_refused(snapshot: Snapshot, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="augment must be one of crop, harder-repeats, not 'hard'"):
        recipe(snapshot, tmp_path, "natural:1", augment="hard")


# -- losses of pairs and of agreement


def manifest(available: list[int], targets: list[int]) -> Manifest:
    return cast("Manifest", SimpleNamespace(name="mine", available=np.array(available), targets=np.array(targets)))


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    rng = torch.Generator().manual_seed(1)
    return torch.randn((40, 6), generator=rng), torch.randint(0, 6, (40,), generator=rng)


def test_auc_is_cross_entropy_and_the_pairs_of_drawn_classes_with_few_images() -> None:
    found = objective("auc", manifest([60, 19, 0, 20, 1, 4], [9, 9, 0, 9, 9, 0]))
    expected = CrossEntropy()(*batch()) + 0.01 * PairwiseAUC([1, 4])(*batch())
    assert float(found.criterion(*batch())) == pytest.approx(float(expected), rel=1e-6)
    assert found.log_prior is None


@pytest.mark.parametrize(("available", "targets"), [([60, 20, 0], [9, 9, 0]), ([60, 4, 1], [9, 0, 0])])
def test_auc_without_such_a_class_cannot_be_done(available: list[int], targets: list[int]) -> None:
    with pytest.raises(EvenshardError, match=r"'mine' draws of no class with fewer than 20") as found:
        objective("auc", manifest(available, targets))
    assert found.value.exit_code == 1


def test_that_no_class_is_rare_is_told_before_the_first_stage(tmp_path: Path) -> None:
    snapshot = write_snapshot(tmp_path / "root", {**COUNTS, "train": (60, 20, 20, 30, 40, 50)})
    with pytest.raises(EvenshardError, match="loss auc"):
        train(recipe(snapshot, tmp_path / "out", "natural:1 -> natural:1:loss=auc"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("name", "kind"), [("kappa", "nominal"), ("quadratic-kappa", "quadratic")])
def test_kappa_is_of_its_kind(name: str, kind: Any) -> None:
    found = objective(name, manifest([60, 4, 1], [9, 9, 9]))
    assert float(found.criterion(*batch())) == pytest.approx(float(kappa_loss(*batch(), kind)))
    assert found.log_prior is None
