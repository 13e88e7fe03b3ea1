"""Small launches of the shipped CUDA launchers that together reach every kernel, branch and tail (for test_gates.py)."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import _cuda_launch as cuda
import torch
from torch import Tensor

from . import Module, Report, SimulatorError, compile_cuda

Results = dict[str, Tensor]
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
ACTIVATIONS = range(6)  # none, relu, leaky_relu, relu6, silu, hardswish
MASKED = (1, 2)  # activations whose backward needs only a bit per element


@dataclass(frozen=True)
class Case:
    """One launch; `run(options)` returns the results and a report per kernel."""

    name: str
    run: Callable[[dict[str, int]], tuple[Results, list[Report]]]


def _random(*shape: int, dtype: torch.dtype, seed: int, nan: bool = False) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(*shape, generator=generator, dtype=torch.float64) * 2
    if nan:  # in every place of a vector and in the tail, but in few channels, so that statistics stay numbers elsewhere
        values.view(-1)[1::5] = 0.0
        (values[:, :2] if len(shape) > 1 else values.view(-1)[::7]).fill_(float("nan"))
    return values.to(dtype)


def _shifted(t: Tensor) -> Tensor:
    """The same values one element away from a 16-byte boundary: the launchers then use single accesses."""
    memory = torch.empty(t.numel() + 1, dtype=t.dtype)
    return memory[1:].view(t.shape).copy_(t)


def add_act_cases(dtype: torch.dtype) -> list[Case]:
    """Forward and backward of add_act: all activations, with and without mask and residual, aligned or not."""
    cases = []
    for activation, shifted in itertools.product(ACTIVATIONS, (False, True)):
        n = 1500 + 2 * activation + 3  # several blocks of single elements, an odd tail for every vector width
        x, residual, dout = (_random(n, dtype=dtype, seed=s, nan=s == 1) for s in (1, 2, 3))
        if shifted:
            x, residual, dout = map(_shifted, (x, residual, dout))
        masks = activation in MASKED

        def forward(options, x=x, residual=residual, activation=activation, masks=masks):
            out, mask, reports = cuda.add_act_fwd(x, residual, 0.75, activation, 0.1, masks, **options)
            return {"out": out} | ({"mask": mask} if masks else {}), reports

        def backward(options, x=x, residual=residual, dout=dout, activation=activation):
            dx, reports = cuda.add_act_bwd(dout, None, x, residual, 0.75, activation, 0.1, **options)
            return {"dx": dx}, reports

        label = f"{str(dtype)[6:]}-act{activation}-{'single' if shifted else 'vector'}"
        cases += [Case(f"add_act_fwd-{label}", forward), Case(f"add_act_bwd-{label}", backward)]
        if masks:
            bits = torch.randint(0, 256, ((n + 7) // 8,), dtype=torch.uint8, generator=torch.Generator().manual_seed(5))

            def masked(options, dout=dout, bits=bits, activation=activation):
                dx, reports = cuda.add_act_bwd(dout, bits, None, None, 0.75, activation, 0.1, **options)
                return {"dx": dx}, reports

            cases.append(Case(f"add_act_bwd-{label}-mask", masked))
    return cases


SHAPES = {"wide": (3, 24, 5, 7), "odd": (2, 63, 5, 3), "long": (2, 8, 40, 41), "tiny": (70, 9, 1, 3)}


def bn_act_cases(dtype: torch.dtype) -> list[Case]:
    """Forward and backward of bn_act in both layouts: training and not, residual, mask, every activation, odd sizes."""
    cases = []
    for (shape_name, shape), channels_last, training in itertools.product(SHAPES.items(), (True, False), (False, True)):
        activations = ACTIVATIONS if shape_name == "wide" else (1, 4)
        for activation in activations:
            with_residual = activation % 2 == 1
            x, residual, dout = (_random(*shape, dtype=dtype, seed=s, nan=s == 1) for s in (1, 2, 3))
            if channels_last:
                x, residual, dout = (t.contiguous(memory_format=torch.channels_last) for t in (x, residual, dout))
            if activation == 5:  # a slice of a larger tensor, every row with a gap behind it
                x = torch.nn.functional.pad(x, (0, 2)).contiguous(memory_format=cuda.suggested(x))[..., : shape[3]]
            kind = torch.float64 if dtype == torch.float64 else dtype if activation == 3 else torch.float32
            weight, bias, mean = (_random(shape[1], dtype=kind, seed=s) for s in (4, 5, 6))
            variance = _random(shape[1], dtype=kind, seed=7).abs() + 0.5
            masks, eps_std = activation in MASKED and with_residual, activation == 4
            extra = residual if with_residual else None

            def forward(
                options, x=x, w=weight, b=bias, m=mean, v=variance, r=extra, a=activation, t=training, k=masks, e=eps_std
            ):
                return cuda.bn_act_fwd(x, w, b, m, v, r, a, training=t, save_mask=k, eps_std=e, options=options)

            def backward(
                options, d=dout, x=x, w=weight, b=bias, m=mean, v=variance, r=extra, a=activation, t=training, e=eps_std
            ):
                needs = ("dx", "dweight", "dbias") + (("dresidual",) if r is not None else ())
                return cuda.bn_act_bwd(
                    d,
                    x,
                    w,
                    b,
                    m.to(cuda.accumulator(x)),
                    v.rsqrt().to(cuda.accumulator(x)),
                    r,
                    None,
                    a,
                    training=t,
                    eps_std=e,
                    needs=needs,
                    options=options,
                )

            layout, mode = "nhwc" if channels_last else "nchw", "train" if training else "eval"
            label = f"{str(dtype)[6:]}-{shape_name}-{layout}-{mode}-act{activation}"
            cases += [Case(f"bn_act_fwd-{label}", forward), Case(f"bn_act_bwd-{label}", backward)]
            if masks:
                bits = torch.randint(
                    0, 256, ((x.numel() + 7) // 8,), dtype=torch.uint8, generator=torch.Generator().manual_seed(5)
                )

                def masked(options, d=dout, x=x, w=weight, b=bias, m=mean, v=variance, k=bits, a=activation, t=training):
                    needs = ("dx", "dweight", "dbias", "dresidual")
                    return cuda.bn_act_bwd(
                        d,
                        x,
                        w,
                        b,
                        m.to(cuda.accumulator(x)),
                        v.rsqrt().to(cuda.accumulator(x)),
                        None,
                        k,
                        a,
                        training=t,
                        needs=needs,
                        options=options,
                    )

                cases.append(Case(f"bn_act_bwd-{label}-mask", masked))
    return cases


OPS = {"add_act": add_act_cases, "bn_act": bn_act_cases}


@functools.cache
def cases(op: str, dtype: torch.dtype) -> list[Case]:
    """The launches of one op and dtype."""
    return OPS[op](dtype)


def sources() -> list[Path]:
    """The .cu files whose kernels the workloads reach."""
    return [s for s in cuda.SOURCES if s.parent.name in OPS]


@functools.cache
def ptx_of(source: Path) -> str:
    """PTX of a project file, as the host library embeds it."""
    return compile_cuda(source, "ptx", includes=[cuda.CSRC], flags=cuda.FLAGS)[0].read_text()


@functools.cache
def kernels(source: Path) -> tuple[str, ...]:
    """Mangled names of the kernels a file instantiates."""
    return tuple(Module(ptx_of(source)).kernels)


@functools.cache
def baseline(op: str, dtype: torch.dtype) -> dict[str, tuple[Results, list[Report]]]:
    """Results and reports of every case, unchanged kernels, default schedule."""
    return {case.name: case.run({}) for case in cases(op, dtype)}


def outcome(results: Results, expected: Results) -> str:
    """Why results are not those expected, within the rounding of their type ("" if they are)."""
    for name, want in expected.items():
        got = results[name]
        if not want.is_floating_point():
            if not torch.equal(got, want):
                return f"{name} differs"
            continue
        limit = 0.75 * torch.finfo(want.dtype).eps * want.double().abs() + (1e-30 if want.dtype == torch.float64 else 1e-12)
        if want.dtype in (torch.float32, torch.float64):  # another order of operations may round differently
            limit = 8 * limit
        error = (got.double() - want.double()).abs()
        wrong = (torch.isnan(got) != torch.isnan(want)) | (error > limit)
        if bool(wrong.any()):
            return f"{int(wrong.sum())} values of {name} differ"
    return ""


@functools.cache
def representatives(kernel: str, op: str, dtype: torch.dtype) -> tuple[tuple[str, ...], frozenset[int]]:
    """A few cases that execute all of a kernel's instructions that any case does, and these instructions.

    The largest launch is among them: partial sums of one block say little about the merge of many.
    """
    executed, size = {}, {}
    for name, (_, reports) in baseline(op, dtype).items():
        mine = [report for report in reports if report.kernel == kernel]
        if mine:
            executed[name] = {line["index"] for report in mine for line in report.lines}
            size[name] = sum(report.counters["thread_instructions"] for report in mine)
    everything = set().union(*executed.values())
    chosen = [max(size, key=size.__getitem__)]
    done = set(executed[chosen[0]])
    while done != everything:
        best = max(executed, key=lambda name: len(executed[name] - done))
        chosen.append(best)
        done |= executed[best]
    return tuple(chosen), frozenset(everything)


def killed(kernel: str, ptx: str, op: str, dtype: torch.dtype, grid_delta: int = 0) -> str:
    """How a mutant of a kernel is found out by the workload ("" if it survives)."""
    try:
        module = Module(ptx)
    except SimulatorError as error:
        return f"does not load: {error}"
    chosen, _ = representatives(kernel, op, dtype)
    for case in cases(op, dtype):
        if case.name not in chosen:
            continue
        expected, _ = baseline(op, dtype)[case.name]
        try:
            with module.replacing(kernel):
                results, _ = case.run({"budget": 1 << 22, "grid_delta": grid_delta, "max_reports": 1})
        except AssertionError as error:  # findings, or an error code of the launcher
            return f"{case.name}: {str(error).strip().splitlines()[0]}"
        wrong = outcome(results, expected)
        if wrong:
            return f"{case.name}: {wrong}"
    return ""


TYPES = {"If": torch.float32, "I6__half": torch.float16, "I13__nv_bfloat16": torch.bfloat16, "Id": torch.float64}


def dtype_of(kernel: str) -> torch.dtype:
    """The element type in a mangled kernel name (finalize kernels name their accumulator)."""
    return next(dtype for mark, dtype in TYPES.items() if mark in kernel)
