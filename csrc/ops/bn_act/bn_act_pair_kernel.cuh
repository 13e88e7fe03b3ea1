// What the kernels of bn_act_pair share: tables of coefficients by channel, and the walk.
//
// A small kernel makes a table of records of four floats a channel; the elementwise pass then has one or two
// 16-byte reads a channel from the L1 cache, whatever the types of the vectors. Maps are dense, so a vector's
// number is its place, and both passes go from the last vector to the first: the end of what came before is
// in the L2 cache.
#pragma once

#include "ops/bn_act/bn_act_bwd_kernel.cuh"
#include "ops/bn_act/bn_act_pair.h"

namespace dl4ds {

/// Places of a grid's threads in the maps.
struct PairWalk {
    int64_t vecs = 0, numel = 0;
    int64_t row_vecs = 1;  // NHWC: vectors of a pixel
    Planes planes;         // NCHW
    PlaneStep plane_step;  // NCHW: the grid's stride
    int64_t blocks = 0;
};

/// most: blocks in NCHW order, at the most.
inline PairWalk pair_walk(const Dims& size, bool channels_last, int vec, int64_t most = kMaxBlocks) {
    PairWalk w;
    w.numel = size.numel();
    w.vecs = ceil_div(w.numel, vec);
    w.row_vecs = channels_last ? size.c / vec : 1;
    w.planes = Planes{size.n, size.c, size.plane(), Divider(), false};
    w.blocks = grid_blocks(w.vecs, w.row_vecs);
    w.blocks = channels_last || w.blocks < most ? w.blocks : most;
    w.plane_step = channels_last ? PlaneStep{} : plane_step(w.planes, w.blocks * kThreads * vec);
    return w;
}

/// Calls fn(TypeTag<T>{}, constant vector width): of what bn_act_pair_serves().
template <typename Fn>
int dispatch_pair(DType dtype, Fn&& fn) {
    switch (dtype) {
        case DType::kFloat32:
            return fn(TypeTag<float>{}, std::integral_constant<int, 4>{});
        case DType::kFloat16:
            return fn(TypeTag<__half>{}, std::integral_constant<int, 8>{});
        case DType::kBFloat16:
            return fn(TypeTag<__nv_bfloat16>{}, std::integral_constant<int, 8>{});
        default:
            return static_cast<int>(cudaErrorInvalidValue);
    }
}

__device__ __forceinline__ float pair_scale(const BnPairNorm& norm, int64_t c) {
    const float rstd = norm.rstd[c];
    return norm.weight.data != nullptr ? rstd * load_channel<float>(norm.weight, c) : rstd;
}

/// Writes channel c's record where the elementwise pass looks for it (record_index(), in 32 bits).
__device__ __forceinline__ void store_record(float* table, int c, int channels, int vec, float x, float y,
                                             float z) {
    const int record = c % vec * (channels / vec) + c / vec;
    reinterpret_cast<float4*>(table)[record] = make_float4(x, y, z, 0.0f);
}

/// A record of a table, read again whenever it is needed (see reload_global).
__device__ __forceinline__ void load_record(const float* table, int64_t record, float (&out)[4]) {
    reload_global(table + record * 4, out);
}

}  // namespace dl4ds
