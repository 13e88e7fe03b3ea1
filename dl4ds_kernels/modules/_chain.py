"""Several convolutions in one op call: a residual block, a pair of U-Net convolutions, a whole DenseNet block.

In inference on the CPU a small layer costs as much in Python and in the dispatcher as in its kernel, because the convolution
before it has emptied the caches that both need. ``run_chain`` collects the tensors of all steps and calls ``conv_chain`` once.
What decides how the op is called (types, hooks, modes, geometry) is gathered as one signature and compared with that of the
call before; whatever is new, or not for this path, goes step by step through the functions of ``_run.py``, and gives the same
values.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import _autotune, _packing
from .._activation import ACTIVATION_CODES
from .._define import CPP, op
from ..functional._common import call
from ..functional.conv_bn_act import out_shape
from ._block import run_norm_act_conv, run_residual_block
from ._packed import applies
from ._run import (
    NO_ACT,
    ActSpec,
    _act_fusable,
    _bn_fusable,
    _conv_fusable,
    _no_global_hooks,
    _slope,
    is_plain,
    run_bn_act,
    run_conv_act,
    run_conv_bn_act,
    run_dense_conv,
)  # fmt: skip
from ._tail import run_tail
from .bn_act import BNAct2d


class Step(NamedTuple):
    """``act(bn(conv(cat(sources))) [+ residual])``; ``before`` (BatchNorm, activation) is applied to what is read.

    ``sources`` and ``residual`` are registers: first the inputs of the chain, then the outputs of its steps.
    """

    conv: nn.Module
    bn: nn.Module | None
    act: ActSpec
    sources: tuple[int, ...]
    residual: int = -1
    before: tuple[nn.Module, ActSpec] | None = None
    pool: nn.Module | None = None  # a mean over 2x2 pixels after the convolution
    in_place: str = ""  # whose dtype the sum has, see add() in _run.py


class _Program(NamedTuple):
    """What ``conv_chain`` is called with besides tensors; ``algorithms`` is empty where the steps must go one by one."""

    signature: list[Any]
    algorithms: tuple[int, ...]
    code: list[int]
    numbers: list[float]


_MAX_PROGRAMS = 32  # of one module: sizes of inputs seen
_JOIN = -1

_CONV_STATE = attrgetter("__class__", "training", "stride", "padding", "dilation", "groups", "padding_mode")
_BN_STATE = attrgetter("__class__", "training", "eps")
_POOL_STATE = attrgetter("__class__", "kernel_size", "stride", "padding", "ceil_mode", "divisor_override")
_DTYPE = attrgetter("dtype")
_FLOAT32 = {torch.float32}


def run_chain(
    inputs: tuple[Tensor, ...],
    steps: tuple[Step, ...],
    join: tuple[int, ...] = (),
    *,
    memory_format: str = "auto",
    exact: bool = False,
    backend: str | None = None,
) -> Tensor:
    """The last step's output, or with ``join`` the concatenation of these registers along the channels."""
    x = inputs[0]
    if not (
        torch.compiler.is_compiling()
        or torch.is_grad_enabled()
        or torch._C._are_functorch_transforms_active()
        or memory_format == "preserve"
        or not isinstance(x, Tensor)
        or not applies(x, steps[0].conv, backend)
        or not _no_global_hooks()
    ):
        out = _run_program(inputs, steps, join, exact)
        if out is not None:
            return out
    elif len(inputs) == 1 and not join and isinstance(x, Tensor) and x.is_cpu:
        out = _run_block(x, steps, backend)
        if out is not None:
            return out
    registers: list[Any] = list(inputs)
    last = len(steps) if join or len(steps) < 2 else len(steps) - 2
    last_reader = {i: at for at, step in enumerate(steps) for i in (*step.sources, step.residual)}
    for i, step in enumerate(steps):
        if i == last and not torch.is_grad_enabled():
            out = _run_tail(registers, step, steps[-1], backend)
            if out is not None:
                return out
        registers.append(_run_step(registers, step, memory_format, exact, backend))
        for r in (*step.sources, step.residual):
            if r >= 0 and last_reader[r] == i and r not in join:
                registers[r] = None  # its memory goes to the next step
    return torch.cat([registers[i] for i in join], 1) if join else registers[-1]


def _run_block(x: Tensor, steps: tuple[Step, ...], backend: str | None) -> Tensor | None:
    """A training call of convolutions with BatchNorm and one activation in a row, as one autograd op; None where not.

    It keeps the convolutions' outputs; the activations between them are computed again in backward, as in a residual block.
    """
    first = steps[0].act
    if torch.compiler.is_compiling() or len(steps) < 2 or not torch.is_grad_enabled():
        return None
    for i, step in enumerate(steps):
        alone = step.residual < 0 and step.before is None and step.pool is None and step.sources == (i,)
        if not (alone and step.bn is not None and step.bn.training and step.act.name == first.name):
            return None
        if not _act_fusable(step.act) or _slope(step.act) != _slope(first):
            return None
    return run_residual_block(x, [(step.conv, step.bn) for step in steps], first, None, add=False, backend=backend)


