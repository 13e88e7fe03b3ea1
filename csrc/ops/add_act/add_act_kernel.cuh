// Kernels of add_act: one grid-stride loop over vectors, whatever the layout.
#pragma once

#include "common/cuda/activation.cuh"
#include "common/cuda/launch.cuh"
#include "ops/add_act/add_act.h"

namespace dl4ds {

/// z = alpha * (value [+ add])
template <typename T, int kVec>
__device__ __forceinline__ void scaled_sum(acc_type<T> (&z)[kVec], const Pack<T, kVec>& value,
                                           const Pack<T, kVec>& add, bool has_add, acc_type<T> alpha) {
#pragma unroll
    for (int k = 0; k < kVec; ++k) {
        z[k] = to_acc(value.v[k]);
    }
    if (has_add) {
#pragma unroll
        for (int k = 0; k < kVec; ++k) {
            z[k] += to_acc(add.v[k]);
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
        Pack<T, kVec> value[kUnroll], add[kUnroll];
#pragma unroll
        for (int u = 0; u < kUnroll; ++u) {
            const int64_t f = base + u * stride + threadIdx.x;
            if (f < vecs) {
                value[u] = load_upto<T, kVec>(static_cast<const T*>(a.x) + f * kVec, a.numel - f * kVec);
                if (a.residual != nullptr) {
                    add[u] =
                        load_upto<T, kVec>(static_cast<const T*>(a.residual) + f * kVec, a.numel - f * kVec);
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

template <typename T, int kVec>
__global__ void __launch_bounds__(kThreads) add_act_bwd_kernel(const AddActBwdParams a) {
    using acc_t = acc_type<T>;
    const int64_t vecs = (a.numel + kVec - 1) / kVec, stride = int64_t(gridDim.x) * kThreads;
    const acc_t alpha = static_cast<acc_t>(a.alpha), slope = static_cast<acc_t>(a.negative_slope);
    const bool recompute = a.mask == nullptr && a.activation != Activation::kNone;
    for (int64_t f = int64_t(blockIdx.x) * kThreads + threadIdx.x; f < vecs; f += stride) {
        const int64_t left = a.numel - f * kVec;
        const auto gradient = load_upto<T, kVec>(static_cast<const T*>(a.dout) + f * kVec, left);
        acc_t dz[kVec];
#pragma unroll
        for (int k = 0; k < kVec; ++k) {
            dz[k] = to_acc(gradient.v[k]);
        }
        if (a.mask != nullptr) {
            masked_gradient(dz, load_mask<kVec>(a.mask, f), a.activation, slope);
        } else if (recompute) {
            const auto value = load_upto<T, kVec>(static_cast<const T*>(a.x) + f * kVec, left);
            Pack<T, kVec> add;
            if (a.residual != nullptr) {
                add = load_upto<T, kVec>(static_cast<const T*>(a.residual) + f * kVec, left);
            }
            acc_t z[kVec];
            scaled_sum<T, kVec>(z, value, add, a.residual != nullptr, alpha);
            activation_gradient<T, kVec>(dz, z, a.activation, slope);
        }
#pragma unroll
        for (int k = 0; k < kVec; ++k) {
            dz[k] *= alpha;
        }
        store_upto<T, kVec>(static_cast<T*>(a.dx) + f * kVec, round_pack<T, kVec>(dz), left);
    }
}

}  // namespace dl4ds
