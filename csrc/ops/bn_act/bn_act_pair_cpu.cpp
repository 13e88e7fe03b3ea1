// bn_stats and bn_act_pair on the CPU. The contracts are in dl4ds_kernels/ops/_bn_act_pair.py.
#include "ops/bn_act/bn_act_pair_cpu.h"

#include <torch/csrc/stable/library.h>

#include "ops/bn_act/bn_act_reduce_cpu.h"

namespace dl4ds {
namespace {

constexpr const char* kStatsOp = "bn_stats";
constexpr const char* kOp = "bn_act_pair";

struct Forward {
    TensorInfo x, residual;
    PairNorm norm, residual_norm;
    Activation activation;
    double negative_slope;
};

template <typename T>
void run_forward(const Forward& f, const BnPlan& plan, void* out, uint8_t* mask) {
    ChannelArrays<T> arrays(plan, 6);
    set_constants<T>(arrays, 0, f.norm, plan.channels);
    set_constants<T>(arrays, 3, f.residual_norm, plan.channels);
    arrays.replicate(6);
    const int dtype = static_cast<int>(plan.dtype), per_row = plan.per_row ? 1 : 0;
    const int64_t size = dtype_size(plan.dtype);
    const auto normalise = bn_kernels().apply[dtype][per_row][static_cast<int>(Activation::kNone)];
    const auto add = bn_kernels().apply[dtype][per_row][static_cast<int>(f.activation)];
    const bool streaming = use_streaming(plan.bytes());
    struct State {
        BitWriter bits;
        Scratch memory;
        State(uint8_t* to, int64_t bytes) : bits{to}, memory(bytes) {}
    };
    const int64_t longest = plan.per_row ? 1 : std::max(plan.len, plan.tail * plan.channels);
    const int64_t bytes = std::max(kPieceBytes, 8 * longest * size);
    for_each_piece<State>(
        plan, 3, [&](int64_t at) { return State(mask == nullptr ? nullptr : mask + at / 8, bytes); },
        [&](State& state, const Piece& piece) {
            const auto arguments = [&](int64_t first, const void* from) {
                BnApplyArgs p{};
                p.x = byte_offset(from, piece.at * size);
                p.rows = piece.rows;
                p.len = p.x_pitch = p.pitch = piece.len;
                p.mean = arrays.array(first) + piece.c;
                p.scale = arrays.array(first + 1) + piece.c;
                p.shift = arrays.array(first + 2) + piece.c;
                p.slope = f.negative_slope;
                return p;
            };
            BnApplyArgs p = arguments(3, f.residual.data);
            p.out = state.memory.template as<void>();
            normalise(p);
            BnApplyArgs q = arguments(0, f.x.data);
            q.residual = p.out;
            q.out = byte_offset(out, piece.at * size);
            q.mask = mask == nullptr ? nullptr : &state.bits;
            q.streaming = streaming;
            add(q);
        },
        [&](State& state) { state.bits.finish(); });
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor> bn_stats_cpu(Tensor x, std::optional<Tensor> running_mean,
                                                        std::optional<Tensor> running_var, double momentum,
                                                        double eps, bool eps_std) {
    TensorInfo xi = tensor_info(x);
    const TensorInfo rm = tensor_info(running_mean), rv = tensor_info(running_var);
    check_batched(kStatsOp, xi);
    check_channel_vector(kStatsOp, "running_mean", rm, xi);
    check_channel_vector(kStatsOp, "running_var", rv, xi);
    DL4DS_CHECK(rm.present == rv.present, kStatsOp,
                ": expected running_mean and running_var both given or both None");
    const BnPlan plan = bn_plan_or_copy(x, xi);
    const DType acc = acc_dtype(xi.dtype);
    const int64_t running = rm.present ? plan.channels : 0;
    const Tensor mean = empty_vector_cpu(plan.channels, acc), rstd = empty_vector_cpu(plan.channels, acc);
    const Tensor new_mean = empty_vector_cpu(running, rm.present ? rm.dtype : acc);
    const Tensor new_var = empty_vector_cpu(running, rv.present ? rv.dtype : acc);
    const TensorInfo out[4] = {tensor_info(mean), tensor_info(rstd), tensor_info(new_mean),
                               tensor_info(new_var)};
    if (plan.numel > 0) {
        Scratch moments(2 * 8 * plan.channels);
        double* means = moments.as<double>();
        double* m2 = means + plan.channels;
        bn_stats_all(plan, xi.data, means, m2);
        const double n = static_cast<double>(plan.count());
        for (int64_t c = 0; c < plan.channels; ++c) {
            const double var = m2[c] > 0 ? m2[c] / n : m2[c] * 0;  // as in bn_act_cpu.cpp
            write_entry(out[0], c, means[c]);
            write_entry(out[1], c, bn_rstd(var, eps, eps_std));
            if (rm.present) {
                write_entry(out[2], c,
                            (1.0 - momentum) * channel_entry<double>(rm, c, 0.0) + momentum * means[c]);
                write_entry(out[3], c,
                            (1.0 - momentum) * channel_entry<double>(rv, c, 1.0) +
                                momentum * (var * (n / (n - 1.0))));
            }
        }
    }
    return {mean, rstd, new_mean, new_var};
}

std::tuple<Tensor, Tensor> bn_act_pair_cpu(Tensor x, Tensor mean, Tensor rstd, std::optional<Tensor> weight,
                                           std::optional<Tensor> bias, Tensor residual, Tensor residual_mean,
                                           Tensor residual_rstd, std::optional<Tensor> residual_weight,
                                           std::optional<Tensor> residual_bias, int64_t activation,
                                           double negative_slope, bool save_mask) {
    Forward f{tensor_info(x), tensor_info(residual), {}, {}, linear_activation(kOp, activation),
              negative_slope};
    f.norm = {tensor_info(mean), tensor_info(rstd), tensor_info(weight), tensor_info(bias)};
    f.residual_norm = {tensor_info(residual_mean), tensor_info(residual_rstd), tensor_info(residual_weight),
                       tensor_info(residual_bias)};
    check_batched(kOp, f.x);
    check_map(kOp, "residual", f.residual, f.x);
    check_norm(kOp, "", f.norm, f.x);
    check_norm(kOp, "residual_", f.residual_norm, f.x);
    const BnPlan plan = dense_plan(x, f.x);
    const Tensor added = in_plan_order(residual, f.residual, plan);
    f.residual = tensor_info(added);
    Tensor out =
        empty_cpu(f.x.sizes, dense_strides(f.x.sizes, f.x.dim, plan.format).data(), f.x.dim, f.x.dtype);
    const bool with_mask = save_mask && activation_has_mask(f.activation);
    Tensor mask = empty_vector_cpu(with_mask ? (plan.numel + 7) / 8 : 0, DType::kUInt8);
    uint8_t* bits = with_mask ? tensor_info(mask).as<uint8_t>() : nullptr;
    if (plan.numel > 0) {
        const auto run = plan.dtype == DType::kFloat64 ? run_forward<double> : run_forward<float>;
        run(f, plan, tensor_info(out).data, bits);
    }
    return {out, mask};
}

STABLE_TORCH_LIBRARY_IMPL(dl4ds_kernels, CPU, m) {
    m.impl("bn_stats", TORCH_BOX(&bn_stats_cpu));
    m.impl("bn_act_pair", TORCH_BOX(&bn_act_pair_cpu));
    m.impl("bn_act_pair_bwd", TORCH_BOX(&bn_act_pair_bwd_cpu));
}

}  // namespace dl4ds
