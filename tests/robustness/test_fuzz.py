"""Hypothesis over every public function: shapes, strides, dtypes, values and options, against stock torch or the reference.

Good input has to give stock's numbers; bad input has to raise stock's exception type; nothing may crash the process. The
default profile is small (seconds in all); ``make test-full`` runs the large one.
"""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from _assert import no_worse_than_torch
from _cases import LAYOUTS, lay_out
from _stock import ACTS, same
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from dl4ds_kernels import functional as F
from dl4ds_kernels.reference import nms as reference_nms

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
ODD = [torch.int32, torch.uint8, torch.bool, torch.complex64]
BACKENDS = st.sampled_from([None, "cpu"])
ACTIVATIONS = st.sampled_from(["none", "relu", "leaky_relu", "relu6", "silu", "hardswish"])
SIZES = st.sampled_from([0, 1, 2, 3, 4, 5, 7, 8, 13, 16, 17, 33])
SPECIAL = [float("nan"), float("inf"), float("-inf"), 0.0, -0.0, 1e-40, 3e38, 6.0, -3.0]
COMMON = {"deadline": None, "database": None, "suppress_health_check": list(HealthCheck)}
LEVELS = [
    pytest.param(80, id="short"),
    pytest.param(1500, id="long", marks=pytest.mark.full),
]
fuzz = pytest.mark.parametrize("examples", LEVELS)


@st.composite
def tensors(draw: Any, shape: tuple[int, ...], dtype: torch.dtype, special: bool = True) -> Tensor:
    """Seeded values, some of them special, in one of the layouts."""
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    values = torch.randn(shape, generator=g, dtype=torch.float64) * draw(st.sampled_from([1.0, 1e-3, 30.0]))
    if special and values.numel() and draw(st.integers(0, 3)) == 0:
        flat = values.view(-1)
        for place in torch.randint(flat.numel(), (3,), generator=g).tolist():
            flat[place] = draw(st.sampled_from(SPECIAL))
    layout = draw(st.sampled_from(LAYOUTS))
    return lay_out(values.to(dtype), layout if layout != "expanded" or min(shape, default=0) else "nchw")


@st.composite
def images(draw: Any, special: bool = True) -> Tensor:
    shape = (draw(st.integers(0, 3)), draw(SIZES), draw(SIZES), draw(SIZES))
    return draw(tensors(shape, draw(st.sampled_from(DTYPES)), special))


def drive(examples: int, body: Any) -> None:
    """Run a @given function with this many examples; warnings of stock torch about odd input are not ours to report."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # The short runs are the same every time; the long ones look further each time.
        settings(max_examples=examples, derandomize=examples <= 1000, **COMMON)(body)()


def wide_tolerance(x: Tensor) -> float:
    """Few values, special values and cancellation: stock's own error is not a stable yardstick there."""
    return 8.0 if x.numel() < 200 else 4.0


@fuzz
def test_add_act(examples: int, kernels: None) -> None:
    @given(st.data(), BACKENDS, ACTIVATIONS)
    def body(data: Any, backend: str | None, activation: str) -> None:
        x = data.draw(images())
        kind = data.draw(st.sampled_from(["same", "same", "same", "broadcast", "dtype", "wrong"]))
        shape, dtype = tuple(x.shape), x.dtype
        if kind == "broadcast":
            shape = tuple(1 if data.draw(st.booleans()) else size for size in shape)[data.draw(st.integers(0, 3)) :]
        if kind == "wrong":
            shape = (*shape[:3], shape[3] + 2)
        if kind == "dtype":
            dtype = data.draw(st.sampled_from(DTYPES))
        other = torch.ones(shape, dtype=dtype) if len(shape) != 4 else data.draw(tensors(shape, dtype))
        alpha = data.draw(st.sampled_from([1.0, 0.5, -2.0]))
        same("add_act", x, other, activation=activation, alpha=alpha, backend=backend, strides=kind == "same" and x.numel() > 1
             and activation == "none" and alpha == 1.0, factor=wide_tolerance(x))  # fmt: skip

    drive(examples, body)


