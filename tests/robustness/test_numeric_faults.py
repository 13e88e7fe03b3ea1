"""Values that break kernels: F09, F10, F14 to F16, and the modes that change dtypes or order: F45, F47."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as TF
from _assert import no_worse_than_torch, same_non_finite
from _cases import ACTIVATIONS
from _stock import ACTS, bn_vectors, same
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import dl4ds_kernels as dk
from dl4ds_kernels import functional as F

EACH = pytest.mark.parametrize("backend", [None, "cpu"], ids=lambda b: b or "auto")
NAN, INF = float("nan"), float("inf")


def image(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize(
    "options",
    [{"momentum": None}, {"affine": False}, {"track_running_stats": False}, {"affine": False, "track_running_stats": False}],
    ids=lambda o: "-".join(o),
)
def test_F09_batch_norm_variants(options: dict[str, Any]) -> None:
    """Same keys, same numbers, same running statistics over four training steps and an eval pass."""
    stock = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8, **options), nn.ReLU())
    model = dk.optimize(stock)
    assert list(model.state_dict()) == list(stock.state_dict())
    for step in range(4):
        x = image(4, 3, 9, 9, seed=step)
        torch.testing.assert_close(model(x), stock(x), rtol=1e-4, atol=1e-5)
    for key, value in stock.state_dict().items():
        torch.testing.assert_close(model.state_dict()[key], value, rtol=1e-4, atol=1e-6)
    x = image(4, 3, 9, 9, seed=9)
    torch.testing.assert_close(model.eval()(x), stock.eval()(x), rtol=1e-4, atol=1e-5)


@EACH
def test_F09_functional_without_statistics_or_affine(backend: str | None, kernels: None) -> None:
    x = image(4, 8, 9, 9)
    same("bn_act", x, None, None, training=True, backend=backend)
    same("bn_act", x, *bn_vectors(8)[:2], training=True, momentum=1.0, backend=backend)
    same("bn_act", x, *bn_vectors(8)[:2], training=True, momentum=0.0, backend=backend)
    assert isinstance(same("bn_act", x, None, None, backend=backend), RuntimeError)


@EACH
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_F10_no_variance_and_no_eps(dtype: torch.dtype, backend: str | None, kernels: None) -> None:
    """1 / sqrt(0): not finite where torch is not; a constant channel in training is zero before the bias.

    torch's CPU kernel has NaN throughout such a channel, its CUDA kernel and ours (x - mean) * Inf: Inf with the right sign.
    """
    x = image(2, 4, 6, 5, dtype=dtype)
    x[:, 1] = 0.25
    mean, var = torch.tensor([0.0, 0.25, 0.0, 0.0], dtype=dtype), torch.tensor([0.0, 0.0, 1.0, 0.0], dtype=dtype)
    for vectors in ((), (torch.ones(4, dtype=dtype), torch.zeros(4, dtype=dtype))):
        ours = F.bn_act(x, mean, var, *vectors, eps=0.0, activation="none", backend=backend)
        stock = TF.batch_norm(x, mean, var, *vectors, eps=0.0)
        assert torch.equal(ours.isfinite(), stock.isfinite())
        assert ours[:, 1].isnan().all() and (ours.isinf() <= (ours.sign() == (x - mean.view(1, 4, 1, 1)).sign())).all()
    constant = torch.full((2, 4, 6, 5), 3.0, dtype=dtype)
    same("bn_act", constant, None, None, None, torch.arange(4).to(dtype), training=True, backend=backend)


SPECIAL = torch.tensor([NAN, INF, -INF, 0.0, -0.0, 1.0, -1.0, 3.4e38, -3.4e38, 1e-45, -1e-45, 6.0, 6.0001, 3.0, -3.0])


def special(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    x = image(*shape, dtype=torch.float32).flatten()
    x[::3] = SPECIAL.repeat(x[::3].numel() // len(SPECIAL) + 1)[: x[::3].numel()]
    return x.view(shape).to(dtype)


@pytest.mark.parametrize("backend", [None, "cpu", "reference"], ids=lambda b: b or "auto")
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_F14_nan_and_infinity_pass_through(dtype: torch.dtype, activation: str, backend: str | None, kernels: None) -> None:
    """NaN stays NaN through every activation (a max that drops NaN would make it 0), Inf keeps its sign."""
    x = special(2, 8, 37, 41, dtype=dtype)
    zero = torch.zeros_like(x)
    ours = F.add_act(x, zero, activation=activation, backend=backend)
    stock = ACTS[activation](x + zero, 0.1)
    same_non_finite(ours, stock)
    if backend == "reference":  # its BatchNorm subtracts and divides, stock's folds: they overflow at other values
        return
    bn = [v.to(dtype) for v in bn_vectors(8)]
    for residual in (None, special(2, 8, 37, 41, dtype=dtype).flip(0)):
        ours = F.bn_act(x, *bn, residual=residual, activation=activation, backend=backend)
        z = TF.batch_norm(x, *bn)
        stock = ACTS[activation](z if residual is None else z + residual, 0.1)
        if dtype in (torch.float16, torch.bfloat16):  # ours adds in fp32: Inf only where the sum itself overflows
            assert torch.equal(ours.isnan(), stock.isnan()) or residual is not None
            assert ours.isnan()[x.isnan()].all()
        else:
            same_non_finite(ours, stock)


@EACH
def test_F14_nan_in_training_stays_in_its_channel(backend: str | None, kernels: None) -> None:
    x = image(3, 8, 20, 20)
    x[1, 2, 3, 4], x[0, 5, 0, 0] = NAN, INF
    mean, var = (v.clone() for v in bn_vectors(8)[:2])
    out = F.bn_act(x, mean, var, training=True, backend=backend)
    poisoned = [c for c in range(8) if not out[:, c].isfinite().all()]
    assert poisoned == [2, 5] and out[:, 2].isnan().all() and mean.isfinite().tolist() == [c not in (2, 5) for c in range(8)]
    leaf = image(3, 8, 20, 20).requires_grad_()
    dout = torch.ones_like(leaf)
    dout[0, 1, 0, 0] = NAN
    (dx,) = torch.autograd.grad(F.bn_act(leaf, None, None, training=True, activation="none", backend=backend), leaf, dout)
    assert dx[:, 1].isnan().all() and dx[:, [0, 2, 3, 4, 5, 6, 7]].isfinite().all()


@EACH
def test_F14_pooling_keeps_nan(backend: str | None, kernels: None) -> None:
    x = special(2, 8, 38, 42)
    (out, where), (stock, _) = F.max_pool_indices(x, backend=backend), TF.max_pool2d(x, 2, 2, return_indices=True)
    assert torch.equal(out.isnan(), stock.isnan()) and torch.equal(out.nan_to_num(7), stock.nan_to_num(7))
    assert where.max() <= 3


@EACH
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
def test_F15_sums_that_overflow_or_cancel(layout: torch.memory_format, backend: str | None, kernels: None) -> None:
    """fp16 sums beyond 65,504, and a variance a millionth of the mean: fp32 accumulators and Welford, near fp64."""
    half = (image(8, 4, 32, 32) * 0.5 + 300).half().to(memory_format=layout)  # the sum of a channel is 2.4 million
    same("bn_act", half, *bn_vectors(4), training=True, activation="none", backend=backend)
    large = (image(8, 4, 32, 32) * 200 + 3e4).half().to(memory_format=layout)
    ours = F.bn_act(large, *(v.clone() for v in bn_vectors(4)), training=True, activation="none", backend=backend)
    assert ours.isfinite().all()
    for mean in (1e3, 1e5):
        x = (image(8, 4, 32, 32) + mean).to(memory_format=layout)
        ours = F.bn_act(x, None, None, training=True, activation="none", backend=backend)
        truth = TF.batch_norm(x.double(), None, None, training=True)
        no_worse_than_torch(ours, TF.batch_norm(x, None, None, training=True), truth)
        assert (ours.double() - truth).abs().max() < 0.05  # sum(x^2) - mean^2 in fp32 would be off by more than the value


@EACH
def test_F16_denormals_and_the_sign_of_zero(backend: str | None, kernels: None) -> None:
    """Nothing is flushed, and -0.0 has stock's sign after every activation."""
    tiny = torch.tensor([1e-45, -1e-45, 1e-40, -1e-40, 1.1754944e-38, 0.0, -0.0]).repeat(6000)[: 8 * 37 * 41 * 3].view(-1)
    x = torch.cat([tiny, tiny])[: 2 * 8 * 41 * 50].view(2, 8, 41, 50)
    zero, minus = torch.zeros_like(x), torch.full_like(x, -0.0)
    for activation in ACTIVATIONS:
        for other in (zero, minus):
            ours = F.add_act(x, other, activation=activation, backend=backend)
            stock = ACTS[activation](x + other, 0.1)
            if activation in ("none", "relu", "leaky_relu", "relu6"):
                assert torch.equal(ours, stock) and torch.equal(ours.signbit(), stock.signbit()), activation
            else:
                torch.testing.assert_close(ours, stock, rtol=1e-5, atol=3e-45)
    out = F.bn_act(x, torch.zeros(8), torch.ones(8), eps=0.0, activation="relu", backend=backend)
    stock = torch.relu(TF.batch_norm(x, torch.zeros(8), torch.ones(8), eps=0.0))
    assert torch.equal(out, stock) and (out != 0).any()
    pooled = F.max_pool_indices(minus[:, :, :40], backend=backend)[0]
    assert torch.equal(pooled.signbit(), TF.max_pool2d(minus[:, :, :40], 2).signbit())


