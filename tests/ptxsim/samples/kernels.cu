// Small kernels that use what nvcc emits for elementwise, reduction and tiled code. Run by test_samples.py.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_pipeline.h>

#include <cstdint>

// y = relu(a * scale[c] + shift[c] + residual), eight fp16 values per thread
extern "C" __global__ void scale_shift_relu(const __half* __restrict__ a, const __half* __restrict__ residual,
                                            const float* __restrict__ scale, const float* __restrict__ shift,
                                            __half* __restrict__ y, int64_t n, int channels) {
    const int64_t stride = int64_t(gridDim.x) * blockDim.x * 8;
    for (int64_t i = (int64_t(blockIdx.x) * blockDim.x + threadIdx.x) * 8; i < n; i += stride) {
        const uint4 va = *reinterpret_cast<const uint4*>(a + i),
                    vr = *reinterpret_cast<const uint4*>(residual + i);
        const __half2* pa = reinterpret_cast<const __half2*>(&va);
        const __half2* pr = reinterpret_cast<const __half2*>(&vr);
        uint4 out;
        __half2* po = reinterpret_cast<__half2*>(&out);
        const int c = static_cast<int>(i % channels);
        for (int k = 0; k < 4; ++k) {
            float2 f = __half22float2(pa[k]);
            const float2 r = __half22float2(pr[k]);
            f.x = fmaxf(fmaf(f.x, scale[c + 2 * k], shift[c + 2 * k]) + r.x, 0.f);
            f.y = fmaxf(fmaf(f.y, scale[c + 2 * k + 1], shift[c + 2 * k + 1]) + r.y, 0.f);
            po[k] = __float22half2_rn(f);
        }
        *reinterpret_cast<uint4*>(y + i) = out;
    }
}

// one sum per block, by shuffles and shared memory; T is float or double
template <class T>
__device__ void block_sum(const T* x, T* sums, int n) {
    __shared__ T partial[32];
    T v = 0;
    for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x) v += x[i];
    for (int lanes = 16; lanes > 0; lanes /= 2) v += __shfl_down_sync(0xffffffffu, v, lanes);
    if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = v;
    __syncthreads();
    if (threadIdx.x < 32) {
        v = threadIdx.x < blockDim.x / 32 ? partial[threadIdx.x] : T(0);
        for (int lanes = 16; lanes > 0; lanes /= 2) v += __shfl_xor_sync(0xffffffffu, v, lanes);
        if (threadIdx.x == 0) sums[blockIdx.x] = v;
    }
}
extern "C" __global__ void sum_float(const float* x, float* sums, int n) { block_sum(x, sums, n); }
extern "C" __global__ void sum_double(const double* x, double* sums, int n) { block_sum(x, sums, n); }

extern "C" __global__ void transpose(const float* x, float* y, int rows, int columns) {
    __shared__ float tile[32][33];
    const int x0 = blockIdx.x * 32, y0 = blockIdx.y * 32;
    for (int j = threadIdx.y; j < 32; j += blockDim.y)
        if (y0 + j < rows && x0 + int(threadIdx.x) < columns)
            tile[j][threadIdx.x] = x[(y0 + j) * columns + x0 + threadIdx.x];
    __syncthreads();
    for (int j = threadIdx.y; j < 32; j += blockDim.y)
        if (x0 + j < columns && y0 + int(threadIdx.x) < rows)
            y[(x0 + j) * rows + y0 + threadIdx.x] = tile[threadIdx.x][j];
}

extern "C" __global__ void histogram(const uint8_t* x, unsigned* bins, int n) {
    __shared__ unsigned local[256];
    for (int i = threadIdx.x; i < 256; i += blockDim.x) local[i] = 0;
    __syncthreads();
    for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x)
        atomicAdd(&local[x[i]], 1u);
    __syncthreads();
    for (int i = threadIdx.x; i < 256; i += blockDim.x) atomicAdd(&bins[i], local[i]);
}

extern "C" __global__ void silu_bf16(const __nv_bfloat16* x, __nv_bfloat16* y, int n) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    const float v = __bfloat162float(x[i]);
    y[i] = __float2bfloat16_rn(v / (1.f + __expf(-v)));
}

// full-precision functions: special cases, tables, 64-bit integers, local arrays
extern "C" __global__ void functions(const float* x, float* y, int n) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    y[i * 6] = expf(x[i]);
    y[i * 6 + 1] = logf(fabsf(x[i]) + 1e-30f);
    y[i * 6 + 2] = sinf(x[i] * 100.f);
    y[i * 6 + 3] = tanhf(x[i]);
    y[i * 6 + 4] = powf(fabsf(x[i]), 1.7f);
    y[i * 6 + 5] = 1.f / sqrtf(fabsf(x[i]) + 1.f);
}

