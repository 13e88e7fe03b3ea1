// Poolings: fp32, channels_last in and out, one pass without indices, outputs from the pool. The maximum's
// gradient looks for the places again.
#include "ops/pool2d/pool2d_cpu.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cstring>

#include "common/cpu/isa.h"
#include "common/cpu/output.h"
#include "common/cpu/parallel.h"

namespace dl4ds {
namespace {

void check_pair(const char* op, const char* name, int64_t height, int64_t width, int64_t least) {
    DL4DS_CHECK(height >= least && width >= least, op, ": ", name, ": expected two numbers of at least ",
                least, ", got ", height, " and ", width);
}

/// As dense channels_last; another layout is copied.
Tensor input(const char* op, const char* name, const Tensor& x) {
    const TensorInfo xi = tensor_info(x);
    DL4DS_CHECK(xi.dim == 4 && xi.sizes[1] > 0 && xi.sizes[2] > 0 && xi.sizes[3] > 0, op, ": ", name,
                ": expected (N, C, H, W) with C, H, W > 0, got shape ", xi.shape());
    check_dtype(op, name, xi, DType::kFloat32);
    const auto strides = dense_strides(xi.sizes, 4, Format::kChannelsLast);
    return same_strides(xi.strides, strides.data(), xi.sizes, 4) ? x
                                                                 : copy_with_strides(x, xi, strides.data());
}

Tensor input(const char* op, const Tensor& x) { return input(op, "x", x); }

Tensor output(int64_t n, int64_t channels, int64_t height, int64_t width) {
    const int64_t sizes[4] = {n, channels, height, width};
    return empty_cpu(sizes, dense_strides(sizes, 4, Format::kChannelsLast).data(), 4, DType::kFloat32);
}

/// One dimension, with the output's size as torch computes it.
PoolAxis axis(const char* op, int64_t size, int64_t kernel, int64_t stride, int64_t padding, int64_t dilation,
              bool ceil_mode) {
    const int64_t reach = dilation * (kernel - 1) + 1, room = size + 2 * padding - reach;
    DL4DS_CHECK(2 * padding <= kernel, op, ": padding: expected at most half of the kernel, got ", padding);
    // Rounded down also where room is negative (then ceil_mode may still leave one window).
    const int64_t top = room + (ceil_mode ? stride - 1 : 0);
    int64_t out = (top >= 0 ? top / stride : -1) + 1;
    if (ceil_mode && (out - 1) * stride >= size + padding) {
        --out;  // the last window would start in the padding behind the map
    }
    DL4DS_CHECK(out > 0, op, ": x: expected a map at least as large as the kernel, got ", size,
                " for kernel ", kernel);
    return {size, out, kernel, stride, padding, dilation};
}

/// Runs fn(n, y, row of x, row of out) over all output rows on the threads.
template <typename Fn>
Tensor over_rows(const Tensor& dense, const PoolAxis& h, const PoolAxis& w, const Fn& fn) {
    const TensorInfo xi = tensor_info(dense);
    const int64_t channels = xi.sizes[1], row = w.size * channels;
    Tensor out = output(xi.sizes[0], channels, h.out, w.out);
    const float* const x = xi.as<float>();
    float* const to = tensor_info(out).as<float>();
    const int64_t taps = h.kernel * w.kernel;
    parallel_for(xi.sizes[0] * h.out, (taps + 1) * 4 * xi.sizes[0] * h.out * w.out * channels,
                 [&](int64_t first, int64_t last) {
                     for (int64_t i = first; i < last; ++i) {
                         const PoolAxis::Window window = h.window(i % h.out);
                         const int64_t taps_inside = window.end - window.begin;
                         const int64_t y = taps_inside > 0 ? window.first + window.begin * h.dilation : 0;
                         fn(i % h.out,
                            PoolRowArgs{x + (i / h.out * h.size + y) * row, h.dilation * row, taps_inside,
                                        channels, channels, &w, to + i * w.out * channels});
                     }
                 });
    return out;
}

/// What a maximum pooling's forward and backward pass share.
struct MaxPool {
    Tensor dense;
    PoolAxis h, w;

