// Transposed convolution 2x2 with stride 2 (U-Net's upsampling) on the engine's micro-kernel. No output pixel
// gets more than one input pixel, so it is one GEMM: for each of the two output rows of an input row, the
// pixels (W x C) times a matrix of 2 C_out columns (left and right output pixel) gives W x 2 C_out values,
// which lie in memory just as the output row does. BatchNorm, bias and activation are applied to the
// accumulators.
#include <torch/csrc/stable/library.h>

#include "ops/conv_bn_act/conv_cut_cpu.h"
#include "ops/conv_bn_act/conv_step_cpu.h"

namespace dl4ds {
namespace {

constexpr const char* kOp = "conv_transpose_bn_act";

struct TransposedShape {
    int64_t channels, channels_out;

    int64_t columns() const { return 2 * channels_out; }
    int64_t panels() const { return ceil_div(columns(), conv_kernels().panel); }
    int64_t panel_floats() const { return channels * conv_kernels().panel; }
    int64_t packed_floats() const { return 2 * panels() * panel_floats(); }
};

TransposedShape weight_shape(const TensorInfo& weight) {
    DL4DS_CHECK(weight.dim == 4 && weight.sizes[2] == 2 && weight.sizes[3] == 2, kOp,
                ": weight: expected shape (C, C_out, 2, 2), got ", weight.shape());
    check_dtype(kOp, "weight", weight, DType::kFloat32);
    return {weight.sizes[0], weight.sizes[1]};
}

const float* contiguous_vector(const char* name, const TensorInfo& v, int64_t channels) {
    DL4DS_CHECK(!v.present || (v.dim == 1 && v.sizes[0] == channels && v.dtype == DType::kFloat32 &&
                               (v.strides[0] == 1 || channels == 1)),
                kOp, ": ", name, ": expected a contiguous float32 vector of shape (", channels, ",), got ",
                v.shape());
    return v.present ? v.as<float>() : nullptr;
}

struct TransposedArgs {
    TransposedShape shape;
    const TensorInfo* x;  // channel stride 1
    const float* packed;
    float* out;
    GemmFinish finish;  // scale and shift of 2 C_out columns, padded to whole panels
};

/// A unit is a segment of an input row, low enough for one A panel; its output pixels are 2 C_out values
/// apart.
struct Units {
    int64_t width, segments, tallest, count;

    Units(const TensorInfo& x, int64_t max_rows)
        : width(x.sizes[3]),
          segments(ceil_div(width, max_rows)),
          tallest(ceil_div(width, segments)),
          count(x.sizes[0] * x.sizes[2] * segments) {}
    int64_t row(int64_t unit) const { return unit / segments; }  // of all images' rows
    int64_t begin(int64_t unit) const { return width * (unit % segments) / segments; }
    int64_t pixels(int64_t unit) const { return width * (unit % segments + 1) / segments - begin(unit); }
};

/// Units by panels: blocks whose packed pixels stay in L2. Where they are few, the threads share out the
/// panels too, and each packs its pixels again.
class Transposed {
  public:
    Transposed(const TransposedArgs& args, int64_t threads)
        : args_(args),
          t_(args.shape),
          x_(*args.x),
          units_(x_, conv_kernels().max_rows),
          panels_(2 * t_.panels()) {
        const int64_t budget = cache_sizes().l2_bytes / 2 / 4;
        const int64_t wanted = std::clamp<int64_t>(budget / (units_.tallest * line()), 1, 8);
        blocks_ = std::max(ceil_div(units_.count, wanted), std::min(units_.count, threads));
        shares_ = blocks_ >= 2 * threads ? 1 : std::min(panels_, 2 * threads);
        workers_ = std::min(blocks_ * shares_, threads);
    }

