// The micro-kernel whose sums are the gradient of a BatchNorm's activated output (ConvBnBack). Included once
// per ISA by conv_kernels_cpu.h, behind the GEMM.
namespace dl4ds {
namespace DL4DS_ISA {

/// Column vector j of every row through the BatchNorm in front: see ConvBnBack.
template <int kRows, bool kPartial>
DL4DS_INLINE void back_column(const GemmArgs& p, const GemmBack& f,
                              const Vec<float> (&acc)[kRows][kPanelVecs], int j, int64_t n) {
    const int64_t at = j * kLanes<float>;
    const Vec<float> mean = load(f.mean + at), scale = load(f.scale + at), shift = load(f.shift + at);
    const Vec<float> low = broadcast(f.low), high = broadcast(f.high);
    Vec<float> sum{}, product{};
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) {
        const Vec<float> centered = load_lanes<kPartial>(f.x + i * f.x_pitch + at, n) - mean;
        const Vec<float> z = multiply_add(centered, scale, shift);
        const Vec<float> dz = (z <= low) | (z >= high) ? Vec<float>{} : acc[i][j];
        sum += dz;
        product += dz * centered;
        const Vec<float> grad = load_lanes<kPartial>(f.grad + i * f.grad_pitch + at, n);
        store_lanes<kPartial>(p.d + i * p.pitch + at, multiply_add(dz, scale, grad), n, false);
    }
    store(f.sum + at, load(f.sum + at) + sum);
    store(f.product + at, load(f.product + at) + product);
}

template <int kRows>
void gemm_back(const GemmArgs& args, const GemmBack& back) {
    const GemmArgs p = args;
    const GemmBack f = back;
    for (int i = 0; i < kRows; ++i) {  // as in gemm_finish
        __builtin_prefetch(f.x + i * f.x_pitch, 0, 3);
        __builtin_prefetch(f.x + i * f.x_pitch + kPanel - 1, 0, 3);
        __builtin_prefetch(f.grad + i * f.grad_pitch, 0, 3);
        __builtin_prefetch(f.grad + i * f.grad_pitch + kPanel - 1, 0, 3);
    }
    Vec<float> acc[kRows][kPanelVecs];
    accumulate<kRows>(p, acc);
#pragma GCC unroll 2
    for (int j = 0; j < kPanelVecs; ++j) {
        const int64_t n = f.columns - j * kLanes<float>;
        if (n >= kLanes<float>) {
            back_column<kRows, false>(p, f, acc, j, kLanes<float>);
        } else if (n > 0) {
            back_column<kRows, true>(p, f, acc, j, n);
        }
    }
}

void (*const kGemmBack[])(const GemmArgs&, const GemmBack&) = DL4DS_ROWS(gemm_back);
#undef DL4DS_ROWS
#undef DL4DS_SIX

}  // namespace DL4DS_ISA
}  // namespace dl4ds
