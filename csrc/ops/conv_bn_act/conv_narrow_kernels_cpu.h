// A 1x1 convolution to a few output channels (the head of a segmentation network): dot products of pixels,
// since a panel of the GEMM would be all but empty. Included once per ISA by conv_kernels_cpu.h.
namespace dl4ds {
namespace DL4DS_ISA {

constexpr int kPixelsAtOnce = 4;

template <int kOutputs, int kPixels>
DL4DS_INLINE void narrow_pixels(const NarrowArgs& p, int64_t first) {
    Vec<float> acc[kPixels][kOutputs] = {};
    const float* x = p.x + first * p.stride;
    int64_t c = 0;
    for (; c + kLanes<float> <= p.channels; c += kLanes<float>) {
#pragma GCC unroll 4
        for (int i = 0; i < kPixels; ++i) {
            const Vec<float> value = load(x + i * p.stride + c);
#pragma GCC unroll 4
            for (int k = 0; k < kOutputs; ++k) {
                acc[i][k] = multiply_add(value, load(p.weight + k * p.padded + c), acc[i][k]);
            }
        }
    }
    if (c < p.channels) {
        for (int i = 0; i < kPixels; ++i) {
            const Vec<float> value = load_partial(x + i * p.stride + c, p.channels - c);
            for (int k = 0; k < kOutputs; ++k) {
                acc[i][k] = multiply_add(value, load(p.weight + k * p.padded + c), acc[i][k]);
            }
        }
    }
    const bool cut = p.finish.activation == Activation::kRelu || p.finish.activation == Activation::kRelu6;
    const float most = p.finish.activation == Activation::kRelu6 ? 6.0f : __builtin_inff();
    for (int i = 0; i < kPixels; ++i) {
        const int64_t at = (first + i) * kOutputs;
#pragma GCC unroll 4
        for (int k = 0; k < kOutputs; ++k) {
            float z = sum_lanes(acc[i][k]) * p.finish.scale[k] + p.finish.shift[k];
            if (p.finish.residual != nullptr) {
                z += p.finish.residual[at + k];
            }
            if (cut) {  // keeps NaN
                z = z < 0.0f ? 0.0f : z > most ? most : z;
            }
            p.out[at + k] = z;
        }
        if (!is_clamp(p.finish.activation)) {
            finish_rest(p.out + at, p.finish);
        }
    }
}

template <int kOutputs>
void narrow_run(const NarrowArgs& args) {
    const NarrowArgs p = args;
    int64_t i = 0;
    for (; i + kPixelsAtOnce <= p.pixels; i += kPixelsAtOnce) {
        narrow_pixels<kOutputs, kPixelsAtOnce>(p, i);
    }
    for (; i < p.pixels; ++i) {
        narrow_pixels<kOutputs, 1>(p, i);
    }
}

void (*const kNarrow[])(const NarrowArgs&) = {nullptr, &narrow_run<1>, &narrow_run<2>, &narrow_run<3>,
                                              &narrow_run<4>};

}  // namespace DL4DS_ISA
}  // namespace dl4ds
