"""The input's gradient of a convolution with the epilogue of a backward pass, on the PTX simulator.

The sums are those of the gradient as stored: they are compared with fp64 sums over the very tensor that the kernel wrote.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from _cuda_conv import channels_last, require_fused_conv
from _cuda_dgrad import conv_dgrad
from ptxsim._gate import ROTATION
from torch import Tensor

from dl4ds_kernels._define import op
from dl4ds_kernels.ops._traffic import moved

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
TILES = ("k128x128", "k128x64", "k64x64")
NONE, RELU, LEAKY, RELU6 = range(4)
SLOPE = 0.1
# x (N, C, H, W), channels of dout, kernel, padding, dilation
GEOMETRIES = [
    ((2, 24, 13, 12), 16, 1, 0, 1), ((1, 136, 9, 7), 24, 3, 1, 1), ((1, 16, 17, 11), 8, 5, 3, 2), ((2, 64, 8, 9), 40, 3, 0, 1),
    ((1, 8, 1, 1), 8, 1, 0, 1), ((1, 200, 12, 13), 72, 1, 0, 1),
]  # fmt: skip
ODD = [((2, 21, 9, 8), 16, 3, 1, 1), ((1, 67, 7, 5), 8, 1, 0, 1)]  # channels that fill no vectors: only the smallest tile


@pytest.fixture(autouse=True, scope="module")
def _toolchain() -> None:
    require_fused_conv()


def exact(*shape: int, dtype: torch.dtype) -> Tensor:
    """Values that TF32 holds exactly."""
    return torch.randn(*shape).bfloat16().to(dtype)


def random_bits(numel: int) -> Tensor:
    return torch.randint(0, 256, ((numel + 7) // 8,), dtype=torch.uint8)


def unpacked(mask: Tensor, like: Tensor) -> Tensor:
    """The bits as booleans; they lie in memory order of a channels-last map."""
    n, c, h, w = like.shape
    flat = torch.stack([(mask >> k) & 1 for k in range(8)], 1).flatten()[: like.numel()].bool()
    return flat.view(n, h, w, c).permute(0, 3, 1, 2)


def behind(g: Tensor, above: Tensor, code: int, slope: float = SLOPE) -> Tensor:
    """dz of a gradient in fp64."""
    return g if code == NONE else torch.where(above, g, g * slope if code == LEAKY else 0.0)


def above(z: Tensor, code: int) -> Tensor:
    if code == LEAKY:
        return z > 0
    return ~((z <= 0) | (z >= 6)) if code == RELU6 else ~(z <= 0)


def case(dtype: torch.dtype, geometry: tuple, seed: int) -> dict[str, Any]:
    """Operands of a call, and its true gradient without what is added."""
    shape, k, size, padding, dilation = geometry
    torch.manual_seed(seed)
    out = [s + 2 * padding - dilation * (size - 1) for s in shape[2:]]
    dout = channels_last(exact(shape[0], k, *out, dtype=dtype))
    weight = (torch.randn(k, shape[1], size, size) * (k * size * size) ** -0.5).bfloat16().to(dtype)
    weight = channels_last(weight) if seed % 2 else weight
    bn = {"y": channels_last(exact(*shape, dtype=dtype)), "mean": torch.randn(shape[1]), "rstd": torch.rand(shape[1]) + 0.5}
    bn |= {"weight": torch.randn(shape[1]), "bias": torch.randn(shape[1])}
    other = {"other": channels_last(exact(*shape, dtype=dtype)), "other_mean": torch.randn(shape[1])}
    given = {"dout": dout, "weight": weight, "size": shape[2:], "padding": [padding] * 2, "dilation": [dilation] * 2}
    back = lambda d, w: torch.nn.grad.conv2d_input(shape, w, d, 1, padding, dilation)  # noqa: E731
    want, width = back(dout.double(), weight.double()), back(dout.double().abs(), weight.double().abs())
    added = channels_last(exact(*shape, dtype=dtype))
    return {"given": given, "bn": bn, "other": other, "want": want, "width": width, "added": added}


def argument(bn: dict[str, Tensor | None], dtype: torch.dtype) -> Tensor:
    """The activation's argument as the kernel makes it: fp32, one rounding a step, then dtype."""
    vector = lambda t: t.double().view(1, -1, 1, 1)  # noqa: E731
    scale = bn["rstd"] if bn["weight"] is None else bn["rstd"] * bn["weight"].float()
    bias = 0.0 if bn["bias"] is None else vector(bn["bias"])
    shift = (bias - vector(bn["mean"]) * vector(scale)).float().double()
    return (bn["y"].double() * vector(scale) + shift).float().to(dtype)


def check_sums(dx: Tensor, sums: Tensor, bn: dict[str, Tensor | None], bits: Tensor | None, code: int, rows: int) -> None:
    """Every tile's sums to fp32's last bits."""
    side = unpacked(bits, dx) if bits is not None else above(argument(bn, dx.dtype), code)
    dz = behind(dx.double(), side, code)
    every = [dz]
    for y, mean in (("y", "mean"), ("other", "other_mean")):
        if y in bn:
            every.append(dz * (bn[y].double() - bn[mean].double().view(1, -1, 1, 1)))
    assert sums.shape[1] == len(every)
    for place, terms in enumerate(every):
        tiles = terms.permute(0, 2, 3, 1).flatten(0, 2).split(rows)
        want, size = torch.stack([t.sum(0) for t in tiles]), torch.stack([t.abs().sum(0) for t in tiles])
        assert want.shape == sums[:, place].shape
        assert bool(((sums[:, place].double() - want).abs() <= 1e-6 * size + 1e-30).all())


