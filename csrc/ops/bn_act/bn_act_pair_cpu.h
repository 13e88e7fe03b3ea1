// What the forward and backward passes of bn_act_pair on the CPU share.
//
// No kernel of their own: those of bn_act, one BatchNorm after the other over pieces that stay in a core's
// cache, so that memory sees x, residual and dout once a pass and no map in between. Results are those of two
// calls of bn_act, bit for bit, and do not depend on the number of threads.
#pragma once

#include "common/cpu/isa.h"
#include "ops/bn_act/bn_act_host_cpu.h"

namespace dl4ds {

constexpr int64_t kPieceBytes = 32 << 10;  // of one map

/// One BatchNorm of the two.
struct PairNorm {
    TensorInfo mean, rstd, weight, bias;
};

inline void check_norm(const char* op, const std::string& prefix, const PairNorm& norm, const TensorInfo& x) {
    check_channel_vector(op, (prefix + "mean").c_str(), norm.mean, x);
    check_channel_vector(op, (prefix + "rstd").c_str(), norm.rstd, x);
    check_channel_vector(op, (prefix + "weight").c_str(), norm.weight, x);
    check_channel_vector(op, (prefix + "bias").c_str(), norm.bias, x);
    check_dtype(op, (prefix + "mean").c_str(), norm.mean, acc_dtype(x.dtype));
    check_dtype(op, (prefix + "rstd").c_str(), norm.rstd, acc_dtype(x.dtype));
}

inline void check_map(const char* op, const char* name, const TensorInfo& map, const TensorInfo& x) {
    check_same_shape(op, name, map, x);
    check_dtype(op, name, map, x.dtype);
    check_same_device(op, name, map, x);
}

inline Activation linear_activation(const char* op, int64_t code) {
    const Activation activation = activation_from_code(op, code);
    DL4DS_CHECK(activation == Activation::kNone || activation_has_mask(activation), op,
                ": activation: expected none, relu, leaky_relu or relu6, got ", activation_name(activation));
    return activation;
}

/// The plan of a dense tensor of x's shape in x's memory format; x is made one.
inline BnPlan dense_plan(Tensor& x, TensorInfo& info) {
    BnPlan plan;
    const Format format = suggest_format(info);
    const auto strides = dense_strides(info.sizes, info.dim, format);
    if (!same_strides(info.strides, strides.data(), info.sizes, info.dim)) {
        x = copy_with_strides(x, info, strides.data());
        info = tensor_info(x);
    }
    make_bn_plan(info, format, plan);
    return plan;
}

/// Mean, scale and shift as bn_act's forward pass has them, in arrays first .. first + 2.
template <typename T>
void set_constants(ChannelArrays<T>& arrays, int64_t first, const PairNorm& norm, int64_t channels) {
    for (int64_t c = 0; c < channels; ++c) {
        arrays.array(first)[c] = channel_entry<T>(norm.mean, c, T(0));
        arrays.array(first + 1)[c] =
            channel_entry<T>(norm.weight, c, T(1)) * channel_entry<T>(norm.rstd, c, T(1));
        arrays.array(first + 2)[c] = channel_entry<T>(norm.bias, c, T(0));
    }
}

/// A stretch of memory that is one row or several of the kernels: `rows` of `len` from element `at` on. In
/// NCHW order it is a part of channel `c`'s plane.
struct Piece {
    int64_t at, rows, len, c;
};

/// Calls fn(piece) over all of the tensor, in parallel over units that hold whole bytes of a mask; before the
/// first piece of a unit begin(bit), behind the last end(). fn must not throw.
template <typename State, typename Begin, typename Fn, typename End>
void for_each_piece(const BnPlan& plan, int64_t tensors, const Begin& begin, const Fn& fn, const End& end) {
    const int64_t size = dtype_size(plan.dtype), most = kPieceBytes / size;
    if (!plan.per_row) {
        const Blocks blocks = row_blocks(plan);
        const int64_t step = std::max<int64_t>(8, most / std::max<int64_t>(1, plan.len) / 8 * 8);
        parallel_for(blocks.count, tensors * plan.bytes(), [&](int64_t first, int64_t last) {
            for (int64_t block = last - 1; block >= first; --block) {
                State state = begin(blocks.begin(block) * plan.len);
                for (int64_t row = blocks.begin(block); row < blocks.end(block); row += step) {
                    const int64_t rows = std::min(step, blocks.end(block) - row);
                    fn(state, Piece{row * plan.len, rows, plan.len, 0});
                }
                end(state);
            }
        });
        if (plan.tail > 0) {
            State state = begin(plan.rows * plan.len);
            fn(state, Piece{plan.rows * plan.len, plan.tail, plan.channels, 0});
            end(state);
        }
        return;
    }
    // Eight planes fill whole bytes of a mask whatever their size.
    const int64_t planes = plan.n * plan.channels, units = (planes + 7) / 8;
    parallel_for(units, tensors * plan.bytes(), [&](int64_t first, int64_t last) {
        for (int64_t unit = last - 1; unit >= first; --unit) {
            State state = begin(unit * 8 * plan.spatial);
            for (int64_t plane = unit * 8; plane < std::min(planes, unit * 8 + 8); ++plane) {
                for (int64_t i = 0; i < plan.spatial; i += most) {
                    fn(state, Piece{plane * plan.spatial + i, 1, std::min(most, plan.spatial - i),
                                    plane % plan.channels});
                }
            }
            end(state);
        }
    });
}

std::tuple<Tensor, Tensor, Tensor, Tensor> bn_stats_cpu(Tensor x, std::optional<Tensor> running_mean,
                                                        std::optional<Tensor> running_var, double momentum,
                                                        double eps, bool eps_std);

std::tuple<Tensor, Tensor> bn_act_pair_cpu(Tensor x, Tensor mean, Tensor rstd, std::optional<Tensor> weight,
                                           std::optional<Tensor> bias, Tensor residual, Tensor residual_mean,
                                           Tensor residual_rstd, std::optional<Tensor> residual_weight,
                                           std::optional<Tensor> residual_bias, int64_t activation,
                                           double negative_slope, bool save_mask);

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> bn_act_pair_bwd_cpu(
    Tensor dout, std::optional<Tensor> mask, int64_t activation, double negative_slope, Tensor x,
    std::optional<Tensor> weight, Tensor mean, Tensor rstd, double eps, bool eps_std, Tensor residual,
    std::optional<Tensor> residual_weight, Tensor residual_mean, Tensor residual_rstd, double residual_eps,
    bool residual_eps_std, std::optional<Tensor> known_dweight, std::optional<Tensor> known_dbias,
    std::optional<Tensor> known_residual_dweight);

}  // namespace dl4ds
