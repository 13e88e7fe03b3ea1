"""The lecture's phenomena: every check of every experiment, and the values of UDL's notebooks."""

from __future__ import annotations

import builtins
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from _cli import invoke, strict_json

from dl4ds_kernels import experiments
from dl4ds_kernels.datasets import textures
from dl4ds_kernels.experiments import _nets, paths, shattered, variance
from dl4ds_kernels.functional import max_pool_indices, max_unpool

TRAINED = ("degradation", "landscape")  # train two or four networks: about a minute each
SLOW = ("paths", "shattered", "history")


def _verify(name: str, quick: bool, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    result = experiments.run(name, quick=quick)
    assert result.checks
    assert result.ok, [check for check in result.checks if not check.ok]
    picture = experiments.save(result, tmp_path / f"{name}.png").read_bytes()
    assert picture.startswith(b"\x89PNG") and len(picture) > 20_000


@pytest.mark.parametrize("name", [n for n in experiments.NAMES if n not in SLOW + TRAINED])
def test_quick(name: str, tmp_path: Path) -> None:
    _verify(name, True, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW)
def test_quick_slow(name: str, tmp_path: Path) -> None:
    _verify(name, True, tmp_path)


@pytest.mark.full
@pytest.mark.parametrize("name", TRAINED)
def test_quick_trained(name: str, tmp_path: Path) -> None:
    _verify(name, True, tmp_path)


@pytest.mark.full
@pytest.mark.parametrize("name", experiments.NAMES)
def test_whole(name: str, tmp_path: Path) -> None:
    _verify(name, False, tmp_path)


def test_every_file_is_listed() -> None:
    files = {p.stem for p in Path(experiments.__file__).parent.glob("*.py") if not p.stem.startswith("_")}
    assert files == set(experiments.NAMES)
    with pytest.raises(ValueError, match="expected one of history, .*got 'nothing'"):
        experiments.run("nothing")


def test_same_seed_same_numbers() -> None:
    first, second, other = (experiments.run("layernorm", seed, quick=True).numbers for seed in (3, 3, 4))
    assert first == second != other


def test_a_check_can_fail() -> None:
    assert experiments.Check("x", 1.0, 0.0, 1.0).ok
    assert not experiments.Check("x", 1.1, high=1.0).ok
    assert not experiments.Check("x", math.nan).ok
    assert not experiments.Result("t", {}, [], lambda figure: None).ok


def test_without_matplotlib(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    real = builtins.__import__

    def refuse(name: str, *args: Any) -> Any:
        if name.split(".")[0] == "matplotlib":
            raise ImportError(name)
        return real(name, *args)

    result = experiments.run("order", quick=True)
    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(ImportError, match=r"figures need matplotlib: pip install 'dl4ds_kernels\[cli\]'"):
        experiments.save(result, tmp_path / "x.png")


def test_command(tmp_path: Path) -> None:
    code, stdout, stderr = invoke("experiment", "order", "--quick", "--json", "--out", tmp_path / "new")
    assert code == 0, stderr
    document = strict_json(stdout)
    assert document["ok"] and document == strict_json((tmp_path / "new" / "order.json").read_text())
    assert (tmp_path / "new" / "order.png").stat().st_size > 20_000
    code, stdout, stderr = invoke("experiment", "order", "--quick", "--no-figure", "--out", tmp_path)
    assert code == 0 and "smallest y - x" in stdout and not (tmp_path / "order.png").exists()


def test_command_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code, _, stderr = invoke("experiment", "nothing", "--out", tmp_path)
    assert code == 2 and "NAME: expected one of" in stderr
    wrong = experiments.Result("t", {}, [experiments.Check("c", 2.0, high=1.0)], lambda figure: None)
    monkeypatch.setattr(experiments, "run", lambda *args: wrong)
    code, stdout, stderr = invoke("experiment", "order", "--no-figure", "--out", tmp_path)
    assert code == 1 and "WRONG" in stdout and "checks failed: order" in stderr


# Values that UDL's notebooks print, or that follow from their inputs.


def test_notebook_11_1() -> None:
    gradient = shattered.notebook_gradients(torch.ones(1), depth=3)
    torch.testing.assert_close(gradient, torch.tensor([0.013250], dtype=torch.float64), atol=5e-7, rtol=0)


def test_notebook_11_1_does_not_shatter() -> None:
    """As its author notes: without BatchNorm the autocorrelation at one step stays high at 24 layers."""
    x = shattered.grid().squeeze(1)
    curve = torch.stack([shattered.autocorrelation(shattered.notebook_gradients(x, 24, seed)) for seed in range(4)]).mean(0)
    assert float(curve[1]) > 0.85


def test_notebook_11_3() -> None:
    """Variances of input, first layer and five blocks on MNIST-1D, ten seeds."""
    mnist1d = pytest.importorskip("mnist1d.data", reason="MNIST-1D's generator is a package of its own (pip install mnist1d)")
    x = torch.from_numpy(mnist1d.make_dataset(mnist1d.get_dataset_args())["x"]).float()
    assert x.shape == (4000, 40)
    plain = variance.batch_variances(x, batch_norm=False, seeds=10)
    normed = variance.batch_variances(x, batch_norm=True, seeds=10)
    torch.testing.assert_close(
        torch.tensor(plain), torch.tensor([0.985, 2.00, 3.37, 5.89, 10.2, 18.2, 32.9]), rtol=0.12, atol=0
    )
    torch.testing.assert_close(
        torch.tensor(normed), torch.tensor([0.985, 2.00, 2.68, 3.37, 4.02, 4.73, 5.40]), rtol=0.06, atol=0
    )


@pytest.mark.parametrize(
    ("kernel", "value", "stride", "dilation", "total"), [(3, 0.33, 1, 1, 71.1), (5, 0.2, 1, 1, 69.6), (3, 0.33, 1, 2, 68.3)]
)
def test_notebook_10_1(kernel: int, value: float, stride: int, dilation: int, total: float) -> None:
    """Sums of its zero-padded convolutions of a line of twelve."""
    x = torch.tensor([5.2, 5.3, 5.4, 5.1, 10.1, 10.3, 9.9, 10.3, 3.2, 3.4, 3.3, 3.1])
    weight = torch.full((1, 1, 1, kernel), value)
    out = F.conv2d(x.view(1, 1, 1, -1), weight, None, stride, (0, dilation * (kernel // 2)), (1, dilation))
    assert abs(float(out.sum()) - total) < 0.06


def test_notebook_10_4() -> None:
    x = torch.tensor([[1.0, 3, 5, 3], [6, 2, 0, 8], [4, 6, 1, 4], [2, 8, 0, 3]]).view(1, 1, 4, 4)
    pooled, where = max_pool_indices(x)
    assert pooled.view(2, 2).tolist() == [[6, 8], [8, 4]]
    back = max_unpool(pooled, where)
    assert float(back.sum()) == 26 and back.view(4, 4)[1].tolist() == [6, 0, 0, 8]


def test_paths_are_all_there() -> None:
    found = list(paths.subsets(4))
    assert len(set(found)) == 16 and sum(0 in p for p in found) == 8


def test_deleting_a_block() -> None:
    for residual, count in ((True, 9), (False, 7)):
        net = _nets.make_net(20, residual, 0).eval()
        names = paths.block_names(net)
        lesioned = [paths.delete_block(net, name) for name in names]
        assert len(names) == 9 and sum(m is not None for m in lesioned) == count
        x = torch.randn(2, 3, 8, 8)
        for one in lesioned:
            if one is not None:
                assert one(x).shape == (2, 10) and not torch.equal(one(x), net(x))


def test_textures() -> None:
    x, y = textures(200, size=16, seed=5)
    again, other = textures(200, size=16, seed=5), textures(200, size=16, seed=6)
    assert torch.equal(x, again[0]) and torch.equal(y, again[1]) and not torch.equal(x, other[0])
    assert x.shape == (200, 3, 16, 16) and y.min() == 0 and y.max() == 9
    with pytest.raises(ValueError, match="count, size: expected 0 or more and 4 or more, got 3 and 2"):
        textures(3, size=2)
