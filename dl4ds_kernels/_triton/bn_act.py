"""``bn_act`` in Triton: BatchNorm statistics, the fused apply (+ residual, activation, bit mask), and their gradient.

Forward in training: partial statistics per chunk of rows, a merge in fixed order, apply. In eval: one small kernel folds the
running statistics, then apply. Backward: partial sums per chunk, merge, apply. No atomics: same bits on every run.
Only x may have any strides; residual and gradients are brought to the output's memory order first.
"""

import torch
import triton
from torch import Tensor

from ..ops._layout import accumulate_dtype, suggested_format
from . import _common
from ._bn_apply import bn_apply_into_kernel, bn_apply_kernel, bn_bwd_apply_kernel
from ._bn_merge import FOLD_CONFIG, MERGE_CONFIG, bn_bwd_merge_kernel, bn_fold_kernel, bn_stats_merge_kernel
from ._bn_reduce import MASKED_SUMS, STATS, SUMS, bn_bwd_partial_kernel, bn_stats_partial_kernel, reduce_launch_config
from ._common import Matrix, check, elementwise_launch_config, slope_of


def bn_act(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    residual: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    eps_std: bool,
    activation: int,
    negative_slope: float,
    save_mask: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """``(out, mean, rstd, mask, new_running_mean, new_running_var)``; what does not apply is an empty (0,) tensor."""
    _common.check_x("bn_act", x)
    channels = x.shape[1]
    weight, bias, running_mean, running_var = _common.channel_vectors(
        "bn_act", x, channels, weight=weight, bias=bias, running_mean=running_mean, running_var=running_var
    )
    _common.check_like("bn_act", x, residual=residual)
    has_statistics = training or (running_mean is not None and running_var is not None)
    check(has_statistics, "bn_act", "running_mean, running_var", "both tensors in eval", "None")

    acc_dtype = accumulate_dtype(x)
    out = torch.empty_like(x, memory_format=suggested_format(x))
    mask = _common.empty_mask(x, save_mask and residual is not None, activation)
    statistics = [x.new_empty(channels if training else 0, dtype=acc_dtype) for _ in range(2)]
    updated = [
        x.new_empty(channels if training and old is not None else 0, dtype=acc_dtype if old is None else old.dtype)
        for old in (running_mean, running_var)
    ]
    results = (out, *statistics, mask, *updated)
    if x.numel() == 0:
        for vector in (*statistics, *updated):  # the Python layer refuses this call in training; nothing stays undefined
            vector.fill_(float("nan"))
        return results

    matrix = Matrix.of(x, out)
    with _common.device_of(x):
        if training:
            center, _ = statistics
            scale, shift = x.new_empty((2, channels), dtype=acc_dtype)
            _statistics(x, matrix, weight, bias, running_mean, running_var, results, scale, shift, momentum, eps, eps_std)
        else:
            center, scale, shift = fold_statistics(x, running_mean, running_var, weight, bias, None, eps, eps_std)
        apply_statistics(x, matrix, residual, out, mask, (center, scale, shift), activation, negative_slope)
    return results


def _statistics(
    x: Tensor,
    matrix: Matrix,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    results: tuple[Tensor, ...],
    scale: Tensor,
    shift: Tensor,
    momentum: float,
    eps: float,
    eps_std: bool,
) -> None:
    """Batch statistics into ``results`` (laid out as bn_act returns them), folded vectors into ``scale`` and ``shift``."""
    _, mean, rstd, _, new_running_mean, new_running_var = results
    config = reduce_launch_config(matrix, STATS)
    chunks = config["chunks"]
    partial = x.new_empty(chunks * (3 * matrix.channels + 1), dtype=mean.dtype)
    _common.launch(
        bn_stats_partial_kernel,
        chunks * config["groups"],
        x=x,
        partial=partial,
        # A product that goes into a sum over lanes would become part of an fma with the other lane's rounded product: the two
        # lanes then hold different sums, and which of them shared memory keeps is the hardware's choice.
        enable_fp_fusion=False,
        **config,
        **matrix.arguments(),
    )
    _common.launch(
        bn_stats_merge_kernel,
        triton.cdiv(matrix.channels, MERGE_CONFIG["BLOCK_C"]),
        partial=partial,
        weight=weight,
        bias=bias,
        running_mean=running_mean,
        running_var=running_var,
        mean=mean,
        rstd=rstd,
        scale=scale,
        shift=shift,
        new_running_mean=new_running_mean,
        new_running_var=new_running_var,
        chunks=chunks,
        C=matrix.channels,
        total=matrix.per_channel,
        momentum=momentum,
        EPS=float(eps),
        EPS_STD=eps_std,
        **MERGE_CONFIG,
    )


def fold_statistics(
    y: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    conv_bias: Tensor | None,
    eps: float,
    eps_std: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(center, scale, shift), each (C,) in ``y``'s accumulation dtype: eval BatchNorm is (y - center) * scale + shift."""
    channels = running_mean.numel()
    center, scale, shift = y.new_empty((3, channels), dtype=accumulate_dtype(y))
    _common.launch(
        bn_fold_kernel,
        triton.cdiv(channels, FOLD_CONFIG["BLOCK_C"]),
        running_mean=running_mean,
        running_var=running_var,
        weight=weight,
        bias=bias,
        conv_bias=conv_bias,
        center=center,
        scale=scale,
        shift=shift,
        C=channels,
        EPS=float(eps),
        EPS_STD=eps_std,
        **FOLD_CONFIG,
    )
    return center, scale, shift


def apply_statistics(
    x: Tensor,
    matrix: Matrix,
    residual: Tensor | None,
    out: Tensor,
    mask: Tensor,
    folded: tuple[Tensor, Tensor, Tensor],
    activation: int,
    negative_slope: float,
) -> None:
    """out = act((x - center) * scale + shift [+ residual]); ``out`` may be ``x`` itself where x is dense."""
    programs, config = elementwise_launch_config(matrix)
    center, scale, shift = folded
    _common.launch(
        bn_apply_kernel,
        programs,
        x=x,
        residual=_common.dense_as(residual, out),
        out=out,
        mask=mask if mask.numel() else None,
        center=center,
        scale=scale,
        shift=shift,
        ACTIVATION=activation,
        SLOPE=slope_of(activation, negative_slope),
        **matrix.arguments(),
        **config,
    )


def bn_act_bwd(
    dout: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    residual: Tensor | None,
    mask: Tensor | None,
    training: bool,
    eps: float,
    eps_std: bool,
    activation: int,
    negative_slope: float,
    need_dx: bool,
    need_dparams: bool,
    need_dresidual: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``(dx, dweight, dbias, dresidual)``; what is not needed is an empty (0,) tensor."""
    _common.check_x("bn_act_bwd", x)
    channels, acc_dtype = x.shape[1], accumulate_dtype(x)
    weight, bias, mean, rstd = _common.channel_vectors(
        "bn_act_bwd", x, channels, weight=weight, bias=bias, mean=mean, rstd=rstd
    )
    for name, vector in (("mean", mean), ("rstd", rstd)):
        check(vector.dtype == acc_dtype, "bn_act_bwd", name, f"dtype {acc_dtype}", vector.dtype)
    _common.check_like("bn_act_bwd", x, dout=dout, residual=residual)
    _common.check_mask("bn_act_bwd", x, mask)

    memory_format = suggested_format(x)
    dx, dresidual = (
        torch.empty_like(x, memory_format=memory_format) if needed else x.new_empty(0) for needed in (need_dx, need_dresidual)
    )
    dweight, dbias = (x.new_empty(channels if need_dparams else 0, dtype=acc_dtype) for _ in range(2))
    results = (dx, dweight, dbias, dresidual)
    if x.numel() == 0:
        dweight.zero_()
        dbias.zero_()
        return results

    order = torch.empty_like(x, memory_format=memory_format, device="meta")
    matrix = Matrix.of(x, order)
    dout, residual = _common.dense_as(dout, order), _common.dense_as(residual, order)
    shared = {
        "dout": dout,
        "x": x,
        "mask": mask,
        "residual": residual,
        "mean": mean,
        "ACTIVATION": activation,
        "SLOPE": slope_of(activation, negative_slope),
        **matrix.arguments(),
    }
    with _common.device_of(x):
        partial, chunks = None, 0
        if need_dparams or (training and need_dx):
            config = reduce_launch_config(matrix, SUMS if mask is None else MASKED_SUMS)
            chunks = config["chunks"]
            partial = x.new_empty((2, chunks, channels), dtype=acc_dtype)
            _common.launch(
                bn_bwd_partial_kernel,
                chunks * config["groups"],
                weight=weight,
                bias=bias,
                rstd=rstd,
                partial=partial,
                WHOLE_BYTES=matrix.cols % 8 == 0,
                **shared,
                **config,
            )
        scale, shift, slope_x, offset = x.new_empty((4, channels), dtype=acc_dtype)
        _common.launch(
            bn_bwd_merge_kernel,
            triton.cdiv(channels, MERGE_CONFIG["BLOCK_C"]),
            partial=partial,
            weight=weight,
            bias=bias,
            mean=mean,
            rstd=rstd,
            dweight=dweight if need_dparams else None,
            dbias=dbias if need_dparams else None,
            scale=scale,
            shift=shift,
            slope_x=slope_x,
            offset=offset,
            chunks=chunks,
            C=channels,
            count=matrix.per_channel,
            TRAINING=training,
            EPS=float(eps),
            EPS_STD=eps_std,
            **MERGE_CONFIG,
        )
        if need_dx or need_dresidual:
            programs, config = elementwise_launch_config(matrix)
            _common.launch(
                bn_bwd_apply_kernel,
                programs,
                dx=dx if need_dx else None,
                dresidual=dresidual if need_dresidual else None,
                scale=scale,
                shift=shift,
                slope_x=slope_x,
                offset=offset,
                TRAINING=training,
                NEED_X=(training and need_dx) or (activation != 0 and mask is None),
                **shared,
                **config,
            )
    return results


def bn_act_into(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor,
    running_var: Tensor,
    out: Tensor,
    eps: float,
    eps_std: bool,
    activation: int,
    negative_slope: float,
) -> None:
    """Eval-mode ``act(bn(x))`` into ``out``: channels_last, or a slice of the channels of such a buffer, as x may be."""
    op = "bn_act_into"
    _common.check_x(op, x)
    channels = x.shape[1]
    weight, bias, running_mean, running_var = _common.channel_vectors(
        op, x, channels, weight=weight, bias=bias, running_mean=running_mean, running_var=running_var
    )
    _common.check_like(op, x, out=out)
    if x.numel() == 0:
        return
    out_pitch = pixel_pitch(out)
    check(out_pitch >= channels, op, "out", "channels_last, or a slice of its channels", out.stride())
    if not pixel_pitch(x):
        x = x.movedim(1, -1).contiguous().movedim(-1, 1)
    rows = x.numel() // channels
    programs, config = _common.walk_config(rows, channels, True)
    with _common.device_of(x):
        center, scale, shift = fold_statistics(x, running_mean, running_var, weight, bias, None, eps, eps_std)
        _common.launch(
            bn_apply_into_kernel,
            programs,
            x=x,
            out=out,
            center=center,
            scale=scale,
            shift=shift,
            rows=rows,
            cols=channels,
            x_pitch=pixel_pitch(x),
            out_pitch=out_pitch,
            ACTIVATION=activation,
            SLOPE=slope_of(activation, negative_slope),
            WIDE=_common.is_wide(x.numel(), x, out),
            **config,
        )


def pixel_pitch(t: Tensor) -> int:
    """Elements from one pixel of t (N, C, *spatial) to the next if that is one number and channels are neighbours, else 0."""
    if t.shape[1] > 1 and t.stride(1) != 1:
        return 0
    pitch, pixels = 0, 1
    for d in (*range(t.dim() - 1, 1, -1), 0):
        if t.shape[d] == 1:
            continue
        pitch = pitch or t.stride(d)
        if t.stride(d) != pitch * pixels:
            return 0
        pixels *= t.shape[d]
    return pitch or t.shape[1]
