"""The loaders at home in PyTorch, Lightning, Accelerate, Hugging Face Trainer and fastai: the blocks of TRAINING.md.

Each test takes its adapter from the document, trains a linear model for a few steps, and looks at which draws came.
"""

from __future__ import annotations

import json
import logging
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_snapshot import write_snapshot
from torch.utils.data import DataLoader, IterableDataset

from pipeline.snapshot import Snapshot
from pipeline.stream.loader import EvaluationLoader, Loader
from pipeline.stream.transforms import Draw

os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", HF_HUB_DISABLE_TELEMETRY="1")

DOCUMENT = (Path(__file__).parents[1] / "docs" / "TRAINING.md").read_text(encoding="utf-8")
BLOCKS = dict(re.findall(r"^```python (\w+)\n(.*?)^```", DOCUMENT, re.MULTILINE | re.DOTALL))
GLOBAL_BATCH = 40  # 93 draws an epoch: epochs of 3, 2, 2, 3 steps
ALL = [0, 40, 80, 120, 160, 200, 240, 280, 320, 360]

# What the frameworks say of each other, and of a run as small as these.
pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("quiet")]


@pytest.fixture
def quiet() -> Any:
    logging.disable(logging.ERROR)
    yield
    logging.disable(logging.NOTSET)


@pytest.fixture(scope="module")
def snapshot(tmp_path_factory: pytest.TempPathFactory) -> Snapshot:
    return write_snapshot(tmp_path_factory.mktemp("interop"))


def placed(image: torch.Tensor, draw: Draw) -> torch.Tensor:
    """A pixel and the position of the draw: so a model's inputs tell which draws it saw."""
    return torch.cat([image[:, 0, 0].long(), torch.tensor([draw.position])])[:, None, None]


def loader_of(snapshot: Snapshot, **options: Any) -> Loader:
    return Loader(snapshot.manifest("natural"), **{"batch_size": GLOBAL_BATCH, "transform": placed, **options})


