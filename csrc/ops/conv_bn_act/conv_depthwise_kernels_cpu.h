// Depthwise convolution: one output row at a time, a vector of channels of up to kPixels neighbouring pixels
// in registers. Included once per ISA by conv_kernels_cpu.h. Every output is summed tap by tap in the
// weight's order, taps in the padding left out, whatever the blocking.
namespace dl4ds {
namespace DL4DS_ISA {

#if DL4DS_VEC_BYTES == 64
constexpr int kPixels = 8;
#else
constexpr int kPixels = 4;
#endif

/// The taps that lie inside the map for one output row, and where the first of them reads.
struct TapRows {
    int64_t begin, end;
    const float* x;  // tap row 0, column 0 of the map; may be outside
    int64_t step;    // from one tap row to the next
};

/// kWidth x any height of taps with kStride between kCount pixels; 0 for both: as the shape says. `x` is the
/// first pixel's first column; taps [q_begin, q_end) of a row count.
template <int kWidth, int kStride, int kCount, bool kPartial>
DL4DS_INLINE void depthwise_lanes(const DepthwiseArgs& p, const ConvShape& s, const TapRows& rows,
                                  const float* x, int64_t q_begin, int64_t q_end, const Clamp& limits,
                                  float* out, const float* residual, int64_t c, int64_t n) {
    const int64_t stride = (kStride ? kStride : s.stride_w) * p.stride_w;
    const int64_t tap = (kWidth ? 1 : s.dilation_w) * p.stride_w, width = kWidth ? kWidth : s.kernel_w;
    Vec<float> acc[kCount];
#pragma GCC unroll 8
    for (int i = 0; i < kCount; ++i) {
        acc[i] = Vec<float>{};
    }
    const float* row = x + rows.begin * rows.step + c;
    const float* weight = p.weight + rows.begin * width * p.padded + c;
    for (int64_t r = rows.begin; r < rows.end; ++r, row += rows.step, weight += width * p.padded) {
        if constexpr (kWidth > 0) {
#pragma GCC unroll 8
            for (int q = 0; q < kWidth; ++q) {
                const Vec<float> w = load(weight + q * p.padded);
#pragma GCC unroll 8
                for (int i = 0; i < kCount; ++i) {
                    const int column =
                        i * kStride + q;  // a constant: loads that several taps share are merged
                    acc[i] = multiply_add(load_lanes<kPartial>(row + column * p.stride_w, n), w, acc[i]);
                }
            }
        } else {
            for (int64_t q = q_begin; q < q_end; ++q) {
                const Vec<float> w = load(weight + q * p.padded);
#pragma GCC unroll 8
                for (int i = 0; i < kCount; ++i) {
                    acc[i] = multiply_add(load_lanes<kPartial>(row + i * stride + q * tap, n), w, acc[i]);
                }
            }
        }
    }
    const Vec<float> scale = load(p.finish.scale + c), shift = load(p.finish.shift + c);
#pragma GCC unroll 8
    for (int i = 0; i < kCount; ++i) {
        Vec<float> z = multiply_add(acc[i], scale, shift);
        if (residual != nullptr) {
            z += load_lanes<kPartial>(residual + i * s.channels + c, n);
        }
        store_lanes<kPartial>(out + i * s.channels + c, clamp(z, limits), n, false);
    }
}

/// kCount output pixels from column `ox` on, all channels.
template <int kWidth, int kStride, int kCount>
void depthwise_pixels(const DepthwiseArgs& p, const ConvShape& s, const TapRows& rows, int64_t ox,
                      int64_t q_begin, int64_t q_end, const Clamp& limits) {
    const float* x = rows.x + (ox * s.stride_w - s.pad_w) * p.stride_w;
    float* out = p.out + ox * s.channels;
    const float* residual = p.finish.residual == nullptr ? nullptr : p.finish.residual + ox * s.channels;
    int64_t c = 0;
    for (; c + kLanes<float> <= s.channels; c += kLanes<float>) {
        depthwise_lanes<kWidth, kStride, kCount, false>(p, s, rows, x, q_begin, q_end, limits, out, residual,
                                                        c, kLanes<float>);
    }
    if (c < s.channels) {
        depthwise_lanes<kWidth, kStride, kCount, true>(p, s, rows, x, q_begin, q_end, limits, out, residual,
                                                       c, s.channels - c);
    }
}

/// Pixels [begin, end), all of whose columns lie inside the map.
template <int kWidth, int kStride>
void depthwise_inner(const DepthwiseArgs& p, const ConvShape& s, const TapRows& rows, int64_t begin,
                     int64_t end, const Clamp& limits) {
    const int64_t taps = s.kernel_w;
    int64_t ox = begin;
    for (; ox + kPixels <= end; ox += kPixels) {
        depthwise_pixels<kWidth, kStride, kPixels>(p, s, rows, ox, 0, taps, limits);
    }
    if (kPixels > 4 && ox + 4 <= end) {
        depthwise_pixels<kWidth, kStride, 4>(p, s, rows, ox, 0, taps, limits);
        ox += 4;
    }
    if (ox + 2 <= end) {
        depthwise_pixels<kWidth, kStride, 2>(p, s, rows, ox, 0, taps, limits);
        ox += 2;
    }
    if (ox < end) {
        depthwise_pixels<kWidth, kStride, 1>(p, s, rows, ox, 0, taps, limits);
    }
}

/// Taps [begin, end) of a line of `taps`, `dilation` apart from `first` on, that lie in [0, size).
DL4DS_INLINE void taps_inside(int64_t first, int64_t taps, int64_t dilation, int64_t size, int64_t& begin,
                              int64_t& end) {
    begin = first >= 0 ? 0 : (-first + dilation - 1) / dilation;
    end = first >= size ? 0 : (size - first + dilation - 1) / dilation;
    end = end < taps ? end : taps;
    end = end > begin ? end : begin;
}

inline void depthwise_row(const DepthwiseArgs& args) {
    const DepthwiseArgs p = args;
    const ConvShape s = *p.shape;
    const Clamp limits = clamp_of(p.finish.activation);
    const int64_t y0 = p.y * s.stride_h - s.pad_h, wo = s.out_width(),
                  reach = (s.kernel_w - 1) * s.dilation_w;
    TapRows rows{0, 0, p.x + y0 * p.stride_h, s.dilation_h * p.stride_h};
    taps_inside(y0, s.kernel_h, s.dilation_h, s.height, rows.begin, rows.end);
    // Output columns whose every tap is inside.
    const int64_t room = s.width - 1 - reach + s.pad_w;
    int64_t begin = (s.pad_w + s.stride_w - 1) / s.stride_w, end = room < 0 ? 0 : room / s.stride_w + 1;
    begin = begin < wo ? begin : wo;
    end = end < wo ? end : wo;
    end = end > begin ? end : begin;
    for (int64_t ox = 0; ox < wo; ++ox) {
        if (ox == begin && end > begin) {
            const bool plain = s.dilation_w == 1 && s.stride_w <= 2;
            const int kind = plain && (s.kernel_w == 3 || s.kernel_w == 5)
                                 ? static_cast<int>(s.kernel_w * 10 + s.stride_w)
                                 : 0;
            switch (kind) {
                case 31:
                    depthwise_inner<3, 1>(p, s, rows, begin, end, limits);
                    break;
                case 32:
                    depthwise_inner<3, 2>(p, s, rows, begin, end, limits);
                    break;
                case 51:
                    depthwise_inner<5, 1>(p, s, rows, begin, end, limits);
                    break;
                case 52:
                    depthwise_inner<5, 2>(p, s, rows, begin, end, limits);
                    break;
                default:
                    depthwise_inner<0, 0>(p, s, rows, begin, end, limits);
            }
            ox = end - 1;
            continue;
        }
        int64_t q_begin, q_end;
        taps_inside(ox * s.stride_w - s.pad_w, s.kernel_w, s.dilation_w, s.width, q_begin, q_end);
        depthwise_pixels<0, 0, 1>(p, s, rows, ox, q_begin, q_end, limits);
    }
    if (!is_clamp(p.finish.activation)) {
        GemmFinish all = p.finish;
        all.columns = wo * s.channels;
        finish_rest(p.out, all);
    }
}

}  // namespace DL4DS_ISA
}  // namespace dl4ds
