"""Data sets by name: MNIST-1D against its authors' generator, scikit-learn's digits, scikit-image's nuclei; missing extras."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from dl4ds_kernels import datasets, recipes

MNIST1D = sys.modules["dl4ds_kernels.datasets.mnist1d"]  # the module; the function has its name


def test_mnist1d_is_the_authors_transformation() -> None:
    """The same random numbers through both: the same signals."""
    data = pytest.importorskip("mnist1d.data", reason="the authors' generator is the oracle, not installed")
    import numpy as np
    from mnist1d import transform

    def double(value: float) -> torch.Tensor:
        return torch.tensor([value], dtype=torch.float64)

    curves, options = data.get_templates(), data.get_dataset_args()
    assert torch.allclose(MNIST1D.templates(), torch.from_numpy(curves["x"]), rtol=0, atol=1e-14)
    for seed in range(60):
        digit = seed % 10
        np.random.seed(seed)
        want, _ = transform(curves["x"][digit], curves["t"], options)
        np.random.seed(seed)  # what the generator draws, in its order
        padding, scale, move = 36 + int(np.random.rand() * 25), np.random.rand() - 0.5, np.random.choice(48)
        noises = [torch.from_numpy(np.random.randn(1, 72)) for _ in range(2)]
        shear = np.random.rand() - 0.5
        got = MNIST1D.signals(
            MNIST1D.templates()[digit : digit + 1], torch.tensor([padding]), double(1 + 0.4 * scale),
            torch.tensor([move]), 0.25 * noises[0], 0.02 * noises[1], double(0.75 * shear),
        )  # fmt: skip
        torch.testing.assert_close(got[0], torch.from_numpy(want), rtol=0, atol=1e-12)


def test_mnist1d_is_seeded_and_normalised() -> None:
    x, y = datasets.mnist1d(1000, seed=3)
    assert x.shape == (1000, 40) and x.dtype == torch.float32 and y.bincount().tolist() == [100] * 10
    assert abs(float(x.mean())) < 1e-5 and float(x.std(correction=0)) == pytest.approx(1, abs=1e-5)
    assert torch.equal(datasets.mnist1d(1000, seed=3)[0], x) and not torch.equal(datasets.mnist1d(1000, seed=4)[0], x)
    with pytest.raises(ValueError, match="mnist1d: count: expected 1 or more, got 0"):
        datasets.mnist1d(0)


def test_digits() -> None:
    pytest.importorskip("sklearn", reason="the digits come with scikit-learn, not installed")
    (x, y), (x_test, y_test) = datasets.digits(), datasets.digits(train=False)
    assert x.shape == (1437, 1, 8, 8) and x_test.shape == (360, 1, 8, 8)
    assert y[:10].tolist() == list(range(10)) and y_test[-4:].tolist() == [0, 8, 9, 8]
    every = torch.cat((x, x_test))
    assert abs(float(every.mean())) < 1e-3 and float(every.std()) == pytest.approx(1, abs=1e-3)
    ink = every * 6.017 + 4.884  # 17 levels of gray
    torch.testing.assert_close(ink, ink.round(), atol=1e-4, rtol=0)
    assert int(ink.round().min()) == 0 and int(ink.round().max()) == 16


def test_nuclei() -> None:
    """Parts do not overlap; nuclei hold more of the blue stain than the rest."""
    pytest.importorskip("skimage", reason="the picture comes with scikit-image, not installed")
    from skimage import data

    x, masks = datasets.nuclei()
    held_out, truth = datasets.nuclei(train=False)
    assert x.shape == (105, 3, 64, 64) and masks.shape == (105, 64, 64) and held_out.shape == (32, 3, 64, 64)
    picture = torch.from_numpy(data.immunohistochemistry().copy()).permute(2, 0, 1).float() / 255
    assert torch.equal(x[0], picture[:, :64, :64]) and torch.equal(held_out[0], picture[:, :64, 256:320])
    assert torch.equal(x[-1], picture[:, -64:, 192:256]) and torch.equal(held_out[-1], picture[:, -64:, -64:])
    for part, mask in ((x, masks), (held_out, truth)):
        absorbed = -part.clamp(min=0.02).log()
        stain = absorbed[:, 0] - 0.5 * absorbed[:, 2]  # haematoxylin takes more red than blue, the brown stain the reverse
        assert float(stain[mask == 1].mean()) > float(stain[mask == 0].mean()) + 0.1 and mask.unique().tolist() == [0, 1]
    with pytest.raises(ValueError, match="nuclei: size: expected 16 to 256, got 300"):
        datasets.nuclei(size=300)


def test_missing_packages_are_named() -> None:
    """Without the extra: one line with the cure, from the function and from the command."""
    code = (
        "import sys\n"
        "for name in ('sklearn', 'skimage', 'scipy'): sys.modules[name] = None\n"
        "from dl4ds_kernels import datasets\n"
        "for make in (datasets.digits, datasets.nuclei):\n"
        "    try: make()\n"
        "    except ImportError as error: print(error)\n"
        "from dl4ds_kernels.cli import main\n"
        "main(['train', 'cifar', '--data', 'digits', '--quick'])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.splitlines() == [
        "digits: needs scikit-learn: pip install 'dl4ds_kernels[data]'",
        "nuclei: needs scikit-image: pip install 'dl4ds_kernels[data]'",
    ]
    assert done.returncode == 1 and "digits: needs scikit-learn" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize(("data", "name"), recipes.DATA.items())
def test_recipes_on_named_data(data: str, name: str, tmp_path) -> None:
    """Quick: one epoch runs and its metric is one; the checkpoint is not mistaken for one of other data."""
    if data != "mnist1d":
        pytest.importorskip({"digits": "sklearn", "skimage": "skimage"}[data], reason="the data's package is not installed")
    recipe = recipes.make(name, data=data, quick=True, epochs=1)
    assert recipe.name == f"{name}-{data}"
    (row,) = recipes.train(recipe, tmp_path)
    assert 0 <= row[recipe.metric] <= 1 and row["loss"] > 0
    with pytest.raises(ValueError, match=f"'recipe': '{name}',"):
        recipes.train(recipes.make(name, quick=True, epochs=1), tmp_path)


@pytest.mark.full
@pytest.mark.parametrize(("data", "name"), recipes.DATA.items())
def test_recipes_on_named_data_reach_their_metric(data: str, name: str, tmp_path) -> None:
    recipe = recipes.make(name, data=data)
    rows = recipes.train(recipe, tmp_path)
    assert rows[-1][recipe.metric] >= recipe.target, rows


def test_data_of_another_recipe() -> None:
    with pytest.raises(ValueError, match="unet: data: expected none .* or 'skimage', got 'digits'"):
        recipes.make("unet", data="digits")
    with pytest.raises(ValueError, match="hourglass: data: expected none"):
        recipes.make("hourglass", data="mnist1d")
    with pytest.raises(FileNotFoundError, match="skimage/data_batch_1.bin"):
        recipes.make("cifar", data="skimage")
