// bn_act_pair forward: out = act(bn(x) + bn(residual)), one read of each and one write.
#include "ops/bn_act/bn_act_pair_kernel.cuh"

namespace dl4ds {
/// out = act(x * scale + (residual * residual_scale + shift)), the table's records (scale, residual_scale,
/// shift).
struct BnPairFwdArgs {
    PairWalk walk;
    const void *x, *residual;
    void* out;
    uint8_t* mask;
    const float* table;
    Activation activation;
    float slope;
    uint32_t word_bits = 32;  // of zero_after()
};

/// switch_activation() of those that these kernels are for.
template <typename Fn>
__device__ __forceinline__ void switch_linear(Activation act, Fn&& fn) {
    switch (act) {
        case Activation::kRelu:
            return fn(ActivationConstant<Activation::kRelu>{});
        case Activation::kLeakyRelu:
            return fn(ActivationConstant<Activation::kLeakyRelu>{});
        case Activation::kRelu6:
            return fn(ActivationConstant<Activation::kRelu6>{});
        default:
            return fn(ActivationConstant<Activation::kNone>{});
    }
}

struct BnPairFwdTableArgs {
    int channels;
    int vec;  // of record_index()
    BnPairNorm norm, residual;
    float* table;
};

/// The sum of both shifts has one rounding.
__global__ void __launch_bounds__(kThreads) bn_act_pair_fwd_table_kernel(const BnPairFwdTableArgs a) {
    const int c = static_cast<int>(blockIdx.x * kThreads + threadIdx.x);
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
    store_record(a.table, c, a.channels, a.vec, scale, other, static_cast<float>(shift));
}

/// Normalises, adds and activates kCount values from `first` on in place of x; returns the mask's bits of the
/// vector. record: of each value's channel.
template <typename T, int kVec, int kCount>
__device__ __forceinline__ unsigned pair_values(const BnPairFwdArgs& a, RawPack<T, kVec>& value,
                                                const RawPack<T, kVec>& other, int first,
                                                const float (&record)[kCount][4]) {
    unsigned bits = 0;
    float v[kCount], r[kCount];
    get_values<T, kVec, kCount>(value, first, v);
    get_values<T, kVec, kCount>(other, first, r);
#pragma unroll
    for (int k = 0; k < kCount; ++k) {
        v[k] = fmaf(v[k], record[k][0], fmaf(r[k], record[k][1], record[k][2]));
    }
    switch_linear(a.activation, [&](auto code) {
        constexpr Activation kAct = decltype(code)::value;
        if constexpr (kAct != Activation::kNone) {
            if (a.mask != nullptr) {
#pragma unroll
                for (int k = 0; k < kCount; ++k) {
                    bits |= rounded_positive<kAct, T>(v[k]) ? 1u << (first + k) : 0u;
                }
            }
#pragma unroll
            for (int k = 0; k < kCount; ++k) {
                v[k] = activation_fwd<kAct>(v[k], a.slope);
            }
        }
    });
    put_values<T, kVec, kCount>(value, first, v);
    return bits;
}

/// The grid's stride is a multiple of a pixel's vectors, so a thread keeps its channels. Their records do not
/// fit its registers beside two vectors of each map: they are read for four channels at a time.
template <typename T, int kVec>
__global__ void __launch_bounds__(kThreads, 4) bn_act_pair_fwd_kernel_nhwc(const BnPairFwdArgs a) {
    constexpr int kUnroll = 2, kGroup = 4;
    const int64_t base = int64_t(blockIdx.x) * kThreads, stride = int64_t(gridDim.x) * kThreads;
    int step = static_cast<int>((a.walk.vecs - 1 - base) / stride);  // the same in all threads of a block
    const int row_vecs = static_cast<int>(a.walk.row_vecs);
    int64_t f = base + threadIdx.x;
    const int column = static_cast<int>(f % row_vecs);
    for (f += step * stride; step >= 0; step -= kUnroll, f -= kUnroll * stride) {
        RawPack<T, kVec> value[kUnroll]{}, other[kUnroll]{};
        unsigned bits[kUnroll] = {};
        bool valid[kUnroll];
#pragma unroll
        for (int u = 0; u < kUnroll; ++u) {
            const int64_t at = f - u * stride;
            valid[u] = step >= u && (u > 0 || at < a.walk.vecs);  // only a thread's first can lie behind
            if (valid[u]) {
                value[u] = load_raw<T, kVec>(static_cast<const T*>(a.x) + at * kVec);
                other[u] = load_raw<T, kVec>(static_cast<const T*>(a.residual) + at * kVec);
            }
        }
#pragma unroll
        for (int u = 0; u < kUnroll; ++u) {
            pin<T, kVec>(value[u]);
            pin<T, kVec>(other[u]);
        }
        // Addresses are computed where they are needed, not kept for every record.
        int place = column + static_cast<int>(zero_after(static_cast<uint32_t>(f), a.word_bits));
#pragma unroll
        for (int g = 0; g < kVec; g += kGroup) {
            float record[kGroup][4];
#pragma unroll
            for (int k = 0; k < kGroup; ++k) {
                load_record(a.table, place + (g + k) * row_vecs, record[k]);
            }
#pragma unroll
            for (int u = 0; u < kUnroll; ++u) {
                bits[u] |= pair_values<T, kVec, kGroup>(a, value[u], other[u], g, record);
            }
            if constexpr (kVec == 8) {  // no record is read before the values before are done with
                place += static_cast<int>(zero_after(word(value[kUnroll - 1], g / 2), a.word_bits));
            }
        }
#pragma unroll
        for (int u = 0; u < kUnroll; ++u) {
            const int64_t at = f - u * stride;
            if (valid[u]) {
                store_raw<T, kVec>(static_cast<T*>(a.out) + at * kVec, value[u]);
            }
            if (a.mask != nullptr && step >= u) {
                store_mask<kVec>(a.mask, at, bits[u], valid[u]);
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
                pin<T, kVec>(value[u]);
                pin<T, kVec>(other[u]);
#pragma unroll
                for (int g = 0; g < kVec; g += 4) {
                    float record[4][4];
#pragma unroll
                    for (int k = 0; k < 4; ++k) {
#pragma unroll
                        for (int i = 0; i < 3; ++i) {
                            record[k][i] = g + k < here[u] ? own[i] : next[i];
                        }
                    }
                    bits |= pair_values<T, kVec, 4>(a, value[u], other[u], g, record);
                }
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
        table.channels = static_cast<int>(p.size.c);
        table.vec = p.channels_last ? kVec : 1;
        table.norm = p.norm;
        table.residual = p.residual_norm;
        table.table = static_cast<float*>(p.workspace);
        const int error =
            launch(bn_act_pair_fwd_table_kernel, ceil_div(p.size.c, kThreads), kThreads, stream, table);
        if (error != 0) {
            return error;
        }
        BnPairFwdArgs args{};
        args.walk = pair_walk(p.size, p.channels_last, kVec);
        args.x = p.x;
        args.residual = p.residual;
        args.out = p.out;
        args.mask = p.mask;
        args.table = table.table;
        args.activation = p.activation;
        args.slope = static_cast<float>(p.negative_slope);
        const auto kernel =
            p.channels_last ? bn_act_pair_fwd_kernel_nhwc<T, kVec> : bn_act_pair_fwd_kernel_nchw<T, kVec>;
        return launch(kernel, args.walk.blocks, kThreads, stream, args);
    });
}

}  // namespace dl4ds
