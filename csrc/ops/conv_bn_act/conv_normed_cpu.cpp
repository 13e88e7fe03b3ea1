// 1x1 convolutions of a training step behind a BatchNorm and an activation that are applied where the
// convolution reads its input, forward and for the weight's gradient; behind the gradient of the input their
// own gradient follows in registers. Of a layer's input four streams of memory are read or written instead of
// eleven. The same bits as bn_act's passes, but for the order of the backward sums.
#include "ops/conv_bn_act/conv_step_cpu.h"

namespace dl4ds {
namespace {

ConvShape shape_of(const TensorInfo& x, const Filters& filters) {
    ConvShape s = conv_weight_shape(filters.info, 1);
    s.n = x.sizes[0], s.height = x.sizes[2], s.width = x.sizes[3];
    return s;
}

struct Prologue {
    ConvSource source;
    ConvPrologue prologue;

    explicit Prologue(const NormedInput& in)
        : source{in.x.as<float>(), in.x.sizes[1], in.x.strides[0], in.x.strides[2], in.x.strides[3]},
          prologue{&source, 1, in.scale, in.shift, in.activation, 1, in.mean} {}
    Prologue(const Prologue&) = delete;
    Prologue& operator=(const Prologue&) = delete;
};

}  // namespace

Tensor normed_conv(const NormedInput& in, const Tensor& weight) {
    const Filters filters(weight);
    const ConvShape s = shape_of(in.x, filters);
    Tensor out = empty_channels_last(s.n, s.channels_out, s.height, s.width, DType::kFloat32);
    const Prologue before(in);
    with_team(num_threads(), [&] {
        run_exact(ConvAlgorithm::kDirect, s, in.x, filters, false, TensorInfo{}, tensor_info(out).as<float>(),
                  nullptr, &before.prologue);
    });
    return out;
}

Tensor normed_conv_wgrad(const NormedInput& in, const Tensor& weight, const Tensor& dout) {
    const Filters filters(weight);
    Tensor dweight = empty_cpu(filters.info.sizes, filters.info.strides, 4, DType::kFloat32);
    const Prologue before(in);
    WgradArgs args{};
    args.shape = shape_of(in.x, filters), args.dout = tensor_info(dout).as<float>();
    args.dweight = tensor_info(dweight).as<float>(), args.layout = filters.layout;
    args.threads = num_threads(), args.prologue = &before.prologue;
    conv_wgrad_direct(args);
    return dweight;
}

void normed_conv_dgrad(const NormedInput& in, const Tensor& weight, const Tensor& dout,
                       const TensorInfo& grad, const TensorInfo& out, double* sum, double* product) {
    const Filters filters(weight);
    const TensorInfo di = tensor_info(dout);
    const ConvShape s = shape_of(in.x, filters);
    const int64_t width = conv_kernels().panel, padded = ceil_div(s.channels, width) * width;
    ConvShape turned = s;
    std::swap(turned.channels, turned.channels_out);
    const int64_t blocks = conv_back_blocks(turned);
    Scratch sums(blocks * 2 * padded * 4);
    const ConvBnBack back{in.x.as<float>(), grad.as<float>(), pixel_pitch(in.x), pixel_pitch(grad),
                          pixel_pitch(out), in.mean,          in.scale,          in.shift,
                          in.activation,    sums.as<float>()};
    with_team(num_threads(), [&] {
        conv_dgrad_direct({s, di.as<float>(), di.strides[0], di.strides[2], di.strides[3],
                           filters.info.as<float>(), filters.layout, out.as<float>(), num_threads(), nullptr,
                           &back});
    });
    for (int64_t c = 0; c < s.channels; ++c) {
        sum[c] = product[c] = 0.0;
        for (int64_t block = 0; block < blocks; ++block) {
            const float* own = back.sums + block * 2 * padded + c;
            sum[c] += static_cast<double>(own[0]);
            product[c] += static_cast<double>(own[padded]);
        }
    }
}

}  // namespace dl4ds
