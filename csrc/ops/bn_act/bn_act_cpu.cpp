#include <torch/csrc/stable/library.h>

#include "common/cpu/isa.h"
#include "ops/bn_act/bn_act_host_cpu.h"
#include "ops/bn_act/bn_act_reduce_cpu.h"

namespace dl4ds {
namespace {

constexpr const char* kOp = "bn_act";

struct Forward {
    TensorInfo x, weight, bias, running_mean, running_var, residual;
    bool training;
    double momentum, eps, negative_slope;
    bool eps_std;
    Activation activation;
};

void check_arguments(const Forward& f) {
    check_batched(kOp, f.x);
    check_channel_vector(kOp, "weight", f.weight, f.x);
    check_channel_vector(kOp, "bias", f.bias, f.x);
    check_channel_vector(kOp, "running_mean", f.running_mean, f.x);
    check_channel_vector(kOp, "running_var", f.running_var, f.x);
    const bool has_mean = f.running_mean.present, has_var = f.running_var.present;
    DL4DS_CHECK(has_mean == has_var, kOp, ": expected running_mean and running_var both given or both None");
    DL4DS_CHECK(f.training || has_mean, kOp, ": expected running statistics in eval mode, got None");
    if (f.residual.present) {
        check_same_shape(kOp, "residual", f.residual, f.x);
        check_dtype(kOp, "residual", f.residual, f.x.dtype);
        check_same_device(kOp, "residual", f.residual, f.x);
    }
}

/// Channel c's constants: scale = weight * rstd and shift = bias, rounded as the backward pass rounds them.
template <typename T>
void set_channel(ChannelArrays<T>& arrays, const TensorInfo& weight, const TensorInfo& bias, int64_t c,
                 T mean, T rstd) {
    arrays.array(0)[c] = mean;
    arrays.array(1)[c] = channel_entry<T>(weight, c, T(1)) * rstd;
    arrays.array(2)[c] = channel_entry<T>(bias, c, T(0));
}

/// What training mode computes of a channel besides `out`.
template <typename T>
struct TrainOutputs {
    T* mean;
    T* rstd;
    TensorInfo new_running_mean, new_running_var;
};

/// From a channel's moments to its constants, its outputs and its new running statistics.
template <typename T>
void finish_channel(const Forward& f, ChannelArrays<T>& arrays, const TrainOutputs<T>& outputs, int64_t count,
                    int64_t c, double mean, double m2) {
    const double n = static_cast<double>(count);
    const double var = m2 > 0 ? m2 / n : m2 * 0;  // never below zero by rounding; NaN stays NaN
    outputs.mean[c] = static_cast<T>(mean);
    outputs.rstd[c] = static_cast<T>(bn_rstd(var, f.eps, f.eps_std));
    set_channel<T>(arrays, f.weight, f.bias, c, outputs.mean[c], outputs.rstd[c]);
    if (f.running_mean.present) {
        const double keep = 1.0 - f.momentum;
        const double unbiased = var * (n / (n - 1.0));
        write_entry(outputs.new_running_mean, c,
                    keep * channel_entry<double>(f.running_mean, c, 0.0) + f.momentum * mean);
        write_entry(outputs.new_running_var, c,
                    keep * channel_entry<double>(f.running_var, c, 1.0) + f.momentum * unbiased);
    }
}

/// True if a channel's values of `tensors` tensors stay in a core's cache between the two passes of an op.
bool channel_fits_cache(const BnPlan& plan, int64_t tensors) {
    const int64_t channel_bytes = plan.count() * dtype_size(plan.dtype) * tensors;
    return channel_bytes <= cache_sizes().l2_bytes;
}

template <typename T>
void train(const Forward& f, const BnPlan& plan, BnApplyArgs apply, uint8_t* mask,
           const TrainOutputs<T>& outputs) {
    if (plan.numel == 0) {
        return;
    }
    ChannelArrays<T> arrays(plan, 3);
    apply.mean = arrays.array(0);
    apply.scale = arrays.array(1);
    apply.shift = arrays.array(2);
    const bool mask_fits = mask == nullptr || plan.spatial % 8 == 0;
    if (plan.per_row && mask_fits && plan.channels >= 16 && channel_fits_cache(plan, 1)) {
        parallel_for(plan.channels, 3 * plan.bytes(), [&](int64_t begin, int64_t end) {
            for (int64_t c = begin; c < end; ++c) {
                double mean = 0, m2 = 0;
                bn_stats_channel(plan, apply.x, c, mean, m2);
                finish_channel<T>(f, arrays, outputs, plan.count(), c, mean, m2);
                bn_apply_channel(plan, f.activation, apply, mask, c);
            }
        });
        return;
    }
    Scratch moments(2 * 8 * plan.channels);
    double* mean = moments.as<double>();
    double* m2 = mean + plan.channels;
    bn_stats_all(plan, apply.x, mean, m2);
    for (int64_t c = 0; c < plan.channels; ++c) {
        finish_channel<T>(f, arrays, outputs, plan.count(), c, mean[c], m2[c]);
    }
    arrays.replicate(3);
    bn_apply_all(plan, f.activation, apply, mask, /*backwards=*/true);
}

template <typename T>
void apply_eval(const BnPlan& plan, const BnEvalArgs& a) {
    if (plan.numel == 0) {
        return;
    }
    ChannelArrays<T> arrays(plan, 3);
    for (int64_t c = 0; c < plan.channels; ++c) {
        const T mean = channel_entry<T>(a.running_mean, c, T(0));
        const double var = channel_entry<double>(a.running_var, c, 1.0);
        set_channel<T>(arrays, a.weight, a.bias, c, mean, static_cast<T>(bn_rstd(var, a.eps, a.eps_std)));
    }
    arrays.replicate(3);
    BnApplyArgs p{};
    p.x = a.x;
    p.residual = a.residual;
    p.out = a.out;
    p.mean = arrays.array(0);
    p.scale = arrays.array(1);
    p.shift = arrays.array(2);
    p.slope = a.negative_slope;
    p.streaming = a.out != a.x && use_streaming(plan.bytes());
    bn_apply_all(plan, a.activation, p, a.mask, /*backwards=*/false);
}

template <typename T>
void run_training(const Forward& f, const BnPlan& plan, const void* residual, void* out, uint8_t* mask,
                  const Tensor& mean, const Tensor& rstd, const Tensor& new_mean, const Tensor& new_var) {
    BnApplyArgs apply{};
    apply.x = f.x.data;
    apply.residual = residual;
    apply.out = out;
    apply.slope = f.negative_slope;
    apply.streaming = use_streaming(plan.bytes());
    const TrainOutputs<T> outputs{tensor_info(mean).as<T>(), tensor_info(rstd).as<T>(), tensor_info(new_mean),
                                  tensor_info(new_var)};
    train<T>(f, plan, apply, mask, outputs);
}

}  // namespace

void bn_apply_eval(const BnPlan& plan, const BnEvalArgs& args) {
    if (plan.dtype == DType::kFloat64) {
        apply_eval<double>(plan, args);
    } else {
        apply_eval<float>(plan, args);
    }
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> bn_act_fwd_cpu(
    Tensor x, std::optional<Tensor> weight, std::optional<Tensor> bias, std::optional<Tensor> running_mean,
    std::optional<Tensor> running_var, std::optional<Tensor> residual, bool training, double momentum,
    double eps, bool eps_std, int64_t activation, double negative_slope, bool save_mask) {
    Forward f{tensor_info(x),
              tensor_info(weight),
              tensor_info(bias),
              tensor_info(running_mean),
              tensor_info(running_var),
              tensor_info(residual),
              training,
              momentum,
              eps,
              negative_slope,
              eps_std,
              activation_from_code(kOp, activation)};
    check_arguments(f);
    const BnPlan plan = bn_plan_or_copy(x, f.x);
    std::optional<Tensor> added;
    if (residual) {
        added = in_plan_order(*residual, f.residual, plan);
    }
    const void* added_data = added ? tensor_info(*added).data : nullptr;

    Tensor out =
        empty_cpu(f.x.sizes, dense_strides(f.x.sizes, f.x.dim, plan.format).data(), f.x.dim, f.x.dtype);
    const bool with_mask = save_mask && residual && activation_has_mask(f.activation);
    Tensor mask = empty_vector_cpu(with_mask ? (plan.numel + 7) / 8 : 0, DType::kUInt8);
    uint8_t* mask_data = with_mask ? tensor_info(mask).as<uint8_t>() : nullptr;
    void* out_data = tensor_info(out).data;

    const DType acc = acc_dtype(f.x.dtype);
    const int64_t channels = training ? plan.channels : 0;
    const int64_t running = training && running_mean ? plan.channels : 0;
    Tensor mean = empty_vector_cpu(channels, acc), rstd = empty_vector_cpu(channels, acc);
    Tensor new_mean = empty_vector_cpu(running, running_mean ? f.running_mean.dtype : acc);
    Tensor new_var = empty_vector_cpu(running, running_var ? f.running_var.dtype : acc);
    if (!training) {
        bn_apply_eval(plan, {f.x.data, added_data, out_data, mask_data, f.weight, f.bias, f.running_mean,
                             f.running_var, eps, eps_std, f.activation, negative_slope});
    } else if (acc == DType::kFloat64) {
        run_training<double>(f, plan, added_data, out_data, mask_data, mean, rstd, new_mean, new_var);
    } else {
        run_training<float>(f, plan, added_data, out_data, mask_data, mean, rstd, new_mean, new_var);
    }
    return {out, mean, rstd, mask, new_mean, new_var};
}

Tensor bn_act_again_cpu(const Tensor& y, const std::optional<Tensor>& weight,
                        const std::optional<Tensor>& bias, const Tensor& mean, const Tensor& rstd,
                        int64_t activation, double negative_slope) {
    const TensorInfo yi = tensor_info(y), ri = tensor_info(rstd), wi = tensor_info(weight);
    check_batched(kOp, yi);
    check_channel_vector(kOp, "weight", wi, yi);
    check_channel_vector(kOp, "rstd", ri, yi);
    const DType acc = acc_dtype(yi.dtype);
    check_dtype(kOp, "rstd", ri, acc);
    const Tensor scale = empty_vector_cpu(ri.numel, acc), ones = empty_vector_cpu(ri.numel, acc);
    const auto fill = [&](auto one) {
        using T = decltype(one);
        T *const product = tensor_info(scale).as<T>(), *const var = tensor_info(ones).as<T>();
        for (int64_t c = 0; c < ri.numel; ++c) {
            product[c] = channel_entry<T>(wi, c, one) * channel_entry<T>(ri, c, one);
            var[c] = one;
        }
    };
    acc == DType::kFloat64 ? fill(1.0) : fill(1.0f);
    return std::get<0>(bn_act_fwd_cpu(y, scale, bias, mean, ones, std::nullopt, false, 0.0, 0.0, false,
                                      activation, negative_slope, false));
}

STABLE_TORCH_LIBRARY_IMPL(dl4ds_kernels, CPU, m) {
    m.impl("bn_act", TORCH_BOX(&bn_act_fwd_cpu));
    m.impl("bn_act_bwd", TORCH_BOX(&bn_act_bwd_cpu));
}

}  // namespace dl4ds
