"""Recipes learn, resume bit for bit, and follow stock layers; their metrics against counts by hand."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch
from _cli import invoke, strict_json

from dl4ds_kernels import recipes
from dl4ds_kernels.datasets import Annotation
from dl4ds_kernels.detection import encode_targets
from dl4ds_kernels.recipes import _train, yolo


def run(name: str, folder: Path, **options: object) -> tuple[recipes.Recipe, list[dict[str, float]]]:
    torch.set_num_threads(1)
    recipe = recipes.make(name, quick=True, epochs=2)
    return recipe, recipes.train(recipe, folder, **options)


@pytest.mark.slow
@pytest.mark.parametrize("name", recipes.NAMES)
def test_resumed_training_is_uninterrupted_training(name: str, tmp_path: Path) -> None:
    """Weights, buffers, optimizer state and log: equal bit for bit."""
    whole, rows = run(name, tmp_path / "whole")
    run(name, tmp_path / "cut", stop_after=1)
    torch.manual_seed(999)  # the state of a new process
    cut, resumed = run(name, tmp_path / "cut")
    assert len(rows) == 2
    for a, b in zip(rows, resumed, strict=True):
        assert {k: v for k, v in a.items() if k != "seconds"} == {k: v for k, v in b.items() if k != "seconds"}
    for key, value in whole.model.state_dict().items():
        assert torch.equal(value, cut.model.state_dict()[key]), key
    a, b = (torch.load(tmp_path / f / "checkpoint.pt", weights_only=True)["optimizer"]["state"] for f in ("whole", "cut"))
    for index, state in a.items():
        for key, value in state.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(b[index][key])), key
    with open(tmp_path / "cut" / "log.csv", newline="") as file:
        logged = list(csv.DictReader(file))
    assert [int(row["epoch"]) for row in logged] == [1, 2] and float(logged[1]["loss"]) == resumed[1]["loss"]


@pytest.mark.parametrize("name", ["cifar", "unet"])
def test_follows_stock_layers(name: str, tmp_path: Path) -> None:
    """The same losses as with stock layers within rounding, over the first steps."""
    losses: dict[bool, list[float]] = {True: [], False: []}
    for stock in (True, False):
        torch.set_num_threads(1)
        recipe = recipes.make(name, quick=True, epochs=1)
        with recipes.stock_layers() if stock else torch.enable_grad():
            recipes.train(recipe, tmp_path / str(stock), advance=lambda step, loss, stock=stock: losses[stock].append(loss))
    assert len(losses[True]) == recipe.steps
    torch.testing.assert_close(torch.tensor(losses[False]), torch.tensor(losses[True]), rtol=5e-3, atol=5e-3)


def test_stock_layers_call_no_kernel() -> None:
    from torch.utils._python_dispatch import TorchDispatchMode

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            names.append(str(function))
            return function(*args, **(kwargs or {}))

    model, x = recipes.make("cifar", quick=True).model, torch.randn(8, 3, 32, 32)
    used = {}
    for stock in (True, False):
        names: list[str] = []
        with recipes.stock_layers() if stock else torch.enable_grad(), Record():
            model(x).sum().backward()
        used[stock] = any("dl4ds" in n for n in names)
    assert used == {True: False, False: True}


def test_a_checkpoint_of_something_else(tmp_path: Path) -> None:
    run("cifar", tmp_path, stop_after=1)
    with pytest.raises(ValueError, match=r"checkpoint.pt: expected \{'recipe': 'cifar', 'seed': 1"):
        recipes.train(recipes.make("cifar", quick=True, epochs=2, seed=1), tmp_path)


@pytest.mark.full
@pytest.mark.parametrize("name", recipes.NAMES)
def test_reaches_its_metric(name: str, tmp_path: Path) -> None:
    recipe = recipes.make(name)
    rows = recipes.train(recipe, tmp_path)
    assert rows[-1][recipe.metric] >= recipe.target, rows


def test_command(tmp_path: Path) -> None:
    code, stdout, stderr = invoke("train", "unet", "--quick", "--epochs", 1, "--stock", "--json", "--out", tmp_path)
    assert code == 0, stderr
    document = strict_json(stdout)
    assert document["ours"]["rows"][0]["loss"] == pytest.approx(document["stock"]["rows"][0]["loss"], rel=5e-3)
    assert document["stock_over_ours"] > 0 and (tmp_path / "stock" / "checkpoint.pt").is_file()
    code, stdout, stderr = invoke("train", "unet", "--quick", "--epochs", 1, "--out", tmp_path)
    assert code == 0 and "target: iou 0.85" in stdout
    code, _, stderr = invoke("train", "unet", "--quick", "--epochs", 3, "--out", tmp_path)
    assert code == 1 and "checkpoint.pt: expected" in stderr
    code, _, stderr = invoke("train", "nothing")
    assert code == 2 and "RECIPE: expected one of cifar" in stderr
    code, _, stderr = invoke("train", "cifar", "--data", tmp_path, "--out", tmp_path / "c")
    assert code == 1 and "data_batch_1.bin (the *binary* version" in stderr


def test_average_precision_by_hand() -> None:
    assert yolo.average_precision([], 3) == 0
    assert yolo.average_precision([(0.9, True), (0.8, True)], 2) == 1
    # Right, wrong, right of two objects: precision 1 and 2/3 at recalls 1/2 and 1.
    assert yolo.average_precision([(0.7, True), (0.9, True), (0.8, False)], 2) == pytest.approx((1 + 2 / 3) / 2)


def test_perfect_output_has_map_one() -> None:
    net = yolo.SmallYolo(3)
    boxes, labels = torch.tensor([[10.0, 20, 50, 60], [70, 70, 100, 100]]), torch.tensor([2, 0])
    truth = Annotation("a", (112, 112), boxes, labels)
    target = encode_targets(boxes, labels, net.layout, (112, 112))
    has, classes, box = target[:, :1], target[:, 1:4], target[:, 4:]
    box = torch.cat((box[:, :2], box[:, 2:].sqrt()), 1)
    confidences = torch.cat((has, torch.zeros_like(has)), 1)
    output = net.layout.join(classes[None], confidences[None], torch.stack((box, box), 1)[None])
    assert yolo.mean_average_precision(output, [truth], net) == 1
    assert yolo.mean_average_precision(output * 0, [truth], net) == 0


def test_cosine() -> None:
    assert _train.cosine(0.0) == 0.01 and _train.cosine(0.1) == 1 and _train.cosine(1.0) == pytest.approx(0)
