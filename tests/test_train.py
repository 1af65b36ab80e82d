"""Training by one process: stages and their options, checkpoints, resumes, models, the command and its page."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import TINY_TRAINING
from hostile_names import HOSTILE
from tiny_snapshot import write_snapshot
from torch import nn

from pipeline.cli import cli, run
from pipeline.errors import AlreadyExistsError, EvenshardError, IntegrityError, StateError, StoreError, UsageError
from pipeline.learn import checkpoints, models
from pipeline.learn.ledger import Ledger
from pipeline.learn.recipe import LOSSES, Recipe, Stage, parse_stages
from pipeline.learn.stepping import draw_seed
from pipeline.learn.summing import by_count, worst_classes
from pipeline.learn.trainer import Step, train
from pipeline.report.trained import render_training
from pipeline.snapshot import Snapshot

STAGES = "natural:4 -> balanced:2:crt:lr=0.05"
NUM_STEPS = 26  # 4 epochs of 93 draws and 2 of 115, in steps of 24
SMALL: dict[str, Any] = {"model": "small_cnn", "norm": "group", "side": 16, "batch_size": 24, "workers": 1, "lr": 0.05}


@pytest.fixture(scope="module")
def snapshot(tmp_path_factory: pytest.TempPathFactory) -> Snapshot:
    return write_snapshot(tmp_path_factory.mktemp("train"))


def recipe(snapshot: Snapshot, out: Path, stages: str = STAGES, **more: Any) -> Recipe:
    return Recipe(root=snapshot.store.url, out=str(out), stages=parse_stages([stages]), **{**SMALL, **more})


@pytest.fixture(scope="module")
def whole(snapshot: Snapshot, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Step]]:
    out, seen = tmp_path_factory.mktemp("whole") / "out", list[Step]()
    train(recipe(snapshot, out), observe=seen.append)
    return out, seen


def weights(out: Path) -> dict[str, torch.Tensor]:
    return torch.load(out / "model.pt", weights_only=True)["state_dict"]


def summary(out: Path) -> dict[str, Any]:
    return json.loads((out / "summary.json").read_text())


def at_step(number: int, do: Callable[[], Any]) -> Callable[[Step], None]:
    def observe(step: Step) -> None:
        if step.number == number:
            do()

    return observe


def terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


# -- stages


def test_stages_are_spelled_as_schedules_print_them() -> None:
    found = parse_stages(["natural:20 -> balanced:5:crt:lr=0.01:loss=weighted", "balanced:0:tau=0.5"])
    assert found == (
        Stage(manifest="natural", epochs=20),
        Stage(manifest="balanced", epochs=5, freeze=True, reset=True, lr=0.01, loss="weighted"),
        Stage(manifest="balanced", epochs=0, tau=0.5),
    )
    assert parse_stages([str(stage) for stage in found]) == found


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("natural", "expected MANIFEST:EPOCHS"),
        ("natural:x", "expected MANIFEST:EPOCHS"),
        ("natural:-1", "expected MANIFEST:EPOCHS"),
        ("natural:²", "expected MANIFEST:EPOCHS"),
        ("natural:0", "does nothing"),
        ("nat/ural:1", "a manifest name is"),
        ("natural:1:frezee", "did you mean 'freeze'?"),
        ("natural:1:freeze=maybe", "nothing, yes or no"),
        ("natural:1:lr=fast", "a number above 0"),
        ("natural:1:lr=nan", "a number above 0"),
        ("natural:1:tau=2", "tau from 0 to 1"),
        ("natural:1:loss=balanced-softmx", "did you mean 'balanced-softmax'?"),
    ],
)
def test_a_stage_that_is_none_is_refused(text: str, hint: str) -> None:
    with pytest.raises(UsageError, match=re.escape(hint)):
        parse_stages([text])


def test_stages_on_one_manifest_draw_anew() -> None:
    assert draw_seed(7, 0) == 7
    assert len({draw_seed(seed, stage) for seed in (3, 4) for stage in range(50)}) == 100


# -- what is trained


def test_every_loss_trains_and_tells_its_prior(snapshot: Snapshot, tmp_path: Path) -> None:
    text = " -> ".join(f"natural:1:loss={name}" for name in LOSSES)
    results = train(recipe(snapshot, tmp_path / "out", text)).summary["stages"]
    assert [one["stage"] for one in results] == text.split(" -> ")
    assert all(np.isfinite(one["losses"]).all() for one in results)
    unknown = {name for name, one in zip(LOSSES, results, strict=True) if "corrected" not in one["scores"]}
    assert unknown == {"focal", "auc", "kappa", "quadratic-kappa"}
    # Balanced softmax leaves a uniform prior: to correct to one changes nothing.
    held = results[list(LOSSES).index("balanced-softmax")]["scores"]
    assert held["corrected"] == held["as_it_is"]


def test_crt_moves_the_head_alone_from_fresh_weights_and_tau_equals_norms(snapshot: Snapshot, tmp_path: Path) -> None:
    first, second, third = (tmp_path / name for name in ("first", "second", "third"))
    train(recipe(snapshot, first, "natural:1", norm="batch"))
    train(recipe(snapshot, second, "natural:1 -> balanced:2:crt", norm="batch"))
    train(recipe(snapshot, third, "natural:1 -> balanced:0:tau=1", norm="batch"))
    before, after, scaled = (weights(out) for out in (first, second, third))
    head = list(before)[-2:]  # weight and bias
    same = [name for name in before if torch.equal(before[name], after[name])]
    assert sorted(same) == sorted(set(before) - set(head))  # running means of batch normalisation, too
    torch.testing.assert_close(scaled[head[0]].norm(dim=1), torch.ones(6))
    assert not scaled[head[1]].any()
    assert "corrected" not in summary(third)["stages"][1]["scores"]


def test_bf16_is_of_the_network_alone(snapshot: Snapshot, tmp_path: Path) -> None:
    """Parameters, losses and scores stay float32; the losses are near those of float32, and not the same."""
    found = {kind: list[Step]() for kind in ("fp32", "bf16")}
    for kind, seen in found.items():
        train(recipe(snapshot, tmp_path / kind, "natural:1", precision=kind), observe=seen.append)
    assert {tensor.dtype for tensor in weights(tmp_path / "bf16").values()} == {torch.float32}
    exact, rounded = ([one.loss for one in seen] for seen in found.values())
    assert exact != rounded
    np.testing.assert_allclose(rounded, exact, rtol=0.1)


def test_a_loss_that_is_no_number_ends_the_training(snapshot: Snapshot, tmp_path: Path) -> None:
    with pytest.raises(Exception, match=r"training diverged: the loss is .* lower --lr"):
        train(recipe(snapshot, tmp_path / "out", "natural:9", lr=1e12))


def test_a_network_that_is_no_number_is_not_scored(snapshot: Snapshot, tmp_path: Path) -> None:
    model = models.make_model("small_cnn", 6, norm="group")
    next(model.parameters()).data[0] = float("nan")
    torch.save(model.state_dict(), tmp_path / "nan.pt")
    with pytest.raises(EvenshardError, match="logits are no finite numbers: it diverged"):
        train(recipe(snapshot, tmp_path / "out", "natural:0:tau=1", weights=str(tmp_path / "nan.pt")))


@pytest.mark.parametrize(
    ("stages", "more", "hint"),
    [
        ("natural:1 -> small:1", {}, "stage small:1 draws 5 images an epoch, fewer than batch_size 24"),
        ("natural:1 -> balanced:1:crt", {"model": "squeezenet1_1", "side": 32}, "does not end in a linear layer of 6"),
        ("natural:1", {"model": "alexnet"}, "AlexNet cannot train on 24 images of 16 pixels .*is too small"),
        ("natural:1", {"model": "resnet18", "norm": "batch", "batch_size": 1}, "Expected more than 1 value"),
    ],
)
def test_what_a_later_stage_lacks_is_told_before_the_first(
    stages: str, more: dict[str, Any], hint: str, snapshot: Snapshot, tmp_path: Path
) -> None:
    with pytest.raises(EvenshardError, match=hint) as caught:
        train(recipe(snapshot, tmp_path / "out", stages, **more), observe=lambda _: pytest.fail("it trained"))
    assert not (tmp_path / "out").exists()
    assert caught.value.exit_code == (1 if "draws" in hint else 2), (
        "what the counts decide could not be done; the rest is wrong"
    )


def test_sizes_are_checked_without_a_change() -> None:
    model, before = models.make_model("mobilenet_v3_small", 6), torch.random.get_rng_state()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    models.check_size(model, 32, 4)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(before, torch.random.get_rng_state())
    with pytest.raises(UsageError, match="Expected more than 1 value per channel"):
        models.check_size(models.make_model("resnet18", 6), 16, 1)
    models.check_size(models.make_model("resnet18", 6), 16, 1, trains=False)  # of a stage that moves the head alone


@pytest.mark.parametrize(
    ("more", "hint"), [({"out": "s3://bucket/out"}, "a folder of this machine"), ({"seed": 2**63}, "of 64 bits")]
)
def test_a_recipe_that_is_none_is_refused(more: dict[str, Any], hint: str, snapshot: Snapshot, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=hint):
        Recipe(**{"root": snapshot.store.url, "out": str(tmp_path), "stages": parse_stages(["natural:1"]), **more})


# -- checkpoints


@pytest.mark.parametrize("number", [5, 17, 20])
def test_a_signal_leaves_a_checkpoint_from_which_the_rest_is_bit_exact(
    number: int, snapshot: Snapshot, whole: tuple[Path, list[Step]], tmp_path: Path
) -> None:
    out, seen = tmp_path / "out", list[Step]()
    with pytest.raises(KeyboardInterrupt, match=r"checkpoint-00\d-00000000\d\d-[0-9a-f]{32}\.pt"):
        train(recipe(snapshot, out), observe=at_step(number, terminate))
    assert not (out / "model.pt").exists()
    train(recipe(snapshot, out, resume=True), observe=seen.append)
    expected = whole[1][number + 1 :]  # the signal was noted in one step and told to all ranks in the next
    assert [one.number for one in seen] == [one.number for one in expected]
    assert [one.loss for one in seen] == [one.loss for one in expected]
    assert all(torch.equal(a.positions, b.positions) for a, b in zip(seen, expected, strict=True))
    one, other = weights(out), weights(whole[0])
    assert all(torch.equal(one[name], other[name]) for name in other)
    assert summary(out) == summary(whole[0])
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [line["loss"] for line in lines if "loss" in line] == [
        loss for stage in summary(out)["stages"] for loss in stage["losses"]
    ]


def test_killed_between_its_scores_and_their_checkpoint_it_logs_them_once(
    snapshot: Snapshot, whole: tuple[Path, list[Step]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, save = tmp_path / "out", checkpoints.save

    def killed(folder: Path, stage: int, *more: Any) -> Path:
        if stage == 1:
            raise KeyboardInterrupt
        return save(folder, stage, *more)

    with monkeypatch.context() as patched:
        patched.setattr(checkpoints, "save", killed)
        with pytest.raises(KeyboardInterrupt):
            train(recipe(snapshot, out))
    with (out / "log.jsonl").open("a") as file:
        file.write('{"step": 1')  # and in the midst of a line
    train(recipe(snapshot, out, resume=True))

    def log(folder: Path) -> list[tuple[int, str, list[str]]]:
        lines = map(json.loads, (folder / "log.jsonl").read_text().splitlines())
        return [(line["step"], line["stage"], sorted(line)) for line in lines]

    assert log(out) == log(whole[0])


def test_one_process_at_a_time_trains_into_a_folder(snapshot: Snapshot, tmp_path: Path) -> None:
    def another() -> None:
        with pytest.raises(AlreadyExistsError, match="another process trains into it now"):
            train(recipe(snapshot, tmp_path / "out", "natural:1", resume=True))

    train(recipe(snapshot, tmp_path / "out", "natural:1"), observe=at_step(2, another))
    train(recipe(snapshot, tmp_path / "out", "natural:1", resume=True))


def test_ranks_whose_torchrun_was_killed_stop_with_a_checkpoint(
    snapshot: Snapshot, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def orphaned() -> None:
        monkeypatch.setattr("os.getppid", lambda: 1)

    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    with pytest.raises(KeyboardInterrupt, match="checkpoint-000-0000000003-"):
        train(recipe(snapshot, tmp_path / "out"), observe=at_step(2, orphaned))
    monkeypatch.undo()
    train(recipe(snapshot, tmp_path / "out", resume=True), observe=at_step(5, orphaned))  # of a shell that was left


def test_ranks_that_do_not_meet_say_so(snapshot: Snapshot, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(EvenshardError, match=r"the ranks of this run did not meet: .*MASTER_ADDR.*; start all of them"):
        train(recipe(snapshot, tmp_path / "out"))


def test_a_folder_that_cannot_be_written_is_told(
    snapshot: Snapshot, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    words = ("train", snapshot.store.url, "--stage", "natural:1", *TINY_TRAINING, "--out")
    assert call(*words, tmp_path / "file/below") == 1
    assert "nothing could be written there: [Errno 20] Not a directory" in capsys.readouterr().err
    book = Ledger(tmp_path / "full", tensorboard=False, since_step=0, num_lines=0)
    book.close()
    with Path("/dev/full").open("w") as full:
        book._file = full  # pyright: ignore[reportPrivateUsage]
        with pytest.raises(StoreError, match="No space left on device; free space or name another DIR"):
            book.write(1, "natural:1", {"loss": 1.0})
        book.close()


def test_a_torn_checkpoint_is_never_taken(snapshot: Snapshot, tmp_path: Path) -> None:
    out, told = tmp_path / "out", list[str]()
    with pytest.raises(KeyboardInterrupt):
        train(recipe(snapshot, out, save_every=3), observe=at_step(6, terminate))
    newest, older = checkpoints.checkpoints(out)
    newest.write_bytes(newest.read_bytes()[:-100])
    assert checkpoints.load_newest(out, told.append)["progress"]["num_steps"] == 6  # type: ignore[index]
    assert told == [f"{newest.name} is passed over: {told[0].partition(': ')[2]}"]
    flipped = bytearray(older.read_bytes())
    flipped[len(flipped) // 2] ^= 1
    older.write_bytes(flipped)
    with pytest.raises(IntegrityError, match="all 2 checkpoints are damaged"):
        train(recipe(snapshot, out, resume=True))


def test_a_write_that_ends_half_way_leaves_no_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoints.save(tmp_path, 0, 1, {"progress": 1})

    def torn(state: object, file: Any) -> None:
        file.write(b"PK")
        raise RuntimeError("PytorchStreamWriter failed: No space left on device")  # as torch tells it

    with monkeypatch.context() as patched:
        patched.setattr(torch, "save", torn)
        with pytest.raises(StoreError, match="No space left"):
            checkpoints.save(tmp_path, 0, 2, {"progress": 2})
    (tmp_path / ".checkpoint-1-dead.part").write_bytes(b"PK")  # of a process that was killed
    assert checkpoints.load_newest(tmp_path, print) == {"format_version": 1, "progress": 1}
    for step in range(3, 6):
        checkpoints.save(tmp_path, 0, step, {"progress": step})
    assert [path.name[:25] for path in sorted(tmp_path.iterdir())] == [
        "checkpoint-000-0000000004", "checkpoint-000-0000000005",
    ]  # fmt: skip


def test_nothing_is_unpickled(tmp_path: Path) -> None:
    class Hostile:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(tmp_path / "ran"),)

    checkpoints.save(tmp_path, 0, 1, {"progress": Hostile()})
    with pytest.raises(IntegrityError, match=r"no checkpoint of evenshard \(code of a file is never run\)"):
        checkpoints.load_newest(tmp_path, print)
    assert not (tmp_path / "ran").exists()


def test_another_training_is_not_gone_on_with(
    snapshot: Snapshot, whole: tuple[Path, list[Step]], tmp_path: Path
) -> None:
    with pytest.raises(AlreadyExistsError, match="holds a training: go on with --resume"):
        train(recipe(snapshot, whole[0]))
    with pytest.raises(StateError, match=r"lr was 0\.05 and is 0\.1 now"):
        train(recipe(snapshot, whole[0], resume=True, lr=0.1))
    (tmp_path / "thesis.txt").touch()
    with pytest.raises(AlreadyExistsError, match="holds other files"):
        train(recipe(snapshot, tmp_path))


# -- models


def test_torchvision_models_have_a_head_for_the_classes_and_no_batch_normalisation_where_asked() -> None:
    before = torch.random.get_rng_state()
    model = models.make_model("resnet18", 7, norm="group", seed=3)
    again = models.make_model("resnet18", 7, norm="group", seed=3)
    assert torch.equal(before, torch.random.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    assert not [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 7)
    assert models.head_of(model, 7).out_features == 7
    with pytest.raises(UsageError, match="did you mean 'resnet18'"):
        models.check_model("resnet81")


def test_weights_come_from_a_file_with_a_head_of_other_classes(tmp_path: Path) -> None:
    given = models.make_model("small_cnn", 5, norm="group", seed=9)
    torch.save({"state_dict": {f"module.{k}": v for k, v in given.state_dict().items()}}, tmp_path / "w.pt")
    model = models.make_model("small_cnn", 6, norm="group")
    fresh = models.head_of(model, 6).weight.clone()
    models.load_weights(model, tmp_path / "w.pt", 6)
    assert torch.equal(next(model.parameters()), next(given.parameters()))
    assert torch.equal(models.head_of(model, 6).weight, fresh)
    with pytest.raises(UsageError, match="holds no weights of this model: it lacks"):
        models.load_weights(models.make_model("small_cnn", 5), tmp_path / "w.pt", 5)
    with pytest.raises(StoreError, match="never downloaded"):
        models.load_weights(model, tmp_path / "none.pt", 6)
    (tmp_path / "text.pt").write_text("no weights")
    with pytest.raises(StoreError, match="cannot be read as weights"):
        models.load_weights(model, tmp_path / "text.pt", 6)
    (tmp_path / "empty.pt").touch()
    with pytest.raises(StoreError, match=r"cannot be read as weights: (EOFError|Ran out)"):
        models.load_weights(model, tmp_path / "empty.pt", 6)
    torch.save(model, tmp_path / "whole.pt")
    with pytest.raises(StoreError, match=r"code of a file is never run: save the model's state_dict\(\) instead"):
        models.load_weights(model, tmp_path / "whole.pt", 6)


def test_weights_of_a_model_without_a_linear_head_fit_as_a_whole(tmp_path: Path) -> None:
    given = models.make_model("squeezenet1_1", 5, seed=9)
    torch.save(given.state_dict(), tmp_path / "w.pt")
    model = models.make_model("squeezenet1_1", 5)
    models.load_weights(model, tmp_path / "w.pt", 5)
    assert torch.equal(next(model.parameters()), next(given.parameters()))
    with pytest.raises(UsageError, match="other shapes of"):
        models.load_weights(models.make_model("squeezenet1_1", 6), tmp_path / "w.pt", 6)


# -- the command


def call(*words: object) -> int:
    return run(cli, [str(word) for word in words])


def test_the_command_trains_tells_and_leaves_a_page(
    snapshot: Snapshot, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("train", snapshot.store.url, "--stage", "natural:1", "--stage", "balanced:1:crt", *TINY_TRAINING)
    assert call(*words, "--out", tmp_path / "a", "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert told == summary(tmp_path / "a")
    assert call(*words, "--out", tmp_path / "b", "--quiet") == 0
    out = capsys.readouterr()
    assert out.err == ""
    assert "balanced:1:freeze:reset" in out.out
    assert f"page       {tmp_path}/b/index.html" in out.out
    assert (tmp_path / "a/index.html").read_bytes() == (tmp_path / "b/index.html").read_bytes()


def test_interrupted_it_says_how_to_go_on(
    snapshot: Snapshot, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(recipe: Recipe, **options: Any) -> Any:
        return train(recipe, observe=at_step(2, terminate))

    words = ("train", snapshot.store.url, "--stage", "natural:1", *TINY_TRAINING, "--out", tmp_path / "out")
    with monkeypatch.context() as patched:
        patched.setattr("pipeline.learn.trainer.train", stopped)
        assert call(*words) == 130
    assert re.search(r"stopped: .*/out/checkpoint-\S+ holds what was done; --resume goes on", capsys.readouterr().err)
    assert call(*words, "--resume") == 0


def test_tensorboard_is_asked_for_in_words(
    snapshot: Snapshot, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.learn.ledger.find_spec", lambda name: None)  # type: ignore[misc]
    words = ("train", snapshot.store.url, "--stage", "natural:1", *TINY_TRAINING, "--out", tmp_path / "out")
    assert call(*words, "--tensorboard") == 1
    assert "pip install tensorboard" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_tensorboard_gets_what_the_log_gets(
    snapshot: Snapshot, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[tuple[str, float, int]] = []

    class SummaryWriter:
        def __init__(self, folder: str, purge_step: int) -> None:
            assert folder == str(tmp_path / "out/tensorboard")
            written.append(("purged from", 0.0, purge_step))

        def add_scalar(self, *scalar: Any) -> None:
            written.append(scalar)

        def close(self) -> None:
            written.append(("closed", 0.0, 0))

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=SummaryWriter))
    monkeypatch.setattr("pipeline.learn.ledger.find_spec", lambda name: name)  # type: ignore[misc]
    train(recipe(snapshot, tmp_path / "out", "natural:1", tensorboard=True))
    lines = [json.loads(line) for line in (tmp_path / "out/log.jsonl").read_text().splitlines()]
    logged = [
        (name, value, line["step"])
        for line in lines
        for name, value in line.items()
        if name not in ("step", "stage") and value is not None
    ]
    assert "loss" in {name for name, _, _ in logged}
    assert written == [("purged from", 0.0, 0), *logged, ("closed", 0.0, 0)]
    written.clear()
    last = max(step for _, _, step in logged)
    train(recipe(snapshot, tmp_path / "out", "natural:1", tensorboard=True, resume=True))  # nothing is left to do
    kept = [scalar for scalar in logged if scalar[2] == last]
    assert written == [("purged from", 0.0, last), *kept, ("closed", 0.0, 0)]


# -- the summary and its page


def test_figures_by_count_and_of_the_worst_classes() -> None:
    train_counts = np.array([150, 30, 4, 1, 0])
    recall = np.array([0.9, 0.5, 0.25, np.nan, np.nan])
    rows = by_count(recall, train_counts)
    assert [(row["from"], row["classes"], row["measured"], row["recall"]) for row in rows] == [
        (0, 1, 0, None), (1, 1, 0, None), (2, 1, 1, 0.25), (20, 1, 1, 0.5), (100, 1, 1, 0.9),
    ]  # fmt: skip
    labels = np.array([0] * 4 + [1] * 2 + [2] * 3)
    predicted = np.array([0, 0, 0, 0, 0, 1, 1, 1, 0])
    found = worst_classes(labels, predicted, train_counts)
    assert [(row["class_id"], row["recall"], row["tested"], row["train"]) for row in found] == [
        (2, 0, 3, 4),
        (1, 0.5, 2, 30),
    ]
    assert found[0]["taken_for"] == [{"class_id": 1, "count": 2}, {"class_id": 0, "count": 1}]


class Tags(HTMLParser):
    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.handlers: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.handlers += [name for name, _ in attrs if name.startswith("on") or name in ("href", "src")]


def test_hostile_names_are_text_in_the_page(whole: tuple[Path, list[Step]]) -> None:
    told = summary(whole[0])
    tame = Tags(render_training(told))
    told["classes"] = [{**told["classes"][0], "class_id": i, "name": name} for i, name in enumerate(HOSTILE)]
    told["worst"] = [
        {"class_id": 0, "name": name, "train": 1, "tested": 1, "recall": 0.0, "taken_for": [{"name": name, "count": 1}]}
        for name in HOSTILE
    ]
    page = render_training(told)
    wild = Tags(page)
    assert set(wild.tags) == set(tame.tags)
    assert (wild.tags.count("script"), wild.tags.count("img"), wild.tags.count("style"), wild.handlers) == (0, 0, 1, [])
    assert re.search(r"[\u202e\u2066\x07\u2028]", page) is None
    assert "default-src &#39;none&#39;; style-src &#39;sha256-" in page
