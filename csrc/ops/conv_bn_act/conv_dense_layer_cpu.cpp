// The bottleneck layers of a dense block's training step in one call, forward and backward, on the block's
// buffers: the calls that dl4ds_kernels/ops/dense_block.py and _dense_gradient.py would make one by one, in
// the same order. Between two of them Python and the dispatcher, with caches that a convolution has just
// emptied, cost as much as a small layer's kernel (as for conv_chain). Where the first convolution can, it
// applies the BatchNorm in front itself (conv_normed_cpu.cpp).
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "ops/bn_act/bn_act_dense_cpu.h"
#include "ops/conv_bn_act/conv_step_cpu.h"

namespace dl4ds {
namespace {

using Pair = std::vector<int64_t>;

/// The ints of `code`, in this order.
struct Code {
    int64_t channels, growth;  // that the layer reads and makes
    int64_t eps_std[2], activation;
    int64_t forward[2], dgrad[2], wgrad[2];  // algorithms of the two convolutions
    int64_t geometry[2][6];                  // stride, padding, dilation

    Pair pair(int conv, int which) const {
        return {geometry[conv][2 * which], geometry[conv][2 * which + 1]};
    }
};

constexpr size_t kCode = sizeof(Code) / sizeof(int64_t);

/// Places in `tensors`; the rest is the inner BatchNorm's running statistics, or its mean and rstd.
enum Place { kWeight0, kBias0, kConv0, kWeight1, kBias1, kConv1, kFirst, kSecond, kPlaces };
/// Places in `numbers`.
enum Number { kEps0, kEps1, kSlope, kMomentum, kNumbers };

struct Layer {
    Code code;
    std::vector<Tensor> tensors;  // kFirst or kPlaces of them
    const double* numbers;
};

/// What the lists of a call hold, one layer's part behind the other's.
std::vector<Layer> decode(const char* op, const std::vector<Tensor>& tensors,
                          const std::vector<int64_t>& code, const std::vector<double>& numbers) {
    const size_t count = code.size() / kCode;
    DL4DS_CHECK(count > 0 && code.size() == count * kCode, op, ": code: expected ", kCode,
                " integers a layer, got ", code.size());
    const size_t places = tensors.size() / count;
    DL4DS_CHECK(tensors.size() == count * places && (places == kFirst || places == kPlaces), op,
                ": tensors: expected ", static_cast<int>(kFirst), " or ", static_cast<int>(kPlaces),
                " a layer, got ", tensors.size(), " for ", count);
    DL4DS_CHECK(numbers.size() == count * kNumbers, op, ": numbers: expected ", static_cast<int>(kNumbers),
                " a layer, got ", numbers.size(), " for ", count);
    std::vector<Layer> layers(count);
    for (size_t i = 0; i < count; ++i) {
        std::copy_n(code.begin() + i * kCode, kCode, reinterpret_cast<int64_t*>(&layers[i].code));
        layers[i].tensors.assign(tensors.begin() + i * places, tensors.begin() + (i + 1) * places);
        layers[i].numbers = numbers.data() + i * kNumbers;
    }
    return layers;
}

Tensor channels(const Tensor& t, int64_t first, int64_t count) {
    return torch::stable::narrow(const_cast<Tensor&>(t), 1, first, count);
}

Tensor entries(const Tensor& t, int64_t first, int64_t count) {
    return torch::stable::narrow(const_cast<Tensor&>(t), 0, first, count);
}

/// The BatchNorm in front of the first convolution where that applies it while it reads.
class Outer {
  public:
    Outer(const char* op, const std::vector<Tensor>& tensors, const Code& c, const Tensor& out,
          const Tensor& mean, const Tensor& var, double eps)
        : features_(channels(out, 0, c.channels)),
          mean_(entries(mean, 0, c.channels)),
          var_(entries(var, 0, c.channels)),
          entries_(pad_elements(c.channels + std::max(conv_kernels().panel, kChunk))),
          memory_(3 * entries_ * 4),
          norm_{tensor_info(tensors[kWeight0]),
                tensor_info(tensors[kBias0]),
                tensor_info(mean_),
                tensor_info(var_),
                eps,
                c.eps_std[0] != 0} {
        norm_.check(op, tensor_info(features_));
        float *center = memory_.as<float>(), *scale = center + entries_, *shift = scale + entries_;
        std::fill(center, center + 3 * entries_, 0.0f);
        for (int64_t i = 0; i < c.channels; ++i) {
            norm_.constants<float>(i, center[i], scale[i], shift[i]);
        }
        input_ = {tensor_info(features_), center, scale, shift, static_cast<Activation>(c.activation)};
    }
    Outer(const Outer&) = delete;
    Outer& operator=(const Outer&) = delete;