    void run() {
        const int64_t items = blocks_ * shares_,
                      floats = (ceil_div(units_.count, blocks_) * units_.tallest + 1) * line();
        Scratch scratch(workers_ * floats * 4);
        float* const memory = scratch.as<float>();
        const int64_t work = units_.count * units_.tallest * t_.channels * t_.columns() / 4;
        parallel_for(workers_, work, [&](int64_t begin, int64_t end) {
            for (int64_t w = begin; w < end; ++w) {
                for (int64_t i = items * w / workers_; i < items * (w + 1) / workers_; ++i) {
                    run_item(i / shares_, i % shares_, memory + w * floats);
                }
            }
        });
    }

  private:
    int64_t line() const { return chunks_of(t_.channels) * kChunk; }
    int64_t first_unit(int64_t block) const { return units_.count * block / blocks_; }

    /// Where an output row's part of a unit begins; below: 0 or 1.
    float* output(int64_t unit, int64_t below) const {
        return args_.out +
               ((2 * units_.row(unit) + below) * units_.width + units_.begin(unit)) * t_.columns();
    }

    void pack(int64_t first, int64_t last, float* a) const {
        const ConvShape pixels{
            x_.sizes[0], t_.channels, x_.sizes[2], x_.sizes[3], t_.columns(), 1, 1, 1, 1, 0, 0, 1, 1, 1};
        for (int64_t u = first; u < last; ++u, a += units_.tallest * line()) {
            conv_kernels().pack({x_.as<float>(), x_.strides[0], x_.strides[2], x_.strides[3], &pixels,
                                 units_.row(u) * units_.width + units_.begin(u), units_.pixels(u), a,
                                 nullptr});
        }
    }

    /// What a block reads and writes, to be asked for while the block before it is multiplied.
    void add(Ahead& ahead, int64_t first, int64_t last) const {
        for (int64_t u = first; u < last; ++u) {
            const int64_t row = units_.row(u), n = row / x_.sizes[2], y = row % x_.sizes[2];
            const float* x =
                x_.as<float>() + n * x_.strides[0] + y * x_.strides[2] + units_.begin(u) * x_.strides[3];
            ahead.add(x, x + units_.pixels(u) * x_.strides[3]);
            for (int64_t below = 0; below < 2; ++below) {
                ahead.add(output(u, below), output(u, below) + units_.pixels(u) * t_.columns());
            }
        }
    }

    void run_item(int64_t block, int64_t share, float* a) const {
        const ConvKernels& kernels = conv_kernels();
        const int64_t first = first_unit(block), last = first_unit(block + 1);
        pack(first, last, a);
        Ahead next;
        if (block + 1 < blocks_ && shares_ == 1) {
            add(next, last, first_unit(block + 2));
        }
        for (int64_t p = panels_ * share / shares_; p < panels_ * (share + 1) / shares_; ++p) {
            const int64_t below = p / t_.panels(), column = p % t_.panels() * kernels.panel;
            const float* b = args_.packed + p * t_.panel_floats();
            GemmFinish finish = args_.finish;
            finish.scale += column, finish.shift += column;
            finish.columns = std::min(kernels.panel, t_.columns() - column);
            for (int64_t u = first; u < last; ++u) {
                // The first units ask for the next panel, each for one part of it; the others for the next
                // block.
                const int64_t i = u - first;
                const char* ahead =
                    i * 16 < kernels.panel
                        ? reinterpret_cast<const char*>(b + t_.panel_floats() + i * t_.channels * 16)
                        : next.take(t_.channels * 64, reinterpret_cast<const char*>(b));
                kernels.gemm_finish[units_.pixels(u)]({a + i * units_.tallest * line(), b, t_.channels,
                                                       output(u, below) + column, t_.columns(), ahead},
                                                      finish);
            }
        }
    }