def _run_step(registers: list[Tensor], step: Step, memory_format: str, exact: bool, backend: str | None) -> Tensor:
    keywords: dict[str, Any] = {"memory_format": memory_format, "exact": exact, "backend": backend}
    conv, bn, act, sources, residual, before, pool, in_place = step
    xs = [registers[i] for i in sources]
    if before is not None:
        if bn is not None and pool is None:
            return run_dense_conv(xs, *before, conv, bn, act, **keywords)
        if bn is None and act is NO_ACT:
            out = run_norm_act_conv(xs[0] if len(xs) == 1 else torch.cat(xs, 1), *before, conv, **keywords)
            return out if pool is None else pool(out)
        xs = [run_bn_act(xs[0] if len(xs) == 1 else torch.cat(xs, 1), *before, backend=backend)]
    x = xs[0] if len(xs) == 1 else torch.cat(xs, 1)
    if bn is not None:
        out = run_conv_bn_act(x, conv, bn, act, registers[residual] if residual >= 0 else None, in_place, **keywords)
    else:
        out = run_conv_act(x, conv, act, **keywords)
    return out if pool is None else pool(out)


def _run_tail(registers: list[Tensor], step: Step, last: Step, backend: str | None) -> Tensor | None:
    """The last two steps in one call, None if they must go one by one."""
    between = len(registers)  # the register of what only the last step reads
    alone = (step.residual, step.before, step.pool, last.before, last.pool) == (-1, None, None, None, None)
    if not alone or len(step.sources) != 1 or last.sources != (between,) or last.residual == between:
        return None
    residual = registers[last.residual] if last.residual >= 0 else None
    return run_tail(registers[step.sources[0]], (step[:3], last[:3]), residual, last.in_place, backend)


def _run_program(inputs: tuple[Tensor, ...], steps: tuple[Step, ...], join: tuple[int, ...], exact: bool) -> Tensor | None:
    """All steps in one call; None if they must go one by one this time."""
    for t in inputs[1:]:
        if type(t) is not Tensor or t.dtype is not torch.float32 or not t.is_cpu:
            return None
    signature, vectors = _inspect(steps)
    if signature is None or not _FLOAT32.issuperset(map(_DTYPE, vectors)):
        return None
    programs = _packing.programs(steps[0].conv, steps[0].conv._parameters["weight"])
    key = (tuple(t.shape for t in inputs), len(steps), join, exact, torch.get_num_threads())
    program = programs.get(key)
    if program is None or program.signature != signature:
        if len(programs) >= _MAX_PROGRAMS:
            programs.clear()
        program = programs[key] = _compile(inputs, steps, join, exact, signature)
    if not program.algorithms:
        programs.pop(key, None)  # some step has not chosen its algorithm yet; its own call does that
        return None
    tensors = []
    for step, algorithm in zip(steps, program.algorithms, strict=True):
        weight = step.conv._parameters["weight"]
        if weight.dtype is not torch.float32 or not weight.is_cpu or weight.is_inference():
            return None
        packed = _packing.kept(step.conv, weight, algorithm)
        if packed is None:
            return None
        tensors += (weight, packed)
    return call(op("conv_chain", CPP), False, list(inputs), tensors + vectors, program.code, program.numbers)


def _inspect(steps: tuple[Step, ...]) -> tuple[list[Any] | None, list[Tensor]]:
    """(everything that a program depends on besides sizes, the per-channel tensors in the order of its code).

    None in place of a signature: a hook or a patched forward somewhere.
    """
    signature: list[Any] = []
    vectors: list[Tensor] = []
    note, take = signature.append, vectors.append
    for conv, bn, act, sources, residual, before, pool, _in_place in steps:
        note((sources, residual))
        note(_CONV_STATE(conv))
        bias = conv._parameters["bias"]
        note(bias is None)
        if bias is not None:
            take(bias)
        modules = [conv, bn, act.module, pool] if before is None else [conv, bn, act.module, pool, before[0], before[1].module]
        for module in modules:
            if module is not None and not is_plain(module):
                return None, vectors
        for norm in (bn,) if before is None else (bn, before[0]):
            if norm is None:
                note(None)
                continue
            note(_BN_STATE(norm))
            note(norm.eps_mode if type(norm) is BNAct2d else None)
            for t in _norm_vectors(norm):
                note(t is None)
                if t is not None:
                    take(t)
        for spec in (act,) if before is None else (act, before[1]):
            module = spec.module
            note(spec[:2] if module is None else (module.__class__, spec.name, _slope(spec)))
        if pool is not None:
            note(_POOL_STATE(pool) if type(pool) is nn.AvgPool2d else pool.__class__)
    return signature, vectors