# added (None, plain, masked, every second pixel), its activation; mask bits in front (two: of two BatchNorms), activation in
# front, vectors in front. Every third is run, so every tile and type has sums of two.
WAYS = [
    (None, NONE, None, RELU, True), ("masked", RELU, "two", RELU, True), ("masked", RELU, "bits", LEAKY, False),
    ("masked", LEAKY, None, LEAKY, True), ("plain", NONE, None, RELU6, True), ("step", NONE, "bits", RELU6, True),
    ("masked", RELU6, "two", NONE, False), ("masked", RELU, "no sums", NONE, True), ("step", NONE, "two", LEAKY, False),
    ("plain", NONE, "bits", RELU, True), ("step", NONE, None, RELU, False), ("masked", RELU6, None, NONE, False),
]  # fmt: skip


@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradient_and_sums(dtype: torch.dtype, tile: str, request: pytest.FixtureRequest) -> None:
    """The gradient within one rounding, with what is added; its sums; the same bits in any order of threads and copies."""
    full = request.config.getoption("-m") == ""
    geometries = [*GEOMETRIES, *(ODD if tile == "k64x64" else [])]
    for i, way in enumerate(WAYS):
        if not full and (i + ROTATION + DTYPES.index(dtype) + TILES.index(tile)) % 3:
            continue
        c = case(dtype, geometries[(i + TILES.index(tile)) % len(geometries)], seed=i)
        kind, added_code, front, code, vectors = way
        bn = c["bn"] | ({} if vectors else {"weight": None, "bias": None}) | (c["other"] if front == "two" else {})
        more: dict[str, Any] = {"bn": None if front == "no sums" else bn, "activation": code, "tile": tile}
        bits = random_bits(c["want"].numel()) if front in ("bits", "two") and code != NONE else None
        want, width = c["want"], c["width"]
        if kind is not None:
            full_size = c["added"].double()
            more["added"] = c["added"]
            if kind == "masked":
                more |= {"added_mask": random_bits(want.numel()), "added_activation": added_code}
                full_size = behind(full_size, unpacked(more["added_mask"], want), added_code)
            if kind == "step":
                more |= {"added": channels_last(c["added"][:, :, ::2, ::2]), "step": 2}
                spread = torch.zeros_like(full_size)
                spread[:, :, ::2, ::2] = full_size[:, :, ::2, ::2]
                full_size = spread
            want, width = want + full_size, width + full_size.abs()
        dx, sums, reports = conv_dgrad(**c["given"], mask=bits, **more)
        eps = torch.finfo(dtype).eps
        assert bool(((dx.double() - want).abs() <= 0.5 * eps * want.abs() + 2e-6 * width).all()), way
        if sums is not None:
            check_sums(dx, sums, bn, bits, code, 64 if tile == "k64x64" else 128)
        assert len(reports) == 2 and all(r.counters["atomics"] == 0 for r in reports)
        if i % 3 == 0 or full:
            again = conv_dgrad(**c["given"], mask=bits, **more, options={"lazy_copies": 0, "schedule": 7})
            assert torch.equal(again[0], dx) and (sums is None or torch.equal(again[1], sums))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_touches_what_it_declares(dtype: torch.dtype) -> None:
    """Distinct bytes of every map and mask are those of the declaration (ops/_traffic.py)."""
    c = case(dtype, ((1, 128, 16, 16), 64, 1, 0, 1), seed=1)
    g, bn, masks = c["given"], c["bn"] | c["other"], (random_bits(c["want"].numel()), random_bits(c["want"].numel()))
    dx, _, reports = conv_dgrad(
        **g, bn=bn, added=c["added"], added_mask=masks[0], added_activation=RELU, mask=masks[1], activation=RELU,
        tile="k128x128",
    )  # fmt: skip
    front = (bn["y"], bn["weight"], bn["bias"], bn["mean"], bn["rstd"], masks[1], 1e-5, False, RELU, 0.0, bn["other"])
    args = (g["dout"], g["weight"], [16, 16], [0, 0], [1, 1], c["added"], masks[0], RELU, 0.0, 1, *front)
    declared = moved(op("conv_bn_act_dgrad_bwd"), args, (dx, None, None, None, None))
    touched = {{"other": "other_y"}.get(name, name): (t["read"], t["written"]) for name, t in reports[-1].tensors.items()}
    assert declared == {name: touched[name] for name in ("dout", "added", "added_mask", "y", "mask", "other_y", "dx")}
    rest = sum(sum(both) for name, both in touched.items() if name not in declared)
    assert rest <= 0.2 * sum(map(sum, declared.values()))  # filter and sums: a map of 256 pixels is small


def test_refusals() -> None:
    """What the launcher does not serve, it says and does not start."""
    c = case(torch.float16, GEOMETRIES[0], seed=1)
    bits = random_bits(c["want"].numel())
    for reason, more in (
        (5, {"channels": 12}), (9, {"slices": 2}), (13, {"pad_h": -1}), (14, {"activation": 4, "bn": c["bn"]}),
        (14, {"activation": RELU, "bn": c["bn"] | c["other"]}), (14, {"mask": bits, "bn": c["bn"]}),
        (14, {"added": c["added"], "added_mask": bits}), (15, {"step": 0}),
        (15, {"added": c["added"], "added_mask": bits, "added_activation": RELU, "step": 2}), (13, {"stride_h": 2}),
    ):  # fmt: skip
        tile = {"tile": "k128x128"} if reason == 9 else {}
        assert conv_dgrad(**c["given"], **more, **tile, refusal=reason)[2] == [], more
