"""Depthwise, transposed, stem and pooling layers: ours against stock NCHW and channels_last, interleaved, parity first.

    python bench/ops/conv_kinds.py [--threads 2] [--only depthwise,transposed,stem,maxpool,avgpool,globalpool]

Stock runs the layer with its BatchNorm and ReLU where the networks have them (depthwise, stem), alone otherwise. Prints a row
per layer: medians in microseconds, and the best stock time over ours.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

import dl4ds_kernels as dk
from dl4ds_kernels.modules._pool import run_pool
from dl4ds_kernels.modules._transposed import run_conv_transpose_bn_act

CL = torch.channels_last
Call = Callable[[], Tensor]
DEPTHWISE = (
    (1, 32, 112, 3, 1), (1, 96, 112, 3, 2), (1, 144, 56, 3, 1), (1, 192, 28, 3, 1), (1, 384, 14, 3, 1), (1, 960, 7, 3, 1),
    (1, 240, 28, 5, 1), (1, 672, 14, 5, 2), (1, 1152, 7, 5, 1), (1, 96, 56, 7, 1), (8, 144, 56, 3, 1), (8, 384, 14, 3, 1),
)  # fmt: skip
TRANSPOSED = ((1, 512, 256, 16), (1, 256, 128, 32), (1, 128, 64, 64), (1, 64, 32, 128), (1, 1024, 512, 28), (4, 256, 128, 32))
MAX_POOLS = ((1, 64, 112, 3, 2, 1), (16, 64, 112, 3, 2, 1), (1, 64, 224, 2, 2, 0), (1, 32, 256, 2, 2, 0), (1, 192, 28, 3, 1, 1))
AVG_POOLS = ((1, 128, 56, 2, 2, 0), (16, 128, 56, 2, 2, 0), (1, 288, 35, 3, 1, 1))
GLOBAL_POOLS = ((1, 2048, 7), (16, 2048, 7), (1, 512, 7))


def layers() -> Iterator[tuple[str, str, nn.Module, Tensor, Callable[[nn.Module], nn.Module]]]:
    """(kind, name, stock module, input in NCHW, how ours is made of the module)."""
    for n, c, size, k, stride in DEPTHWISE:
        conv = nn.Conv2d(c, c, k, stride, k // 2, groups=c, bias=False)
        block = nn.Sequential(conv, nn.BatchNorm2d(c), nn.ReLU(True))
        yield "depthwise", f"{n}x{c}x{size} k{k}s{stride}", block, torch.randn(n, c, size, size), dk.optimize
    for n in (1, 16):
        block = nn.Sequential(nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU(True))
        yield "stem", f"{n}x3x224 k7s2 -> 64", block, torch.randn(n, 3, 224, 224), dk.optimize
    for n, c, k, size in TRANSPOSED:
        conv = nn.ConvTranspose2d(c, k, 2, 2)
        yield (
            "transposed",
            f"{n}x{c}x{size} -> {k}",
            conv,
            torch.randn(n, c, size, size),
            lambda m: _helper(lambda x, up: run_conv_transpose_bn_act(x, up, None), m),
        )
    for kind, pool, shapes in (("maxpool", nn.MaxPool2d, MAX_POOLS), ("avgpool", nn.AvgPool2d, AVG_POOLS)):
        for n, c, size, k, stride, padding in shapes:
            x = torch.randn(n, c, size, size)
            yield kind, f"{n}x{c}x{size} k{k}s{stride}", pool(k, stride, padding), x, lambda m: _helper(run_pool, m)
    for n, c, size in GLOBAL_POOLS:
        x = torch.randn(n, c, size, size)
        yield "globalpool", f"{n}x{c}x{size}", nn.AdaptiveAvgPool2d(1), x, lambda m: _helper(run_pool, m)


class _helper:
    """A module through its run-time helper."""

    def __init__(self, helper: Callable[..., Tensor], module: nn.Module) -> None:
        self.helper, self.module = helper, module

    def __call__(self, x: Tensor) -> Tensor:
        return self.helper(x, self.module)


def measure(calls: list[Call], rounds: int) -> list[float]:
    """Medians in microseconds; every round runs each call once, so that noise hits all alike."""
    samples: list[list[float]] = [[] for _ in calls]
    for _ in range(rounds):
        for call, times in zip(calls, samples, strict=True):
            start = time.perf_counter()
            call()
            times.append((time.perf_counter() - start) * 1e6)
    return [statistics.median(times) for times in samples]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", default="")
    parser.add_argument("--rounds", type=int, default=21)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    kinds = set(filter(None, options.only.split(",")))
    print(f"{'layer':36} {'ours':>9} {'NCHW':>9} {'NHWC':>9}  best stock / ours")
    with torch.no_grad():
        for kind, name, module, x, make in layers():
            if kinds and kind not in kinds:
                continue
            stock = module.eval()
            last, x_last = copy.deepcopy(stock).to(memory_format=CL), x.to(memory_format=CL)
            ours = make(copy.deepcopy(stock))
            torch.testing.assert_close(ours(x_last), stock(x), rtol=1e-4, atol=1e-4)
            calls = [lambda o=ours, v=x_last: o(v), lambda s=stock, v=x: s(v), lambda s=last, v=x_last: s(v)]
            measure(calls, 3)
            mine, first, second = measure(calls, options.rounds)
            print(f"{kind + ' ' + name:36} {mine:9.0f} {first:9.0f} {second:9.0f}  {min(first, second) / mine:.2f}", flush=True)


if __name__ == "__main__":
    main()
