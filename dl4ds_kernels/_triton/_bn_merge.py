"""The small kernels of BatchNorm, C threads each: partial results of all chunks into per-channel vectors, in fp64."""

import triton
import triton.language as tl

MERGE_CONFIG = {"BLOCK_CHUNKS": 64, "BLOCK_C": 16, "num_warps": 4}
FOLD_CONFIG = {"BLOCK_C": 128, "num_warps": 4}


@triton.jit
def rstd_of(var, EPS: tl.constexpr, EPS_STD: tl.constexpr):
    """1/sqrt(var + eps), or the lecture's 1/(sqrt(var) + eps)."""
    if EPS_STD:
        return 1 / (tl.sqrt(var) + EPS)
    else:
        return 1 / tl.sqrt(var + EPS)


@triton.jit
def load_vector(vector, c, valid, DEFAULT: tl.constexpr):
    """A per-channel vector in fp64, or its default where the caller has none."""
    if vector is None:
        return tl.full(c.shape, DEFAULT, tl.float64)
    else:
        values = tl.load(vector + c, valid, DEFAULT)
        if vector.dtype.element_ty == tl.bfloat16:  # Triton's interpreter converts bf16 from and to fp32 only
            values = values.to(tl.float32)
        return values.to(tl.float64)


@triton.jit
def store_vector(vector, c, values, valid):
    """Store fp64 values in the vector's dtype."""
    dtype: tl.constexpr = vector.dtype.element_ty
    if dtype == tl.bfloat16:
        values = values.to(tl.float32)
    tl.store(vector + c, values.to(dtype), valid)


@triton.jit
def bn_stats_merge_kernel(
    partial, weight, bias, running_mean, running_var, mean, rstd, scale, shift, new_running_mean, new_running_var,
    chunks, C, total, momentum: tl.float64, EPS: tl.constexpr, EPS_STD: tl.constexpr,
    BLOCK_CHUNKS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Merge (pivot, deviation, M2) and counts of all chunks, ``total`` together, in fp64.

    Writes statistics, folded vectors and running statistics.
    """
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    c_valid = c < C
    weighted = tl.zeros([BLOCK_C], tl.float64)
    for first in range(0, chunks, BLOCK_CHUNKS):
        chunk = first + tl.arange(0, BLOCK_CHUNKS)[:, None]
        valid = (chunk < chunks) & c_valid[None, :]
        at = partial + chunk * C + c[None, :]
        chunk_mean = tl.load(at, valid, 0.0).to(tl.float64) + tl.load(at + chunks * C, valid, 0.0).to(tl.float64)
        count = tl.load(partial + 3 * chunks * C + chunk, chunk < chunks, 0.0).to(tl.float64)
        weighted += tl.sum(count * chunk_mean, 0)
    merged_mean = weighted / total
    m2 = tl.zeros([BLOCK_C], tl.float64)
    for first in range(0, chunks, BLOCK_CHUNKS):
        chunk = first + tl.arange(0, BLOCK_CHUNKS)[:, None]
        valid = (chunk < chunks) & c_valid[None, :]
        at = partial + chunk * C + c[None, :]
        chunk_mean = tl.load(at, valid, 0.0).to(tl.float64) + tl.load(at + chunks * C, valid, 0.0).to(tl.float64)
        count = tl.load(partial + 3 * chunks * C + chunk, chunk < chunks, 0.0).to(tl.float64)
        delta = chunk_mean - merged_mean[None, :]
        m2 += tl.sum(tl.load(at + 2 * chunks * C, valid, 0.0).to(tl.float64) + count * delta * delta, 0)
    merged_rstd = rstd_of(m2 / total, EPS, EPS_STD)

    store_vector(mean, c, merged_mean, c_valid)
    store_vector(rstd, c, merged_rstd, c_valid)
    store_vector(scale, c, load_vector(weight, c, c_valid, 1.0) * merged_rstd, c_valid)
    store_vector(shift, c, load_vector(bias, c, c_valid, 0.0), c_valid)
    if running_mean is not None:
        updated = (1 - momentum) * load_vector(running_mean, c, c_valid, 0.0) + momentum * merged_mean
        store_vector(new_running_mean, c, updated, c_valid)
    if running_var is not None:
        unbiased = m2 / tl.maximum(total - 1, 1)
        updated = (1 - momentum) * load_vector(running_var, c, c_valid, 0.0) + momentum * unbiased
        store_vector(new_running_var, c, updated, c_valid)


@triton.jit
def bn_fold_kernel(
    running_mean, running_var, weight, bias, conv_bias, center, scale, shift, C,
    EPS: tl.constexpr, EPS_STD: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Eval: z = (y - center) * scale + shift from running statistics; a convolution's bias moves the center."""
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    valid = c < C
    mean = load_vector(running_mean, c, valid, 0.0) - load_vector(conv_bias, c, valid, 0.0)
    rstd = rstd_of(load_vector(running_var, c, valid, 1.0), EPS, EPS_STD)
    store_vector(center, c, mean, valid)
    store_vector(scale, c, load_vector(weight, c, valid, 1.0) * rstd, valid)
    store_vector(shift, c, load_vector(bias, c, valid, 0.0), valid)


@triton.jit
def bn_bwd_merge_kernel(
    partial, weight, bias, mean, rstd, dweight, dbias, scale, shift, slope_x, offset,
    chunks, C, count, TRAINING: tl.constexpr, EPS: tl.constexpr, EPS_STD: tl.constexpr,
    BLOCK_CHUNKS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Sum the chunks' (S1, S2) in fixed order in fp64; dx = scale * dz + slope_x * (x - mean) + offset."""
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    c_valid = c < C
    s1 = tl.zeros([BLOCK_C], tl.float64)
    s2 = tl.zeros([BLOCK_C], tl.float64)
    for first in range(0, chunks, BLOCK_CHUNKS):
        chunk = first + tl.arange(0, BLOCK_CHUNKS)[:, None]
        valid = (chunk < chunks) & c_valid[None, :]
        at = partial + chunk * C + c[None, :]
        s1 += tl.sum(tl.load(at, valid, 0.0).to(tl.float64), 0)
        s2 += tl.sum(tl.load(at + chunks * C, valid, 0.0).to(tl.float64), 0)
    inverse = tl.load(rstd + c, c_valid, 1.0).to(tl.float64)
    a = load_vector(weight, c, c_valid, 1.0) * inverse

    store_vector(scale, c, a, c_valid)
    store_vector(shift, c, load_vector(bias, c, c_valid, 0.0), c_valid)
    if dweight is not None:
        store_vector(dweight, c, s2 * inverse, c_valid)
        store_vector(dbias, c, s1, c_valid)
    if TRAINING:
        curvature = inverse / (1 / inverse - EPS if EPS_STD else 1 / inverse)
        store_vector(slope_x, c, -a * curvature * s2 / count, c_valid)
        store_vector(offset, c, -a * s1 / count, c_valid)
