"""The ways of a convolution layer on a GPU: library and fused kernel, inference and training, and the choice by timing.

A dry run makes the same calls on the CPU, where there is one way.
"""

from __future__ import annotations

import copy
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as TF
from torch import Tensor

from dl4ds_kernels import _autotune, explain
from dl4ds_kernels import functional as F
from dl4ds_kernels.modules import Bottleneck
from gpu.place import Place

# x (N, C, H, W), output channels, kernel, stride: a large map, a 1x1 layer, few pixels, channels that are no whole tile.
LAYERS = [((8, 64, 56, 56), 64, 3, 1), ((8, 256, 14, 14), 512, 1, 1), ((1, 512, 7, 7), 512, 3, 1), ((2, 40, 17, 13), 72, 3, 2)]
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
TOLERANCE = {"fp16": 4e-3, "bf16": 3e-2, "fp32": 4e-3}  # of the output's largest value; fp32 may be TF32
# Of a gradient's norm; relus on the other side of zero for rounding make half of it (stock on the CPU: 0.05, 0.14, 1e-6).
GRADIENT = {"fp16": 0.1, "bf16": 0.3, "fp32": 0.1}


@contextmanager
def _environment(**values: str) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None) if value is None else os.environ.__setitem__(name, value)


def _call(place: Place, layer: Any, dtype: torch.dtype) -> dict[str, Any]:
    shape, outputs, kernel, stride = layer
    g = torch.Generator().manual_seed(0)
    x, weight = torch.randn(shape, generator=g), torch.randn(outputs, shape[1], kernel, kernel, generator=g)
    weight = weight / (shape[1] * kernel**2) ** 0.5
    last = {"memory_format": torch.channels_last}
    return {
        "x": x.to(place.device, dtype).contiguous(**last), "weight": weight.to(place.device, dtype).contiguous(**last),
        "stride": stride, "padding": kernel // 2,
    }  # fmt: skip


def _run(call: dict[str, Any], training: bool) -> Tensor:
    channels, device = call["weight"].shape[0], call["x"].device
    statistics = {"running_mean": torch.zeros(channels, device=device), "running_var": torch.ones(channels, device=device)}
    return F.conv_bn_act(**call, **statistics, training=training)


def _truth(call: dict[str, Any], training: bool) -> Tensor:
    y = TF.conv2d(call["x"].cpu().double(), call["weight"].cpu().double(), None, call["stride"], call["padding"])
    zeros, ones = y.new_zeros(y.shape[1]), y.new_ones(y.shape[1])
    return torch.relu(TF.batch_norm(y, zeros, ones, training=training))


def way(place: Place, wish: str, training: bool, dtype: str) -> str:
    """ "right", or which layer differs from fp64."""
    with _environment(DL4DS_CUDA_CONV=wish):
        for layer in (
            LAYERS[-1:] if place.is_dry else LAYERS
        ):  # on the CPU there is one way, and its ops have tests of their own
            call = _call(place, layer, DTYPES[dtype])
            truth = _truth(call, training)
            error = float((_run(call, training).cpu().double() - truth).abs().max() / truth.abs().max())
            if not error <= TOLERANCE[dtype]:
                return f"{layer}: {error:.1e} of the largest value"
    return "right"


def measured() -> str:
    """DL4DS_AUTOTUNE=1: every layer is timed once, kept in a file, right, and left alone while a graph is captured."""
    with (
        tempfile.TemporaryDirectory() as folder,
        _environment(DL4DS_AUTOTUNE="1", DL4DS_AUTOTUNE_CACHE=str(Path(folder) / "autotune.json"), DL4DS_CUDA_CONV="auto"),
    ):
        _autotune.forget()
        try:
            return _measured(Path(folder) / "autotune.json")
        finally:
            _autotune.forget()


def _measured(file: Path) -> str:
    place = Place("cuda")

    def told(call: dict[str, Any]) -> str:
        return str(
            explain("conv_bn_act", call["x"], call["weight"], stride=call["stride"], padding=call["padding"]).get("chosen_by")
        )

    for layer in LAYERS[:-1]:
        call = _call(place, layer, torch.float16)
        if "not measured yet" not in told(call):
            return f"{layer}: before the first call explain says {told(call)}"
        graph, side = torch.cuda.CUDAGraph(), torch.cuda.Stream()
        with _environment(DL4DS_CUDA_CONV="library"), torch.cuda.stream(side):
            _run(call, False)  # cuDNN's own set-up
        side.synchronize()
        with torch.cuda.graph(graph):
            _run(call, False)
        if "not measured yet" not in told(call):
            return f"{layer}: something was timed while a graph was captured"
        out, truth = _run(call, False), _truth(call, False)
        if told(call) != "measured":
            return f"{layer}: after the first call explain says {told(call)}"
        if not float((out.cpu().double() - truth).abs().max() / truth.abs().max()) <= TOLERANCE["fp16"]:
            return f"{layer}: the measured way is wrong"
    wrong = _measured_block(place)
    if wrong:
        return wrong
    if not file.exists():
        return "no file was written"
    before = file.read_bytes()
    _autotune.forget()  # as in the next process
    _run(call, False)
    return "right" if file.read_bytes() == before else "a known layer was timed again"


