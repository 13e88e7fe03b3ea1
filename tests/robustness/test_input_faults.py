"""Bad and odd inputs to the convolution, BatchNorm, addition and pooling functions: F01 to F08, F17, F24, F25, F27.

Row numbers are those of the fault checklist. What stock torch does is the expectation: the same result, or its exception type
with a message that names the op.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from _stock import bn_vectors, same
from torch import Tensor, nn

import dl4ds_kernels as dk
from dl4ds_kernels import functional as F

X = torch.randn(2, 8, 6, 10)
BN = bn_vectors(8)
W = torch.randn(5, 8, 3, 3)
BN5 = dict(zip(("running_mean", "running_var", "bn_weight", "bn_bias"), bn_vectors(5), strict=True))
EACH = pytest.mark.parametrize("backend", [None, "cpu"], ids=lambda b: b or "auto")


@EACH
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("shape", [(0, 8, 6, 10), (2, 8, 0, 10)], ids=str)
def test_F01_empty_batch(shape: tuple[int, ...], training: bool, backend: str | None, kernels: None) -> None:
    """Outputs of the right shape, zero gradients, running statistics as torch leaves them."""
    x = torch.randn(shape)
    same("bn_act", x, *BN, training=training, backend=backend)
    same("add_act", x, x, backend=backend)
    same("add_bn_act", x, x, *BN, training=training, backend=backend)
    same("upsample_add", x, torch.randn(shape[0], 8, 2 * shape[2], 20), backend=backend)
    if shape[2]:  # a convolution needs height
        same("conv_bn_act", x, W, **BN5, training=training, backend=backend)
        same("bn_act_conv", x, *BN, W, training=training, backend=backend)
        same("max_pool_indices", x, backend=backend)
        leaf, weight = x.clone().requires_grad_(), W.clone().requires_grad_()
        F.conv_bn_act(
            leaf, weight, **{k: v.clone() for k, v in BN5.items()}, training=training, backend=backend
        ).sum().backward()
        assert leaf.grad.shape == shape and weight.grad.eq(0).all()
    leaf, scale = x.clone().requires_grad_(), BN[2].clone().requires_grad_()
    F.bn_act(leaf, BN[0].clone(), BN[1].clone(), scale, BN[3], training=training, backend=backend).sum().backward()
    assert leaf.grad.shape == shape and scale.grad.eq(0).all()


def test_F01_empty_batch_through_a_model() -> None:
    stock = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()).eval()
    assert dk.optimize(stock)(torch.empty(0, 3, 9, 9)).shape == stock(torch.empty(0, 3, 9, 9)).shape == (0, 8, 7, 7)


@EACH
def test_F02_unbatched_image(backend: str | None, kernels: None) -> None:
    """(C, H, W) goes through the convolution; BatchNorm alone has no unbatched form in torch."""
    same("conv_bn_act", X[0], W, **BN5, backend=backend, padding=1)
    same("conv_bn_act", X[0], W, **BN5, backend=backend, padding=1, residual=torch.randn(5, 6, 10))
    leaf = X[0].clone().requires_grad_()
    F.conv_bn_act(leaf, W, **BN5, backend=backend).sum().backward()
    assert leaf.grad.shape == X[0].shape


@EACH
def test_F03_wrong_number_of_channels(backend: str | None) -> None:
    """A RuntimeError that names what was expected and what came."""
    with torch.no_grad():
        with pytest.raises(RuntimeError, match=r"conv_bn_act: x: expected 8 channels .*got 7"):
            F.conv_bn_act(X[:, :7], W, **BN5, backend=backend)
        with pytest.raises(RuntimeError, match=r"bn_act: running_mean: expected shape \(C,\) = \(7,\), got \(8,\)"):
            F.bn_act(X[:, :7], *BN, backend=backend)
        with pytest.raises(RuntimeError, match=r"bn_act_conv: x: expected 8 channels"):
            F.bn_act_conv(X[:, :7], *bn_vectors(7), W, backend=backend)
        with pytest.raises(RuntimeError, match=r"add_bn_act: running_mean: expected shape"):
            F.add_bn_act(X[:, :7], X[:, :7], *BN, backend=backend)


def test_F03_wrong_channels_through_a_model() -> None:
    model = dk.optimize(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()).eval())
    with pytest.raises(RuntimeError, match="3 channels"):
        model(torch.randn(1, 4, 9, 9))


@EACH
def test_F04_input_smaller_than_the_kernel(backend: str | None) -> None:
    error = same("conv_bn_act", X[:, :, :2], W, **BN5, backend=backend)
    assert isinstance(error, RuntimeError) and "ernel" in str(error)
    error = same("bn_act_conv", X[..., :2], *BN, W, backend=backend)
    assert isinstance(error, RuntimeError) and "ernel" in str(error)


@EACH
@pytest.mark.parametrize("dims", [0, 1, 5, 6])
def test_F05_ranks(dims: int, backend: str | None) -> None:
    x = torch.randn((2, 8, 2, 3, 2, 2)[:dims])
    for name, arguments in (
        ("bn_act", (x, *BN)),
        ("add_bn_act", (x, x, *BN)),
        ("bn_act_conv", (x, *BN, W)),
        ("max_pool_indices", (x,)),
    ):
        if name in ("bn_act", "add_bn_act") and (dims == 5 or (dims == 6 and backend is None)):
            same(name, *arguments, backend=backend)  # torch.nn.functional.batch_norm takes more dimensions than the kernels
            continue
        with torch.no_grad(), pytest.raises((RuntimeError, ValueError), match=f"{name}|bn_act|dimension"):
            getattr(F, name)(*arguments, backend=backend)
    assert isinstance(same("conv_bn_act", x, W, **BN5, backend=backend), RuntimeError)
    same("add_act", x, x, backend=backend)  # any rank


def test_F05_rank_does_not_matter_less_when_large(kernels: None) -> None:
    """Six dimensions above the size from which the kernels are chosen: still torch's own result."""
    same("bn_act", torch.randn(2, 8, 16, 16, 8, 2), *BN)


