// Kernels of add_act: one grid-stride loop over vectors, whatever the layout.
#pragma once

#include "common/cuda/activation.cuh"
#include "common/cuda/launch.cuh"
#include "ops/add_act/add_act.h"

namespace dl4ds {

/// z = alpha * (value [+ add])
template <typename T, int kVec>
__device__ __forceinline__ void scaled_sum(acc_type<T> (&z)[kVec], const RawPack<T, kVec>& value,
                                           const RawPack<T, kVec>& add, bool has_add, acc_type<T> alpha) {
    const Pack<T, kVec> first = unpack<T, kVec>(value);
#pragma unroll
    for (int k = 0; k < kVec; ++k) {
        z[k] = to_acc(first.v[k]);
    }
    if (has_add) {
        const Pack<T, kVec> second = unpack<T, kVec>(add);
#pragma unroll
        for (int k = 0; k < kVec; ++k) {
            z[k] += to_acc(second.v[k]);
        }
    }
#pragma unroll
    for (int k = 0; k < kVec; ++k) {
        z[k] *= alpha;
    }
}

/// out may be x or residual, hence no read-only loads. All lanes of a warp stay in the loop for the mask's
/// sake.
template <typename T, int kVec>
__global__ void __launch_bounds__(kThreads) add_act_fwd_kernel(const AddActFwdParams a) {
    using acc_t = acc_type<T>;
    constexpr int kUnroll = 2;
    const int64_t vecs = (a.numel + kVec - 1) / kVec, stride = int64_t(gridDim.x) * kThreads;
    const acc_t alpha = static_cast<acc_t>(a.alpha), slope = static_cast<acc_t>(a.negative_slope);
    for (int64_t base = int64_t(blockIdx.x) * kThreads; base < vecs; base += kUnroll * stride) {
        RawPack<T, kVec> value[kUnroll], add[kUnroll];
        // A block whose vectors are all whole sends all its loads before it looks at one.
        if ((base + (kUnroll - 1) * stride + kThreads) * kVec <= a.numel) {
#pragma unroll
            for (int u = 0; u < kUnroll; ++u) {
                value[u] =
                    load_raw<T, kVec>(static_cast<const T*>(a.x) + (base + u * stride + threadIdx.x) * kVec);
            }
            if (a.residual != nullptr) {
#pragma unroll
                for (int u = 0; u < kUnroll; ++u) {
                    add[u] = load_raw<T, kVec>(static_cast<const T*>(a.residual) +
                                               (base + u * stride + threadIdx.x) * kVec);
                }
            }
        } else {
#pragma unroll
            for (int u = 0; u < kUnroll; ++u) {
                const int64_t f = base + u * stride + threadIdx.x, left = a.numel - f * kVec;
                if (f < vecs) {
                    value[u] = load_raw_upto<T, kVec>(static_cast<const T*>(a.x) + f * kVec, left);
                    if (a.residual != nullptr) {
                        add[u] = load_raw_upto<T, kVec>(static_cast<const T*>(a.residual) + f * kVec, left);
                    }
                }
            }
        }
#pragma unroll
        for (int u = 0; u < kUnroll; ++u) {
            const int64_t f = base + u * stride + threadIdx.x, left = a.numel - f * kVec;
            const bool valid = f < vecs;
            unsigned bits = 0;
            if (valid) {
                acc_t z[kVec];
                scaled_sum<T, kVec>(z, value[u], add[u], a.residual != nullptr, alpha);
                if (a.mask != nullptr) {
                    bits = mask_bits<T, kVec>(z, a.activation);
                    bits = left < kVec ? bits & ((1u << left) - 1) : bits;
                }
                activate(z, a.activation, slope);
                store_upto<T, kVec>(static_cast<T*>(a.out) + f * kVec, round_pack<T, kVec>(z), left);
            }
            if (a.mask != nullptr) {
                store_mask<kVec>(a.mask, f, bits, valid);
            }
        }
    }
}

/// kRecompute: z is recomputed from x (and residual), as neither a mask says its sign nor is its gradient 1.
template <typename T, int kVec, int kUnroll, bool kRecompute>
__device__ __forceinline__ void add_act_gradient(const AddActBwdParams& a) {
    using acc_t = acc_type<T>;
    const int64_t vecs = (a.numel + kVec - 1) / kVec, stride = int64_t(gridDim.x) * kThreads;
    const acc_t alpha = static_cast<acc_t>(a.alpha), slope = static_cast<acc_t>(a.negative_slope);
    for (int64_t base = int64_t(blockIdx.x) * kThreads; base < vecs; base += kUnroll * stride) {
        RawPack<T, kVec> gradient[kUnroll], value[kUnroll], add[kUnroll];
        unsigned bits[kUnroll];
        const auto at = [&](int u) { return base + u * stride + threadIdx.x; };
        if ((base + (kUnroll - 1) * stride + kThreads) * kVec <= a.numel) {
#pragma unroll
            for (int u = 0; u < kUnroll; ++u) {
                gradient[u] = load_raw<T, kVec>(static_cast<const T*>(a.dout) + at(u) * kVec);
            }
            if (!kRecompute && a.mask != nullptr) {
#pragma unroll
                for (int u = 0; u < kUnroll; ++u) {
                    bits[u] = load_mask<kVec>(a.mask, at(u));
                }
            } else if constexpr (kRecompute) {
#pragma unroll
                for (int u = 0; u < kUnroll; ++u) {
                    value[u] = load_raw<T, kVec>(static_cast<const T*>(a.x) + at(u) * kVec);
                }
                if (a.residual != nullptr) {
#pragma unroll
                    for (int u = 0; u < kUnroll; ++u) {
                        add[u] = load_raw<T, kVec>(static_cast<const T*>(a.residual) + at(u) * kVec);
                    }
                }
            }
        } else {
#pragma unroll
            for (int u = 0; u < kUnroll; ++u) {
                const int64_t f = at(u), left = a.numel - f * kVec;
                if (f >= vecs) {
                    continue;
                }
                gradient[u] = load_raw_upto<T, kVec>(static_cast<const T*>(a.dout) + f * kVec, left);
                if (!kRecompute && a.mask != nullptr) {
                    bits[u] = load_mask<kVec>(a.mask, f);
                } else if constexpr (kRecompute) {
                    value[u] = load_raw_upto<T, kVec>(static_cast<const T*>(a.x) + f * kVec, left);
                    if (a.residual != nullptr) {
                        add[u] = load_raw_upto<T, kVec>(static_cast<const T*>(a.residual) + f * kVec, left);
                    }
                }
            }
        }
#pragma unroll
        for (int u = 0; u < kUnroll; ++u) {
            const int64_t f = at(u);
            if (f >= vecs) {
                continue;
            }
            const Pack<T, kVec> given = unpack<T, kVec>(gradient[u]);
            acc_t dz[kVec];
#pragma unroll
            for (int k = 0; k < kVec; ++k) {
                dz[k] = to_acc(given.v[k]);
            }
            if (!kRecompute && a.mask != nullptr) {
                masked_gradient(dz, bits[u], a.activation, slope);
            } else if constexpr (kRecompute) {
                acc_t z[kVec];
                scaled_sum<T, kVec>(z, value[u], add[u], a.residual != nullptr, alpha);
                activation_gradient<T, kVec>(dz, z, a.activation, slope);
            }
#pragma unroll
            for (int k = 0; k < kVec; ++k) {
                dz[k] *= alpha;
            }
            store_upto<T, kVec>(static_cast<T*>(a.dx) + f * kVec, round_pack<T, kVec>(dz),
                                a.numel - f * kVec);
        }
    }
}

template <typename T, int kVec>
__global__ void __launch_bounds__(kThreads) add_act_bwd_kernel(const AddActBwdParams a) {
    if (a.mask == nullptr && a.activation != Activation::kNone) {
        add_act_gradient<T, kVec, 2, true>(a);
    } else {
        add_act_gradient<T, kVec, 4, false>(a);
    }
}

}  // namespace dl4ds
