// What every launcher needs: block size, grid size from the shape alone, dtype to kernel type, error code.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <numeric>

#include "common/dispatch.h"

namespace dl4ds {

constexpr int kThreads = 256;
// Whole waves of blocks of 256 threads on an H100's 132 multiprocessors: three of four blocks each, two of
// six. On an A100's 108 the last wave is two thirds full, enough to saturate the memory. More blocks would
// only repeat each thread's set-up. Tests build with a handful too, so that small tensors reach the later
// steps of every loop.
#ifndef DL4DS_MAX_BLOCKS
#define DL4DS_MAX_BLOCKS 1584
#endif
constexpr int64_t kMaxBlocks = DL4DS_MAX_BLOCKS;

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

inline bool aligned16(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

/// Blocks of a grid-stride loop over `items`. With period > 1, the stride of the whole grid is a multiple of
/// `period` wherever a thread makes more than one step, so that each thread keeps its place in the period.
inline int64_t grid_blocks(int64_t items, int64_t period = 1) {
    const int64_t needed = ceil_div(items, kThreads);
    const int64_t multiple = period / std::gcd(period, static_cast<int64_t>(kThreads));
    if (needed <= multiple || needed <= kMaxBlocks) {
        return needed <= multiple ? needed : round_up(needed, multiple);
    }
    return multiple >= kMaxBlocks ? multiple : kMaxBlocks / multiple * multiple;
}

/// Launches and returns the error code of the launch, 0 for success. Launches nothing where blocks is 0.
template <typename... Params, typename... Args>
int launch(void (*kernel)(Params...), int64_t blocks, int threads, void* stream, const Args&... args) {
    if (blocks == 0) {
        return 0;
    }
    if (blocks < 0 || blocks > INT32_MAX) {
        return static_cast<int>(cudaErrorInvalidConfiguration);
    }
    kernel<<<static_cast<unsigned>(blocks), threads, 0, static_cast<cudaStream_t>(stream)>>>(args...);
    return static_cast<int>(cudaGetLastError());
}

template <typename T>
struct TypeTag {
    using type = T;
};

/// Calls fn(TypeTag<T>{}, constant vector width) for x's dtype; width 1 where 16-byte accesses are not
/// possible, and always for fp64, whose single elements fill a warp's sectors anyway.
template <typename Fn>
int dispatch_vec(DType dtype, bool vectors, Fn&& fn) {
    using One = std::integral_constant<int, 1>;
    using Four = std::integral_constant<int, 4>;
    using Eight = std::integral_constant<int, 8>;
    switch (dtype) {
        case DType::kFloat32:
            return vectors ? fn(TypeTag<float>{}, Four{}) : fn(TypeTag<float>{}, One{});
        case DType::kFloat16:
            return vectors ? fn(TypeTag<__half>{}, Eight{}) : fn(TypeTag<__half>{}, One{});
        case DType::kBFloat16:
            return vectors ? fn(TypeTag<__nv_bfloat16>{}, Eight{}) : fn(TypeTag<__nv_bfloat16>{}, One{});
        case DType::kFloat64:
            return fn(TypeTag<double>{}, One{});
        default:
            return static_cast<int>(cudaErrorInvalidValue);
    }
}

constexpr int vector_width(DType dtype) {
    return dtype == DType::kFloat64 ? 1 : static_cast<int>(16 / dtype_size(dtype));
}

}  // namespace dl4ds
