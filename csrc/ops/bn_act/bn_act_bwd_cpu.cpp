#include "common/cpu/isa.h"
#include "ops/bn_act/bn_act_host_cpu.h"
#include "ops/bn_act/bn_act_reduce_cpu.h"

namespace dl4ds {
namespace {

constexpr const char* kOp = "bn_act_bwd";

struct Backward {
    TensorInfo dout, x, weight, bias, mean, rstd, residual, mask;
    bool training;
    double eps, negative_slope;
    bool eps_std;
    Activation activation;
    bool need_dx, need_dparams, need_dresidual;

    bool needs_sums() const { return need_dparams || (need_dx && training); }
};

void check_arguments(const Backward& b) {
    check_batched(kOp, b.x);
    check_same_shape(kOp, "dout", b.dout, b.x);
    check_dtype(kOp, "dout", b.dout, b.x.dtype);
    check_same_device(kOp, "dout", b.dout, b.x);
    check_channel_vector(kOp, "weight", b.weight, b.x);
    check_channel_vector(kOp, "bias", b.bias, b.x);
    check_channel_vector(kOp, "mean", b.mean, b.x);
    check_channel_vector(kOp, "rstd", b.rstd, b.x);
    check_dtype(kOp, "mean", b.mean, acc_dtype(b.x.dtype));
    check_dtype(kOp, "rstd", b.rstd, acc_dtype(b.x.dtype));
    if (b.residual.present) {
        check_same_shape(kOp, "residual", b.residual, b.x);
        check_dtype(kOp, "residual", b.residual, b.x.dtype);
        check_same_device(kOp, "residual", b.residual, b.x);
    }
    if (b.mask.present) {
        check_dtype(kOp, "mask", b.mask, DType::kUInt8);
        check_same_device(kOp, "mask", b.mask, b.x);
        const int64_t bytes = (b.x.numel + 7) / 8;
        DL4DS_CHECK(b.mask.dim == 1 && b.mask.numel == bytes && (bytes <= 1 || b.mask.strides[0] == 1), kOp,
                    ": mask: expected shape (ceil(numel / 8),) = (", bytes, ",) without gaps, got ",
                    b.mask.shape());
        DL4DS_CHECK(activation_has_mask(b.activation), kOp, ": mask: expected None for activation ",
                    activation_name(b.activation));
    }
}

/// The channel arrays of the backward kernels.
enum Array { kMean, kScale, kShift, kFactorX, kOffset, kNumArrays };

template <typename T>
void set_constants(const Backward& b, ChannelArrays<T>& arrays, int64_t c) {
    arrays.array(kMean)[c] = channel_entry<T>(b.mean, c, T(0));
    arrays.array(kScale)[c] = channel_entry<T>(b.weight, c, T(1)) * channel_entry<T>(b.rstd, c, T(1));
    arrays.array(kShift)[c] = channel_entry<T>(b.bias, c, T(0));
    arrays.array(kFactorX)[c] = arrays.array(kOffset)[c] = T(0);
}

/// From a channel's sums to dx's constants (training) and the parameter gradients.
template <typename T>
void set_gradients(const Backward& b, ChannelArrays<T>& arrays, T* dweight, T* dbias, int64_t count,
                   int64_t c, double s1, double s2) {
    const double rstd = channel_entry<double>(b.rstd, c, 1.0);
    if (b.need_dparams) {
        dweight[c] = static_cast<T>(s2 * rstd);
        dbias[c] = static_cast<T>(s1);
    }
    if (b.training) {
        // dx = w rstd (dz - S1/n - (x - mean) k S2/n), k = rstd^2, or rstd/sigma with sigma = 1/rstd - eps.
        const double n = static_cast<double>(count);
        const double factor = channel_entry<double>(b.weight, c, 1.0) * rstd;
        double k = rstd * rstd;
        if (b.eps_std) {
            const double sigma = 1.0 / rstd - b.eps;
            k = sigma > 0 ? rstd / sigma
                          : 0.0;  // a constant channel: x - mean is zero, so is the term with k
        }
        arrays.array(kFactorX)[c] = static_cast<T>(-factor * k * s2 / n);
        arrays.array(kOffset)[c] = static_cast<T>(-factor * s1 / n);
    }
}

void apply_per_element(const BnPlan& plan, Activation act, const BnBwdArgs& whole) {
    const auto kernel = bn_kernels().bwd_apply[static_cast<int>(plan.dtype)][0][static_cast<int>(act)];
    const Blocks blocks = row_blocks(plan);
    const int64_t pitch = plan.outer_strides[plan.outer_dims - 1];
    parallel_for(blocks.count, 3 * plan.bytes(), [&](int64_t begin, int64_t end) {
        // From the last block to the first: the reduction left the end of the range in cache.
        for (int64_t block = end - 1; block >= begin; --block) {
            for_each_run(plan, blocks.begin(block), blocks.end(block),
                         [&](int64_t row, int64_t rows, int64_t x_at) {
                             kernel(bwd_rows(plan, whole, row * plan.len, x_at, rows, plan.len, pitch));
                         });
        }
    });
    if (plan.tail > 0) {
        const int64_t at = plan.rows * plan.len;
        kernel(bwd_rows(plan, whole, at, at, plan.tail, plan.channels, plan.channels));
    }
}

void apply_channel(const BnPlan& plan, Activation act, const BnBwdArgs& whole, int64_t c) {
    const auto kernel = bn_kernels().bwd_apply[static_cast<int>(plan.dtype)][1][static_cast<int>(act)];
    if (plan.single_plane_row()) {
        kernel(bwd_planes(plan, whole, -1, c));
        return;
    }
    for (int64_t n = 0; n < plan.n; ++n) {
        kernel(bwd_planes(plan, whole, n, c));
    }
}

/// Both passes over contiguous tensors: channel by channel where a channel stays in cache in between.
template <typename T>
void run_per_row(const Backward& b, const BnPlan& plan, const BnBwdArgs& whole, ChannelArrays<T>& arrays,
                 T* dweight, T* dbias) {
    const bool apply = b.need_dx || b.need_dresidual;
    const int64_t channel_bytes = 2 * plan.count() * dtype_size(plan.dtype);
    if (plan.channels >= 16 && (channel_bytes <= cache_sizes().l2_bytes || !apply)) {
        parallel_for(plan.channels, 5 * plan.bytes(), [&](int64_t begin, int64_t end) {
            for (int64_t c = begin; c < end; ++c) {
                if (b.needs_sums()) {
                    double s1 = 0, s2 = 0;
                    bn_bwd_reduce_channel(plan, b.activation, whole, c, s1, s2);
                    set_gradients<T>(b, arrays, dweight, dbias, plan.count(), c, s1, s2);
                }
                if (apply) {
                    apply_channel(plan, b.activation, whole, c);
                }
            }
        });
        return;
    }
    if (b.needs_sums()) {
        Scratch sums(2 * 8 * plan.channels);
        double* s1 = sums.as<double>();
        double* s2 = s1 + plan.channels;
        bn_bwd_reduce_all(plan, b.activation, whole, s1, s2);
        for (int64_t c = 0; c < plan.channels; ++c) {
            set_gradients<T>(b, arrays, dweight, dbias, plan.count(), c, s1[c], s2[c]);
        }
    }
    if (apply) {
        const auto kernel =
            bn_kernels().bwd_apply[static_cast<int>(plan.dtype)][1][static_cast<int>(b.activation)];
        parallel_for(plan.n * plan.channels, 3 * plan.bytes(), [&](int64_t begin, int64_t end) {
            for (int64_t plane = end - 1; plane >= begin; --plane) {
                kernel(bwd_planes(plan, whole, plane / plan.channels, plane % plan.channels));
            }
        });
    }
}

template <typename T>
void run(const Backward& b, const BnPlan& plan, BnBwdArgs whole, T* dweight, T* dbias) {
    ChannelArrays<T> arrays(plan, kNumArrays);
    for (int64_t c = 0; c < plan.channels; ++c) {
        set_constants<T>(b, arrays, c);
    }
    arrays.replicate(kFactorX);
    whole.mean = arrays.array(kMean);
    whole.scale = arrays.array(kScale);
    whole.shift = arrays.array(kShift);
    whole.factor_x = arrays.array(kFactorX);
    whole.offset = arrays.array(kOffset);
    if (plan.per_row && plan.numel > 0) {
        run_per_row<T>(b, plan, whole, arrays, dweight, dbias);
        return;
    }
    if (b.needs_sums()) {
        Scratch sums(2 * 8 * plan.channels);
        double* s1 = sums.as<double>();
        double* s2 = s1 + plan.channels;
        std::fill(s1, s1 + 2 * plan.channels, 0.0);
        if (plan.numel > 0) {
            bn_bwd_reduce_all(plan, b.activation, whole, s1, s2);
        }
        for (int64_t c = 0; c < plan.channels; ++c) {
            set_gradients<T>(b, arrays, dweight, dbias, std::max<int64_t>(1, plan.count()), c, s1[c], s2[c]);
        }
    }
    arrays.replicate(kNumArrays);
    if (plan.numel > 0 && (b.need_dx || b.need_dresidual)) {
        apply_per_element(plan, b.activation, whole);
    }
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor> bn_act_bwd_cpu(
    Tensor dout, Tensor x, std::optional<Tensor> weight, std::optional<Tensor> bias, Tensor mean, Tensor rstd,
    std::optional<Tensor> residual, std::optional<Tensor> mask, bool training, double eps, bool eps_std,
    int64_t activation, double negative_slope, bool need_dx, bool need_dparams, bool need_dresidual) {
    Backward b{tensor_info(dout),
               tensor_info(x),
               tensor_info(weight),
               tensor_info(bias),
               tensor_info(mean),
               tensor_info(rstd),
               tensor_info(residual),
               tensor_info(mask),
               training,
               eps,
               negative_slope,
               eps_std,
               activation_from_code(kOp, activation),
               need_dx,
               need_dparams,
               need_dresidual};
    check_arguments(b);
    const BnPlan plan = bn_plan_or_copy(x, b.x);
    const Tensor dout_dense = in_plan_order(dout, b.dout, plan);
    std::optional<Tensor> added;
    if (residual && !mask) {
        added = in_plan_order(*residual, b.residual, plan);
    }
    const auto strides = dense_strides(b.x.sizes, b.x.dim, plan.format);
    const auto like_x = [&](bool needed) {
        return needed ? empty_cpu(b.x.sizes, strides.data(), b.x.dim, b.x.dtype)
                      : empty_vector_cpu(0, b.x.dtype);
    };
    Tensor dx = like_x(need_dx), dresidual = like_x(need_dresidual);
    const DType acc = acc_dtype(b.x.dtype);
    Tensor dweight = empty_vector_cpu(need_dparams ? plan.channels : 0, acc);
    Tensor dbias = empty_vector_cpu(need_dparams ? plan.channels : 0, acc);

    BnBwdArgs whole{};
    whole.dout = tensor_info(dout_dense).data;
    whole.x = b.x.data;
    whole.residual = added ? tensor_info(*added).data : nullptr;
    whole.mask = mask ? b.mask.as<uint8_t>() : nullptr;
    whole.slope = negative_slope;
    whole.training = training;
    whole.dx = need_dx ? tensor_info(dx).data : nullptr;
    whole.dresidual = need_dresidual ? tensor_info(dresidual).data : nullptr;
    whole.streaming = use_streaming(plan.bytes());
    if (acc == DType::kFloat64) {
        run<double>(b, plan, whole, tensor_info(dweight).as<double>(), tensor_info(dbias).as<double>());
    } else {
        run<float>(b, plan, whole, tensor_info(dweight).as<float>(), tensor_info(dbias).as<float>());
    }
    return {dx, dweight, dbias, dresidual};
}

}  // namespace dl4ds