    const NormedInput& input() const { return input_; }
    const DenseNorm& norm() const { return norm_; }

  private:
    Tensor features_, mean_, var_;
    int64_t entries_;
    Scratch memory_;
    DenseNorm norm_;
    NormedInput input_;
};

/// Whether the first convolution can: direct in all three passes, an activation that is a clamp.
bool reads_normed(const Code& c, const Tensor& out, const Tensor& weight) {
    const TensorInfo oi = tensor_info(out), wi = tensor_info(weight);
    const auto direct = static_cast<int64_t>(ConvAlgorithm::kDirect);
    const std::array<int64_t, 6> plain{1, 1, 0, 0, 1, 1};
    const bool clamp = c.activation == static_cast<int64_t>(Activation::kNone) ||
                       c.activation == static_cast<int64_t>(Activation::kRelu) ||
                       c.activation == static_cast<int64_t>(Activation::kRelu6);
    return clamp && c.forward[0] == direct && c.dgrad[0] == direct && c.wgrad[0] == direct && oi.dim == 4 &&
           oi.numel > 0 && oi.dtype == DType::kFloat32 && pixel_pitch(oi) >= oi.sizes[1] && wi.dim == 4 &&
           wi.sizes[1] == c.channels && wi.sizes[2] == 1 && wi.sizes[3] == 1 &&
           std::equal(plain.begin(), plain.end(), c.geometry[0]);
}

/// Features from which on backward takes this way too: fewer stay in a cache from pass to pass, and the
/// passes are then faster than an epilogue between products (two threads, Zen 3: 0.97 to 1.01x at 7x7, 1.03
/// to 1.07x at 14x14 and 28x28).
constexpr int64_t kNormedBack = 768 << 10;

/// The gradient of the features behind the first convolution, see dense_back_cpu: gives those of the vectors.
std::pair<Tensor, Tensor> outer_back(const char* op, const Outer& outer, const Tensor& weight,
                                     const Tensor& dy, const Tensor& total, const Tensor& grad,
                                     const Tensor& factor, const Tensor& offset) {
    const TensorInfo &x = outer.input().x, from = tensor_info(total), to = tensor_info(grad);
    const TensorInfo slopes = tensor_info(factor), constants = tensor_info(offset), di = tensor_info(dy);
    dense_pitch(op, "total", from, x);
    dense_pitch(op, "grad", to, x);
    check_written(op, "factor", slopes, x, DType::kFloat64);
    check_written(op, "offset", constants, x, DType::kFloat64);
    const int64_t channels = x.sizes[1];
    DL4DS_CHECK(di.sizes[0] == x.sizes[0] && di.sizes[1] == tensor_info(weight).sizes[0] &&
                    di.sizes[2] == x.sizes[2] && di.sizes[3] == x.sizes[3],
                op, ": y: expected the first convolution's output, got ", di.shape());
    Scratch sums(2 * 8 * channels);
    double *s1 = sums.as<double>(), *s2 = s1 + channels;
    normed_conv_dgrad(outer.input(), weight, dy, from, to, s1, s2);
    Tensor dweight = empty_vector_cpu(channels, DType::kFloat32),
           dbias = empty_vector_cpu(channels, DType::kFloat32);
    const double n = static_cast<double>(x.numel / channels);
    for (int64_t i = 0; i < channels; ++i) {
        outer.norm().add_gradients<float>(i, n, s1[i], s2[i], tensor_info(dweight).as<float>()[i],
                                          tensor_info(dbias).as<float>()[i], slopes.as<double>()[i],
                                          constants.as<double>()[i]);
    }
    return {std::move(dweight), std::move(dbias)};
}

/// One layer of dense_layers_cpu: its output goes behind what it reads.
std::array<Tensor, 6> layer_forward(const char* op, const Tensor& out, const Tensor& mean, const Tensor& var,
                                    const Layer& layer) {
    const Code& c = layer.code;
    const std::vector<Tensor>& tensors = layer.tensors;
    const double* numbers = layer.numbers;
    const bool tracks = tensors.size() > kFirst;
    Tensor y = [&] {
        if (reads_normed(c, out, tensors[kConv0])) {
            return normed_conv(Outer(op, tensors, c, out, mean, var, numbers[kEps0]).input(),
                               tensors[kConv0]);
        }
        const Tensor input = std::get<0>(
            bn_act_fwd_cpu(channels(out, 0, c.channels), tensors[kWeight0], tensors[kBias0],
                           entries(mean, 0, c.channels), entries(var, 0, c.channels), std::nullopt, false,
                           0.0, numbers[kEps0], c.eps_std[0] != 0, c.activation, numbers[kSlope], false));
        return conv2d_exact(input, tensors[kConv0], std::nullopt, c.pair(0, 0), c.pair(0, 1), c.pair(0, 2),
                            c.forward[0]);
    }();
    auto [z, first, rstd, mask, new_mean, new_var] = bn_act_fwd_cpu(
        y, tensors[kWeight1], tensors[kBias1], tracks ? std::optional<Tensor>(tensors[kFirst]) : std::nullopt,
        tracks ? std::optional<Tensor>(tensors[kSecond]) : std::nullopt, std::nullopt, true,
        numbers[kMomentum], numbers[kEps1], c.eps_std[1] != 0, c.activation, numbers[kSlope], false);
    dense_append_cpu(conv2d_exact(z, tensors[kConv1], std::nullopt, c.pair(1, 0), c.pair(1, 1), c.pair(1, 2),
                                  c.forward[1]),
                     channels(out, c.channels, c.growth), entries(mean, c.channels, c.growth),
                     entries(var, c.channels, c.growth));
    return {std::move(y), std::move(z), first, rstd, new_mean, new_var};
}

/// One layer of dense_layers_back_cpu.
std::array<Tensor, 6> layer_back(const char* op, const Tensor& total, const Tensor& grad,
                                 const Tensor& factor, const Tensor& offset, const Tensor& out,
                                 const Tensor& mean, const Tensor& var, const Tensor& y, const Layer& layer) {
    const Code& c = layer.code;
    const std::vector<Tensor>& tensors = layer.tensors;
    const double* numbers = layer.numbers;
    const Tensor features = channels(out, 0, c.channels), &first = tensors[kFirst], &rstd = tensors[kSecond];
    Tensor dweight1 = tensors[kConv1], dvector1 = tensors[kWeight1], dbias1 = tensors[kBias1];
    Tensor dy = [&] {
        const Tensor dout =
            dense_take_cpu(channels(total, c.channels, c.growth), channels(out, c.channels, c.growth),
                           entries(mean, c.channels, c.growth), entries(factor, c.channels, c.growth),
                           entries(offset, c.channels, c.growth));
        const Tensor inner = bn_act_again_cpu(y, tensors[kWeight1], tensors[kBias1], first, rstd,
                                              c.activation, numbers[kSlope]);
        Tensor dinner = dout;
        std::tie(dinner, dweight1) = conv2d_exact_bwd(dout, inner, tensors[kConv1], c.pair(1, 0),
                                                      c.pair(1, 1), c.pair(1, 2), c.dgrad[1], c.wgrad[1]);
        Tensor made = dinner, none = dinner;
        std::tie(made, dvector1, dbias1, none) = bn_act_bwd_cpu(
            dinner, y, tensors[kWeight1], tensors[kBias1], first, rstd, std::nullopt, std::nullopt, true,
            numbers[kEps1], c.eps_std[1] != 0, c.activation, numbers[kSlope], true, true, false);
        return dense_channels_last(made, tensor_info(made));
    }();
    if (tensor_info(features).numel >= kNormedBack && reads_normed(c, out, tensors[kConv0])) {
        const Outer outer(op, tensors, c, out, mean, var, numbers[kEps0]);
        auto [dvector0, dbias0] = outer_back(op, outer, tensors[kConv0], dy, channels(total, 0, c.channels),
                                             channels(grad, 0, c.channels), entries(factor, 0, c.channels),
                                             entries(offset, 0, c.channels));
        Tensor dweight0 = normed_conv_wgrad(outer.input(), tensors[kConv0], dy);
        return {dvector0, dbias0, std::move(dweight0), dvector1, dbias1, dweight1};
    }
    const auto first_back = [&](const Tensor& x, int64_t dgrad, int64_t wgrad) {
        return conv2d_exact_bwd(dy, x, tensors[kConv0], c.pair(0, 0), c.pair(0, 1), c.pair(0, 2), dgrad,
                                wgrad);
    };
    // The gradient of a 1x1 convolution's input does not read that input, which dense_back_cpu then makes of
    // it.
    const Tensor dz = std::get<0>(first_back(features, c.dgrad[0], 0));
    auto [dvector0, dbias0] = dense_back_cpu(
        dz, features, tensors[kWeight0], tensors[kBias0], entries(mean, 0, c.channels),
        entries(var, 0, c.channels), channels(total, 0, c.channels), channels(grad, 0, c.channels),
        entries(factor, 0, c.channels), entries(offset, 0, c.channels), numbers[kEps0], c.eps_std[0] != 0,
        c.activation, numbers[kSlope], true);
    Tensor dweight0 = std::get<1>(first_back(dz, 0, c.wgrad[0]));
    return {dvector0, dbias0, std::move(dweight0), dvector1, dbias1, dweight1};
}

}  // namespace

/// Each layer's output is appended to `out`, its statistics to `mean` and `var`. Gives six tensors a layer: y
/// and z, the inner BatchNorm's input and its activated output (empty unless `keep` is 1 or 2), and its mean,
/// rstd, new_running_mean and new_running_var.
std::vector<Tensor> dense_layers_cpu(Tensor out, Tensor mean, Tensor var, std::vector<Tensor> tensors,
                                     std::vector<int64_t> code, std::vector<double> numbers, int64_t keep) {
    constexpr const char* kOp = "dense_layers_into";
    DL4DS_CHECK(keep >= 0 && keep <= 2, kOp, ": keep: expected 0, 1 or 2, got ", keep);
    std::vector<Tensor> made;
    for (const Layer& layer : decode(kOp, tensors, code, numbers)) {
        std::array<Tensor, 6> results = layer_forward(kOp, out, mean, var, layer);
        for (int64_t i = keep; i < 2; ++i) {
            results[i] = empty_vector_cpu(0, DType::kFloat32);
        }
        made.insert(made.end(), results.begin(), results.end());
    }
    return made;
}

/// The layers in the order in which their gradients are taken, the last one first. From `total`, the gradient
/// of all features, to `grad`: that plus the layers' parts (but for what is linear in the features, see
/// dense_back_cpu). `ys` as dense_layers_cpu gave them; the last two of a layer's `tensors` are its mean and
/// rstd. Gives the gradients of the first six of each.
std::vector<Tensor> dense_layers_back_cpu(Tensor total, Tensor grad, Tensor factor, Tensor offset, Tensor out,
                                          Tensor mean, Tensor var, std::vector<Tensor> ys,
                                          std::vector<Tensor> tensors, std::vector<int64_t> code,
                                          std::vector<double> numbers) {
    constexpr const char* kOp = "dense_layers_back_into";
    const std::vector<Layer> layers = decode(kOp, tensors, code, numbers);
    DL4DS_CHECK(layers[0].tensors.size() == kPlaces, kOp, ": tensors: expected the inner mean and rstd");
    DL4DS_CHECK(ys.size() == layers.size(), kOp, ": ys: expected one a layer, got ", ys.size(), " for ",
                layers.size());
    std::vector<Tensor> gradients;
    for (size_t i = 0; i < layers.size(); ++i) {
        const Tensor& before = i == 0 ? total : grad;
        for (Tensor& t : layer_back(kOp, before, grad, factor, offset, out, mean, var, ys[i], layers[i])) {
            gradients.push_back(std::move(t));
        }
    }
    return gradients;
}

STABLE_TORCH_LIBRARY_IMPL(dl4ds_kernels, CPU, m) {
    m.impl("dense_layers_into", TORCH_BOX(&dense_layers_cpu));
    m.impl("dense_layers_back_into", TORCH_BOX(&dense_layers_back_cpu));
}

}  // namespace dl4ds