extern "C" __global__ void integers(const int64_t* a, const int64_t* b, int64_t* out, int n) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    const int64_t x = a[i], y = b[i];
    int64_t r;
    switch (i % 9) {
        case 0:
            r = x / y;
            break;
        case 1:
            r = x % y;
            break;
        case 2:
            r = __mul64hi(x, y);
            break;
        case 3:
            r = __popcll(x) * 1000 + __clzll(y);
            break;
        case 4:
            r = __ffsll(x);
            break;
        case 5:
            r = static_cast<int64_t>(static_cast<uint64_t>(x) >> (y & 63));
            break;
        case 6:
            r = x < y ? x : y;
            break;
        case 7:
            r = __brevll(x);
            break;
        default:
            r = static_cast<int64_t>(static_cast<double>(x) * 0.5);
    }
    out[i] = r;
}

__device__ __noinline__ float horner(const float* c, int n, float x) {
    float r = 0;
    for (int i = n - 1; i >= 0; --i) r = fmaf(r, x, c[i]);
    return r;
}
extern "C" __global__ void polynomial(const float* x, float* y, int n, int degree) {
    float c[16];
    for (int i = 0; i < 16; ++i) c[i] = 1.f / (1 + (i * 7 + degree) % 5);
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) y[i] = horner(c, degree, x[i]);
}

// three-stage cp.async pipeline through dynamic shared memory; every block copies `tiles` tiles, reversed
// inside each
extern "C" __global__ void reverse_tiles(const float4* x, float4* y, int tiles) {
    extern __shared__ float4 buffer[];
    constexpr int kStages = 3;
    const int t = threadIdx.x, width = blockDim.x;
    const int64_t base = int64_t(blockIdx.x) * tiles * width;
    auto fetch = [&](int tile) {
        if (tile < tiles)
            __pipeline_memcpy_async(&buffer[tile % kStages * width + t], &x[base + int64_t(tile) * width + t],
                                    16);
        __pipeline_commit();
    };
    for (int s = 0; s < kStages - 1; ++s) fetch(s);
    for (int tile = 0; tile < tiles; ++tile) {
        __pipeline_wait_prior(kStages - 2);
        __syncthreads();
        fetch(tile + kStages - 1);
        y[base + int64_t(tile) * width + t] = buffer[tile % kStages * width + width - 1 - t];
    }
    __pipeline_wait_prior(0);
}

// C = A B with tensor cores: one warp computes 16 x 8 from A (16 x k, rows) and B (k x 8, columns)
extern "C" __global__ void tensor_core(const __half* a, const __half* bt, float* c, int k) {
    __shared__ __align__(16) __half tile[16][16];
    const int lane = threadIdx.x, row = lane / 4, column = lane % 4 * 2;
    float d[4] = {0, 0, 0, 0};
    for (int k0 = 0; k0 < k; k0 += 16) {
        *reinterpret_cast<uint4*>(&tile[lane / 2][lane % 2 * 8]) =
            *reinterpret_cast<const uint4*>(a + (lane / 2) * k + k0 + lane % 2 * 8);
        __syncwarp();
        uint32_t ra[4], rb[2];
        const auto address = static_cast<unsigned>(__cvta_generic_to_shared(&tile[lane % 16][lane / 16 * 8]));
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                     : "=r"(ra[0]), "=r"(ra[1]), "=r"(ra[2]), "=r"(ra[3])
                     : "r"(address));
        rb[0] = *reinterpret_cast<const uint32_t*>(bt + row * k + k0 + column);
        rb[1] = *reinterpret_cast<const uint32_t*>(bt + row * k + k0 + column + 8);
        asm volatile(
            "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
            "{%0,%1,%2,%3};"
            : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
            : "r"(ra[0]), "r"(ra[1]), "r"(ra[2]), "r"(ra[3]), "r"(rb[0]), "r"(rb[1]));
        __syncwarp();
    }
    c[row * 8 + column] = d[0];
    c[row * 8 + column + 1] = d[1];
    c[(row + 8) * 8 + column] = d[2];
    c[(row + 8) * 8 + column + 1] = d[3];
}

extern "C" __global__ void asserts(const int* x, int n) {
    const int i = threadIdx.x;
    if (i < n && x[i] < 0) {
        printf("negative at %d\n", i);
        __trap();
    }
}
