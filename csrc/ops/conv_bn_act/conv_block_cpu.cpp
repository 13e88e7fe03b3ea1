// A post-activation residual block's training step in one call each way: the calls that
// dl4ds_kernels/ops/residual_block.py and _block_gradient.py would make one by one, in the same order and
// with the same bits. Between two of them Python and the dispatcher, with caches that a convolution has just
// emptied, cost as much as a small layer's kernel (as for conv_chain and dense_layers). The block's threads
// stay together from its first loop to its last, and what the shortcut adds to the gradient of the block's
// input is added where the first convolution writes its own.
#include <torch/csrc/stable/library.h>

#include "ops/bn_act/bn_act_pair_cpu.h"
#include "ops/conv_bn_act/conv_step_cpu.h"

namespace dl4ds {
namespace {

constexpr const char* kForward = "residual_step";
constexpr const char* kBackward = "residual_step_bwd";

enum Shortcut { kNoShortcut, kIdentity, kProjection };

/// The ints of `code`: this, then a ConvCode for each convolution, the projection's behind the branch's.
struct Header {
    int64_t convs;  // of the branch
    int64_t shortcut, activation;
    int64_t keep_last, keep_projection;  // whether their outputs are kept; they are computed again if not
};
struct ConvCode {
    int64_t eps_std, tracks;        // of its BatchNorm; tracks: there are running statistics
    int64_t forward, dgrad, wgrad;  // algorithms, 0: the library's
    int64_t stride[2], padding[2], dilation[2];
};
/// The doubles of `numbers`: the slope, then momentum and eps of each BatchNorm.
constexpr size_t kHeader = sizeof(Header) / sizeof(int64_t), kConv = sizeof(ConvCode) / sizeof(int64_t);

/// A convolution and the BatchNorm behind it.
struct Layer {
    ConvCode code;
    double momentum, eps;
    Tensor weight, bn_weight, bn_bias;
    std::vector<Tensor> rest;  // forward: the running statistics if any; backward: y, mean and rstd

    Convolution convolution() const {
        const auto pair = [](const int64_t* v) { return std::vector<int64_t>{v[0], v[1]}; };
        return {pair(code.stride), pair(code.padding), pair(code.dilation), 1};
    }
    std::optional<Tensor> running(size_t which) const {
        return code.tracks != 0 ? std::optional<Tensor>(rest[which]) : std::nullopt;
    }
    const Tensor& y() const { return rest[0]; }
    const Tensor& mean() const { return rest[1]; }
    const Tensor& rstd() const { return rest[2]; }
};

struct Block {
    Header header;
    double slope;
    std::vector<Layer> branch;
    std::optional<Layer> projection;

    int64_t act() const { return header.activation; }
    bool has_mask() const { return activation_has_mask(static_cast<Activation>(header.activation)); }
    bool adds() const { return header.shortcut != kNoShortcut; }

