// A host launcher as the project writes them: a Params struct, a choice by type and size, constants, opt-in
// shared memory.
#include <cuda_runtime.h>

#include "samples/host.h"

namespace sample {
namespace {

__constant__ float factors[2] = {1.f, 0.5f};
__device__ int calls = 0;

template <class T, int kStep>
__global__ void scale_kernel(const ScaleParams p) {
    extern __shared__ unsigned char raw[];
    T* stage = reinterpret_cast<T*>(raw);
    const int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
    if (i < p.size.count) {
        stage[threadIdx.x] = static_cast<const T*>(p.x)[i * kStep];
        static_cast<T*>(p.out)[i] = stage[threadIdx.x] * static_cast<T>(p.factor * factors[p.halve ? 1 : 0]);
    }
    if (i == 0) ++calls;
}

template <class T, int kStep>
int start(const ScaleParams& p, void* stream) {
    const int threads = 128;
    const size_t shared = p.big_shared ? 100 * 1024 : threads * sizeof(T);
    const auto kernel = scale_kernel<T, kStep>;
    if (shared > 48 * 1024) {
        const cudaError_t status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                                        static_cast<int>(shared));
        if (status != cudaSuccess) return status;
    }
    const auto blocks = static_cast<unsigned>((p.size.count + threads - 1) / threads);
    kernel<<<blocks, threads, shared, static_cast<cudaStream_t>(stream)>>>(p);
    return cudaGetLastError();
}

}  // namespace

int launch_scale(const ScaleParams& p, void* stream) {
    if (p.kind == Kind::kDouble)
        return p.size.step == 2 ? start<double, 2>(p, stream) : start<double, 1>(p, stream);
    return p.size.step == 2 ? start<float, 2>(p, stream) : start<float, 1>(p, stream);
}

int count_calls() {
    int value = 0;
    return cudaMemcpyFromSymbol(&value, calls, sizeof value) == cudaSuccess ? value : -1;
}

}  // namespace sample