def _is_mean_of_four(pool: nn.Module | None) -> bool:
    """Whether the module averages 2x2 pixels as the kernel does; average and 1x1 convolution change places."""
    if pool is None:
        return True
    pairs = ((2, 2), 2)
    return (
        type(pool) is nn.AvgPool2d
        and is_plain(pool)
        and pool.kernel_size in pairs
        and pool.stride in pairs
        and pool.padding in ((0, 0), 0)
        and not pool.ceil_mode
        and pool.divisor_override is None
    )


def _step_algorithm(step: Step, shape: tuple[int, ...], aligned: bool, exact: bool) -> int | None:
    """The algorithm of a step whose (joined) input has this shape, None if the step cannot be part of a program.

    ``aligned``: every source but the last fills whole chunks of channels.
    """
    conv, bn, act, _sources, _residual, before, pool, _in_place = step
    if not (_conv_fusable(conv) and _act_fusable(act) and type(conv.padding) is not str and shape[1] == conv.in_channels):
        return None
    if bn is not None and (not _bn_fusable(bn) or bn.training or bn._buffers["running_mean"] is None):
        return None
    if bn is None and conv.training:
        return None
    weight = conv._parameters["weight"]
    if before is not None:
        norm, activation = before
        fits = (
            conv.kernel_size == (1, 1) and conv.stride == (1, 1) and conv.padding == (0, 0) and conv.groups == 1
            and _bn_fusable(norm) and not norm.training and norm._buffers["running_mean"] is not None
            and _act_fusable(activation) and activation.name in ("none", "relu", "relu6")
            and aligned and _is_mean_of_four(pool)
            and (pool is None or (act.name == "none" and bn is None and min(shape[2:]) >= 2))
        )  # fmt: skip
        return _packing.DIRECT if fits and _packing.direct_weight(conv, weight) is not None else None
    if pool is not None:
        return None
    geometry = (conv.stride, conv.padding, conv.dilation, conv.groups)
    algorithm = _packing.chosen(conv, weight, shape, *geometry, exact)
    if algorithm is None:
        algorithm = _choose_ahead(conv, weight, shape, geometry, exact)
    if algorithm == _packing.LIBRARY:
        small = shape[0] * shape[2] * shape[3] * weight.numel() < _packing.MIN_LIBRARY_MACS
        return None if small or bn is None else algorithm
    return algorithm


def _choose_ahead(conv: nn.Module, weight: Tensor, shape: tuple[int, ...], geometry: Any, exact: bool) -> int | None:
    """What the step's own call would choose, so that a chain's first call is one call too; None where it must be asked."""
    if _autotune.wanted() or not _packing.supported(weight):  # timing needs the true input
        return None
    n, _, height, width = out_shape(shape, weight, *geometry[:3])
    if min(n, height, width) < 1 or n * height * width * weight.numel() < _packing.MIN_MACS:
        return None
    return _packing.packed_weight(conv, weight, weight.new_empty(()).expand(shape), *geometry, exact)[0]


