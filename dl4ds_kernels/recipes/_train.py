"""The loop that all recipes share: epochs, logs, and checkpoints from which training goes on bit for bit.

Everything random in an epoch comes from a generator seeded by the recipe's seed and the epoch's number (order of the samples)
or from torch's generator, whose state is in the checkpoint.
"""

from __future__ import annotations

import contextlib
import csv
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from .. import _backend, _packing

CHECKPOINT, LOG = "checkpoint.pt", "log.csv"


@dataclass
class Recipe:
    """What to train and how.

    ``loss(model, batch)`` is the training loss of one batch of ``dataset``; ``evaluate(model)`` gives metrics, of which
    ``metric`` must reach ``target``. ``rate(progress)`` is the learning rate's factor for progress from 0 to 1.
    """

    name: str
    model: nn.Module
    dataset: Dataset
    batch: int
    epochs: int
    optimizer: torch.optim.Optimizer
    loss: Callable[[nn.Module, list[Tensor]], Tensor]
    evaluate: Callable[[nn.Module], dict[str, float]]
    metric: str
    target: float
    seed: int = 0
    rate: Callable[[float], float] = lambda progress: 1.0

    @property
    def steps(self) -> int:
        """Batches an epoch."""
        return len(self.dataset) // self.batch


@contextlib.contextmanager
def stock_layers() -> Iterator[None]:
    """Within it the package's layers call stock torch (``F.batch_norm``, activation, addition), one after the other."""
    saved = dict(_backend.MIN_NUMEL), _packing.MIN_MACS, _packing.MIN_LIBRARY_MACS, _backend.untouched
    try:
        _backend.MIN_NUMEL.update(dict.fromkeys(_backend.MIN_NUMEL, sys.maxsize))
        _packing.MIN_MACS = _packing.MIN_LIBRARY_MACS = sys.maxsize
        yield
    finally:
        _backend.MIN_NUMEL.update(saved[0])
        _packing.MIN_MACS, _packing.MIN_LIBRARY_MACS = saved[1:3]


def _save(path: Path, state: dict[str, Any]) -> None:
    """The whole file or the old one."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            torch.save(state, file)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def _board(folder: Path) -> Any:
    """A TensorBoard writer, or None where tensorboard is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(folder / "tensorboard"))


def train(
    recipe: Recipe,
    folder: str | Path,
    *,
    resume: bool = True,
    stop_after: int | None = None,
    advance: Callable[[int, float], None] | None = None,
) -> list[dict[str, float]]:
    """Train, one row a finished epoch: epoch, loss (mean), seconds, and the recipe's metrics.

    After each epoch ``folder`` holds ``checkpoint.pt`` (model, optimizer, random state, rows; read with ``weights_only``) and
    ``log.csv``; TensorBoard files too where tensorboard is installed. ``stop_after``: end after that many epochs of this call.
    ``advance(step, loss)`` is called after each step.

    Raises: ValueError for a checkpoint of another recipe, seed or number of epochs.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    identity = {"recipe": recipe.name, "seed": recipe.seed, "epochs": recipe.epochs, "steps": recipe.steps}
    base = [group["lr"] for group in recipe.optimizer.param_groups]
    rows: list[dict[str, float]] = []
    torch.manual_seed(recipe.seed)
    if resume and (folder / CHECKPOINT).is_file():
        state = torch.load(folder / CHECKPOINT, map_location="cpu", weights_only=True)
        if state["identity"] != identity:
            raise ValueError(f"train: {folder / CHECKPOINT}: expected {identity}, got {state['identity']}")
        recipe.model.load_state_dict(state["model"])
        recipe.optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["random"])
        rows = state["rows"]
    board, total = _board(folder), recipe.epochs * recipe.steps
    for epoch in range(len(rows), min(recipe.epochs, len(rows) + (stop_after or recipe.epochs))):
        order = torch.Generator().manual_seed(1_000_003 * recipe.seed + epoch)
        loader = DataLoader(recipe.dataset, recipe.batch, shuffle=True, drop_last=True, generator=order)
        recipe.model.train()
        start, losses = time.perf_counter(), 0.0
        for i, batch in enumerate(loader):
            step = epoch * recipe.steps + i
            for group, lr in zip(recipe.optimizer.param_groups, base, strict=True):
                group["lr"] = lr * recipe.rate(step / total)
            loss = recipe.loss(recipe.model, batch)
            recipe.optimizer.zero_grad()
            loss.backward()
            recipe.optimizer.step()
            losses += float(loss.detach())
            if advance is not None:
                advance(step, float(loss.detach()))
        seconds = time.perf_counter() - start
        recipe.model.eval()
        with torch.no_grad():
            metrics = recipe.evaluate(recipe.model)
        rows.append({"epoch": epoch + 1, "loss": losses / recipe.steps, "seconds": round(seconds, 3), **metrics})
        _save(
            folder / CHECKPOINT,
            {
                "identity": identity, "model": recipe.model.state_dict(), "optimizer": recipe.optimizer.state_dict(),
                "random": torch.get_rng_state(), "rows": rows,
            },
        )  # fmt: skip
        with open(folder / LOG, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
        if board is not None:
            for key, value in rows[-1].items():
                board.add_scalar(key, value, epoch + 1)
    if board is not None:
        board.close()
    return rows


def cosine(progress: float) -> float:
    """A warm-up over a tenth, then half a cosine down to 0."""
    import math

    return progress / 0.1 + 0.01 if progress < 0.1 else 0.5 * (1 + math.cos(math.pi * (progress - 0.1) / 0.9))