@EACH
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.uint8, torch.bool], ids=str)
def test_F06_integers(dtype: torch.dtype, backend: str | None) -> None:
    x = torch.ones(2, 8, 6, 10, dtype=dtype)
    for name, arguments, options in (
        ("bn_act", (x, *BN), {}),
        ("conv_bn_act", (x, W), BN5),
        ("conv_bn_act", (X, W.to(dtype)), BN5),
        ("bn_act_conv", (x, *BN, W), {}),
        ("bn_act", (X, BN[0], BN[1], BN[2].to(dtype)), {}),
    ):
        with torch.no_grad(), pytest.raises(RuntimeError, match=f"{name}: (x|weight|bn_weight): expected .*got {dtype}"):
            getattr(F, name)(*arguments, **options, backend=backend)
    for name, arguments in (("max_pool_indices", (x,)), ("upsample_add", (x, x.repeat(1, 1, 2, 2)))):
        if backend == "cpu":
            with pytest.raises(RuntimeError, match=f"{name}: "):
                getattr(F, name)(*arguments, backend=backend)
    if dtype != torch.bool:  # addition has integers in torch, and so here
        same("add_act", x, x)


@EACH
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_F07_no_silent_cast(dtype: torch.dtype, backend: str | None) -> None:
    """Another dtype than the weights' is an error outside autocast, as in torch; inside it is what autocast is for."""
    error = same("conv_bn_act", X.to(dtype), W, **BN5, backend=backend)
    assert isinstance(error, RuntimeError) and f"conv_bn_act: weight: expected dtype {dtype} like x" in str(error)
    if dtype == torch.float64:
        assert "bn_act" in str(same("bn_act", X.to(dtype), *BN, backend=backend))
    else:
        same("bn_act", X.to(dtype), *BN, backend=backend)  # float32 vectors beside 16-bit floats are the normal case
    if dtype == torch.bfloat16:
        with torch.autocast("cpu", dtype), torch.no_grad():
            assert F.conv_bn_act(X, W, **BN5, backend=backend).dtype == torch.bfloat16


@EACH
@pytest.mark.parametrize("shape", [(1, 8), (1, 8, 1), (1, 8, 1, 1), (1, 8, 1, 1, 1)], ids=str)
def test_F08_one_value_per_channel(shape: tuple[int, ...], backend: str | None) -> None:
    """torch's ValueError in training, torch's result in eval."""
    x = torch.randn(shape)
    error = same("bn_act", x, *BN, training=True, backend=backend)
    assert isinstance(error, ValueError) and "more than 1 value per channel" in str(error) and str(shape) in str(error)
    same("bn_act", x, *BN, backend=backend)
    if len(shape) == 4:
        error = same("conv_bn_act", x, W[:, :, :1, :1], **BN5, training=True, backend=backend)
        assert isinstance(error, ValueError) and "more than 1 value per channel" in str(error)
        layer = dk.modules.ConvBNAct2d(8, 5, 1)
        with pytest.raises(ValueError, match="more than 1 value per channel"):
            layer(x)


