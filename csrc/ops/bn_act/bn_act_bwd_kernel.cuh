// Backward kernels of bn_act: per-channel sums of dz and dz * (x - mean), and the elementwise pass.
#pragma once

#include "ops/bn_act/bn_act_kernel.cuh"

namespace dl4ds {

/// What both passes read. z is recomputed from x (and residual) unless there is a mask or no activation.
struct BnActGradientArgs {
    const void *dout, *x, *residual;
    const uint8_t* mask;
    Activation activation;
    double slope;
    Rows rows;
    RowStrides dout_rows, x_rows, residual_rows;
    Planes planes;
    PlaneStrides dout_planes, x_planes, residual_planes;
    int64_t channels, row_vecs, numel;

    __host__ __device__ bool recomputes() const { return mask == nullptr && activation != Activation::kNone; }
    __host__ __device__ bool reads_residual() const { return recomputes() && residual != nullptr; }
};

struct BnActReduceArgs {
    BnActGradientArgs in;
    Affine affine;  // without a table
    ReducePlan plan;
    void* partial;  // [parts][2][channels]: sum of dz, sum of dz * (x - mean)
};

/// dz = dout * act'(z) for kCount neighbouring values, in place.
template <typename T, int kVec, int kCount>
__device__ __forceinline__ void to_dz(const BnActGradientArgs& in, acc_type<T> (&dz)[kCount],
                                      const acc_type<T> (&x)[kCount], const Pack<T, kVec>& residual,
                                      int first, const acc_type<T> (&scale)[kCount],
                                      const acc_type<T> (&shift)[kCount], unsigned bits) {
    using acc_t = acc_type<T>;
    const acc_t slope = static_cast<acc_t>(in.slope);
    if (in.mask != nullptr) {
        masked_gradient(dz, bits, in.activation, slope);
    } else if (in.activation != Activation::kNone) {
        acc_t z[kCount];
#pragma unroll
        for (int k = 0; k < kCount; ++k) {
            z[k] = fma(x[k], scale[k], shift[k]);
        }
        if (in.residual != nullptr) {
#pragma unroll
            for (int k = 0; k < kCount; ++k) {
                z[k] += to_acc(residual.v[first + k]);
            }
        }
        activation_gradient<T, kCount>(dz, z, in.activation, slope);
    }
}

/// Where a table of `channels` entries keeps channel c: groups of four, first those that begin a vector of
/// eight, then the others, so that neighbouring threads read neighbouring groups.
template <int kVec>
__host__ __device__ __forceinline__ int64_t group_index(int64_t c, int64_t channels) {
    return kVec == 8 ? c % 8 / 4 * (channels / 2) + c / 8 * 4 + c % 4 : c;
}

template <typename T, int kVec, int kCount>
__device__ __forceinline__ void get_values(const Pack<T, kVec>& pack, int first, acc_type<T> (&out)[kCount]) {
#pragma unroll
    for (int k = 0; k < kCount; ++k) {
        out[k] = to_acc(pack.v[first + k]);
    }
}

/// Blocks and rows as in bn_act_stats_kernel_nhwc.
template <typename T, int kVec>
__global__ void __launch_bounds__(kThreads, 4) bn_act_bwd_reduce_kernel_nhwc(const BnActReduceArgs a) {
    using acc_t = acc_type<T>;
    constexpr int kGroup = kVec < 4 ? kVec : 4;
    __shared__ alignas(16) acc_t shared[Sums<acc_t>::kFields * kThreads * kVec];
    __shared__ alignas(16) acc_t table[3][kThreads];  // mean, scale, shift of the tile's channels
    const BnActGradientArgs& in = a.in;
    const int width = a.plan.width, height = a.plan.height, tile_channels = width * kVec;
    const int tx = threadIdx.x % width, ty = threadIdx.x / width;
    const int64_t tile = blockIdx.x % a.plan.tiles, part = blockIdx.x / a.plan.tiles;
    const int column = static_cast<int>(tile) * width + tx, c = column * kVec;
    if (threadIdx.x < tile_channels && tile * tile_channels + threadIdx.x < in.channels) {
        const int64_t channel = tile * tile_channels + threadIdx.x;
        acc_t scale[1], shift[1];
        load_affine<acc_t, 1>(a.affine, channel, scale, shift);
        const int64_t place = group_index<kVec>(threadIdx.x, tile_channels);
        table[0][place] = load_channel<acc_t>(a.affine.mean, channel);
        table[1][place] = scale[0];
        table[2][place] = shift[0];
    }
    __syncthreads();
    Sums<acc_t> own[kVec];
    if (ty < height && c < in.channels) {
        for (int64_t row = part * height + ty; row < in.rows.count; row += a.plan.row_step) {
            const auto value =
                load_pack<T, kVec>(static_cast<const T*>(in.x) + c + row_offset(in.rows, in.x_rows, row));
            const auto gradient = load_pack<T, kVec>(static_cast<const T*>(in.dout) + c +
                                                     row_offset(in.rows, in.dout_rows, row));
            Pack<T, kVec> add;
            if (in.reads_residual()) {
                add = load_pack<T, kVec>(static_cast<const T*>(in.residual) + c +
                                         row_offset(in.rows, in.residual_rows, row));
            }
            const unsigned bits =
                in.mask != nullptr ? load_mask<kVec>(in.mask, row * in.row_vecs + column) : 0;
#pragma unroll
            for (int g = 0; g < kVec; g += kGroup) {
                acc_t v[kGroup], dz[kGroup], scale[kGroup], shift[kGroup], mean[kGroup];
                const int64_t place = group_index<kVec>(tx * kVec + g, tile_channels);
                if (in.recomputes()) {
                    reload_shared(&table[1][place], scale);
                    reload_shared(&table[2][place], shift);
                }
                get_values<T, kVec, kGroup>(value, g, v);
                get_values<T, kVec, kGroup>(gradient, g, dz);
                to_dz<T, kVec, kGroup>(in, dz, v, add, g, scale, shift, bits >> g);
                reload_shared(&table[0][place], mean);
#pragma unroll
                for (int k = 0; k < kGroup; ++k) {
                    own[g + k].v[0] += dz[k];
                    own[g + k].v[1] += dz[k] * (v[k] - mean[k]);
                }
            }
        }
    }
    const Sums<acc_t> merged = column_merge<Sums<acc_t>, acc_t, kVec>(own, width, height, shared);
    const int64_t channel = tile * tile_channels + threadIdx.x;
    if (threadIdx.x < tile_channels && channel < in.channels) {
        acc_t* partial = static_cast<acc_t*>(a.partial) + part * 2 * in.channels + channel;
        partial[0] = merged.v[0];
        partial[in.channels] = merged.v[1];
    }
}

/// Blocks and windows as in bn_act_stats_kernel_nchw.
template <typename T, int kVec>
__global__ void __launch_bounds__(kThreads, 4) bn_act_bwd_reduce_kernel_nchw(const BnActReduceArgs a) {
    using acc_t = acc_type<T>;
    __shared__ Sums<acc_t> shared[kThreads / 32];
    const BnActGradientArgs& in = a.in;
    const int64_t part = blockIdx.x % a.plan.parts, length = in.planes.length;
    const int c = static_cast<int>(blockIdx.x / a.plan.parts);
    const int64_t item = part * kThreads + threadIdx.x;
    int64_t n = item / a.plan.windows;
    int64_t window = item - n * a.plan.windows;
    acc_t scale[1], shift[1];
    load_affine<acc_t, 1>(a.affine, c, scale, shift);
    const acc_t mean = load_channel<acc_t>(a.affine.mean, c);
    Sums<acc_t> own;
    while (n < in.planes.batch) {
        const int64_t start = (n * in.planes.channels + c) * length;
        const int pos = static_cast<int>(window * kVec - start % kVec);
        const int64_t left = in.numel - start - pos;
        if (pos < length) {
            const auto value = load_upto<T, kVec>(
                static_cast<const T*>(in.x) + plane_offset(in.planes, in.x_planes, n, c, pos), left);
            const auto gradient = load_upto<T, kVec>(
                static_cast<const T*>(in.dout) + plane_offset(in.planes, in.dout_planes, n, c, pos), left);
            Pack<T, kVec> add;
            if (in.reads_residual()) {
                add = load_upto<T, kVec>(static_cast<const T*>(in.residual) +
                                             plane_offset(in.planes, in.residual_planes, n, c, pos),
                                         left);
            }
            const unsigned bits = in.mask != nullptr ? load_mask<kVec>(in.mask, (start + pos) / kVec) : 0;
            acc_t v[kVec], dz[kVec], scales[kVec], shifts[kVec];
            get_values<T, kVec, kVec>(value, 0, v);
            get_values<T, kVec, kVec>(gradient, 0, dz);
#pragma unroll
            for (int k = 0; k < kVec; ++k) {
                scales[k] = scale[0];
                shifts[k] = shift[0];
            }
            to_dz<T, kVec, kVec>(in, dz, v, add, 0, scales, shifts, bits);
#pragma unroll
            for (int k = 0; k < kVec; ++k) {
                if (pos + k >= 0 && pos + k < length) {
                    own.v[0] += dz[k];
                    own.v[1] += dz[k] * (v[k] - mean);
                }
            }
        }
        n += a.plan.step_n;
        window += a.plan.step_window;
        if (window >= a.plan.windows) {
            window -= a.plan.windows;
            ++n;
        }
    }
    const Sums<acc_t> merged = block_merge(own, shared);
    if (threadIdx.x == 0) {
        acc_t* partial = static_cast<acc_t*>(a.partial) + part * 2 * in.channels + c;
        partial[0] = merged.v[0];
        partial[in.channels] = merged.v[1];
    }
}

struct BnActBwdFinalizeArgs {
    int64_t channels, parts;  // parts 0: no sums were taken
    double count;             // values per channel
    const void* partial;
    Affine affine;
    const void* rstd;
    bool training, eps_std;
    double eps;
    void* table;  // [4][table_stride]: what bn_act_bwd_kernel_* read
    int64_t table_stride;
    bool grouped;  // by group_index<8>
    void *dweight, *dbias;
};

/// Sums the partials of each channel in fp64, in a fixed order. dx = scale * dz + factor * x + offset.
template <typename acc_t>
__global__ void __launch_bounds__(kFinalizeChannels* kFinalizeGroups, 2)
    bn_act_bwd_finalize_kernel(const BnActBwdFinalizeArgs a) {
    __shared__ double shared[2][kFinalizeGroups][kFinalizeChannels];
    const int64_t c = int64_t(blockIdx.x) * kFinalizeChannels + threadIdx.x % kFinalizeChannels;
    const int group = threadIdx.x / kFinalizeChannels;
    const bool active = c < a.channels;
    const acc_t* partial = static_cast<const acc_t*>(a.partial) + c;
    double sum[2] = {0, 0};
    if (active) {
#pragma unroll 4
        for (int64_t part = group; part < a.parts; part += kFinalizeGroups) {
            sum[0] += partial[part * 2 * a.channels];
            sum[1] += partial[(part * 2 + 1) * a.channels];
        }
    }
    finalize_sum(sum, shared);
    if (!active || group != 0) {
        return;
    }
    const double mean = load_channel<double>(a.affine.mean, c), rstd = static_cast<const acc_t*>(a.rstd)[c];
    if (a.dweight != nullptr) {
        static_cast<acc_t*>(a.dbias)[c] = static_cast<acc_t>(sum[0]);
        static_cast<acc_t*>(a.dweight)[c] = static_cast<acc_t>(sum[1] * rstd);
    }
    acc_t scale[1], shift[1], factor = 0, offset = 0;
    load_affine<acc_t, 1>(a.affine, c, scale, shift);
    if (a.training) {
        // With rstd = 1 / (sigma + eps) the variance's gradient divides by sigma; a constant channel has
        // none.
        const double sigma = 1 / rstd - a.eps;
        const double k = !a.eps_std ? rstd * rstd : sigma > 0 ? rstd / sigma : 0;
        factor = static_cast<acc_t>(-scale[0] * k * sum[1] / a.count);
        offset = static_cast<acc_t>(-scale[0] * sum[0] / a.count - double(factor) * mean);
    }
    acc_t* table = static_cast<acc_t*>(a.table) + (a.grouped ? group_index<8>(c, a.channels) : c);
    table[0] = scale[0];
    table[a.table_stride] = factor;
    table[2 * a.table_stride] = offset;
    table[3 * a.table_stride] = shift[0];
}

struct BnActBwdArgs {
    BnActGradientArgs in;
    const void* table;
    int64_t table_stride;
    bool training;
    void *dx, *dresidual;
    int64_t row_step, vecs;
    PlaneStep plane_step;

