"""Our model against an independent implementation with the same weights: outputs, every gradient, running statistics.

Outputs with ``exact=True``, and wherever gradients are on, follow the package's rule: at most twice stock eager's own error
against fp64. By default, where Winograd F(4x4) and Strassen take part, they are within the documented bound: ``BOUND`` of the
largest output, or twice stock's error where that is more. In training, rounding moves values across the kinks of ReLU and
max-pooling, in stock torch as in ours, and one of a thousand values changes a gradient by 0.1 %; so every gradient and every
running statistic is compared in fp64, where ours must equal stock, and in fp32 all of them together.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from _assert import no_worse_than_torch
from torch import Tensor, nn

import dl4ds_kernels as dk

BOUND = 1e-5  # docs/models.md
NORMS = nn.modules.batchnorm._BatchNorm
Rename = Callable[[dict[str, Tensor]], dict[str, Tensor]]


def seeded(model: nn.Module, seed: int = 0, gain: float = 1.0) -> nn.Module:
    """BatchNorm statistics and parameters away from the neutral ones, biases away from 0; the same for the same seed.

    ``gain`` below 1 keeps very deep residual nets from growing without bound.
    """
    generator = torch.Generator().manual_seed(seed)

    def uniform(tensor: Tensor, low: float, high: float) -> None:
        tensor.data.copy_(torch.rand(tensor.shape, generator=generator) * (high - low) + low)

    for m in model.modules():
        if isinstance(m, NORMS):
            uniform(m.running_mean, -0.2, 0.2)
            uniform(m.running_var, 0.7, 1.4)
            uniform(m.weight, 0.6 * gain, 1.4 * gain)
            uniform(m.bias, -0.2, 0.2)
        elif getattr(m, "bias", None) is not None and isinstance(m.bias, Tensor):
            uniform(m.bias, -0.05, 0.05)
    return model


def copy_in_order(ours: nn.Module, theirs: nn.Module) -> None:
    """Copy ``theirs`` into ``ours`` tensor by tensor in order of definition; every shape must agree."""
    mine, other = ours.state_dict(), theirs.state_dict()
    assert len(mine) == len(other), f"{len(mine)} tensors here, {len(other)} there"
    for (a, target), (b, source) in zip(mine.items(), other.items(), strict=True):
        assert target.shape == source.shape, f"{a} {tuple(target.shape)} against {b} {tuple(source.shape)}"
    ours.load_state_dict(dict(zip(mine, other.values(), strict=True)))


def check_forward(ours: nn.Module, stock: nn.Module, x: Tensor, shape: tuple[int, ...] | None = None) -> None:
    """Outputs in eval: by default and with ``exact=True``, NCHW and channels_last, and with gradients.

    Each inference call is made twice: the first chooses the algorithms layer by layer, the second runs blocks as one call.
    """
    ours.eval(), stock.eval()
    truth = copy.deepcopy(stock).double()
    last = torch.channels_last if x.dim() == 4 else torch.channels_last_3d
    x_last = x.contiguous(memory_format=last)
    with torch.no_grad():
        want, want_last, true = (_outputs(net(i)) for net, i in ((stock, x), (stock, x_last), (truth, x.double())))
        assert all(t.isfinite().all() and t.abs().max() > 0 for t in true), "the comparison would say nothing"
        if shape is not None:
            assert tuple(want[-1].shape) == shape
        for call in ("first call", "second call"):
            _near(ours(x), want, true, f"default, {call}")
            _near(ours(x_last), want_last, true, f"default, channels_last, {call}")
        dk.optimize(ours, exact=True, inplace=True)
        for call in ("first call", "second call"):
            _exact(ours(x), want, true, f"exact, {call}")
            _exact(ours(x_last), want_last, true, f"exact, channels_last, {call}")
        dk.restore(ours)
    _exact(ours(x), want, true, "with gradients")


def _exact(got: Any, want: Sequence[Tensor], true: Sequence[Tensor], name: str) -> None:
    for i, (g, w, t) in enumerate(zip(_outputs(got), want, true, strict=True)):
        no_worse_than_torch(g.detach(), w, t, f"{name}, output {i}")


def _near(got: Any, want: Sequence[Tensor], true: Sequence[Tensor], name: str) -> None:
    for i, (g, w, t) in enumerate(zip(_outputs(got), want, true, strict=True)):
        assert (g.shape, g.dtype) == (w.shape, w.dtype), f"{name}, output {i}: {tuple(g.shape)} {g.dtype}"
        error, own, size = (float(d.abs().max()) for d in (g - t, w - t, t))
        assert error <= max(BOUND * size, 2 * own), f"{name}, output {i}: error {error / size:.2e}, stock's is {own / size:.2e}"


def check_training(
    ours: nn.Module,
    stock: nn.Module,
    x: Tensor,
    *,
    steps: int = 3,
    lr: float = 1e-5,
    bn: bool = True,
    rename: Rename | None = None,
    chaotic: bool = False,
) -> None:
    """Loss and every gradient of the first step, running statistics after ``steps`` steps of SGD, in fp32 and fp64.

    The rate is small: at 1e-3 three steps of a deep net amplify fp64's own rounding to 1e-5, at 1e-5 to 1e-6.

    ``ours`` and ``stock`` have the same weights. ``rename`` gives stock's tensors our names; without it they are compared by
    name, or in their order of definition where the names differ. ``chaotic``: for nets that amplify fp64's rounding by many
    orders of magnitude (a hundred layers without shortcuts, statistics of a few values); then each quantity may in fp64 differ
    by ten times what one unit in the last place of the input does to stock.
    """
    # Up or down by one unit at random: BatchNorm would take a common factor out again.
    ulp = 1 + 2**-52 * image(*x.shape, seed=5).sign().double()
    runs = {}
    # The fp64 twins first, for training changes the weights, and one at a time: the paper's YOLO is 2 GB a copy.
    for name, net in (
        ("ours64", ours),
        ("truth", stock),
        *([("nudged", stock)] if chaotic else []),
        ("ours", ours),
        ("stock", stock),
    ):
        net = net if name in ("ours", "stock") else copy.deepcopy(net).double()
        runs[name] = _train(net.train(), x, steps, lr, ulp if name == "nudged" else None)
        if bn:
            counts = {int(b) for key, b in net.named_buffers() if key.endswith("num_batches_tracked")}
            assert counts == {steps}, name
    losses, grads, statistics = ({name: run[i] for name, run in runs.items()} for i in range(3))
    slack = 10 * abs(float(losses["nudged"] / losses["truth"]) - 1) if chaotic else 0.0
    close(losses["ours64"], losses["truth"], 1e-10 + slack, "loss in fp64")
    own = abs(float(losses["stock"] / losses["truth"]) - 1)
    close(losses["ours"], losses["truth"], 2 * own + 1e-4 + slack * 2**29, "loss")  # fp32's unit is 2^29 of fp64's
    check_norms(grads, rename, "gradient", 1e-7)
    if bn:
        assert statistics["truth"], "the model has no BatchNorm"
        check_norms(statistics, rename, "statistics", 1e-5)


def _train(
    net: nn.Module, x: Tensor, steps: int, lr: float, nudge: Tensor | None
) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
    """Loss and gradients of the first step, running statistics after the last; ``nudge`` is a factor on the input.

    ``zero_grad`` lets go of the tensors and writes no zeros into them, so the gradients need no copy.
    """
    optimizer = torch.optim.SGD(net.parameters(), lr)
    found: tuple[Tensor, dict[str, Tensor]] | None = None
    for step in range(steps):
        optimizer.zero_grad()
        torch.manual_seed(step)  # dropout draws the same numbers in every dtype
        batch = (x + 0.1 * step).to(next(net.parameters()).dtype)
        outs = _outputs(net(batch if nudge is None else batch * nudge))
        generator = torch.Generator().manual_seed(7)
        weights = [torch.randn(o.shape, generator=generator).to(o.dtype) for o in outs]
        # A random functional of all outputs: no gradient is zero by symmetry.
        loss = sum((o * w).mean() + o.square().mean() for o, w in zip(outs, weights, strict=True))
        loss.backward()
        found = found or (loss.detach(), _named(net, "grad"))
        optimizer.step()
    net.zero_grad()
    return *found, _named(net, "statistics")


def close(got: Tensor, want: Tensor, relative: float, name: str) -> None:
    assert abs(float(got) - float(want)) <= relative * abs(float(want)), (
        f"{name}: {float(got):.12g}, expected {float(want):.12g}"
    )


def aligned(tensors: dict[str, dict[str, Tensor]], rename: Rename | None) -> dict[str, dict[str, Tensor]]:
    """Everything under our names."""
    names = tensors["ours"]
    out = {}
    for who, mapping in tensors.items():
        if not who.startswith("ours"):
            if rename is not None:
                mapping = rename(mapping)
            elif mapping.keys() != names.keys():
                assert len(mapping) == len(names)
                mapping = dict(zip(names, mapping.values(), strict=True))
        assert mapping.keys() == names.keys(), who
        out[who] = mapping
    return out


def check_norms(tensors: dict[str, dict[str, Tensor]], rename: Rename | None, what: str, tolerance: float) -> None:
    """In fp64 each tensor equals stock's; in fp32 all of them together are near, as stock's are."""
    named = aligned(tensors, rename)
    truth = named["truth"]
    size = {k: float(t.norm()) for k, t in truth.items()}
    scale = _total(size)
    assert scale > 0, f"{what}: all zero"
    for name, want in truth.items():
        got = named["ours64"][name]
        assert got.shape == want.shape, f"{what} of {name}: shape {tuple(got.shape)}, expected {tuple(want.shape)}"
        error = float((got - want).norm())
        slack = 10 * float((named["nudged"][name] - want).norm()) if "nudged" in named else 0.0
        assert error <= tolerance * size[name] + tolerance / 100 * scale + slack, (
            f"{what} of {name} in fp64: error {error:.2e} of {size[name]:.2e}"
        )
    mine, own = (_total({k: float((named[who][k].double() - t).norm()) for k, t in truth.items()}) for who in ("ours", "stock"))
    assert mine <= 6 * own + 0.01 * scale, f"{what}: error {mine / scale:.2e} of the norm, stock's is {own / scale:.2e}"


def _total(values: dict[str, float]) -> float:
    return sum(v * v for v in values.values()) ** 0.5


def _named(net: nn.Module, kind: str) -> dict[str, Tensor]:
    if kind == "grad":
        missing = [name for name, p in net.named_parameters() if p.grad is None]
        assert not missing, f"no gradient: {missing[:5]}"
        return {name: p.grad.detach() for name, p in net.named_parameters()}
    return {name: b.clone() for name, b in net.named_buffers() if name.endswith(("running_mean", "running_var"))}


def _outputs(result: Any) -> Sequence[Tensor]:
    return [result] if isinstance(result, Tensor) else list(result)


def image(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
