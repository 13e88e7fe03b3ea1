"""Our model against an independent implementation with the same weights: outputs, every gradient, running statistics.

The rule is that of the package: at most twice stock eager's own error against fp64. Rounding moves values across the kinks of
ReLU and max-pooling, in stock torch as in ours, so gradients are judged in the norm: all of them together at twice stock's
error, and each one at four times the larger of its own and the average one.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from _assert import no_worse_than_torch
from torch import Tensor, nn

NORMS = nn.modules.batchnorm._BatchNorm
Rename = Callable[[dict[str, Tensor]], dict[str, Tensor]]


def seeded(model: nn.Module, seed: int = 0) -> nn.Module:
    """BatchNorm statistics and parameters away from the neutral ones, biases away from 0; the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(tensor: Tensor, low: float, high: float) -> None:
        tensor.data.copy_(torch.rand(tensor.shape, generator=generator) * (high - low) + low)

    for m in model.modules():
        if isinstance(m, NORMS):
            uniform(m.running_mean, -0.2, 0.2)
            uniform(m.running_var, 0.7, 1.4)
            uniform(m.weight, 0.6, 1.4)
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
    """Outputs in eval, without and with gradients, NCHW and channels_last."""
    ours.eval(), stock.eval()
    truth = copy.deepcopy(stock).double()
    last = torch.channels_last if x.dim() == 4 else torch.channels_last_3d
    with torch.no_grad():
        want, true = _outputs(stock(x)), _outputs(truth(x.double()))
        runs = {"no_grad": _outputs(ours(x)), "channels_last": _outputs(ours(x.contiguous(memory_format=last)))}
    runs["grad"] = _outputs(ours(x))
    if shape is not None:
        assert tuple(want[-1].shape) == shape
    for name, got in runs.items():
        assert len(got) == len(want)
        for i, (g, w, t) in enumerate(zip(got, want, true, strict=True)):
            no_worse_than_torch(g, w, t, f"{name}, output {i}")


def check_training(ours: nn.Module, stock: nn.Module, x: Tensor, *, steps: int = 3, lr: float = 1e-3, bn: bool = True) -> None:
    """Loss and every gradient of the first step, running statistics after ``steps`` steps of SGD.

    ``ours`` and ``stock`` have the same weights; parameters are compared in their order of definition unless names agree.
    """
    nets = {"ours": ours.train(), "stock": stock.train(), "truth": copy.deepcopy(stock).double().train()}
    optimizers = {name: torch.optim.SGD(net.parameters(), lr) for name, net in nets.items()}
    projections: list[Tensor] = []
    for step in range(steps):
        losses, grads = {}, {}
        for name, net in nets.items():
            optimizers[name].zero_grad()
            torch.manual_seed(step)  # dropout
            outs = _outputs(net((x + 0.1 * step).to(next(net.parameters()).dtype)))
            if not projections:
                generator = torch.Generator().manual_seed(7)
                projections = [torch.randn(o.shape, generator=generator, dtype=torch.float64) for o in outs]
            # A random functional of all outputs: no gradient is zero by symmetry.
            loss = sum((o * p.to(o.dtype)).mean() + o.square().mean() for o, p in zip(outs, projections, strict=True))
            loss.backward()
            losses[name] = loss.detach()
            if step == 0:
                grads[name] = _named(net, "grad")
            optimizers[name].step()
        if step == 0:
            close(losses["ours"], losses["stock"], losses["truth"], "loss")
            check_norms(pair(grads["ours"], grads["stock"]), grads["stock"], grads["truth"], "gradient")
    if bn:
        statistics = {name: _named(net, "statistics") for name, net in nets.items()}
        assert statistics["stock"], "the model has no BatchNorm"
        check_norms(pair(statistics["ours"], statistics["stock"]), statistics["stock"], statistics["truth"], "statistics")
        for name, net in nets.items():
            counts = [int(m.num_batches_tracked) for m in net.modules() if isinstance(m, NORMS)]
            assert set(counts) == {steps}, name


def close(ours: Tensor, stock: Tensor, truth: Tensor, name: str) -> None:
    """A single number: its error is luck, so a few ulp are allowed."""
    error, own, size = (float((t.double() - truth).abs()) for t in (ours, stock, torch.zeros_like(truth)))
    assert error <= 2 * own + 1e-5 * size + 1e-7, (
        f"{name}: {float(ours):.9g}, stock {float(stock):.9g}, fp64 {float(truth):.9g}"
    )


def pair(ours: dict[str, Tensor], stock: dict[str, Tensor]) -> dict[str, Tensor]:
    """Ours under stock's names: by name where the names agree, else by the order of definition."""
    if ours.keys() == stock.keys():
        return {name: ours[name] for name in stock}
    assert len(ours) == len(stock)
    return dict(zip(stock, ours.values(), strict=True))


def check_norms(ours: dict[str, Tensor], stock: dict[str, Tensor], truth: dict[str, Tensor], what: str) -> None:
    """The rule of this module's first paragraph."""
    assert ours.keys() == stock.keys()
    size = {k: float(t.norm()) for k, t in truth.items()}
    mine, own = ({k: float((t[k].double() - truth[k]).norm()) for k in truth} for t in (ours, stock))
    scale = _total(size)
    assert scale > 0, f"{what}: all zero"
    allowed = 2 * _total(own) + 1e-6 * scale
    assert _total(mine) <= allowed, f"{what}: error {_total(mine) / scale:.2e} of the norm, allowed {allowed / scale:.2e}"
    average = _total(own) / scale
    for name in truth:
        assert ours[name].shape == stock[name].shape, name
        floor = 4 * average * size[name] + 1e-6 * size[name] + 1e-7 * scale
        assert mine[name] <= 4 * own[name] + floor, f"{what} of {name}: error {mine[name]:.2e}, stock's {own[name]:.2e}"


def _total(values: dict[str, float]) -> float:
    return sum(v * v for v in values.values()) ** 0.5


def _named(net: nn.Module, kind: str) -> dict[str, Tensor]:
    if kind == "grad":
        missing = [name for name, p in net.named_parameters() if p.grad is None]
        assert not missing, f"no gradient: {missing[:5]}"
        return {name: p.grad.detach().clone() for name, p in net.named_parameters()}
    return {name: b.clone() for name, b in net.named_buffers() if name.endswith(("running_mean", "running_var"))}


def _outputs(result: Any) -> Sequence[Tensor]:
    return [result] if isinstance(result, Tensor) else list(result)


def image(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