    __host__ __device__ bool reads_x() const { return in.recomputes() || (training && dx != nullptr); }
};

/// The walk of bn_act_fwd_kernel_nhwc: from the end of the reduction backwards, channels fixed per thread.
template <typename T, int kVec>
__global__ void __launch_bounds__(kThreads, 4) bn_act_bwd_kernel_nhwc(const BnActBwdArgs a) {
    using acc_t = acc_type<T>;
    constexpr int kGroup = kVec < 4 ? kVec : 4;
    const BnActGradientArgs& in = a.in;
    const int64_t base = int64_t(blockIdx.x) * kThreads, stride = int64_t(gridDim.x) * kThreads;
    int step = static_cast<int>((a.vecs - 1 - base) / stride);
    int64_t row = (base + threadIdx.x) / in.row_vecs;
    const int column = static_cast<int>(base + threadIdx.x - row * in.row_vecs), c = column * kVec;
    row += step * a.row_step;
    for (; step >= 0; --step, row -= a.row_step) {
        if (row >= in.rows.count) {
            continue;
        }
        auto gradient =
            load_pack<T, kVec>(static_cast<const T*>(in.dout) + c + row_offset(in.rows, in.dout_rows, row));
        Pack<T, kVec> value, add;
        if (a.reads_x()) {
            value = load_pack<T, kVec>(static_cast<const T*>(in.x) + c + row_offset(in.rows, in.x_rows, row));
        }
        if (in.reads_residual()) {
            add = load_pack<T, kVec>(static_cast<const T*>(in.residual) + c +
                                     row_offset(in.rows, in.residual_rows, row));
        }
        const int64_t f = row * in.row_vecs + column;
        const unsigned bits = in.mask != nullptr ? load_mask<kVec>(in.mask, f) : 0;
#pragma unroll
        for (int g = 0; g < kVec; g += kGroup) {
            acc_t scale[kGroup], shift[kGroup], factor[kGroup], offset[kGroup], v[kGroup], dz[kGroup];
            const acc_t* table = static_cast<const acc_t*>(a.table) + group_index<kVec>(c + g, in.channels);
            reload_global(table, scale);
            if (in.recomputes()) {
                reload_global(table + 3 * a.table_stride, shift);
            }
            get_values<T, kVec, kGroup>(value, g, v);
            get_values<T, kVec, kGroup>(gradient, g, dz);
            to_dz<T, kVec, kGroup>(in, dz, v, add, g, scale, shift, bits >> g);
            set_values<T, kVec, kGroup>(gradient, g, dz);
            if (a.training) {
                reload_global(table + a.table_stride, factor);
                reload_global(table + 2 * a.table_stride, offset);
            }
#pragma unroll
            for (int k = 0; k < kGroup; ++k) {
                dz[k] = scale[k] * dz[k] + (a.training ? fma(factor[k], v[k], offset[k]) : acc_t(0));
            }
            set_values<T, kVec, kGroup>(value, g, dz);
        }
        if (a.dx != nullptr) {
            store_pack<T, kVec>(static_cast<T*>(a.dx) + f * kVec, value);
        }
        if (a.dresidual != nullptr) {
            store_pack<T, kVec>(static_cast<T*>(a.dresidual) + f * kVec, gradient);
        }
    }
}

/// The walk of bn_act_fwd_kernel_nchw: a vector may end in the next plane.
template <typename T, int kVec>
__global__ void __launch_bounds__(kThreads, 4) bn_act_bwd_kernel_nchw(const BnActBwdArgs a) {
    using acc_t = acc_type<T>;
    constexpr int kGroup = kVec < 4 ? kVec : 4;
    const BnActGradientArgs& in = a.in;
    const int64_t base = int64_t(blockIdx.x) * kThreads, stride = int64_t(gridDim.x) * kThreads;
    int step = static_cast<int>((a.vecs - 1 - base) / stride);
    int64_t f = base + threadIdx.x + step * stride;
    PlaneCursor at(in.planes, f * kVec);
    const acc_t* table = static_cast<const acc_t*>(a.table);
    for (; step >= 0; --step, f -= stride, at.back(in.planes, a.plane_step)) {
        if (f >= a.vecs) {
            continue;
        }
        const int64_t left = in.numel - f * kVec;
        auto gradient = load_upto<T, kVec>(
            static_cast<const T*>(in.dout) + plane_offset(in.planes, in.dout_planes, at.n, at.c, at.pos),
            left);
        Pack<T, kVec> value, add;
        if (a.reads_x()) {
            value = load_upto<T, kVec>(
                static_cast<const T*>(in.x) + plane_offset(in.planes, in.x_planes, at.n, at.c, at.pos), left);
        }
        if (in.reads_residual()) {
            add = load_upto<T, kVec>(static_cast<const T*>(in.residual) +
                                         plane_offset(in.planes, in.residual_planes, at.n, at.c, at.pos),
                                     left);
        }
        const unsigned bits = in.mask != nullptr ? load_mask<kVec>(in.mask, f) : 0;
        const int here = static_cast<int>(in.planes.length) - at.pos;  // values of the vector in this plane
        acc_t own[4], next[4];
#pragma unroll
        for (int k = 0; k < 4; ++k) {
            own[k] = next[k] = table[k * a.table_stride + at.c];
        }
        if (here < kVec) {
            const int c = at.c + 1 < in.planes.channels ? at.c + 1 : 0;
#pragma unroll
            for (int k = 0; k < 4; ++k) {
                next[k] = table[k * a.table_stride + c];
            }
        }
#pragma unroll
        for (int g = 0; g < kVec; g += kGroup) {
            acc_t v[kGroup], dz[kGroup], scale[kGroup], shift[kGroup];
            get_values<T, kVec, kGroup>(value, g, v);
            get_values<T, kVec, kGroup>(gradient, g, dz);
#pragma unroll
            for (int k = 0; k < kGroup; ++k) {
                scale[k] = g + k < here ? own[0] : next[0];
                shift[k] = g + k < here ? own[3] : next[3];
            }
            to_dz<T, kVec, kGroup>(in, dz, v, add, g, scale, shift, bits >> g);
            set_values<T, kVec, kGroup>(gradient, g, dz);
#pragma unroll
            for (int k = 0; k < kGroup; ++k) {
                const acc_t factor = g + k < here ? own[1] : next[1],
                            offset = g + k < here ? own[2] : next[2];
                dz[k] = scale[k] * dz[k] + (a.training ? fma(factor, v[k], offset) : acc_t(0));
            }
            set_values<T, kVec, kGroup>(value, g, dz);
        }
        if (a.dx != nullptr) {
            store_upto<T, kVec>(static_cast<T*>(a.dx) + f * kVec, value, left);
        }
        if (a.dresidual != nullptr) {
            store_upto<T, kVec>(static_cast<T*>(a.dresidual) + f * kVec, gradient, left);
        }
    }
}

}  // namespace dl4ds