def model() -> nn.Sequential:
    torch.manual_seed(5)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.BatchNorm2d(16), nn.ReLU()
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_F45_autocast(dtype: torch.dtype, training: bool, kernels: None) -> None:
    """Outputs in the autocast dtype, parameters and gradients in fp32, as in stock; within the dtype's rounding."""
    stock = model().train(training)
    ours = dk.optimize(stock)
    x = image(4, 3, 40, 40)
    results = []
    for net in (ours, stock):
        with torch.autocast("cpu", dtype):
            out = net(x)
        out.float().square().mean().backward()
        results.append((out, net[0].weight.grad, net[1].weight.grad, net[1].running_mean))
    for a, b in zip(*results, strict=True):
        assert a.dtype == b.dtype
        scale = b.float().abs().max().item()
        assert (a.float() - b.float()).abs().max() <= 20 * torch.finfo(dtype).eps * scale


def test_F45_grad_scaler(kernels: None) -> None:
    """An overflow skips the step and halves the scale, as with stock modules."""
    net = dk.optimize(model())
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    before = net[0].weight.detach().clone()
    scaler.scale(net(image(4, 3, 40, 40)).mean() * INF).backward()
    scaler.step(optimizer)
    scaler.update()
    assert torch.equal(net[0].weight, before) and scaler.get_scale() == 2.0
    optimizer.zero_grad()
    scaler.scale(net(image(4, 3, 40, 40)).mean()).backward()
    scaler.step(optimizer)
    assert not torch.equal(net[0].weight, before)