@fuzz
def test_bn_act(examples: int, kernels: None) -> None:
    @given(st.data(), BACKENDS, ACTIVATIONS, st.booleans())
    def body(data: Any, backend: str | None, activation: str, training: bool) -> None:
        x = data.draw(images(special=not training))
        channels = x.shape[1]
        length = channels + data.draw(st.sampled_from([0, 0, 0, 0, 1, -1]))
        if length < 0 or (length != channels and x.numel() == 0):
            return  # torch lets vectors of any length pass beside nothing
        g = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
        wide = data.draw(st.booleans()) and x.element_size() == 2
        dtype = torch.float32 if wide else x.dtype
        mean, var, weight, bias = (
            torch.rand(n, generator=g).add(0.3).to(dtype) for n in (length, channels, channels, channels)
        )
        affine = data.draw(st.booleans())
        residual = data.draw(tensors(tuple(x.shape), x.dtype)) if data.draw(st.booleans()) else None
        vectors = (mean, var, weight, bias) if affine else (mean, var)
        same("bn_act", x, *vectors, residual=residual, training=training, activation=activation, backend=backend, strides=False,
             factor=2 * wide_tolerance(x))  # fmt: skip

    drive(examples, body)


@fuzz
def test_conv_bn_act(examples: int, kernels: None) -> None:
    @given(st.data(), BACKENDS, ACTIVATIONS)
    def body(data: Any, backend: str | None, activation: str) -> None:
        groups = data.draw(st.sampled_from([1, 1, 1, 2, 3]))
        c_in, c_out = groups * data.draw(st.integers(1, 9)), groups * data.draw(st.integers(1, 9))
        dtype = data.draw(st.sampled_from([torch.float32, torch.float32, torch.float64, torch.bfloat16]))
        shape = (
            data.draw(st.integers(0, 2)),
            c_in + data.draw(st.sampled_from([0, 0, 0, 0, 1])),
            *(data.draw(SIZES) for _ in "hw"),
        )
        kernel = tuple(data.draw(st.integers(1, 4)) for _ in "hw")
        x, weight = data.draw(tensors(shape, dtype, False)), data.draw(tensors((c_out, c_in // groups, *kernel), dtype, False))
        options: dict[str, Any] = {
            name: data.draw(st.one_of(st.integers(low, 3), st.tuples(st.integers(low, 3), st.integers(low, 3))))
            for name, low in (("stride", 1), ("padding", 0), ("dilation", 1))
        }
        g = torch.Generator().manual_seed(1)
        mean, var = (torch.rand(c_out, generator=g).add(0.3).to(dtype) for _ in range(2))
        # Behind relu a small convolution is what is left of its difference to the mean.
        size = float((mean.double() / (var.double() + 1e-5).sqrt()).abs().max())
        same("conv_bn_act", x, weight, running_mean=mean, running_var=var, groups=groups, activation=activation,
             backend=backend, strides=False, factor=16.0, size=size, **options)  # fmt: skip

    drive(examples, body)


@fuzz
def test_linear_act(examples: int, kernels: None) -> None:
    @given(st.data(), BACKENDS, ACTIVATIONS)
    def body(data: Any, backend: str | None, activation: str) -> None:
        rows, inputs, outputs = data.draw(SIZES), data.draw(st.sampled_from([1, 2, 15, 16, 17, 65, 300])), data.draw(SIZES)
        dtype = data.draw(st.sampled_from([torch.float32, torch.float32, torch.float64, torch.bfloat16]))
        g = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
        wide = inputs + data.draw(st.sampled_from([0, 0, 0, 1]))
        x, weight, bias = (torch.randn(shape, generator=g).to(dtype) for shape in ((rows, wide), (outputs, inputs), (outputs,)))
        if x.numel() and data.draw(st.integers(0, 3)) == 0:
            x.view(-1)[data.draw(st.integers(0, x.numel() - 1))] = data.draw(st.sampled_from(SPECIAL))
        if data.draw(st.booleans()):
            x, weight = x.t().contiguous().t(), weight.t().contiguous().t()
        bias = bias if data.draw(st.booleans()) else None
        if wide != inputs:
            with pytest.raises(RuntimeError, match=f"linear_act: x: expected {inputs} features"):
                F.linear_act(x, weight, bias, activation=activation, backend=backend)
            return
        want = ACTS[activation](torch.nn.functional.linear(x, weight, bias), 0.1)
        truth = ACTS[activation](torch.nn.functional.linear(*(t if t is None else t.double() for t in (x, weight, bias))), 0.1)
        no_worse_than_torch(
            F.linear_act(x, weight, bias, activation=activation, backend=backend), want, truth, factor=wide_tolerance(want)
        )

    drive(examples, body)


@fuzz
def test_pooling_and_upsampling(examples: int, kernels: None) -> None:
    @given(st.data(), BACKENDS)
    def body(data: Any, backend: str | None) -> None:
        x = data.draw(images())
        if x.numel() and x.shape[2] % 2 == 0 and x.shape[3] % 2 == 0:
            out, where = same("max_pool_indices", x, backend=backend, strides=False)
            same("max_unpool", out, where, backend=backend, strides=False)
        elif x.shape[2] % 2 or x.shape[3] % 2:
            with pytest.raises(RuntimeError, match="max_pool_indices: x: expected an even height and width"):
                F.max_pool_indices(x, backend=backend)
        n, c, h, w = x.shape
        skip = data.draw(tensors((n, c, 2 * h, 2 * w + data.draw(st.sampled_from([0, 0, 0, 1]))), x.dtype))
        if skip.shape[3] == 2 * w:
            if x.numel():
                same("upsample_add", x, skip, backend=backend, strides=False, factor=4.0)
        else:
            with pytest.raises(RuntimeError, match="upsample_add: skip: expected shape"):
                F.upsample_add(x, skip, backend=backend)

    drive(examples, body)


@fuzz
def test_nms(examples: int, kernels: None) -> None:
    @given(st.data(), st.integers(0, 40), st.sampled_from(DTYPES))
    def body(data: Any, n: int, dtype: torch.dtype) -> None:
        g = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
        corner = torch.randint(0, 12, (n, 2), generator=g).double()
        boxes = torch.cat([corner, corner + torch.randint(-1, 9, (n, 2), generator=g)], 1)
        scores = torch.randint(0, 5, (n,), generator=g).double()
        if n and data.draw(st.booleans()):
            boxes[data.draw(st.integers(0, n - 1)), data.draw(st.integers(0, 3))] = data.draw(st.sampled_from(SPECIAL))
            scores[data.draw(st.integers(0, n - 1))] = data.draw(st.sampled_from(SPECIAL))
        boxes, scores = boxes.to(dtype), scores.to(dtype)
        if data.draw(st.booleans()):
            boxes = boxes.t().contiguous().t()
        threshold = data.draw(st.sampled_from([-0.1, 0.0, 0.2, 0.3, 0.5, 1.0, 1.1, float("nan")]))
        expected = reference_nms.nms(boxes, scores, threshold)
        assert torch.equal(F.nms(boxes, scores, threshold, backend="cpu"), expected)
        ids = torch.randint(0, 3, (n,), generator=g)
        batched = F.batched_nms(boxes, scores, ids, threshold, backend="cpu")
        assert torch.equal(batched, reference_nms.batched_nms(boxes, scores, ids, threshold))
        most = data.draw(st.integers(0, n + 2))
        arguments = (boxes[None], scores[None], ids[None])
        keep, count = F.nms_padded(*arguments, iou_threshold=threshold, score_threshold=1.0, max_output=most, backend="cpu")
        expected_keep, expected_count = reference_nms.nms_padded(*arguments, threshold, 1.0, most)
        assert torch.equal(keep, expected_keep) and torch.equal(count, expected_count)

    drive(examples, body)


@fuzz
def test_nms_variants_never_crash(examples: int) -> None:
    """soft_nms, diou_nms, matrix_nms, darknet_nms on any numbers: indices in range, scores of the right shape."""

    @given(st.data(), st.integers(0, 20), st.sampled_from(DTYPES), st.sampled_from(["linear", "gaussian"]))
    def body(data: Any, n: int, dtype: torch.dtype, method: str) -> None:
        boxes = data.draw(tensors((n, 4), dtype))
        scores = data.draw(tensors((n,), dtype)).abs().clamp(max=1)
        keep, final = F.soft_nms(boxes, scores, method=method)
        assert keep.shape == final.shape and keep.unique().numel() == keep.numel() <= n
        kept = F.diou_nms(boxes, scores, 0.5)
        assert ((kept >= 0) & (kept < max(n, 1))).all()
        assert F.matrix_nms(boxes, scores, method=method).shape == (n,)
        assert F.darknet_nms(boxes, scores[:, None].repeat(1, 3), 0.5).shape == (n, 3)

    drive(examples, body)


ANYTHING = st.one_of(
    st.none(), st.integers(-3, 3), st.text(max_size=3), st.floats(allow_nan=True),
    st.sampled_from([[1.0], (), {}, "relu", torch.ones(2, 3), torch.ones(1, 2, 4, 4), torch.ones(2), torch.tensor(1.0)]),
    st.sampled_from([torch.ones(1, 2, 4, 4).to(dtype) for dtype in ODD]),
    st.sampled_from([torch.ones(1, 2, 4, 4, device="meta"), torch.ones(1, 2, 4, 4).to_sparse()]),
)  # fmt: skip
FUNCTIONS: dict[str, int] = {
    "add_act": 2, "bn_act": 5, "conv_bn_act": 3, "add_bn_act": 6, "bn_act_conv": 6, "max_pool_indices": 1, "max_unpool": 2,
    "upsample_add": 2, "nms": 3, "batched_nms": 4, "nms_padded": 3, "soft_nms": 3, "diou_nms": 3, "matrix_nms": 3,
    "darknet_nms": 3, "avg_pool2d": 2, "conv_transpose_bn_act": 3, "global_avg_pool2d": 1, "local_response_norm": 2,
    "max_pool2d": 2, "basic_block": 3, "bottleneck": 3, "preact_basic_block": 3, "preact_bottleneck": 3,
    "bn_act_max_pool": 5, "linear_act": 2, "dense_block": 2,
}  # fmt: skip
NEEDED: dict[str, tuple[str, ...]] = {
    "conv_bn_act": ("running_mean", "running_var"), "nms_padded": ("iou_threshold", "max_output"),
}  # fmt: skip


def test_every_public_function_is_fuzzed() -> None:
    assert set(FUNCTIONS) == {name for name in F.__all__ if not isinstance(getattr(F, name), type)}


@pytest.mark.parametrize("examples", [pytest.param(400, id="short"), pytest.param(20_000, id="long", marks=pytest.mark.full)])
def test_arguments_of_any_kind(examples: int, kernels: None) -> None:
    """Whatever is passed: a result, or an exception of Python's or torch's usual types with a text; never a crash."""

    @given(st.data(), st.sampled_from(sorted(FUNCTIONS)), BACKENDS)
    def body(data: Any, name: str, backend: str | None) -> None:
        arguments = [data.draw(ANYTHING) for _ in range(FUNCTIONS[name])]
        options = {key: data.draw(ANYTHING) for key in NEEDED.get(name, ())}
        if name not in ("soft_nms", "diou_nms", "matrix_nms", "darknet_nms"):
            options["backend"] = backend
        try:
            getattr(F, name)(*arguments, **options)
        except (TypeError, ValueError, RuntimeError, IndexError, AttributeError) as error:
            assert str(error)
            if type(error) is AttributeError:  # only torch's own, on something that is no tensor
                raise AssertionError(f"{name}: {error}") from error

    drive(examples, body)