@EACH
def test_F17_residual_of_another_shape_dtype_layout_or_device(backend: str | None, kernels: None) -> None:
    """What torch.add broadcasts and promotes, ours does; what it refuses, ours refuses by name."""
    x = torch.randn(2, 8, 6, 10)
    for other in (
        torch.randn(8, 1, 1), torch.randn(6, 10), torch.randn(()), torch.randn(2, 8, 6, 10, dtype=torch.float64),
        torch.randn(2, 8, 6, 10).half(), torch.randint(0, 9, (2, 8, 6, 10)), x.to(memory_format=torch.channels_last),
        torch.randn(1, 8, 6, 10).expand(2, 8, 6, 10), torch.randn(2, 8, 12, 10)[:, :, ::2], torch.randn(2, 8, 6, 1),
    ):  # fmt: skip
        same("add_act", x, other, backend=backend)
        same("bn_act", x, *BN, residual=other, backend=backend)
        same("conv_bn_act", x, torch.randn(8, 8, 1, 1), running_mean=BN[0], running_var=BN[1], residual=other, backend=backend)
    for other in (torch.randn(2, 7, 6, 10), torch.randn(3, 8, 6, 10)):
        for error, name in (
            (same("add_act", x, other, backend=backend), "add_act: residual"),
            (same("bn_act", x, *BN, residual=other, backend=backend), "bn_act: residual"),
            (same("conv_bn_act", x, W, **BN5, residual=other, backend=backend), "conv_bn_act: residual"),
        ):
            assert isinstance(error, RuntimeError) and name in str(error)
    elsewhere = x.to("meta")
    for call in (
        lambda: F.add_act(x, elsewhere, backend=backend),
        lambda: F.bn_act(x, *BN, residual=elsewhere, backend=backend),
        lambda: F.add_bn_act(x, elsewhere, *BN, backend=backend),
    ):
        with pytest.raises(RuntimeError, match="residual: expected a tensor on cpu like x, got meta"):
            call()


class Tagged(Tensor):
    """A subclass that keeps itself through torch's functions, as wrappers of data sets do."""


def test_F24_tensor_subclass(kernels: None) -> None:
    """Computes what the plain tensor gives and stays a subclass."""
    big = torch.randn(2, 8, 64, 64)
    for x in (X, big):
        tagged = x.as_subclass(Tagged)
        for name, arguments in (("add_act", (x, x)), ("bn_act", (x, *BN)), ("max_pool_indices", (x,))):
            ours = getattr(F, name)(tagged, *arguments[1:])
            expected = getattr(F, name)(*arguments)
            first, second = (ours[0], expected[0]) if isinstance(ours, tuple) else (ours, expected)
            assert isinstance(first, Tagged) and torch.equal(first.as_subclass(Tensor), second)


