// conv_bn_act_dgrad_bwd on CUDA: the input's gradient of a stride-1 convolution with another gradient added
// and the sums of the BatchNorm in front; and the question whether it pays, which the Python side asks before
// it schedules a backward pass. The op contract is in dl4ds_kernels/ops/_conv_dgrad.py.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "ops/bn_act/bn_act.h"
#include "ops/bn_act/bn_act_pair.h"
#include "ops/conv_bn_act/conv_bn_act_cuda.h"
#include "ops/conv_bn_act/conv_bn_act_dgrad.h"
#include "ops/conv_bn_act/conv_dgrad_plan.h"

namespace dl4ds {
namespace {

constexpr const char* kOp = "conv_bn_act_dgrad";

/// Sizes of the gradient as a forward convolution; false where they do not fit each other.
bool sizes_of(ConvBnActDgradParams& d, const TensorInfo& weight, DType dtype, int64_t batch,
              const std::vector<int64_t>& size, const std::vector<int64_t>& padding,
              const std::vector<int64_t>& dilation) {
    ConvBnActFwdParams& p = d.conv;
    if (weight.dim != 4 || size.size() != 2 || padding.size() != 2 || dilation.size() != 2) {
        return false;
    }
    p.dtype = dtype;
    p.tile = ConvTile::k64x64;
    p.batch = batch, p.channels = weight.sizes[0], p.channels_out = weight.sizes[1];
    p.kernel_h = weight.sizes[2], p.kernel_w = weight.sizes[3];
    p.dilation_h = dilation[0], p.dilation_w = dilation[1];
    p.height_out = size[0], p.width_out = size[1];
    p.height = size[0] + 2 * padding[0] - dilation[0] * (p.kernel_h - 1);
    p.width = size[1] + 2 * padding[1] - dilation[1] * (p.kernel_w - 1);
    p.pad_h = dilation[0] * (p.kernel_h - 1) - padding[0];
    p.pad_w = dilation[1] * (p.kernel_w - 1) - padding[1];
    p.x_stride_w = p.channels, p.x_stride_h = p.width * p.x_stride_w, p.x_stride_n = p.height * p.x_stride_h;
    return p.height > 0 && p.width > 0 && padding[0] >= 0 && padding[1] >= 0;
}

void choose(ConvRoute& route, const ConvBnActDgradParams& d, int architecture, const DgradWork& work) {
    const ConvBnActFwdParams& p = d.conv;
    route.choice = choose_dgrad(architecture, p.dtype, p.batch * p.height_out * p.width_out, p.channels_out,
                                p.channels, p.kernel_h * p.kernel_w, p.batch * p.height * p.width, work);
}

/// An operand of the gradient's shape, dense channels last on a 16-byte boundary.
Operand dense_map(const char* name, const std::optional<Tensor>& t, const TensorInfo& like,
                  const int64_t* sizes) {
    Operand map(t);
    if (map.info.present) {
        bool fits = map.info.dim == 4;
        for (int64_t i = 0; fits && i < 4; ++i) {
            fits = map.info.sizes[i] == sizes[i];
        }
        DL4DS_CHECK(fits, kOp, ": ", name, ": expected shape (", sizes[0], ", ", sizes[1], ", ", sizes[2],
                    ", ", sizes[3], "), got ", map.info.shape());
        check_dtype(kOp, name, map.info, like.dtype);
        check_same_device(kOp, name, map.info, like);
        const auto strides = dense_strides(map.info.sizes, 4, Format::kChannelsLast);
        if (!same_strides(map.info.strides, strides.data(), map.info.sizes, 4) ||
            reinterpret_cast<uintptr_t>(map.info.data) % 16 != 0) {
            map.copy_to(Format::kChannelsLast);
        }
    }
    return map;
}

const uint8_t* bits_of(const char* name, const TensorInfo& mask, const TensorInfo& like, int64_t numel) {
    if (!mask.present) {
        return nullptr;
    }
    check_dtype(kOp, name, mask, DType::kUInt8);
    check_same_device(kOp, name, mask, like);
    DL4DS_CHECK(mask.dim == 1 && mask.numel == (numel + 7) / 8, kOp, ": ", name, ": expected ",
                (numel + 7) / 8, " bytes, got ", mask.shape());
    return mask.as<uint8_t>();
}

/// The sums of both BatchNorms from those of the tiles.
void finish_both(const ConvBnActDgradParams& d, const TensorInfo& dx, const Operand& rstd,
                 const Operand& other_rstd, Tensor& dweight, Tensor& other_dweight, Tensor& dbias,
                 void* stream) {
    BnActPairSumsParams v;
    v.dtype = dx.dtype;
    v.channels_last = true;
    v.size = as_dims(dx.sizes, 4);
    v.rstd = rstd.info.as<float>();
    v.residual_rstd = other_rstd.info.as<float>();
    v.dweight = tensor_info(dweight).as<float>();
    v.residual_dweight = tensor_info(other_dweight).as<float>();
    v.dbias = tensor_info(dbias).as<float>();
    v.sums = d.sums;
    v.sums_parts = conv_bn_act_parts(d.conv);
    check_launch(launch_bn_act_pair_sums(v, stream), kOp);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> conv_bn_act_dgrad_bwd_cuda(
    Tensor dout, Tensor weight, std::vector<int64_t> size, std::vector<int64_t> padding,
    std::vector<int64_t> dilation, std::optional<Tensor> added, std::optional<Tensor> added_mask,
    int64_t added_activation, double added_slope, int64_t added_step, std::optional<Tensor> y,
    std::optional<Tensor> bn_weight, std::optional<Tensor> bn_bias, std::optional<Tensor> mean,
    std::optional<Tensor> rstd, std::optional<Tensor> mask, double eps, bool eps_std, int64_t activation,
    double negative_slope, std::optional<Tensor> other_y, std::optional<Tensor> other_mean,
    std::optional<Tensor> other_rstd) {
    const TensorInfo di = tensor_info(dout), wi = tensor_info(weight);
    check_cuda(kOp, di);
    check_same_device(kOp, "weight", wi, di);
    check_dtype(kOp, "weight", wi, di.dtype);
    const CudaScope scope(di);
    ConvBnActDgradParams d;
    const bool fit = di.dim == 4 && sizes_of(d, wi, di.dtype, di.sizes[0], size, padding, dilation);
    DL4DS_CHECK(fit, kOp, ": weight, size, padding: expected those of a convolution in two dimensions");
    ConvBnActFwdParams& p = d.conv;
    const int64_t in[4] = {p.batch, p.channels, p.height, p.width};
    const int64_t sizes[4] = {p.batch, p.channels_out, p.height_out, p.width_out};
    const int64_t numel = p.batch * p.channels_out * p.height_out * p.width_out;
    const auto last = [](const int64_t* s) { return dense_strides(s, 4, Format::kChannelsLast); };
    Tensor dx = empty_cuda(di, sizes, last(sizes).data(), 4, di.dtype);
    const TensorInfo xi = tensor_info(dx);
    DL4DS_CHECK(added_step >= 1, kOp, ": added_step: expected 1 or more, got ", added_step);
    const int64_t some[4] = {p.batch, p.channels_out, (p.height_out + added_step - 1) / added_step,
                             (p.width_out + added_step - 1) / added_step};
    const Operand from = dense_map("dout", dout, di, in), more = dense_map("added", added, di, some);
    const Operand argument = dense_map("y", y, di, sizes), other = dense_map("other_y", other_y, di, sizes);
    const TensorInfo mi = tensor_info(mask), ai = tensor_info(added_mask);
    const Operand m = channel_operand(kOp, "mean", mean, xi), r = channel_operand(kOp, "rstd", rstd, xi);
    const Operand w = channel_operand(kOp, "bn_weight", bn_weight, xi);
    const Operand b = channel_operand(kOp, "bn_bias", bn_bias, xi);
    const Operand om = channel_operand(kOp, "other_mean", other_mean, xi);
    const Operand orstd = channel_operand(kOp, "other_rstd", other_rstd, xi);
    const bool sums = argument.info.present, both = other.info.present;
    DL4DS_CHECK(!sums || (m.info.present && r.info.present), kOp,
                ": expected mean and rstd with y, got None");
    DL4DS_CHECK(!both || (sums && om.info.present && orstd.info.present), kOp,
                ": expected y, other_mean and other_rstd with other_y, got None");
    if (both) {  // as bn_act_pair has them
        check_dtype(kOp, "rstd", r.info, DType::kFloat32);
        check_dtype(kOp, "other_mean", om.info, DType::kFloat32);
        check_dtype(kOp, "other_rstd", orstd.info, DType::kFloat32);
        d.other = other.info.data;
        d.other_mean = om.info.as<float>();
    }
    const Tensor turned = empty_vector_cuda(di, wi.numel, di.dtype);
    d.filter = wi.data;
    d.filter_stride_out = wi.strides[0], d.filter_stride_in = wi.strides[1];
    d.filter_stride_h = wi.strides[2], d.filter_stride_w = wi.strides[3];
    d.residual_mask = more.info.present ? bits_of("added_mask", ai, di, numel) : nullptr;
    d.residual_activation = checked_activation(kOp, added_activation);
    d.residual_slope = added_slope;
    d.residual_step = added_step;
    d.activation = checked_activation(kOp, activation);
    d.negative_slope = negative_slope;
    p.x = from.info.data;
    p.weight = tensor_info(turned).data;
    p.residual = more.info.data;
    p.out = xi.data;
    if (sums) {
        d.y = argument.info.data;
        d.mask = bits_of("mask", mi, di, numel);
        d.mean = channel_vector(m), d.rstd = channel_vector(r);
        d.bn_weight = channel_vector(w), d.bn_bias = channel_vector(b);
    }
    ConvRoute route;
    choose(route, d, conv_bn_act_architecture(), {int(sums) + int(both), more.info.present, added_step});
    p.tile = route.choice.tile;
    const int refusal = conv_bn_act_dgrad_refusal(d);
    DL4DS_CHECK(refusal == 0, kOp, ": this call is not served (reason ", refusal,
                " of dl4ds_kernels/_cuda_conv.py); ask conv_bn_act_dgrad_route first");
    const int64_t channels = sums ? p.channels_out : 0;
    const Tensor partial =
        empty_vector_cuda(di, sums ? conv_bn_act_parts(p) * (both ? 3 : 2) * channels : 0, DType::kFloat32);
    d.sums = sums ? tensor_info(partial).as<float>() : nullptr;
    check_launch(launch_conv_bn_act_dgrad(d, scope.stream()), kOp);
    // (bn_act_pair's elementwise pass makes its own table.)
    Tensor table = empty_vector_cuda(di, both ? 0 : bn_act_bwd_table(channels), DType::kFloat32);
    Tensor other_dweight = empty_vector_cuda(di, both ? channels : 0, DType::kFloat32);
    Tensor dweight = empty_vector_cuda(di, channels, DType::kFloat32);
    Tensor dbias = empty_vector_cuda(di, channels, DType::kFloat32);
    if (both) {
        finish_both(d, xi, r, orstd, dweight, other_dweight, dbias, scope.stream());
    } else if (sums) {
        BnActBwdParams v;
        v.steps = BnActBwdSteps::kSums;
        v.dtype = di.dtype;
        v.channels_last = true;
        v.size = as_dims(xi.sizes, 4);
        v.dout_strides = v.x_strides = v.residual_strides = as_dims(xi.strides, 4);
        v.dout = xi.data;
        v.x = argument.info.data;
        v.mask = d.mask;
        v.weight = d.bn_weight, v.bias = d.bn_bias;
        v.mean = m.info.data, v.rstd = r.info.data;
        v.training = true;
        v.eps_std = eps_std;
        v.eps = eps;
        v.activation = d.activation;
        v.negative_slope = negative_slope;
        v.dweight = tensor_info(dweight).data, v.dbias = tensor_info(dbias).data;
        v.sums = d.sums;
        v.sums_parts = conv_bn_act_parts(p);
        v.table = tensor_info(table).data;
        check_launch(launch_bn_act_bwd(v, scope.stream()), kOp);
    }
    return {dx, table, dweight, dbias, other_dweight};
}

/// reason (0: the kernel), tile, 1, modelled nanoseconds of both ways. added: 0 for nothing, else the step;
/// masked: what is added is taken through an activation by its bits; sums: of this many BatchNorms in front.
std::vector<int64_t> conv_bn_act_dgrad_route_cuda(Tensor x, Tensor weight, std::vector<int64_t> stride,
                                                  std::vector<int64_t> padding, std::vector<int64_t> dilation,
                                                  int64_t groups, int64_t added, bool masked, int64_t sums,
                                                  int64_t activation) {
    const TensorInfo xi = tensor_info(x), wi = tensor_info(weight);
    check_cuda(kOp, xi);
    const CudaScope scope(xi);
    ConvRoute route;
    const auto answer = [&](int reason) {
        route.reason = reason;
        return route_answer(route);
    };
    const ConvWish wish = conv_wish(kOp);
    if (wish == ConvWish::kLibrary) {
        return answer(static_cast<int>(ConvReason::kAskedFor));
    }
    ConvBnActDgradParams d;
    if (xi.dim != 4 || stride.size() != 2) {
        return answer(static_cast<int>(ConvReason::kRank));
    }
    if (groups != 1) {
        return answer(static_cast<int>(ConvReason::kGroups));
    }
    if (suggest_format(xi) != Format::kChannelsLast) {
        return answer(static_cast<int>(ConvReason::kLayout));
    }
    if (stride[0] != 1 || stride[1] != 1) {
        return answer(static_cast<int>(DgradRefusal::kStride));
    }
    const bool fit = wi.dtype == xi.dtype && wi.dim == 4 && wi.sizes[1] == xi.sizes[1] &&
                     sizes_of(d, wi, xi.dtype, xi.sizes[0], {xi.sizes[2], xi.sizes[3]}, padding, dilation);
    if (!fit) {
        return answer(static_cast<int>(ConvRefusal::kEmpty));
    }
    DL4DS_CHECK(sums >= 0 && sums <= 2, kOp, ": sums: expected those of 0, 1 or 2 BatchNorms, got ", sums);
    d.activation = sums > 0 ? checked_activation(kOp, activation) : Activation::kNone;
    if (const int refusal = conv_bn_act_dgrad_refusal(d); refusal != 0) {
        return answer(refusal);
    }
    const int architecture = conv_bn_act_architecture();
    if (architecture < 80) {
        return answer(static_cast<int>(ConvReason::kArchitecture));
    }
    if (xi.dtype == DType::kFloat32 && !conv_tf32_allowed()) {
        return answer(static_cast<int>(ConvReason::kNoTf32));
    }
    choose(route, d, architecture, {static_cast<int>(sums), added > 0, added > 0 ? added : 1});
    if (wish == ConvWish::kAuto && conv_autotune()) {
        const ConvBnActFwdParams& p = d.conv;
        const int64_t code =
            conv_measured("conv_bn_act_dgrad_measured",
                          {architecture, static_cast<int64_t>(p.dtype), added, masked, sums,
                           static_cast<int64_t>(d.activation), p.batch, p.channels_out, p.height_out,
                           p.width_out, p.channels, p.kernel_h, p.kernel_w, padding[0], padding[1],
                           p.dilation_h, p.dilation_w, static_cast<int64_t>(route.choice.tile)});
        route.choice.fused = code < 0 ? route.choice.fused : code > 0;
    }
    const bool taken = route.choice.fused || wish == ConvWish::kFused;
    return answer(taken ? 0 : static_cast<int>(ConvReason::kModel));
}

STABLE_TORCH_LIBRARY_IMPL(dl4ds_kernels, CUDA, m) {
    m.impl("conv_bn_act_dgrad_bwd", TORCH_BOX(&conv_bn_act_dgrad_bwd_cuda));
    m.impl("conv_bn_act_dgrad_route", TORCH_BOX(&conv_bn_act_dgrad_route_cuda));
}

}  // namespace
}  // namespace dl4ds