    /// Whether every convolution's algorithms are ours: the library's run on the leader of a team alone.
    template <typename... Algorithm>
    bool is_ours(Algorithm ConvCode::*... passes) const {
        const auto ours = [&](const Layer& layer) { return ((layer.code.*passes != 0) && ...); };
        return std::all_of(branch.begin(), branch.end(), ours) && (!projection || ours(*projection));
    }
};

/// What the lists of a call hold. backward: `tensors` has y, mean and rstd of each layer, where the forward
/// pass has running statistics.
Block decode(const char* op, const std::vector<Tensor>& tensors, const std::vector<int64_t>& code,
             const std::vector<double>& numbers, bool backward) {
    DL4DS_CHECK(code.size() >= kHeader, op, ": code: expected at least ", kHeader, " integers, got ",
                code.size());
    Block block{};
    std::copy_n(code.begin(), kHeader, reinterpret_cast<int64_t*>(&block.header));
    const bool projects = block.header.shortcut == kProjection;
    const size_t convs = static_cast<size_t>(block.header.convs), count = convs + (projects ? 1 : 0);
    DL4DS_CHECK(block.header.convs > 0 && code.size() == kHeader + count * kConv, op, ": code: expected ",
                kConv, " integers for each of ", count, " convolutions behind ", kHeader, ", got ",
                code.size());
    DL4DS_CHECK(numbers.size() == 1 + 2 * count, op, ": numbers: expected ", 1 + 2 * count, ", got ",
                numbers.size());
    const Activation activation = activation_from_code(op, block.header.activation);
    DL4DS_CHECK(activation == Activation::kNone || activation_has_mask(activation), op,
                ": activation: expected none, relu, leaky_relu or relu6, got ", activation_name(activation));
    block.slope = numbers[0];
    auto next = tensors.begin();
    for (size_t i = 0; i < count; ++i) {
        ConvCode own{};
        std::copy_n(code.begin() + kHeader + i * kConv, kConv, reinterpret_cast<int64_t*>(&own));
        const int64_t places = 3 + (backward ? 3 : own.tracks != 0 ? 2 : 0);
        DL4DS_CHECK(tensors.end() - next >= places, op, ": tensors: expected ", places, " for convolution ",
                    i, ", got ", tensors.end() - next);
        Layer layer{own,     numbers[1 + 2 * i],       numbers[2 + 2 * i], next[0], next[1],
                    next[2], {next + 3, next + places}};
        next += places;
        if (i < convs) {
            block.branch.push_back(std::move(layer));
        } else {
            block.projection = std::move(layer);
        }
    }
    DL4DS_CHECK(next == tensors.end(), op, ": tensors: expected ", next - tensors.begin(), ", got ",
                tensors.size());
    return block;
}

Tensor convolve(const Tensor& x, const Layer& layer) {
    Convolution conv = layer.convolution();
    if (layer.code.forward != 0) {
        return conv2d_exact(x, layer.weight, std::nullopt, std::move(conv.stride), std::move(conv.padding),
                            std::move(conv.dilation), layer.code.forward);
    }
    return library_convolution(x, layer.weight, std::nullopt, conv);
}

/// dx plus `added` unless that is null, and dweight; see conv_gradients.
std::tuple<Tensor, Tensor> convolve_back(const Tensor& dy, const Tensor& x, const Layer& layer,
                                         const Tensor* added, bool added_is_dead) {
    return conv_gradients(dy, x, layer.weight, layer.convolution(),
                          static_cast<ConvAlgorithm>(layer.code.dgrad),
                          static_cast<ConvAlgorithm>(layer.code.wgrad), added, added_is_dead);
}

/// What a layer gives besides the activation: y, mean, rstd and the new running statistics.
using Kept = std::array<Tensor, 5>;

Kept normed(const Tensor& x, const Layer& layer) {
    Tensor y = convolve(x, layer);
    auto [mean, rstd, new_mean, new_var] = bn_stats_cpu(y, layer.running(0), layer.running(1), layer.momentum,
                                                        layer.eps, layer.code.eps_std != 0);
    return {std::move(y), mean, rstd, new_mean, new_var};
}

Tensor empty() { return empty_vector_cpu(0, DType::kFloat32); }

struct Forward {
    Tensor out, mask;
    std::vector<Kept> kept;
};

Forward forward(const Block& b, const Tensor& x, bool save) {
    Forward f{x, empty_vector_cpu(0, DType::kUInt8), {}};
    const auto layer = [&](const Tensor& z, const Layer& l, const std::optional<Tensor>& residual) {
        Tensor y = convolve(z, l);
        auto [out, mean, rstd, mask, new_mean, new_var] =
            bn_act_fwd_cpu(y, l.bn_weight, l.bn_bias, l.running(0), l.running(1), residual, true, l.momentum,
                           l.eps, l.code.eps_std != 0, b.act(), b.slope, save && residual && b.has_mask());
        f.out = out, f.mask = mask;
        f.kept.push_back({std::move(y), mean, rstd, new_mean, new_var});
    };
    const size_t last = b.branch.size() - 1;
    for (size_t i = 0; i < last; ++i) {
        layer(f.out, b.branch[i], std::nullopt);
        if (!save) {
            f.kept.back()[0] = empty();
        }
    }
    if (!b.projection) {
        layer(f.out, b.branch[last], b.adds() ? std::optional<Tensor>(x) : std::nullopt);
    } else {
        Kept projected = normed(x, *b.projection);
        f.kept.push_back(normed(f.out, b.branch[last]));
        const Kept& end = f.kept.back();
        const Layer &l = b.branch[last], &p = *b.projection;
        std::tie(f.out, f.mask) =
            bn_act_pair_cpu(end[0], end[1], end[2], l.bn_weight, l.bn_bias, projected[0], projected[1],
                            projected[2], p.bn_weight, p.bn_bias, b.act(), b.slope, save && b.has_mask());
        f.kept.push_back(std::move(projected));
    }
    if (!save || b.header.keep_last == 0) {
        f.kept[last][0] = empty();
    }
    if (b.projection && (!save || b.header.keep_projection == 0)) {
        f.kept.back()[0] = empty();
    }
    return f;
}

/// dweight, bn_dweight and bn_dbias of a layer.
using Gradients = std::array<Tensor, 3>;

/// The gradient of x, then the layers'.
Tensor backward(const Block& b, const Tensor& dout, const Tensor& mask, const Tensor& x,
                std::vector<Gradients>& gradients) {
    const size_t last = b.branch.size() - 1;
    const auto input_of = [&](size_t i) {
        if (i == 0) {
            return x;
        }
        const Layer& l = b.branch[i - 1];
        return bn_act_again_cpu(l.y(), l.bn_weight, l.bn_bias, l.mean(), l.rstd(), b.act(), b.slope);
    };
    const auto normalise_back = [&](const Tensor& dz, const Tensor& y, const Layer& l,
                                    const std::optional<Tensor>& bits, bool need_residual, Gradients& own) {
        Tensor dy = dz, dresidual = dz;
        std::tie(dy, own[1], own[2], dresidual) =
            bn_act_bwd_cpu(dz, y, l.bn_weight, l.bn_bias, l.mean(), l.rstd(), std::nullopt, bits, true, l.eps,
                           l.code.eps_std != 0, b.act(), b.slope, true, true, need_residual);
        return std::pair{std::move(dy), std::move(dresidual)};
    };
    const std::optional<Tensor> bits = tensor_info(mask).numel > 0 ? std::optional(mask) : std::nullopt;
    DL4DS_CHECK(bits.has_value() == (b.adds() && b.has_mask()), kBackward,
                ": mask: expected one of an activation behind a sum, and none else");
    const Layer& end = b.branch[last];
    const bool passes = !b.projection && b.act() == 0;  // the shortcut's gradient is dout itself
    std::optional<Tensor> z, added;
    Tensor dy = dout, y = end.y();
    if (tensor_info(y).numel == 0) {
        z = input_of(last);
        y = convolve(*z, end);
    }
    if (b.projection) {
        const Layer& p = *b.projection;
        Gradients &own = gradients[last], &others = gradients[last + 1];
        Tensor dprojected = dout;
        const Tensor projected = tensor_info(p.y()).numel > 0 ? p.y() : convolve(x, p);
        std::tie(dy, dprojected, own[1], own[2], others[1]) =
            bn_act_pair_bwd_cpu(dout, bits, b.act(), b.slope, y, end.bn_weight, end.mean(), end.rstd(),
                                end.eps, end.code.eps_std != 0, projected, p.bn_weight, p.mean(), p.rstd(),
                                p.eps, p.code.eps_std != 0, std::nullopt, std::nullopt, std::nullopt);
        const TensorInfo sum = tensor_info(own[2]);
        others[2] = empty_vector_cpu(sum.numel, sum.dtype);  // no result is another
        std::copy_n(sum.as<float>(), sum.numel, tensor_info(others[2]).as<float>());
        std::tie(added, others[0]) = convolve_back(dprojected, x, p, nullptr, false);
        added = dense_channels_last(*added, tensor_info(added));
    } else {
        std::tie(dy, added) = normalise_back(dout, y, end, bits, b.adds() && !passes, gradients[last]);
        if (!b.adds()) {
            added.reset();
        } else if (passes) {
            added = dense_channels_last(dout, tensor_info(dout));
        }
    }
    y = empty();
    for (size_t i = last + 1; i-- > 0;) {
        const Layer& l = b.branch[i];
        if (!z) {
            z = input_of(i);
        }
        Tensor dz = dy;
        std::tie(dz, gradients[i][0]) =
            convolve_back(dy, *z, l, i == 0 && added ? &*added : nullptr, !passes);
        z.reset();
        if (i == 0) {
            return dz;
        }
        const Layer& before = b.branch[i - 1];
        dy = normalise_back(dz, before.y(), before, std::nullopt, false, gradients[i - 1]).first;
    }
    return dy;
}

}  // namespace

/// out, the mask of its activation (empty unless `save`), then of each layer y (empty where it is not kept),
/// mean, rstd, new_running_mean and new_running_var. `tensors`: of each layer the convolution's weight, the
/// BatchNorm's weight and bias, and its running statistics if it tracks them.
std::vector<Tensor> residual_step_cpu(Tensor x, std::vector<Tensor> tensors, std::vector<int64_t> code,
                                      std::vector<double> numbers, bool save) {
    const Block block = decode(kForward, tensors, code, numbers, false);
    std::optional<Forward> f;
    const auto run = [&] { f = forward(block, x, save); };
    with_team(block.is_ours(&ConvCode::forward) ? num_threads() : 1, run);
    std::vector<Tensor> results{f->out, f->mask};
    for (Kept& kept : f->kept) {
        std::move(kept.begin(), kept.end(), std::back_inserter(results));
    }
    return results;
}

/// The gradient of x, then of each layer those of the convolution's weight and of the BatchNorm's weight and
/// bias. The last three of a layer's `tensors` are its y (empty: computed again), mean and rstd.
std::vector<Tensor> residual_step_bwd_cpu(Tensor dout, Tensor mask, Tensor x, std::vector<Tensor> tensors,
                                          std::vector<int64_t> code, std::vector<double> numbers) {
    const Block block = decode(kBackward, tensors, code, numbers, true);
    std::vector<Gradients> gradients(block.branch.size() + (block.projection ? 1 : 0),
                                     {empty(), empty(), empty()});
    std::vector<Tensor> results;
    const auto run = [&] { results.push_back(backward(block, dout, mask, x, gradients)); };
    try {
        with_team(block.is_ours(&ConvCode::forward, &ConvCode::dgrad, &ConvCode::wgrad) ? num_threads() : 1,
                  run);
    } catch (const NeedsPool&) {  // a value that is not finite: each step then has the pool to itself
        run();
    }
    for (Gradients& own : gradients) {
        std::move(own.begin(), own.end(), std::back_inserter(results));
    }
    return results;
}

STABLE_TORCH_LIBRARY_IMPL(dl4ds_kernels, CPU, m) {
    m.impl("residual_step", TORCH_BOX(&residual_step_cpu));
    m.impl("residual_step_bwd", TORCH_BOX(&residual_step_bwd_cpu));
}

}  // namespace dl4ds
