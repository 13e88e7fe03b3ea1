// Eval-mode act(bn(x)) into a slice of channels of a larger channels_last buffer, x perhaps such a slice
// itself: how the parts of a concatenation are written where they belong. The rows are pixels, all `pitch`
// apart.
#include <torch/csrc/stable/library.h>

#include "common/cpu/isa.h"
#include "ops/bn_act/bn_act_host_cpu.h"

namespace dl4ds {
namespace {

constexpr const char* kOp = "bn_act_into";
constexpr int64_t kBlockBytes = 128 << 10;

struct Into {
    TensorInfo x, out, weight, bias, mean, var;
    double eps, negative_slope;
    bool eps_std;
    Activation activation;
};

template <typename T>
void apply(const Into& f, int64_t x_pitch, int64_t out_pitch) {
    BnPlan plan;
    plan.dtype = f.x.dtype;
    plan.channels = plan.len = f.x.sizes[1];
    ChannelArrays<T> arrays(plan, 3);
    for (int64_t c = 0; c < plan.channels; ++c) {
        const double rstd = bn_rstd(channel_entry<double>(f.var, c, 1.0), f.eps, f.eps_std);
        arrays.array(0)[c] = channel_entry<T>(f.mean, c, T(0));
        arrays.array(1)[c] = channel_entry<T>(f.weight, c, T(1)) * static_cast<T>(rstd);
        arrays.array(2)[c] = channel_entry<T>(f.bias, c, T(0));
    }
    arrays.replicate(3);
    const int64_t size = dtype_size(plan.dtype), pixels = f.x.numel / plan.channels;
    const Blocks blocks = fixed_blocks(pixels, plan.channels * size, kBlockBytes, 1, int64_t{1} << 40);
    const auto kernel = bn_kernels().apply[static_cast<int>(plan.dtype)][0][static_cast<int>(f.activation)];
    parallel_for(blocks.count, 2 * f.x.numel * size, [&](int64_t first, int64_t last) {
        const int64_t begin = blocks.begin(first);
        BnApplyArgs p{};
        p.x = byte_offset(static_cast<const void*>(f.x.data), begin * x_pitch * size);
        p.out = byte_offset(f.out.data, begin * out_pitch * size);
        p.rows = blocks.end(last - 1) - begin;
        p.len = plan.channels;
        p.x_pitch = x_pitch;
        p.pitch = out_pitch;
        p.mean = arrays.array(0);
        p.scale = arrays.array(1);
        p.shift = arrays.array(2);
        p.slope = f.negative_slope;
        kernel(p);
    });
}

}  // namespace

void bn_act_into_cpu(Tensor x, std::optional<Tensor> weight, std::optional<Tensor> bias, Tensor running_mean,
                     Tensor running_var, Tensor out, double eps, bool eps_std, int64_t activation,
                     double negative_slope) {
    Into f{tensor_info(x),
           tensor_info(out),
           tensor_info(weight),
           tensor_info(bias),
           tensor_info(running_mean),
           tensor_info(running_var),
           eps,
           negative_slope,
           eps_std,
           activation_from_code(kOp, activation)};
    check_batched(kOp, f.x);
    check_same_shape(kOp, "out", f.out, f.x);
    check_dtype(kOp, "out", f.out, f.x.dtype);
    check_same_device(kOp, "out", f.out, f.x);
    check_channel_vector(kOp, "weight", f.weight, f.x);
    check_channel_vector(kOp, "bias", f.bias, f.x);
    check_channel_vector(kOp, "running_mean", f.mean, f.x);
    check_channel_vector(kOp, "running_var", f.var, f.x);
    if (f.x.numel == 0) {
        return;
    }
    const int64_t out_pitch = pixel_pitch(f.out);
    DL4DS_CHECK(out_pitch >= f.x.sizes[1], kOp, ": out: expected channels_last, or a slice of its channels");
    if (pixel_pitch(f.x) == 0) {
        x = copy_with_strides(x, f.x, dense_strides(f.x.sizes, f.x.dim, Format::kChannelsLast).data());
        f.x = tensor_info(x);
    }
    if (f.x.dtype == DType::kFloat64) {
        apply<double>(f, pixel_pitch(f.x), out_pitch);
    } else {
        apply<float>(f, pixel_pitch(f.x), out_pitch);
    }
}

STABLE_TORCH_LIBRARY_IMPL(dl4ds_kernels, CPU, m) { m.impl("bn_act_into", TORCH_BOX(&bn_act_into_cpu)); }

}  // namespace dl4ds