def _compile(
    inputs: tuple[Tensor, ...], steps: tuple[Step, ...], join: tuple[int, ...], exact: bool, signature: list[Any]
) -> _Program:
    """Code in the order of ``struct Code`` in csrc/ops/conv_bn_act/conv_chain_cpu.cpp."""
    none = _Program(signature, (), [], [])
    shapes = [tuple(t.shape) for t in inputs]
    algorithms: list[int] = []
    code: list[int] = []
    numbers: list[float] = []
    place = 2 * len(steps)  # of the next vector; before them a weight and a pack for each step

    def places(tensors: list[Tensor | None]) -> list[int]:
        nonlocal place
        found = []
        for t in tensors:
            found.append(-1 if t is None else place)
            place += t is not None
        return found

    for index, step in enumerate(steps):
        conv, bn, act, sources, residual, before, pool, _in_place = step
        if any(len(shapes[i]) != 4 for i in sources):
            return none
        n, _, height, width = shapes[sources[0]]
        if any((shapes[i][0], *shapes[i][2:]) != (n, height, width) for i in sources):
            return none
        channels = sum(shapes[i][1] for i in sources)
        aligned = all(shapes[i][1] % 16 == 0 for i in sources[:-1])
        algorithm = _step_algorithm(step, (n, channels, height, width), aligned, exact)
        if algorithm is None:
            return none
        out = out_shape((n, channels, height, width), conv.weight, conv.stride, conv.padding, conv.dilation)
        if residual >= 0 and (bn is None or shapes[residual] != tuple(out)):
            return none
        shapes.append((out[0], out[1], out[2] // 2, out[3] // 2) if pool is not None else tuple(out))
        algorithms.append(algorithm)
        norm, activation = before or (None, NO_ACT)
        bias, after = places([conv._parameters["bias"]]), places(_norm_vectors(bn))
        code += [algorithm, 2 * index, 2 * index + 1, *bias, *after, *places(_norm_vectors(norm)), residual]
        code += [*conv.stride, *conv.padding, *conv.dilation, conv.groups, _eps_std(bn), ACTIVATION_CODES[act.name]]
        code += [norm is not None, _eps_std(norm), ACTIVATION_CODES[activation.name]]
        code += [1 if pool is None else 2, len(sources), *sources]
        numbers += [0.0 if bn is None else bn.eps, _slope(act), 0.0 if norm is None else norm.eps]
    if join:
        code += [_JOIN, *[-1] * 11, -1, 1, 1, 0, 0, 1, 1, 1, 0, 0, 0, 0, 0, 1, len(join), *join]
        numbers += [0.0, 0.0, 0.0]
    return _Program(signature, tuple(algorithms), [int(c) for c in code], numbers)


def _norm_vectors(norm: nn.Module | None) -> list[Tensor | None]:
    if norm is None:
        return [None] * 4
    return [norm._buffers["running_mean"], norm._buffers["running_var"], norm._parameters["weight"], norm._parameters["bias"]]


def _eps_std(norm: nn.Module | None) -> bool:
    return type(norm) is BNAct2d and norm.eps_mode == "std"


def residual_steps(
    pairs: list[tuple[nn.Module, nn.Module]],
    act: ActSpec,
    projection: tuple[nn.Module, nn.Module] | None,
    source: int,
    first: int,
) -> tuple[Step, ...]:
    """A residual block that reads register ``source`` and fills those from ``first`` on; ``projection``: of its shortcut.

    The last convolution adds in place to the projection's output, else to the block's input. A projection with a stride is made
    late: its output, and not the larger input, then lies beside those of the branch. Without one it is made first: the input is
    free after the branch's first convolution, and a large output does not come after small ones have taken its place.
    """
    shortcut = [] if projection is None else [Step(*projection, NO_ACT, (source,))]
    early = [] if projection is None or tuple(projection[0].stride) != (1, 1) else shortcut
    start = first + len(early)
    branch = [Step(conv, bn, act, (start + i - 1 if i else source,)) for i, (conv, bn) in enumerate(pairs)]
    end = branch.pop()._replace(residual=source, in_place="z")  # stock adds in place
    if shortcut:
        end = end._replace(residual=first if early else start + len(branch))
    return (*early, *branch, *([] if early else shortcut), end)


def run_blocks(
    x: Tensor, blocks: Iterable[nn.Module], steps_of: Callable[[Any, int, int], tuple[Step, ...] | None], **keywords: Any
) -> Tensor | None:
    """Residual blocks in a row, in inference on the CPU one call, in which a block adds to its input in place. None where not.

    ``steps_of(block, source, first)`` gives the :func:`residual_steps` of a block, None if it does not run as such.
    """
    if type(x) is not Tensor or torch.is_grad_enabled() or not x.is_cpu or torch.compiler.is_compiling():
        return None
    if torch.jit.is_tracing() or not _no_global_hooks():  # which see every module called
        return None
    steps: list[Step] = []
    for block in blocks:
        more = steps_of(block, len(steps), len(steps) + 1)
        if more is None:
            return None
        steps += more
    return run_chain((x,), tuple(steps), **keywords) if steps else None


class DenseLayerParts(NamedTuple):
    """The stock modules of one DenseNet layer."""

    bn1: nn.Module
    act1: ActSpec
    conv1: nn.Module
    bn2: nn.Module
    act2: ActSpec
    conv2: nn.Module


def run_dense_block(x: Tensor, layers: list[DenseLayerParts], **keywords: Any) -> Tensor:
    """A DenseNet block: every layer reads the outputs of those before it where they lie, and they are joined at the end."""
    steps: list[Step] = []
    features: tuple[int, ...] = (0,)
    for bn1, act1, conv1, bn2, act2, conv2 in layers:
        steps.append(Step(conv1, bn2, act2, features, before=(bn1, act1)))
        steps.append(Step(conv2, None, NO_ACT, (len(steps),)))
        features += (len(steps),)
    return run_chain((x,), tuple(steps), features, **keywords)
