"""One rank of a training in one framework, as docs/TRAINING.md says: `torchrun interop_ranks.py FRAMEWORK ROOT OUT`.

Writes the first position of every batch that its model saw, and the model's weight when it ended.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from test_interop import BLOCKS, Classifier, Seeing, loss_of, placed, run_block

from pipeline.snapshot import Snapshot, open_snapshot
from pipeline.stream.loader import EvaluationLoader, Loader

BATCH = 20  # of each of two ranks: 40 together, as in test_interop


def loader_of(snapshot: Snapshot, **options: Any) -> Loader:
    return Loader(snapshot.manifest("natural"), **{"batch_size": BATCH, "transform": placed, "workers": 1, **options})


def plain(snapshot: Snapshot, folder: Path) -> Seeing:
    torch.distributed.init_process_group("gloo")
    model = Seeing()
    parallel = torch.nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.SGD(parallel.parameters(), lr=0.01)
    loader = loader_of(snapshot)
    for _ in range(4):
        for images, labels in loader:
            optimizer.zero_grad()
            loss_of(parallel, images, labels).backward()
            optimizer.step()
    return model


def lightning(snapshot: Snapshot, folder: Path) -> Seeing:
    import lightning

    wrap = run_block("lightning")["ForLightning"]

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = Seeing()

        def train_dataloader(self) -> Any:
            if not hasattr(self, "batches"):  # asked again in each epoch: the same loader goes on
                self.batches = wrap(loader_of(snapshot))
            return self.batches

        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            return loss_of(self.model, *batch)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.01)

    module = Module()
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    lightning.Trainer(
        max_epochs=4,
        accelerator="cpu",
        strategy="ddp",
        devices=2,
        enable_checkpointing=False,
        reload_dataloaders_every_n_epochs=1,
        **quiet,
    ).fit(module)
    return module.model


def accelerate(snapshot: Snapshot, folder: Path) -> Seeing:
    block = BLOCKS["accelerate"].replace('"ROOT"', repr(snapshot.store.url)).replace('"balanced"', '"natural"')
    block = block.replace("batch_size=64", f"batch_size={BATCH}, transform=placed")
    block = block.replace("for images, labels in loader", "for images, labels in (b for _ in range(4) for b in loader)")
    model = Seeing()
    model.scale = 255
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    exec(block, {"torch": torch, "model": model, "optimizer": optimizer, "placed": placed})
    return model


def trainer(snapshot: Snapshot, folder: Path) -> Seeing:
    from transformers import TrainingArguments

    given = run_block("trainer")
    arguments = TrainingArguments(
        output_dir=str(folder / "trainer"),
        max_steps=10,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
    )
    model = Classifier()
    running = given["EvenTrainer"](model=model, args=arguments)
    running.loader = loader_of(snapshot)  # after the arguments, which start torch.distributed
    running.train()
    return model.model


def fastai(snapshot: Snapshot, folder: Path) -> Seeing:
    from fastai.callback.progress import ProgressCallback
    from fastai.learner import Learner

    torch.distributed.init_process_group("gloo")
    given = run_block("fastai")
    loaders = given["DataLoaders"](
        given["ForFastai"](loader_of(snapshot)),
        given["ForFastai"](EvaluationLoader(snapshot, "test", 4, transform=placed)),
        device=torch.device("cpu"),
    )
    model = Seeing()
    model.scale = 255
    parallel = torch.nn.parallel.DistributedDataParallel(model)
    learner = Learner(loaders, parallel, loss_func=torch.nn.functional.cross_entropy, lr=0.01)
    learner.remove_cb(ProgressCallback)
    with learner.no_logging():
        learner.fit(4)
    return model


def main() -> None:
    name, root, out = sys.argv[1], sys.argv[2], Path(sys.argv[3])
    warnings.simplefilter("ignore")
    logging.disable(logging.ERROR)
    torch.set_num_threads(1)
    rank = int(os.environ["RANK"])
    torch.manual_seed(rank)  # ranks begin unlike: that they end alike shows that they trained together
    model = globals()[name](open_snapshot(root), out)
    weight = sum(p.double().sum().item() for p in model.parameters())
    (out / f"{rank}.json").write_text(json.dumps({"seen": model.seen, "weight": weight}))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
