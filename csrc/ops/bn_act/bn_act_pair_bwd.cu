// bn_act_pair backward, from sums that are known: dx and dresidual from one read of dout, x and residual.
#include "ops/bn_act/bn_act_pair_kernel.cuh"

namespace dl4ds {
/// dx = scale * dz + factor * x + offset, the records of the first table (scale, factor, offset); dresidual
/// likewise from residual and the second.
struct BnPairBwdArgs {
    PairWalk walk;
    const void *dout, *x, *residual;
    const uint8_t* mask;
    void *dx, *dresidual;
    const float *table, *residual_table;
    bool leaky;
    float slope;
    uint32_t word_bits = 32;  // of zero_after()
};

struct BnPairBwdTableArgs {
    int channels;
    int vec;       // of record_index()
    double count;  // values of a channel
    BnPairNorm norm[2];
    const float* dbias;
    float* table[2];
};

/// Block row 0: x's BatchNorm, 1: the residual's.
__global__ void __launch_bounds__(kThreads) bn_act_pair_bwd_table_kernel(const BnPairBwdTableArgs a) {
    const int c = static_cast<int>(blockIdx.x / 2 * kThreads + threadIdx.x);
    if (c >= a.channels) {
        return;
    }
    const BnPairNorm& norm = blockIdx.x % 2 == 0 ? a.norm[0] : a.norm[1];
    const double rstd = norm.rstd[c], scale = pair_scale(norm, c), sigma = 1 / rstd - norm.eps;
    // The variance's gradient over rstd, which dweight is multiplied with already: with rstd = 1 / (sigma +
    // eps) it divides by sigma; a constant channel has none.
    const double k = !norm.eps_std ? rstd : sigma > 0 ? 1 / sigma : 0;
    const float factor = static_cast<float>(-scale * k * norm.dweight[c] / a.count);
    const float offset = static_cast<float>(-scale * a.dbias[c] / a.count - double(factor) * norm.mean[c]);
    store_record(blockIdx.x % 2 == 0 ? a.table[0] : a.table[1], c, a.channels, a.vec,
                 static_cast<float>(scale), factor, offset);
}

/// kCount values of dz from `first` on.
template <typename T, int kVec, int kCount>
__device__ __forceinline__ void pair_dz(const BnPairBwdArgs& a, const RawPack<T, kVec>& gradient, int first,
                                        unsigned bits, float (&dz)[kCount]) {
    get_values<T, kVec, kCount>(gradient, first, dz);
#pragma unroll
    for (int k = 0; k < kCount; ++k) {
        const float off = a.leaky ? dz[k] * a.slope : 0.0f;
        dz[k] = (bits >> (first + k)) & 1 ? dz[k] : off;
    }
}

/// A gradient in place of the values that it is of, with the record of each.
template <typename T, int kVec, int kCount>
__device__ __forceinline__ void pair_gradient(RawPack<T, kVec>& value, int first, const float (&dz)[kCount],
                                              const float (&record)[kCount][4]) {
    float v[kCount];
    get_values<T, kVec, kCount>(value, first, v);
#pragma unroll
    for (int k = 0; k < kCount; ++k) {
        v[k] = fmaf(record[k][0], dz[k], fmaf(record[k][1], v[k], record[k][2]));
    }
    put_values<T, kVec, kCount>(value, first, v);
}

/// The grid's stride is a multiple of a pixel's vectors, so a thread keeps its channels. Their records do not
/// fit its registers: they are read for two channels at a time.
template <typename T, int kVec>
__global__ void __launch_bounds__(kThreads, 4) bn_act_pair_bwd_kernel_nhwc(const BnPairBwdArgs a) {
    constexpr int kGroup = 2;
    const int64_t base = int64_t(blockIdx.x) * kThreads, stride = int64_t(gridDim.x) * kThreads;
    const int row_vecs = static_cast<int>(a.walk.row_vecs);
    int64_t f = base + threadIdx.x;
    const int column = static_cast<int>(f % row_vecs);
    const int64_t step = (a.walk.vecs - 1 - base) / stride;
    f += step * stride;
    if (f >= a.walk.vecs) {  // only a thread's first can lie behind the end
        f -= stride;
    }
    for (; f >= 0; f -= stride) {
        const int64_t first = f * kVec;
        RawPack<T, kVec> gradient = load_raw<T, kVec>(static_cast<const T*>(a.dout) + first);
        RawPack<T, kVec> value = load_raw<T, kVec>(static_cast<const T*>(a.x) + first);
        RawPack<T, kVec> other = load_raw<T, kVec>(static_cast<const T*>(a.residual) + first);
        const unsigned bits = a.mask != nullptr ? load_mask<kVec>(a.mask, f) : ~0u;
        pin<T, kVec>(gradient);
        pin<T, kVec>(value);
        pin<T, kVec>(other);
        // No record before the maps are here: all three loads are then under way together. (Addresses are
        // computed where they are needed, not kept for every record.)
        const uint32_t all = word(gradient, 0) ^ word(value, 0) ^ word(other, 0);
        int place = column + static_cast<int>(zero_after(all, a.word_bits));
        // No record is read before the values before are done with: there is no room.
        const auto wait = [&](const RawPack<T, kVec>& done, int g) {
            if constexpr (kVec == 8) {
                place += static_cast<int>(zero_after(word(done, g / 2), a.word_bits));
            }
        };
#pragma unroll
        for (int g = 0; g < kVec; g += kGroup) {
            float dz[kGroup], record[kGroup][4];
            pair_dz<T, kVec, kGroup>(a, gradient, g, bits, dz);
#pragma unroll
            for (int k = 0; k < kGroup; ++k) {
                load_record(a.table, place + (g + k) * row_vecs, record[k]);
            }
            pair_gradient<T, kVec, kGroup>(value, g, dz, record);
            wait(value, g);
#pragma unroll
            for (int k = 0; k < kGroup; ++k) {
                load_record(a.residual_table, place + (g + k) * row_vecs, record[k]);
            }
            pair_gradient<T, kVec, kGroup>(other, g, dz, record);
            wait(other, g);
        }
        store_raw<T, kVec>(static_cast<T*>(a.dx) + first, value);
        store_raw<T, kVec>(static_cast<T*>(a.dresidual) + first, other);
    }
}

/// As bn_act_pair_fwd_kernel_nchw walks.
template <typename T, int kVec>
__global__ void __launch_bounds__(kThreads, 4) bn_act_pair_bwd_kernel_nchw(const BnPairBwdArgs a) {
    constexpr int kGroup = 4;
    const int64_t base = int64_t(blockIdx.x) * kThreads, stride = int64_t(gridDim.x) * kThreads;
    int64_t step = (a.walk.vecs - 1 - base) / stride;
    int64_t f = base + threadIdx.x + step * stride;
    const Planes& planes = a.walk.planes;
    PlaneCursor at(planes, f * kVec);
    for (; step >= 0; --step, f -= stride) {
        const int c = at.c, here = static_cast<int>(planes.length) - at.pos;
        at.back(planes, a.walk.plane_step);
        const int64_t first = f * kVec, left = a.walk.numel - first;
        if (left <= 0) {  // a thread's first
            continue;
        }
        RawPack<T, kVec> gradient, value, other;
        if (left >= kVec) {  // one test, not one a load: all three are under way together
            gradient = load_raw<T, kVec>(static_cast<const T*>(a.dout) + first);
            value = load_raw<T, kVec>(static_cast<const T*>(a.x) + first);
            other = load_raw<T, kVec>(static_cast<const T*>(a.residual) + first);
        } else {
            gradient = load_raw_upto<T, kVec>(static_cast<const T*>(a.dout) + first, left);
            value = load_raw_upto<T, kVec>(static_cast<const T*>(a.x) + first, left);
            other = load_raw_upto<T, kVec>(static_cast<const T*>(a.residual) + first, left);
        }
        const unsigned bits = a.mask != nullptr ? load_mask<kVec>(a.mask, f) : ~0u;
        float own[4], theirs[4], next[4], their_next[4];
        load_record(a.table, c, own);
        load_record(a.residual_table, c, theirs);
        if (here < kVec) {
            const int behind = c + 1 < planes.channels ? c + 1 : 0;
            load_record(a.table, behind, next);
            load_record(a.residual_table, behind, their_next);
        }
        pin<T, kVec>(gradient);
        pin<T, kVec>(value);
        pin<T, kVec>(other);
#pragma unroll
        for (int g = 0; g < kVec; g += kGroup) {
            float mixed[kGroup][4], their_mixed[kGroup][4];
#pragma unroll
            for (int k = 0; k < kGroup; ++k) {
#pragma unroll
                for (int i = 0; i < 3; ++i) {
                    mixed[k][i] = g + k < here ? own[i] : next[i];
                    their_mixed[k][i] = g + k < here ? theirs[i] : their_next[i];
                }
            }
            float dz[kGroup];
            pair_dz<T, kVec, kGroup>(a, gradient, g, bits, dz);
            pair_gradient<T, kVec, kGroup>(value, g, dz, mixed);
            pair_gradient<T, kVec, kGroup>(other, g, dz, their_mixed);
        }
        store_raw_upto<T, kVec>(static_cast<T*>(a.dx) + first, value, left);
        store_raw_upto<T, kVec>(static_cast<T*>(a.dresidual) + first, other, left);
    }
}

int launch_bn_act_pair_bwd(const BnActPairBwdParams& p, void* stream) {
    if (!bn_act_pair_serves(p.dtype, p.channels_last, p.size) || !aligned16(p.dout) || !aligned16(p.x) ||
        !aligned16(p.residual) || !aligned16(p.dx) || !aligned16(p.dresidual)) {
        return static_cast<int>(cudaErrorInvalidValue);
    }
    if (p.size.numel() == 0) {
        return 0;
    }
    return dispatch_pair(p.dtype, [&](auto type, auto width) {
        using T = typename decltype(type)::type;
        constexpr int kVec = decltype(width)::value;
        BnPairBwdTableArgs table{};
        table.channels = static_cast<int>(p.size.c);
        table.vec = p.channels_last ? kVec : 1;
        table.count = static_cast<double>(p.size.n * p.size.plane());
        table.norm[0] = p.norm;
        table.norm[1] = p.residual_norm;
        table.dbias = p.dbias;
        table.table[0] = static_cast<float*>(p.workspace);
        table.table[1] = table.table[0] + 4 * p.size.c;
        const int error =
            launch(bn_act_pair_bwd_table_kernel, 2 * ceil_div(p.size.c, kThreads), kThreads, stream, table);
        if (error != 0) {
            return error;
        }
        BnPairBwdArgs args{};
        // fp32 in NCHW has registers for five blocks on a multiprocessor: two whole waves of them on an H100.
        args.walk = pair_walk(p.size, p.channels_last, kVec, kVec == 4 ? 2 * 5 * 132 : kMaxBlocks);
        args.dout = p.dout;
        args.x = p.x;
        args.residual = p.residual;
        args.mask = p.mask;
        args.dx = p.dx;
        args.dresidual = p.dresidual;
        args.table = table.table[0];
        args.residual_table = table.table[1];
        args.leaky = p.activation == Activation::kLeakyRelu;
        args.slope = static_cast<float>(p.negative_slope);
        const auto kernel =
            p.channels_last ? bn_act_pair_bwd_kernel_nhwc<T, kVec> : bn_act_pair_bwd_kernel_nchw<T, kVec>;
        return launch(kernel, args.walk.blocks, kThreads, stream, args);
    });
}

}  // namespace dl4ds
