// bn_act_pair_bwd on the CPU. The contract is in dl4ds_kernels/ops/_bn_act_pair.py.
#include "ops/bn_act/bn_act_pair_cpu.h"
#include "ops/bn_act/bn_act_reduce_cpu.h"

namespace dl4ds {
namespace {

constexpr const char* kBwdOp = "bn_act_pair_bwd";

struct Backward {
    PairNorm norm[2];
    double eps[2];
    bool eps_std[2];
    const void* x[2];
    void* dx[2];
    const void* dout;
    const uint8_t* mask;
    Activation activation;
    double negative_slope;
    TensorInfo known_dweight[2], known_dbias;  // the second not without the first, nor any without dbias

    bool all_known() const { return known_dweight[1].present; }
};

enum Array { kMean, kScale, kShift, kFactorX, kOffset, kNumArrays };

/// dx = w rstd (dz - S1/n - (x - mean) k S2/n), as in bn_act_bwd_cpu.cpp.
template <typename T>
void set_gradients(const Backward& b, int which, ChannelArrays<T>& arrays, int64_t count, int64_t c,
                   double s1, double s2) {
    const double n = static_cast<double>(count), rstd = channel_entry<double>(b.norm[which].rstd, c, 1.0);
    const double factor = channel_entry<double>(b.norm[which].weight, c, 1.0) * rstd;
    double k = rstd * rstd;
    if (b.eps_std[which]) {
        const double sigma = 1.0 / rstd - b.eps[which];
        k = sigma > 0 ? rstd / sigma : 0.0;
    }
    const int64_t first = which * kNumArrays;
    arrays.array(first + kFactorX)[c] = static_cast<T>(-factor * k * s2 / n);
    arrays.array(first + kOffset)[c] = static_cast<T>(-factor * s1 / n);
}

template <typename T>
BnBwdArgs whole_of(const Backward& b, int which, ChannelArrays<T>& arrays, bool streaming) {
    BnBwdArgs whole{};
    whole.dout = b.dout;
    whole.x = b.x[which];
    whole.mask = b.mask;
    whole.slope = b.negative_slope;
    whole.training = true;
    whole.dx = b.dx[which];
    whole.streaming = streaming;
    const int64_t first = which * kNumArrays;
    whole.mean = arrays.array(first + kMean);
    whole.scale = arrays.array(first + kScale);
    whole.shift = arrays.array(first + kShift);
    whole.factor_x = arrays.array(first + kFactorX);
    whole.offset = arrays.array(first + kOffset);
    return whole;
}

/// dweight: (C,) of both, and dbias: written where they are not known.
template <typename T>
void run_backward(const Backward& b, const BnPlan& plan, T* const (&dweight)[2], T* dbias) {
    ChannelArrays<T> arrays(plan, 2 * kNumArrays);
    BnBwdArgs whole[2];
    for (int i = 0; i < 2; ++i) {
        set_constants<T>(arrays, i * kNumArrays, b.norm[i], plan.channels);
        whole[i] = whole_of(b, i, arrays, use_streaming(2 * plan.bytes()));
    }
    const bool all = b.all_known();
    const auto note = [&](int64_t c, double s1, const double (&s2)[2]) {
        if (all) {
            s1 = channel_entry<double>(b.known_dbias, c, 0.0);
        } else {
            dbias[c] = static_cast<T>(s1);
        }
        for (int i = 0; i < 2; ++i) {
            const double rstd = channel_entry<double>(b.norm[i].rstd, c, 1.0);
            double sum = s2[i];
            if (b.known_dweight[i].present) {
                sum = rstd != 0 ? channel_entry<double>(b.known_dweight[i], c, 0.0) / rstd : 0.0;
            } else {
                dweight[i][c] = static_cast<T>(sum * rstd);
            }
            set_gradients<T>(b, i, arrays, std::max<int64_t>(1, plan.count()), c, s1, sum);
        }
    };
    const int dtype = static_cast<int>(plan.dtype), per_row = plan.per_row ? 1 : 0;
    const auto kernel = bn_kernels().bwd_apply[dtype][per_row][static_cast<int>(b.activation)];
    const int64_t channel_bytes = 3 * plan.count() * dtype_size(plan.dtype);
    if (plan.per_row && plan.numel > 0 && plan.channels >= 16 && channel_bytes <= cache_sizes().l2_bytes) {
        // Channel by channel: both passes over what a core's cache holds.
        parallel_for(plan.channels, 8 * plan.bytes(), [&](int64_t begin, int64_t end) {
            for (int64_t c = begin; c < end; ++c) {
                double s1 = 0, s2[2] = {};
                for (int i = 0; i < 2; ++i) {
                    if (!b.known_dweight[i].present) {
                        bn_bwd_reduce_channel(plan, b.activation, whole[i], c, s1, s2[i]);
                    }
                }
                note(c, s1, s2);
                for (int64_t n = 0; n < plan.n; ++n) {
                    kernel(bwd_planes(plan, whole[0], n, c));
                    kernel(bwd_planes(plan, whole[1], n, c));
                }
            }
        });
        return;
    }
    for (int i = 0; i < 2; ++i) {  // (means over the pixels of a row)
        for (int64_t c = 0; c < plan.channels; ++c) {
            arrays.array(i * kNumArrays + kFactorX)[c] = arrays.array(i * kNumArrays + kOffset)[c] = T(0);
        }
    }
    arrays.replicate(2 * kNumArrays);
    Scratch sums(3 * 8 * std::max<int64_t>(1, plan.channels));
    double* s1 = sums.as<double>();
    double* s2[2] = {s1 + plan.channels, s1 + 2 * plan.channels};
    std::fill(s1, s1 + 3 * plan.channels, 0.0);
    if (plan.numel > 0 && !all) {
        bn_bwd_reduce_both(plan, b.activation, b.known_dweight[0].present ? nullptr : &whole[0], whole[1], s1,
                           s2[0], s2[1]);
    }
    for (int64_t c = 0; c < plan.channels; ++c) {
        note(c, s1[c], {s2[0][c], s2[1][c]});
    }
    if (plan.numel == 0) {
        return;
    }
    arrays.replicate(2 * kNumArrays);
    struct State {};
    const int64_t acc = sizeof(T);
    for_each_piece<State>(
        plan, 5, [](int64_t) { return State{}; },
        [&](State&, const Piece& piece) {
            for (const BnBwdArgs& one : whole) {
                BnBwdArgs p = bwd_rows(plan, one, piece.at, piece.at, piece.rows, piece.len, piece.len);
                p.mean = byte_offset(one.mean, piece.c * acc);
                p.scale = byte_offset(one.scale, piece.c * acc);
                p.shift = byte_offset(one.shift, piece.c * acc);
                p.factor_x = byte_offset(one.factor_x, piece.c * acc);
                p.offset = byte_offset(one.offset, piece.c * acc);
                kernel(p);
            }
        },
        [](State&) {});
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> bn_act_pair_bwd_cpu(
    Tensor dout, std::optional<Tensor> mask, int64_t activation, double negative_slope, Tensor x,
    std::optional<Tensor> weight, Tensor mean, Tensor rstd, double eps, bool eps_std, Tensor residual,
    std::optional<Tensor> residual_weight, Tensor residual_mean, Tensor residual_rstd, double residual_eps,
    bool residual_eps_std, std::optional<Tensor> known_dweight, std::optional<Tensor> known_dbias,
    std::optional<Tensor> known_residual_dweight) {
    TensorInfo xi = tensor_info(x);
    const TensorInfo di = tensor_info(dout), ri = tensor_info(residual), mi = tensor_info(mask);
    Backward b{{{tensor_info(mean), tensor_info(rstd), tensor_info(weight), {}},
                {tensor_info(residual_mean), tensor_info(residual_rstd), tensor_info(residual_weight), {}}},
               {eps, residual_eps},
               {eps_std, residual_eps_std},
               {},
               {},
               nullptr,
               nullptr,
               linear_activation(kBwdOp, activation),
               negative_slope,
               {tensor_info(known_dweight), tensor_info(known_residual_dweight)},
               tensor_info(known_dbias)};
    check_batched(kBwdOp, xi);
    check_map(kBwdOp, "dout", di, xi);
    check_map(kBwdOp, "residual", ri, xi);
    check_norm(kBwdOp, "", b.norm[0], xi);
    check_norm(kBwdOp, "residual_", b.norm[1], xi);
    check_channel_vector(kBwdOp, "dweight", b.known_dweight[0], xi);
    check_channel_vector(kBwdOp, "dbias", b.known_dbias, xi);
    check_channel_vector(kBwdOp, "residual_dweight", b.known_dweight[1], xi);
    const bool known = b.known_dweight[0].present, all = b.all_known();
    DL4DS_CHECK(known == b.known_dbias.present && (known || !all), kBwdOp,
                ": expected dweight and dbias both given or both None, and with residual_dweight given");
    DL4DS_CHECK(mi.present == (b.activation != Activation::kNone), kBwdOp,
                ": mask: expected one with an activation, and none without");
    if (mi.present) {
        const int64_t bytes = (xi.numel + 7) / 8;
        check_dtype(kBwdOp, "mask", mi, DType::kUInt8);
        check_same_device(kBwdOp, "mask", mi, xi);
        DL4DS_CHECK(mi.dim == 1 && mi.numel == bytes && (bytes <= 1 || mi.strides[0] == 1), kBwdOp,
                    ": mask: expected shape (ceil(numel / 8),) = (", bytes, ",) without gaps, got ",
                    mi.shape());
        b.mask = mi.as<uint8_t>();
    }
    const BnPlan plan = dense_plan(x, xi);
    const Tensor gradient = in_plan_order(dout, di, plan), added = in_plan_order(residual, ri, plan);
    b.dout = tensor_info(gradient).data;
    b.x[0] = xi.data, b.x[1] = tensor_info(added).data;
    const auto strides = dense_strides(xi.sizes, xi.dim, plan.format);
    Tensor dx = empty_cpu(xi.sizes, strides.data(), xi.dim, xi.dtype);
    Tensor dresidual = empty_cpu(xi.sizes, strides.data(), xi.dim, xi.dtype);
    b.dx[0] = tensor_info(dx).data, b.dx[1] = tensor_info(dresidual).data;
    const DType acc = acc_dtype(xi.dtype);
    Tensor dweight = empty_vector_cpu(known ? 0 : plan.channels, acc);
    Tensor residual_dweight = empty_vector_cpu(all ? 0 : plan.channels, acc);
    Tensor dbias = empty_vector_cpu(all ? 0 : plan.channels, acc);
    const auto run = [&](auto zero) {
        using T = decltype(zero);
        T* const weights[2] = {tensor_info(dweight).as<T>(), tensor_info(residual_dweight).as<T>()};
        run_backward<T>(b, plan, weights, tensor_info(dbias).as<T>());
    };
    if (acc == DType::kFloat64) {
        run(double{});
    } else {
        run(float{});
    }
    return {dx, dresidual, dweight, dbias, residual_dweight};
}

}  // namespace dl4ds
