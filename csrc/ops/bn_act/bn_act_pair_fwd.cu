// bn_act_pair forward: out = act(bn(x) + bn(residual)), one read of each and one write.
#include "ops/bn_act/bn_act_pair_kernel.cuh"

namespace dl4ds {
/// out = act(x * scale + (residual * residual_scale + shift)), the table's records (scale, residual_scale,
/// shift). none, relu and relu6 keep what is not below `lower` or above `upper`, so NaN too.
struct BnPairFwdArgs {
    PairWalk walk;
    const void *x, *residual;
    void* out;
    uint8_t* mask;
    const float* table;
    bool leaky;
    float slope, lower, upper;
    float six;  // arguments from here on round to 6; NaN without that kink
};

struct BnPairFwdTableArgs {
    int64_t channels;
    int vec;  // of record_index()
    BnPairNorm norm, residual;
    float* table;
};

/// The sum of both shifts has one rounding.
__global__ void __launch_bounds__(kThreads) bn_act_pair_fwd_table_kernel(const BnPairFwdTableArgs a) {
    const int64_t c = int64_t(blockIdx.x) * kThreads + threadIdx.x;
    if (c >= a.channels) {
        return;
    }
    const float scale = pair_scale(a.norm, c), other = pair_scale(a.residual, c);
    double shift = -double(a.norm.mean[c]) * scale - double(a.residual.mean[c]) * other;
    if (a.norm.bias.data != nullptr) {
        shift += load_channel<double>(a.norm.bias, c);
    }
    if (a.residual.bias.data != nullptr) {
        shift += load_channel<double>(a.residual.bias, c);
    }
    store_record(a.table, record_index(c, a.channels, a.vec), scale, other, static_cast<float>(shift));
}

/// Normalises, adds and activates a vector in place of x, four values at a time; returns the mask's bits.
/// coefficients(k): of value k's channel, (scale, residual_scale, shift).
template <typename T, int kVec, typename Coefficients>
__device__ __forceinline__ unsigned pair_vector(const BnPairFwdArgs& a, RawPack<T, kVec>& value,
                                                RawPack<T, kVec>& other, const Coefficients& coefficients) {
    unsigned bits = 0;
    pin<T, kVec>(value);
    pin<T, kVec>(other);
#pragma unroll
    for (int g = 0; g < kVec; g += 4) {
        float v[4], r[4];
        get_values<T, kVec, 4>(value, g, v);
        get_values<T, kVec, 4>(other, g, r);
#pragma unroll
        for (int k = 0; k < 4; ++k) {
            const auto [scale, residual_scale, shift] = coefficients(g + k);
            const float z = fmaf(v[k], scale, fmaf(r[k], residual_scale, shift));
            const bool below = a.leaky ? !(z > rounds_to_zero<T>()) : z <= rounds_to_zero<T>();
            bits |= below || z >= a.six ? 0u : 1u << (g + k);
            const float clamped = z < a.lower ? a.lower : z > a.upper ? a.upper : z;
            v[k] = a.leaky ? (z > 0.0f ? z : z * a.slope) : clamped;
        }
        put_values<T, kVec, 4>(value, g, v);
    }
    return bits;
}

struct PairCoefficients {
    float scale, residual_scale, shift;
};

/// The grid's stride is a multiple of a pixel's vectors, so a thread keeps its channels.
template <typename T, int kVec>
__global__ void __launch_bounds__(kThreads, 4) bn_act_pair_fwd_kernel_nhwc(const BnPairFwdArgs a) {
    constexpr int kUnroll = 2;
    const int64_t base = int64_t(blockIdx.x) * kThreads, stride = int64_t(gridDim.x) * kThreads;
    int step = static_cast<int>((a.walk.vecs - 1 - base) / stride);  // the same in all threads of a block
    int64_t f = base + threadIdx.x;
    const int64_t column = f % a.walk.row_vecs;
    float own[kVec][4];
#pragma unroll
    for (int k = 0; k < kVec; ++k) {
        load_record(a.table, column + k * a.walk.row_vecs, own[k]);
    }
    for (f += step * stride; step >= 0; step -= kUnroll, f -= kUnroll * stride) {
        RawPack<T, kVec> value[kUnroll], other[kUnroll];
#pragma unroll
        for (int u = 0; u < kUnroll; ++u) {
            const int64_t at = f - u * stride;
            if (step >= u && at < a.walk.vecs) {
                value[u] = load_raw<T, kVec>(static_cast<const T*>(a.x) + at * kVec);
                other[u] = load_raw<T, kVec>(static_cast<const T*>(a.residual) + at * kVec);
            }
        }
#pragma unroll
        for (int u = 0; u < kUnroll; ++u) {
            const int64_t at = f - u * stride;
            const bool valid = step >= u && at < a.walk.vecs;
            unsigned bits = 0;
            if (valid) {
                bits = pair_vector<T, kVec>(a, value[u], other[u], [&](int k) {
                    return PairCoefficients{own[k][0], own[k][1], own[k][2]};
                });
                store_raw<T, kVec>(static_cast<T*>(a.out) + at * kVec, value[u]);
            }
            if (a.mask != nullptr && step >= u) {
                store_mask<kVec>(a.mask, at, bits, valid);
            }
        }
    }
}

/// A vector may begin in one plane and end in the next (a plane is never shorter than a vector), and the
/// tensor's last may be cut short: a thread's first then.
template <typename T, int kVec>
__global__ void __launch_bounds__(kThreads, 4) bn_act_pair_fwd_kernel_nchw(const BnPairFwdArgs a) {
    constexpr int kUnroll = 2;
    const int64_t base = int64_t(blockIdx.x) * kThreads, stride = int64_t(gridDim.x) * kThreads;
    int step = static_cast<int>((a.walk.vecs - 1 - base) / stride);
    int64_t f = base + threadIdx.x + step * stride;
    const Planes& planes = a.walk.planes;
    PlaneCursor at(planes, f * kVec);
    for (; step >= 0; step -= kUnroll, f -= kUnroll * stride) {
        RawPack<T, kVec> value[kUnroll], other[kUnroll];
        int c[kUnroll], here[kUnroll];  // here: values of the vector in the first of its planes
#pragma unroll
        for (int u = 0; u < kUnroll; ++u) {
            const int64_t first = (f - u * stride) * kVec, left = a.walk.numel - first;
            c[u] = at.c;
            here[u] = static_cast<int>(planes.length) - at.pos;
            if (step >= u && left > 0) {
                const T *x = static_cast<const T*>(a.x) + first,
                        *r = static_cast<const T*>(a.residual) + first;
                value[u] = u > 0 ? load_raw<T, kVec>(x) : load_raw_upto<T, kVec>(x, left);
                other[u] = u > 0 ? load_raw<T, kVec>(r) : load_raw_upto<T, kVec>(r, left);
            }
            at.back(planes, a.walk.plane_step);
        }
#pragma unroll
        for (int u = 0; u < kUnroll; ++u) {
            const int64_t vec = f - u * stride, left = a.walk.numel - vec * kVec;
            const bool valid = step >= u && left > 0;
            unsigned bits = 0;
            if (valid) {
                float own[4], next[4];
                load_record(a.table, c[u], own);
                if (here[u] < kVec) {
                    load_record(a.table, c[u] + 1 < planes.channels ? c[u] + 1 : 0, next);
                }
                bits = pair_vector<T, kVec>(a, value[u], other[u], [&](int k) {
                    const bool mine = k < here[u];
                    return PairCoefficients{mine ? own[0] : next[0], mine ? own[1] : next[1],
                                            mine ? own[2] : next[2]};
                });
                store_raw_upto<T, kVec>(static_cast<T*>(a.out) + vec * kVec, value[u], left);
                if (left < kVec) {
                    bits &= (1u << left) - 1;
                }
            }
            if (a.mask != nullptr && step >= u) {
                store_mask<kVec>(a.mask, vec, bits, valid);
            }
        }
    }
}

int launch_bn_act_pair_fwd(const BnActPairFwdParams& p, void* stream) {
    if (!bn_act_pair_serves(p.dtype, p.channels_last, p.size) || !aligned16(p.x) || !aligned16(p.residual) ||
        !aligned16(p.out)) {
        return static_cast<int>(cudaErrorInvalidValue);
    }
    if (p.size.numel() == 0) {
        return 0;
    }
    return dispatch_pair(p.dtype, [&](auto type, auto width) {
        using T = typename decltype(type)::type;
        constexpr int kVec = decltype(width)::value;
        BnPairFwdTableArgs table{};
        table.channels = p.size.c;
        table.vec = p.channels_last ? kVec : 1;
        table.norm = p.norm;
        table.residual = p.residual_norm;
        table.table = static_cast<float*>(p.workspace);
        const int error =
            launch(bn_act_pair_fwd_table_kernel, ceil_div(p.size.c, kThreads), kThreads, stream, table);
        if (error != 0) {
            return error;
        }
        const bool clamps = p.activation == Activation::kRelu || p.activation == Activation::kRelu6;
        const bool six = p.activation == Activation::kRelu6;
        BnPairFwdArgs args{};
        args.walk = pair_walk(p.size, p.channels_last, kVec);
        args.x = p.x;
        args.residual = p.residual;
        args.out = p.out;
        args.mask = p.mask;
        args.table = table.table;
        args.leaky = p.activation == Activation::kLeakyRelu;
        args.slope = static_cast<float>(p.negative_slope);
        args.lower = clamps ? 0.0f : -INFINITY;
        args.upper = six ? 6.0f : INFINITY;
        args.six = six ? rounds_to_six<T>() : NAN;
        const auto kernel =
            p.channels_last ? bn_act_pair_fwd_kernel_nhwc<T, kVec> : bn_act_pair_fwd_kernel_nchw<T, kVec>;
        return launch(kernel, args.walk.blocks, kThreads, stream, args);
    });
}

}  // namespace dl4ds