    const TransposedArgs& args_;
    const TransposedShape t_;
    const TensorInfo& x_;
    const Units units_;
    const int64_t panels_;
    int64_t blocks_, shares_, workers_;
};

}  // namespace

/// [below][panel][c][panel width]: column j of row `below` is output channel j % C_out of the pixel j /
/// C_out.
Tensor conv_transpose_bn_act_pack(Tensor weight) {
    const TensorInfo wi = tensor_info(weight);
    const TransposedShape t = weight_shape(wi);
    Tensor packed = empty_pack_cpu(t.packed_floats(), DType::kFloat32);
    const float* const w = wi.as<float>();
    float* to = tensor_info(packed).as<float>();
    const int64_t width = conv_kernels().panel;
    for (int64_t p = 0; p < 2 * t.panels(); ++p) {
        const int64_t below = p / t.panels(), first = p % t.panels() * width;
        for (int64_t c = 0; c < t.channels; ++c, to += width) {
            for (int64_t i = 0; i < width; ++i) {
                const int64_t j = first + i, right = j / t.channels_out;
                to[i] = right > 1 ? 0.0f
                                  : w[c * wi.strides[0] + j % t.channels_out * wi.strides[1] +
                                      below * wi.strides[2] + right * wi.strides[3]];
            }
        }
    }
    return packed;
}

Tensor conv_transpose_bn_act_packed(Tensor x, Tensor weight, Tensor packed, std::optional<Tensor> bias,
                                    std::optional<Tensor> running_mean, std::optional<Tensor> running_var,
                                    std::optional<Tensor> bn_weight, std::optional<Tensor> bn_bias,
                                    double eps, bool eps_std, int64_t activation, double negative_slope) {
    TensorInfo xi = tensor_info(x);
    const TransposedShape t = weight_shape(tensor_info(weight));
    const TensorInfo pi = tensor_info(packed);
    DL4DS_CHECK(xi.dim == 4 && xi.sizes[1] == t.channels, kOp, ": x: expected shape (N, ", t.channels,
                ", H, W), got ", xi.shape());
    check_dtype(kOp, "x", xi, DType::kFloat32);
    check_dtype(kOp, "packed", pi, DType::kFloat32);
    DL4DS_CHECK(pi.dim == 1 && pi.numel == t.packed_floats(), kOp, ": packed: expected ", t.packed_floats(),
                " values, got shape ", pi.shape());
    const int64_t channels = t.channels_out, width = conv_kernels().panel;
    const ScaleShiftArgs vectors{contiguous_vector("running_mean", tensor_info(running_mean), channels),
                                 contiguous_vector("running_var", tensor_info(running_var), channels),
                                 contiguous_vector("bn_weight", tensor_info(bn_weight), channels),
                                 contiguous_vector("bn_bias", tensor_info(bn_bias), channels),
                                 contiguous_vector("bias", tensor_info(bias), channels),
                                 channels,
                                 eps,
                                 eps_std,
                                 nullptr,
                                 nullptr};
    Tensor out =
        empty_channels_last(xi.sizes[0], channels, 2 * xi.sizes[2], 2 * xi.sizes[3], DType::kFloat32);
    const TensorInfo oi = tensor_info(out);
    if (oi.numel == 0) {
        return out;
    }
    Tensor input = x;
    if (t.channels > 1 && xi.strides[1] != 1) {
        input = as_channels_last(x, xi);
        xi = tensor_info(input);
    }
    const int64_t entries = 2 * channels + width;
    Scratch memory(2 * entries * int64_t{sizeof(float)});
    ScaleShiftArgs fill = vectors;
    fill.scale = memory.as<float>(), fill.shift = fill.scale + entries;
    conv_kernels().scale_shift(fill);
    for (float* v : {fill.scale, fill.shift}) {
        std::copy(v, v + channels, v + channels);
        std::fill(v + 2 * channels, v + entries, 0.0f);
    }
    const TransposedArgs args{t,
                              &xi,
                              pi.as<float>(),
                              oi.as<float>(),
                              {fill.scale, fill.shift, nullptr, 0, activation_from_code(kOp, activation),
                               static_cast<float>(negative_slope)}};
    Transposed(args, num_threads()).run();
    return out;
}

STABLE_TORCH_LIBRARY_IMPL(dl4ds_kernels, CPU, m) {
    m.impl("conv_transpose_bn_act_pack", TORCH_BOX(&conv_transpose_bn_act_pack));
    m.impl("conv_transpose_bn_act_packed", TORCH_BOX(&conv_transpose_bn_act_packed));
}

}  // namespace dl4ds
