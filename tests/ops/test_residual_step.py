"""A post-activation residual block's training step in one call each way: against the same step by step, and its arguments."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from dl4ds_kernels import _extension
from dl4ds_kernels import functional as F
from dl4ds_kernels._activation import ACTIVATION_CODES
from dl4ds_kernels._define import op
from dl4ds_kernels.functional.residual_block import run_block
from dl4ds_kernels.ops import _residual_step
from dl4ds_kernels.ops._block_code import IDENTITY, NO_SHORTCUT, PROJECTION

LAST = torch.channels_last


class Case(NamedTuple):
    """Convolutions as (channels, kernel, stride) in a row; a projection if ``shortcut`` says so."""

    convs: tuple[tuple[int, int, int], ...] = ((64, 1, 1), (64, 3, 1), (128, 1, 1))
    shortcut: int = IDENTITY
    shape: tuple[int, ...] = (4, 128, 13, 14)
    activation: str = "relu"
    options: tuple[str, ...] = ()  # of memory_efficient, no_running, std

    @property
    def id(self) -> str:
        convs = "_".join(".".join(map(str, c)) for c in self.convs)
        return "-".join((convs, str(self.shortcut), *map(str, self.shape), self.activation, *self.options))


SMALL = (3, 64, 15, 14)
BASIC = Case(((128, 3, 1), (128, 3, 1)))
WIDER = Case(((64, 1, 1), (64, 3, 1), (256, 1, 1)), PROJECTION)
# All convolutions of these are ours; of those below some are the library's, whose bits depend on threads.
OURS = [Case(), BASIC, WIDER, Case(((128, 3, 1), (128, 3, 1)), PROJECTION, (4, 64, 13, 14))]
DOWN = Case(((128, 3, 2), (128, 3, 1)), PROJECTION, SMALL)  # its projection is computed again
NARROW = Case(((16, 1, 1), (16, 3, 1), (64, 1, 1)), shape=SMALL)
STRIDED = Case(((32, 1, 1), (32, 3, 2), (128, 1, 1)), PROJECTION, SMALL)
CASES = [
    *OURS, DOWN, NARROW, STRIDED, Case(shortcut=NO_SHORTCUT), BASIC._replace(shortcut=NO_SHORTCUT),
    Case(((33, 1, 1), (40, 3, 1), (72, 1, 1)), PROJECTION, SMALL),
    Case(((128, 3, 1),)), Case(((40, 1, 1), (17, 3, 1), (17, 5, 1), (64, 1, 1)), shape=SMALL),
    *(c._replace(activation=a) for c in (Case(), WIDER, STRIDED) for a in ("none", "leaky_relu", "relu6")),
    *(c._replace(options=("memory_efficient",)) for c in (Case(), DOWN, WIDER)),
    *(c._replace(options=(o,)) for c in (Case(), STRIDED) for o in ("no_running", "std")),
    Case(shape=(1, 128, 2, 1)), Case(shape=(2, 128, 1, 9)),
]  # fmt: skip


def tensors_of(case: Case) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(3)
    rand = lambda *shape: torch.randn(shape, generator=g)  # noqa: E731
    tensors = {"x": rand(*case.shape).contiguous(memory_format=LAST)}
    c = case.shape[1]
    stride = 1
    layers = []
    for made, kernel, step in case.convs:
        layers.append((c, made, kernel, step))
        c, stride = made, stride * step
    if case.shortcut == PROJECTION:
        layers.append((case.shape[1], c, 1, stride))
    for i, (c, made, kernel, _) in enumerate(layers):
        tensors |= {f"{i}.conv": rand(made, c, kernel, kernel) / (c * kernel * kernel) ** 0.5}
        tensors |= {f"{i}.weight": 1 + 0.3 * rand(made), f"{i}.bias": rand(made)}
        if "no_running" not in case.options:
            tensors |= {f"{i}.mean": rand(made), f"{i}.var": rand(made).abs() + 0.5}
    return tensors


def call(case: Case, t: dict[str, Tensor]) -> Tensor:
    params = []
    strides = [step for _, _, step in case.convs]
    for i in range(len(case.convs) + (case.shortcut == PROJECTION)):
        weight = t[f"{i}.conv"]
        stride = strides[i] if i < len(strides) else max(strides)
        mode = "std" if "std" in case.options else "var"
        norm = F.BNParams(
            t.get(f"{i}.mean"), t.get(f"{i}.var"), t[f"{i}.weight"], t[f"{i}.bias"], 0.1 + 0.1 * i, 1e-3 * (i + 1), mode
        )
        params.append(F.ConvParams(weight, norm, stride=stride, padding=weight.shape[2] // 2))
    projection = params.pop() if case.shortcut == PROJECTION else None
    return run_block(
        t["x"], params, projection, preact=False, shortcut=case.shortcut, training=True, activation=case.activation,
        memory_efficient="memory_efficient" in case.options, backend="cpu",
    )  # fmt: skip


def results(case: Case, tensors: dict[str, Tensor], frozen: str = "", dense: bool = True) -> dict[str, Tensor]:
    """Output, gradients and running statistics. ``dense``: the output's gradient lies as the output does."""
    leaves = {n: t.detach().clone() for n, t in tensors.items()}
    names = [n for n in leaves if not n.endswith(("mean", "var")) and n != frozen]
    for n in names:
        leaves[n].requires_grad_()
    out = call(case, leaves)
    dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(5))
    out.backward(dout.contiguous(memory_format=LAST) if dense else dout)
    return {"out": out.detach(), **{f"d{n}": leaves[n].grad for n in names}, **{n: t.detach() for n, t in leaves.items()}}


