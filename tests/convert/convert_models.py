"""Models and helpers shared by the tests of ``dl4ds_kernels.convert``."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def conv_bn(c_in: int = 4, c_out: int = 4, **kwargs) -> tuple[nn.Conv2d, nn.BatchNorm2d]:
    return nn.Conv2d(c_in, c_out, 3, padding=1, bias=False, **kwargs), nn.BatchNorm2d(c_out)


class Block(nn.Module):
    """conv-bn-relu-conv-bn + add + relu with one shared ReLU, as in torchvision's BasicBlock."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv_bn(width, width)
        self.conv2, self.bn2 = conv_bn(width, width)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += x
        return self.relu(out)


class Net(nn.Module):
    """A small network of a stem, two blocks and a head: 5 chains."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.LeakyReLU(0.2))
        self.blocks = nn.Sequential(Block(), Block())
        self.fc = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(F.adaptive_avg_pool2d(self.blocks(self.stem(x)), 1).flatten(1))


def seeded(model: nn.Module, seed: int = 0) -> nn.Module:
    """Give every BatchNorm statistics and affine values that are not the neutral ones; eval mode."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            for tensor, low, high in (
                (module.running_mean, -0.3, 0.3),
                (module.running_var, 0.5, 1.5),
                (module.weight, 0.5, 1.5),
                (module.bias, -0.3, 0.3),
            ):
                if tensor is not None:
                    tensor.data.copy_(torch.rand(tensor.shape, generator=generator) * (high - low) + low)
    return model.eval()


def image(n: int = 2, c: int = 3, size: int = 16, dtype: torch.dtype = torch.float32, seed: int = 1) -> Tensor:
    return torch.randn(n, c, size, size, dtype=dtype, generator=torch.Generator().manual_seed(seed))


@contextlib.contextmanager
def stock_calls() -> Iterator[Counter]:
    """Counts the calls of the stock forwards by class name; a fused chain makes none."""
    counts: Counter = Counter()
    norms = (nn.modules.batchnorm._BatchNorm, nn.SyncBatchNorm)
    kinds = (*norms, nn.Conv2d, nn.ReLU, nn.LeakyReLU, nn.ReLU6, nn.SiLU, nn.Hardswish)

    def counting(stock):
        def forward(self, *args, **kwargs):
            counts[type(self).__name__] += 1
            return stock(self, *args, **kwargs)

        return forward

    with contextlib.ExitStack() as stack:
        for kind in kinds:
            stack.enter_context(mock.patch.object(kind, "forward", counting(kind.forward)))
        yield counts


def assert_same(got: Tensor, want: Tensor, tolerance: float = 1e-4) -> None:
    """Equal up to ``tolerance`` of the largest value (of 1e-3 where all are smaller: gradients that only rounding makes)."""
    assert got.shape == want.shape and got.dtype == want.dtype
    scale = max(want.detach().double().abs().max().item(), 1e-3)
    difference = (got.detach().double() - want.detach().double()).abs().max().item()
    assert difference <= tolerance * scale, f"differs by {difference / scale:.2e} of the largest value"