class Seeing(torch.nn.Module):
    """A linear model that notes the first position of each batch it was trained on."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(4, 6)
        self.seen: list[int] = []
        self.scale = 1  # 255 where its images come divided by that

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        if self.training:
            self.seen.append(round(images[0, 3, 0, 0].item() * self.scale))
        return self.linear(images.flatten(1).float() / 1000)


def loss_of(model: Seeing, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.cross_entropy(model(images), labels)


def run_block(name: str, **given: Any) -> dict[str, Any]:
    exec(BLOCKS[name], given)
    return given


def on_root(name: str, snapshot: Snapshot) -> None:
    """Let the block read our root, in batches that its few images fill."""
    BLOCKS[name] = BLOCKS[name].replace('"ROOT"', repr(snapshot.store.url)).replace("batch_size=64", "batch_size=16")


def test_every_block_of_the_document_is_run_here() -> None:
    assert sorted(BLOCKS) == ["accelerate", "fastai", "lightning", "plain", "trainer"]
    assert DOCUMENT.count("```python") == len(BLOCKS)


# ---- PyTorch


def test_plain_pytorch(snapshot: Snapshot, tmp_path: Path) -> None:
    on_root("plain", snapshot)
    model = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(3, 6))
    run_block("plain", checkpoint=None, model=model, path=tmp_path / "checkpoint")
    checkpoint = torch.load(tmp_path / "checkpoint")
    assert checkpoint["loader"]["consumed"] == 240  # two epochs of 115 draws, in steps of 16
    again = run_block("plain", checkpoint=checkpoint, model=model, path=tmp_path / "checkpoint")
    assert again["loader"].epoch == 2


# ---- Lightning


def fit_lightning(snapshot: Snapshot, *, checkpoint: Path | None = None, save_at: int = -1, path: Path) -> list[int]:
    import lightning

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = Seeing()

        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            return loss_of(self.model, *batch)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.01)

    class SaveAt(lightning.Callback):
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            if trainer.global_step == save_at:
                trainer.save_checkpoint(path)

    module = Module()
    trainer = lightning.Trainer(
        max_epochs=4,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        reload_dataloaders_every_n_epochs=1,
        callbacks=[SaveAt()],
    )
    loader = run_block("lightning")["ForLightning"](loader_of(snapshot, workers=1))
    trainer.fit(module, train_dataloaders=loader, ckpt_path=checkpoint)
    return module.model.seen


def test_lightning_trains_every_step_of_every_epoch(snapshot: Snapshot, tmp_path: Path) -> None:
    assert fit_lightning(snapshot, path=tmp_path / "x.ckpt") == ALL


@pytest.mark.parametrize("stop", [1, 3, 4, 5])
def test_lightning_resumes_with_the_next_batch(snapshot: Snapshot, tmp_path: Path, stop: int) -> None:
    path = tmp_path / "x.ckpt"
    fit_lightning(snapshot, save_at=stop, path=path)
    assert fit_lightning(snapshot, checkpoint=path, path=path) == ALL[stop:]


# ---- Accelerate


def test_accelerate_as_documented_trains_on_the_exact_sequence(snapshot: Snapshot, tmp_path: Path) -> None:
    on_root("accelerate", snapshot)
    model = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(3, 6))
    given = run_block("accelerate", torch=torch, model=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.01))
    accelerator, loader = given["accelerator"], given["loader"]
    assert loader.state_dict()["consumed"] == 128  # one epoch of 115 draws, in steps of 16
    accelerator.register_for_checkpointing(loader)
    accelerator.save_state(tmp_path / "state")
    loader.set_epoch(7)
    accelerator.load_state(tmp_path / "state")
    assert loader.state_dict()["consumed"] == 128


def test_accelerate_leaves_a_loader_alone_and_would_slice_a_dataloader_around_it(snapshot: Snapshot) -> None:
    from accelerate import Accelerator
    from accelerate.data_loader import prepare_data_loader

    class Around(IterableDataset):
        def __iter__(self) -> Any:
            for images, labels in loader_of(snapshot, rank=1, world_size=2, batch_size=20):
                yield from zip(images, labels, strict=True)

    loader = loader_of(snapshot)
    assert Accelerator(cpu=True).prepare(loader) is loader
    mine = [images[0, 3, 0, 0].item() for images, _ in loader_of(snapshot, rank=1, world_size=2, batch_size=20)]
    assert mine == [20, 60, 100]
    around = DataLoader(Around(), batch_size=20)
    prepared = prepare_data_loader(around, num_processes=2, process_index=1, dispatch_batches=False)
    sliced = [images[0, 3, 0, 0].item() for images, _ in prepared]
    assert sliced == [60, 20]  # of its three batches this rank keeps one, and sees its first again as padding


# ---- Hugging Face Trainer


class Classifier(torch.nn.Module):
    """As transformers wants it: keywords in, a dict with a loss out."""

    def __init__(self) -> None:
        super().__init__()
        self.model = Seeing()

    def forward(self, pixel_values: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"loss": loss_of(self.model, pixel_values, labels)}


def train_hugging_face(snapshot: Snapshot, folder: Path, resume: Path | None = None) -> list[int]:
    from transformers import TrainingArguments

    given = run_block("trainer")
    arguments = TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=3,
        use_cpu=True,
        report_to=[],
        save_strategy="steps",
        save_steps=2,
        logging_strategy="no",
        disable_tqdm=True,
        ignore_data_skip=True,
    )
    model, loader = Classifier(), loader_of(snapshot, batch_size=31)  # which divides 93
    if resume:
        loader.load_state_dict(json.loads((resume / "loader.json").read_text()))
    trainer = given["EvenTrainer"](model=model, args=arguments, callbacks=[given["KeepState"](loader)])
    trainer.loader = loader
    trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    return model.model.seen


def test_hugging_face_trainer_sees_the_exact_sequence_and_resumes_in_it(snapshot: Snapshot, tmp_path: Path) -> None:
    expected = list(range(0, 279, 31))
    assert train_hugging_face(snapshot, tmp_path) == expected
    for stop in (2, 6):
        found = train_hugging_face(snapshot, tmp_path / "again", tmp_path / f"checkpoint-{stop}")
        assert found == expected[stop:]


# ---- fastai


def test_fastai_learner_fits(snapshot: Snapshot) -> None:
    from fastai.callback.progress import ProgressCallback
    from fastai.learner import Learner

    given = run_block("fastai")
    train = loader_of(snapshot, workers=1)
    valid = EvaluationLoader(snapshot, "test", 4, transform=placed)
    loaders = given["DataLoaders"](given["ForFastai"](train), given["ForFastai"](valid), device=torch.device("cpu"))
    model = Seeing()
    learner = Learner(loaders, model, loss_func=torch.nn.functional.cross_entropy, lr=0.01)
    learner.remove_cb(ProgressCallback)
    with learner.no_logging():
        learner.fit(2)
    assert len(model.seen) == 5
    assert len(learner.recorder.values) == 2


# ---- Two ranks


@pytest.mark.parametrize("framework", ["plain", "lightning", "accelerate", "trainer", "fastai"])
def test_two_ranks_see_the_slices_of_one_sequence(snapshot: Snapshot, tmp_path: Path, framework: str) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    script = Path(__file__).with_name("interop_ranks.py")
    environment = {
        "PYTHONPYCACHEPREFIX": str(tmp_path.parent / "compiled"),
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(script.parents[1]), str(script.parent)]),
        "OMP_NUM_THREADS": "1",
        "ACCELERATE_USE_CPU": "true",
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONDONTWRITEBYTECODE": "",  # as in test_torchrun
    }
    done = subprocess.run(
        [*command, str(script), framework, snapshot.store.url, str(tmp_path)],
        capture_output=True,
        text=True,
        env=environment,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert first["seen"] == ALL
    assert second["seen"] == [position + GLOBAL_BATCH // 2 for position in ALL]
    assert first["weight"] == second["weight"]