def _measured_block(place: Place) -> str:
    """The end of a bottleneck block and the input's gradients of a training step: timed once each, and said so; "" if right."""
    torch.manual_seed(6)
    net = Bottleneck(256, 64).to(place.device, torch.float16, memory_format=torch.channels_last)
    x = torch.randn(1, 256, 56, 56).to(place.device, torch.float16, memory_format=torch.channels_last)
    layers = [F.ConvParams(c.weight, F.BNParams(bn.running_mean, bn.running_var), None, c.stride, c.padding)
              for c, bn in net.pairs()]  # fmt: skip
    with torch.no_grad():
        net.eval()(x)
    found = explain("bottleneck", x, convs=layers)
    if found["tail"].get("chosen_by") != "measured":
        return f"a block's end: after the first call explain says {found['tail'].get('chosen_by')}"
    net.train()(x.requires_grad_()).sum().backward()
    every = [entry["input_gradient"] for entry in explain("bottleneck", x.detach(), convs=layers, training=True)["layers"]]
    said = [entry.get("chosen_by") for entry in every[1:]]  # x has no BatchNorm in front here
    return "" if said == ["measured"] * 2 else f"input gradients: after a training step explain says {said}"


def tail(place: Place, dtype: str) -> str:
    """A bottleneck block whose last two convolutions are one kernel and two: the same bits, near fp64, and in a CUDA graph."""
    g, kind = torch.Generator().manual_seed(1), DTYPES[dtype]
    # The block's sizes at batch 1, and odd ones.
    for channels, size in ((256, (56, 56)), (72, (17, 13)))[1 if place.is_dry else 0 :]:
        x = torch.randn(1, channels, *size, generator=g).to(place.device, kind).contiguous(memory_format=torch.channels_last)
        shapes = ((64, channels, 1), (64, 64, 3), (channels, 64, 1))
        weights = [torch.randn(k, c, r, r, generator=g) / (c * r * r) ** 0.5 for k, c, r in shapes]
        weights = [w.to(place.device, kind).contiguous(memory_format=torch.channels_last) for w in weights]
        norms = [F.BNParams(torch.zeros(len(w), device=place.device), torch.ones(len(w), device=place.device)) for w in weights]
        params = [F.ConvParams(w, bn, padding=w.shape[2] // 2) for w, bn in zip(weights, norms, strict=True)]
        results = []
        for wish in ("0", "1"):
            with _environment(DL4DS_CUDA_CONV="fused", DL4DS_CUDA_TAIL=wish), torch.no_grad():
                results.append(F.bottleneck(x, params))
                if place.is_dry:
                    continue
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph):
                    captured = F.bottleneck(x, params)
                graph.replay()
                torch.cuda.synchronize()
                if not torch.equal(captured, results[-1]):
                    return f"{channels} channels, DL4DS_CUDA_TAIL={wish}: a CUDA graph gives something else"
        if not torch.equal(*results):
            return f"{channels} channels: one kernel and two differ by {float((results[0] - results[1]).abs().max()):.1e}"
        truth = x.cpu().double()
        for i, w in enumerate(weights):
            y = TF.conv2d(truth, w.cpu().double(), None, 1, w.shape[2] // 2) / (1 + 1e-5) ** 0.5
            truth = torch.relu(y + x.cpu().double() if i == 2 else y)
        error = float((results[1].cpu().double() - truth).abs().max() / truth.abs().max())
        if not error <= 2 * TOLERANCE[dtype]:
            return f"{channels} channels: {error:.1e} of the largest value"
    return "right"


def backward(place: Place, wish: str, dtype: str) -> str:
    """Gradients of two bottlenecks, the first with a strided projection: sums and additions in the convolutions' epilogues."""
    torch.manual_seed(5)
    down = torch.nn.Sequential(torch.nn.Conv2d(64, 128, 1, 2, bias=False), torch.nn.BatchNorm2d(128))
    blocks = torch.nn.Sequential(Bottleneck(64, 32, 2, down), Bottleneck(128, 32)).train()
    x, dout = torch.randn(4, 64, 28, 28), torch.randn(4, 128, 14, 14)
    blocks, x, dout = (v.to(DTYPES[dtype]) for v in (blocks, x, dout))  # the truth starts from the same values
    found = []
    for device, kind in (("cpu", torch.float64), (place.device, DTYPES[dtype])):
        net = copy.deepcopy(blocks).to(device, kind, memory_format=torch.channels_last)
        given, grad = (t.to(device, kind, memory_format=torch.channels_last) for t in (x, dout))
        with _environment(DL4DS_CUDA_CONV=wish):
            grads = torch.autograd.grad(net(given.requires_grad_()), [given, *net.parameters()], grad)
        found.append([g.cpu().double() for g in grads])
    worst = max(float((a - b).norm() / a.norm()) for a, b in zip(*found, strict=True))
    return "right" if worst <= GRADIENT[dtype] else f"a gradient is wrong by {worst:.1e} of its size"


def run(place: Place) -> dict[str, str]:
    """{case: "right", "SKIP: why" or what was wrong}."""
    cases: dict[str, Callable[[], str]] = {}
    wishes = [(wish, dtype) for wish in ("library", "fused") for dtype in DTYPES]
    for op, training in (("conv_bn_act", False), ("conv_bn_act_train", True)):
        cases |= {f"{op} {wish} {dtype}": partial(way, place, wish, training, dtype) for wish, dtype in wishes}
    cases |= {f"conv_bn_act_tail {dtype}": partial(tail, place, dtype) for dtype in DTYPES}
    cases |= {f"residual_block_bwd {wish} {dtype}": partial(backward, place, wish, dtype) for wish, dtype in wishes}
    by_timing = "conv_bn_act chosen by timing"
    cases[by_timing] = measured
    if place.is_dry:
        why = "SKIP: needs a GPU's clock (tests/test_autotune_cuda.py takes the same path with a made-up one)"
        cases[by_timing] = lambda: why
    found: dict[str, str] = {}
    for name, case in cases.items():
        try:
            found[name] = case()
        except Exception as error:  # one broken way must not hide the others
            found[name] = f"{type(error).__name__}: {error}"
    return found