def test_F24_fake_and_functional_modes(kernels: None) -> None:
    """FakeTensor gives shapes without data; vmap and functorch transforms give stock's numbers or say no."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    big = torch.randn(2, 8, 64, 64)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = mode.from_tensor(big.to(memory_format=torch.channels_last))
        out = F.bn_act(fake, *BN, residual=fake)
        assert out.shape == big.shape and out.is_contiguous(memory_format=torch.channels_last)
        assert F.add_act(fake, fake).shape == big.shape
    batch = torch.randn(3, 2, 8, 32, 32)
    for function in (lambda x: F.add_act(x, x), lambda x: F.bn_act(x, *BN)):
        expected = torch.stack([function(x) for x in batch])
        try:
            got = torch.func.vmap(function)(batch)
        except (RuntimeError, NotImplementedError) as error:
            assert "vmap" in str(error) or "batching" in str(error)
        else:
            torch.testing.assert_close(got, expected)


def test_F24_distributed_tensor(kernels: None) -> None:
    """A DTensor on one process: computed, or an error that says what is not implemented; never a wrong number."""
    import torch.distributed as dist

    if not dist.is_available():
        pytest.skip("this torch has no torch.distributed")
    from torch.distributed.tensor import distribute_tensor, init_device_mesh

    started = not dist.is_initialized()
    if started:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        x = torch.randn(2, 8, 64, 64)
        shared = distribute_tensor(x, mesh)
        try:
            got = F.add_act(shared, shared).full_tensor()
        except (RuntimeError, NotImplementedError) as error:
            assert "add_act" in str(error) or "sharding" in str(error).lower() or "DTensor" in str(error)
        else:
            assert torch.equal(got, torch.relu(x + x))
    finally:
        if started:
            dist.destroy_process_group()


STRANGE = {
    "sparse": lambda x: x.to_sparse(),
    "mkldnn": lambda x: x.to_mkldnn(),
    "nested": lambda x: torch.nested.nested_tensor([x[0], x[1, :, :4]]),
    "quantized": lambda x: torch.quantize_per_tensor(x, 0.1, 0, torch.qint8),
}


@EACH
@pytest.mark.parametrize("kind", STRANGE)
@pytest.mark.filterwarnings("ignore")
def test_F25_layouts_without_kernels(kind: str, backend: str | None, kernels: None) -> None:
    """A clear error, or exactly what stock torch makes of it (auto falls back); no wild memory access."""
    x = STRANGE[kind](torch.randn(2, 8, 64, 64))
    for name, arguments, options in (
        ("add_act", (x, x), {}),
        ("bn_act", (x, *BN), {}),
        ("conv_bn_act", (x, W), BN5),
        ("max_pool_indices", (x,), {}),
        ("bn_act", (torch.randn(2, 8, 64, 64), *BN), {"residual": x}),
    ):
        try:
            with torch.no_grad():
                out = getattr(F, name)(*arguments, **options, backend=backend)
        except Exception as error:
            assert isinstance(error, (RuntimeError, NotImplementedError, ValueError, TypeError)), error
            assert str(error)
        else:
            from _stock import STOCK

            expected = STOCK[name](*arguments, **options)
            out, expected = (t[0] if isinstance(t, tuple) else t for t in (out, expected))
            assert out.layout == expected.layout and out.is_quantized == expected.is_quantized
            out, expected = (t.dequantize() if t.is_quantized else t for t in (out, expected))
            if kind != "nested":
                torch.testing.assert_close(out.to_dense(), expected.to_dense())


def test_F25_meta_tensors() -> None:
    """Shapes without data, like stock."""
    x = X.to("meta")
    bn = [v.to("meta") for v in BN]
    assert F.add_act(x, x).device.type == "meta"
    assert F.bn_act(x, *bn).shape == x.shape
    out = F.conv_bn_act(x, W.to("meta"), **{k: v.to("meta") for k, v in BN5.items()})
    assert out.device.type == "meta" and out.shape == (2, 5, 4, 8)


def test_F25_quantized_nms_still_reaches_torchvision() -> None:
    torchvision = pytest.importorskip("torchvision", reason="quantized NMS is torchvision's")
    boxes = torch.tensor([[0.0, 0.0, 10.0, 10.0], [1.0, 0.0, 11.0, 10.0], [50.0, 50.0, 60.0, 60.0]])
    scores = torch.tensor([0.9, 0.8, 0.7])
    quantized = torch.quantize_per_tensor(boxes, 1.0, 0, torch.quint8), torch.quantize_per_tensor(scores, 0.01, 0, torch.quint8)
    with dk.patch_torchvision_nms():
        assert torchvision.ops.nms(*quantized, 0.5).tolist() == torchvision.ops.nms(boxes, scores, 0.5).tolist() == [0, 2]


@EACH
def test_F27_complex(backend: str | None) -> None:
    x = torch.randn(2, 8, 64, 64, dtype=torch.complex64)
    for name, arguments, options in (("bn_act", (x, *BN), {}), ("conv_bn_act", (x, W), BN5)):
        with torch.no_grad(), pytest.raises((RuntimeError, TypeError), match=f"{name}: x: .*complex64"):
            getattr(F, name)(*arguments, **options, backend=backend)
    with pytest.raises((RuntimeError, TypeError)):  # relu of complex numbers does not exist in torch either
        F.add_act(x, x, backend=backend)
    assert torch.equal(F.add_act(x, x, activation="none"), x + x)


@EACH
def test_F27_conjugate_and_negative_views(backend: str | None, kernels: None) -> None:
    """Lazy negation: the imaginary part of a conjugate is a float tensor whose memory holds the other sign."""
    z = torch.randn(2, 8, 64, 64, dtype=torch.complex64)
    lazy = z.conj().imag
    assert lazy.is_neg()
    plain: Any = lazy.resolve_neg()
    for name, ours, expected in (
        ("add_act", (lazy, lazy), (plain, plain)),
        ("bn_act", (lazy, *BN), (plain, *BN)),
        ("max_pool_indices", (lazy,), (plain,)),
        ("upsample_add", (lazy[:, :, :32, :32], lazy), (plain[:, :, :32, :32], plain)),
    ):
        got, want = (getattr(F, name)(*a, backend=backend) for a in (ours, expected))
        got, want = (t[0] if isinstance(t, tuple) else t for t in (got, want))
        torch.testing.assert_close(got, want, rtol=0, atol=0)
    got = F.bn_act(plain, *BN, residual=lazy, backend=backend)
    torch.testing.assert_close(got, F.bn_act(plain, *BN, residual=plain, backend=backend), rtol=0, atol=0)