def test_F45_checkpointing(kernels: None) -> None:
    """Recomputed in backward: the gradients of the plain call, bit for bit."""
    net = dk.optimize(model())
    x = image(4, 3, 40, 40)
    grads = []
    for run in (net, lambda t: checkpoint(net, t, use_reentrant=False)):
        net.zero_grad()
        run(x).square().mean().backward()
        grads.append(net[0].weight.grad.clone())
    assert torch.equal(*grads)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_F45_without_gradients(mode: Any, training: bool, kernels: None) -> None:
    stock = model().train(training)
    ours = dk.optimize(stock)
    x = image(4, 3, 40, 40)
    with mode():
        out, expected = ours(x), stock(x)
        torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
        assert not out.requires_grad and out.is_inference() == expected.is_inference()
    torch.testing.assert_close(ours[1].running_mean, stock[1].running_mean)
    torch.testing.assert_close(ours(x), stock(x), rtol=1e-4, atol=1e-5)  # the same model with gradients afterwards


def test_F45_frozen_batch_norm_in_a_training_model(kernels: None) -> None:
    """BatchNorm in eval, convolution in training: running statistics stay, every gradient is stock's."""
    stock = model().train()
    stock[1].eval()
    for parameter in stock[1].parameters():
        parameter.requires_grad_(False)
    ours = dk.optimize(stock)
    assert ours.training and not ours[1].training
    x = image(4, 3, 40, 40)
    for net in (ours, stock):
        net(x).square().mean().backward()
    assert torch.equal(ours[1].running_mean, torch.zeros(16)) and ours[1].weight.grad is None
    torch.testing.assert_close(ours[0].weight.grad, stock[0].weight.grad, rtol=1e-3, atol=1e-6)


@EACH
def test_F47_a_hundred_times_the_same_bits(backend: str | None, kernels: None) -> None:
    """Forward, gradients and running statistics, with deterministic algorithms on and any number of threads."""
    x, weight = image(4, 24, 33, 29), image(24, 24, 3, 3) / 15
    boxes = torch.rand(900, 2, generator=torch.Generator().manual_seed(1)) * 300
    boxes = torch.cat([boxes, boxes + 30], 1)
    scores = torch.rand(900, generator=torch.Generator().manual_seed(2))

    def once() -> list[Tensor]:
        leaf, mean, var = x.clone().requires_grad_(), torch.zeros(24), torch.ones(24)
        out = F.bn_act(leaf, mean, var, training=True, residual=leaf, backend=backend)
        total = F.add_act(out, leaf, backend=backend)
        (dx,) = torch.autograd.grad(total.square().sum(), leaf)
        with torch.no_grad():
            conv = F.conv_bn_act(x, weight, running_mean=mean, running_var=var, padding=1, backend=backend)
            pooled = F.max_pool_indices(x[:, :, :32, :28], backend=backend)
        return [total.detach(), dx, mean, var, conv, *pooled, F.nms(boxes, scores, 0.5, backend=backend)]

    was = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        first = once()
        for i in range(100):
            if i % 25 == 24:
                torch.set_num_threads(1 + i // 25 % 2)
            for a, b in zip(once(), first, strict=True):
                assert torch.equal(a, b), f"call {i}"
    finally:
        torch.use_deterministic_algorithms(was[0], warn_only=was[1])


@EACH
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
def test_F15_mean_that_drifts_through_the_image(layout: torch.memory_format, backend: str | None, kernels: None) -> None:
    """Parts of a channel with different means: merging their variances needs the distance of the means."""
    x = image(2, 8, 384, 128) + torch.linspace(0, 100, 384).view(1, 1, 384, 1)
    x = x.to(memory_format=layout)
    same("bn_act", x, *bn_vectors(8), training=True, activation="none", backend=backend)