    MaxPool(const char* op, const Tensor& x, int64_t kernel_h, int64_t kernel_w, int64_t stride_h,
            int64_t stride_w, int64_t padding_h, int64_t padding_w, int64_t dilation_h, int64_t dilation_w,
            bool ceil_mode)
        : dense(input(op, x)) {
        check_pair(op, "kernel_size", kernel_h, kernel_w, 1);
        check_pair(op, "stride", stride_h, stride_w, 1);
        check_pair(op, "padding", padding_h, padding_w, 0);
        check_pair(op, "dilation", dilation_h, dilation_w, 1);
        const int64_t* const sizes = tensor_info(dense).sizes;
        h = axis(op, sizes[2], kernel_h, stride_h, padding_h, dilation_h, ceil_mode);
        w = axis(op, sizes[3], kernel_w, stride_w, padding_w, dilation_w, ceil_mode);
    }
};

constexpr int64_t kBandBytes = 256 << 10;

/// Rows [first, last) of one image's gradient: cleared shortly before the first window adds to them.
void max_back_band(const MaxPool& pool, int64_t channels, int64_t first, int64_t last, const float* x,
                   const float* dout, float* dx) {
    const PoolAxis &h = pool.h, &w = pool.w;
    const int64_t row = w.size * channels, reach = h.dilation * (h.kernel - 1);
    const int64_t begin = std::max<int64_t>(0, ceil_div(first + h.padding - reach, h.stride));
    const int64_t end = std::min(h.out, (last - 1 + h.padding) / h.stride + 1);
    int64_t cleared = first;
    const auto clear = [&](int64_t to) {
        if (to > cleared) {
            std::memset(dx + cleared * row, 0, static_cast<size_t>((to - cleared) * row) * sizeof(float));
            cleared = to;
        }
    };
    for (int64_t o = begin; o < end; ++o) {
        const PoolAxis::Window window = h.window(o);
        const int64_t taps = window.end - window.begin, y = window.first + window.begin * h.dilation;
        if (taps == 0) {
            continue;
        }
        clear(std::min(last, y + (taps - 1) * h.dilation + 1));
        const auto tap_from = [&](int64_t place) {  // the first tap at this row or behind it
            return std::clamp<int64_t>(ceil_div(place - y, h.dilation), 0, taps);
        };
        pool_kernels().max_row_back({{x + y * row, h.dilation * row, taps, channels, channels, &w, nullptr},
                                     dout + o * w.out * channels,
                                     dx + y * row,
                                     tap_from(first),
                                     tap_from(last)});
    }
    clear(last);
}

}  // namespace

// Plain numbers instead of pairs: a list costs a microsecond on its way through the dispatcher.
Tensor max_pool2d_cpu(Tensor x, int64_t kernel_h, int64_t kernel_w, int64_t stride_h, int64_t stride_w,
                      int64_t padding_h, int64_t padding_w, int64_t dilation_h, int64_t dilation_w,
                      bool ceil_mode) {
    const MaxPool pool("max_pool2d", x, kernel_h, kernel_w, stride_h, stride_w, padding_h, padding_w,
                       dilation_h, dilation_w, ceil_mode);
    const auto kernel_row = pool_kernels().max_row;
    return over_rows(pool.dense, pool.h, pool.w, [&](int64_t, const PoolRowArgs& row) { kernel_row(row); });
}

Tensor max_pool2d_bwd_cpu(Tensor dout, Tensor x, int64_t kernel_h, int64_t kernel_w, int64_t stride_h,
                          int64_t stride_w, int64_t padding_h, int64_t padding_w, int64_t dilation_h,
                          int64_t dilation_w, bool ceil_mode) {
    constexpr const char* kOp = "max_pool2d_bwd";
    const MaxPool pool(kOp, x, kernel_h, kernel_w, stride_h, stride_w, padding_h, padding_w, dilation_h,
                       dilation_w, ceil_mode);
    const TensorInfo xi = tensor_info(pool.dense);
    const int64_t channels = xi.sizes[1], height = pool.h.size, image = height * pool.w.size * channels;
    const Tensor gradient = input(kOp, "dout", dout);
    const TensorInfo di = tensor_info(gradient);
    DL4DS_CHECK(di.sizes[0] == xi.sizes[0] && di.sizes[1] == channels && di.sizes[2] == pool.h.out &&
                    di.sizes[3] == pool.w.out,
                kOp, ": dout: expected the output's shape (", xi.sizes[0], ", ", channels, ", ", pool.h.out,
                ", ", pool.w.out, "), got ", di.shape());
    Tensor dx = output(xi.sizes[0], channels, height, pool.w.size);
    const float *const from = xi.as<float>(), *const grad = di.as<float>();
    float* const to = tensor_info(dx).as<float>();
    const int64_t bands = std::min(height, ceil_div(image * 4, kBandBytes));
    parallel_for(xi.sizes[0] * bands, 2 * xi.numel * 4, [&](int64_t first, int64_t last) {
        for (int64_t i = first; i < last; ++i) {
            const int64_t n = i / bands, band = i % bands;
            max_back_band(pool, channels, height * band / bands, height * (band + 1) / bands,
                          from + n * image, grad + n * pool.h.out * pool.w.out * channels, to + n * image);
        }
    });
    return dx;
}

Tensor avg_pool2d_cpu(Tensor x, int64_t kernel_h, int64_t kernel_w, int64_t stride_h, int64_t stride_w,
                      int64_t padding_h, int64_t padding_w, bool ceil_mode, bool count_include_pad,
                      int64_t divisor) {
    constexpr const char* kOp = "avg_pool2d";
    check_pair(kOp, "kernel_size", kernel_h, kernel_w, 1);
    check_pair(kOp, "stride", stride_h, stride_w, 1);
    check_pair(kOp, "padding", padding_h, padding_w, 0);
    const Tensor dense = input(kOp, x);
    const int64_t* const sizes = tensor_info(dense).sizes;
    const PoolAxis h = axis(kOp, sizes[2], kernel_h, stride_h, padding_h, 1, ceil_mode);
    const PoolAxis w = axis(kOp, sizes[3], kernel_w, stride_w, padding_w, 1, ceil_mode);
    const auto kernel_row = pool_kernels().average_row;
    return over_rows(dense, h, w, [&](int64_t y, const PoolRowArgs& row) {
        kernel_row({row, divisor, count_include_pad, h.padded_taps(y)});
    });
}

Tensor global_avg_pool2d_cpu(Tensor x) {
    const Tensor dense = input("global_avg_pool2d", x);
    const TensorInfo xi = tensor_info(dense);
    const int64_t channels = xi.sizes[1], pixels = xi.sizes[2] * xi.sizes[3];
    Tensor out = output(xi.sizes[0], channels, 1, 1);
    const float* const from = xi.as<float>();
    float* const to = tensor_info(out).as<float>();
    // Shares of channels: an image has few pixels here and many channels.
    constexpr int64_t kShare = 256;
    const int64_t shares = (channels + kShare - 1) / kShare;
    const auto kernel = pool_kernels().global_average;
    parallel_for(xi.sizes[0] * shares, xi.numel * 4, [&](int64_t first, int64_t last) {
        for (int64_t i = first; i < last; ++i) {
            const int64_t n = i / shares, c = i % shares * kShare;
            kernel({from + n * pixels * channels + c, pixels, channels, std::min(kShare, channels - c),
                    to + n * channels + c});
        }
    });
    return out;
}

STABLE_TORCH_LIBRARY_IMPL(dl4ds_kernels, CPU, m) {
    m.impl("max_pool2d", TORCH_BOX(&max_pool2d_cpu));
    m.impl("max_pool2d_bwd", TORCH_BOX(&max_pool2d_bwd_cpu));
    m.impl("avg_pool2d", TORCH_BOX(&avg_pool2d_cpu));
    m.impl("global_avg_pool2d", TORCH_BOX(&global_avg_pool2d_cpu));
}

}  // namespace dl4ds