def assert_same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for n, t in found.items():
        assert t.is_contiguous(memory_format=LAST) == wanted[n].is_contiguous(memory_format=LAST) if t.dim() == 4 else True, n
        assert torch.equal(t.view(torch.int32), wanted[n].view(torch.int32)), n


class Calls:
    """How often a block is taken whole; ``off``: never."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        real, self.taken, self.off = _residual_step.plan, 0, False

        def plan(*args: Any) -> Any:
            found = None if self.off else real(*args)
            self.taken += found is not None
            self.last = found
            return found

        monkeypatch.setattr(_residual_step, "plan", plan)

    def algorithms(self, case: Case, tensors: dict[str, Tensor]) -> list[int]:
        """Of a block that is taken, 0 for those of the library."""
        with torch.no_grad():
            call(case, tensors)
        code, self.taken = self.last.code, 0
        return [v for start in range(5, len(code), 11) for v in code[start + 2 : start + 5]]


@pytest.fixture
def calls(kernels: None, monkeypatch: pytest.MonkeyPatch) -> Calls:
    return Calls(monkeypatch)


@pytest.mark.parametrize("dense", [True, False], ids=["dense", "dout-nchw"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_the_bits_of_the_block_step_by_step(case: Case, dense: bool, calls: Calls) -> None:
    tensors = tensors_of(case)
    whole = results(case, tensors, dense=dense)
    assert calls.taken == 2  # forward and backward
    calls.off = True
    assert_same(whole, results(case, tensors, dense=dense))


@pytest.mark.parametrize("case", OURS, ids=lambda case: case.id)
def test_the_same_bits_for_any_number_of_threads(case: Case, calls: Calls) -> None:
    before, found, tensors = torch.get_num_threads(), [], tensors_of(case)
    if _extension.host().cpu_features()["isa"] not in ("avx512", "avx2"):
        pytest.skip("the engine trains with AVX2 and AVX-512 only")
    assert all(calls.algorithms(case, tensors))
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            found.append(results(case, tensors))
    finally:
        torch.set_num_threads(before)
    assert calls.taken == 8
    for other in found[1:]:
        assert_same(other, found[0])


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
@pytest.mark.parametrize("case", [*OURS, STRIDED], ids=lambda case: case.id)
def test_values_that_are_not_finite(case: Case, value: float, calls: Calls) -> None:
    """Where our algorithms cannot answer, the library does, also inside the call and with what is added to its result."""
    tensors = tensors_of(case)
    for name, at in (("x", (1, 2, 3, 4)), ("0.conv", (1, 0, 0, 0)), ("1.conv", (1, 0, 0, 0)), ("1.weight", (3,))):
        dirty = {n: t.clone() for n, t in tensors.items()}
        dirty[name][at] = value
        calls.off = False
        whole = results(case, dirty)
        calls.off = True
        for n, t in results(case, dirty).items():
            assert torch.equal(torch.isnan(t), torch.isnan(whole[n])) and torch.equal(t.nan_to_num(), whole[n].nan_to_num()), n


@pytest.mark.parametrize("frozen", ["x", "1.conv", "2.bias"])
def test_frozen_tensors_go_step_by_step(frozen: str, calls: Calls) -> None:
    tensors = tensors_of(Case())
    full = results(Case(), tensors)
    found = results(Case(), tensors, frozen)
    assert calls.taken == 3 and f"d{frozen}" not in found
    assert_same(found, {n: full[n] for n in found})


def test_without_gradients(calls: Calls) -> None:
    """Training mode under no_grad: statistics move, nothing is kept."""
    tensors = tensors_of(WIDER)
    wanted = results(WIDER, tensors)
    with torch.no_grad():
        out = call(WIDER, tensors)
    assert calls.taken == 3 and torch.equal(out, wanted["out"]) and torch.equal(tensors["1.var"], wanted["1.var"])


def test_what_is_not_taken(calls: Calls) -> None:
    """fp64, NCHW, a bias, no affine parameters, maps of one pixel: step by step."""
    tensors = tensors_of(Case())
    for change in ("double", "nchw", "pixel", "affine", "silu"):
        changed, case = {n: t.clone() for n, t in tensors.items()}, Case()
        if change == "double":
            changed = {n: t.double() for n, t in changed.items()}
        elif change == "nchw":
            changed["x"] = changed["x"].contiguous()
        elif change == "pixel":
            changed["x"] = changed["x"][:, :, :1, :1].clone()
        elif change == "silu":
            case = Case(activation="silu")
        else:
            changed["0.weight"] = None
        call(case, changed)
    assert calls.taken == 0


def code_of(case: Case) -> list[int]:
    algorithms = [1, 1, 1]
    layers = [[0, 1, *algorithms, 1, 1, k // 2, k // 2, 1, 1] for _, k, _ in case.convs]
    return [len(case.convs), case.shortcut, 1, 1, 1, *(v for layer in layers for v in layer)]


def test_arguments(kernels: None) -> None:
    case = Case()
    t = tensors_of(case)
    layers = [[t[f"{i}.{n}"] for n in ("conv", "weight", "bias", "mean", "var")] for i in range(3)]
    tensors = [v for layer in layers for v in layer]
    code, numbers = code_of(case), [0.0, *[0.1, 1e-5] * 3]
    forward, back = op("residual_step"), op("residual_step_bwd")
    out, mask, *made = forward(t["x"], tensors, code, numbers, True)
    assert out.shape == t["x"].shape and mask.numel() == (out.numel() + 7) // 8 and len(made) == 15
    more = [v for i, layer in enumerate(layers) for v in (*layer[:3], *made[5 * i : 5 * i + 3])]
    gradients = back(out, mask, t["x"], more, code, numbers)
    assert [g.shape for g in gradients] == [t["x"].shape, *(v.shape for layer in layers for v in layer[:3])]
    x, odd = t["x"], [*code[:2], ACTIVATION_CODES["silu"], *code[3:]]
    wide, wide_weight = torch.cat([x, x], 1).contiguous(memory_format=LAST), torch.cat([more[0]] * 2, 1)
    for message, wrong in {
        "residual_step: code: expected at least 5": lambda: forward(x, tensors, [1], numbers, True),
        "residual_step: code: expected 11 integers for each of 3": lambda: forward(x, tensors, code[:-1], numbers, True),
        "residual_step: numbers: expected 7, got 6": lambda: forward(x, tensors, code, numbers[1:], True),
        "residual_step: tensors: expected 5 for convolution 2": lambda: forward(x, tensors[:-1], code, numbers, True),
        "residual_step: tensors: expected 15, got 16": lambda: forward(x, [*tensors, x], code, numbers, True),
        "residual_step: activation: expected none, relu": lambda: forward(x, tensors, odd, numbers, True),
        "conv2d_exact: x: expected shape": lambda: forward(x[:, 1:], tensors, code, numbers, True),
        "residual_step_bwd: tensors: expected 6": lambda: back(out, mask, x, more[:-1], code, numbers),
        "bn_act_bwd: dout: expected": lambda: back(out[:1], mask, x, more, code, numbers),
        "residual_step_bwd: mask: expected one": lambda: back(out, mask[:0], x, more, code, numbers),
        "conv2d_exact: added: expected": lambda: back(out, mask, wide, [wide_weight, *more[1:]], code, numbers),
    }.items():
        with pytest.raises(RuntimeError, match=message):
            wrong()


@pytest.mark.parametrize(
    "case", [Case(), WIDER, STRIDED, DOWN._replace(options=("memory_efficient",))], ids=lambda case: case.id
)
def test_opcheck(case: Case, kernels: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both calls as a block makes them."""
    made: list[tuple[Any, tuple[Any, ...]]] = []

    def recorded(name: str, namespace: str) -> Any:
        def run(*args: Any) -> Any:
            made.append((op(name, namespace), args))
            return op(name, namespace)(*args)

        return run

    monkeypatch.setattr(_residual_step, "op", recorded)
    results(case, tensors_of(case))
    assert len(made) == 2
    for function, args in made:
        plain = tuple([t.detach() for t in a] if isinstance(a, list) and a and isinstance(a[0], Tensor) else a for a in args)
        torch.library.opcheck(function, tuple(a.detach() if isinstance(a, Tensor) else a for a in plain))
