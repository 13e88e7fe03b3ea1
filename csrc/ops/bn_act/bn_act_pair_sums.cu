// Launches of the sums of bn_act_pair's backward.
#include "ops/bn_act/bn_act_pair_reduce_kernel.cuh"

namespace dl4ds {
namespace {

/// Of dense maps; with vectors wherever bn_act_pair_serves().
ReducePlan pair_plan(const BnActPairSumsParams& p, int vec, Walk& walk) {
    const Dims dense = dense_dims(p.size, p.channels_last), strides[kMaxOperands] = {dense, dense, dense};
    plan_walk(p.dtype, p.channels_last, p.size, 3, strides, walk);
    return plan_reduce(walk, p.size.c, vec);
}

int finish(const BnActPairSumsParams& p, const float* partial, int64_t parts, void* stream) {
    BnPairFinalizeArgs final{};
    final.channels = p.size.c;
    final.parts = parts;
    final.partial = partial;
    final.rstd = p.rstd;
    final.residual_rstd = p.residual_rstd;
    final.dweight = p.dweight;
    final.residual_dweight = p.residual_dweight;
    final.dbias = p.dbias;
    return launch(bn_act_pair_finalize_kernel, ceil_div(p.size.c, kFinalizeChannels),
                  kFinalizeChannels * kFinalizeGroups, stream, final);
}

}  // namespace

int64_t bn_act_pair_sums_workspace(const BnActPairSumsParams& p) {
    Walk walk;
    const int vec = static_cast<int>(16 / dtype_size(p.dtype));
    return round_up(pair_plan(p, vec, walk).parts * PairSums::kFields * p.size.c * int64_t(sizeof(float)),
                    16);
}

int launch_bn_act_pair_sums(const BnActPairSumsParams& p, void* stream) {
    if (p.sums != nullptr) {
        return p.size.c == 0 ? 0 : finish(p, p.sums, p.sums_parts, stream);
    }
    if (!bn_act_pair_serves(p.dtype, p.channels_last, p.size) || !aligned16(p.dout) || !aligned16(p.x) ||
        !aligned16(p.residual)) {
        return static_cast<int>(cudaErrorInvalidValue);
    }
    if (p.size.c == 0) {
        return 0;
    }
    const bool empty = p.size.numel() == 0;
    BnPairReduceArgs args{};
    args.dout = p.dout;
    args.x = p.x;
    args.residual = p.residual;
    args.mask = p.mask;
    args.mean = p.mean;
    args.residual_mean = p.residual_mean;
    args.activation = p.activation;
    args.slope = static_cast<float>(p.negative_slope);
    args.channels = p.size.c;
    args.numel = p.size.numel();
    args.length = static_cast<int>(p.size.plane());
    args.partial = static_cast<float*>(p.workspace);
    const int error = dispatch_pair(p.dtype, [&](auto type, auto width) {
        using T = typename decltype(type)::type;
        constexpr int kVec = decltype(width)::value;
        Walk walk;
        args.plan = pair_plan(p, kVec, walk);
        args.row_vecs = p.size.c / kVec;
        args.vecs = args.numel / kVec;
        args.row_step = args.plan.row_step * args.row_vecs;
        const int64_t blocks = empty ? 0 : args.plan.tiles * args.plan.parts;
        if (walk.use_rows) {
            return launch(bn_act_pair_reduce_kernel_nhwc<T, kVec>, blocks, kThreads, stream, args);
        }
        const auto kernel = args.plan.planes.whole ? bn_act_pair_reduce_kernel_nchw<T, kVec, true>
                                                   : bn_act_pair_reduce_kernel_nchw<T, kVec, false>;
        return launch(kernel, blocks, kThreads, stream, args);
    });
    if (error != 0) {
        return error;
    }
    return finish(p, args.partial, empty ? 0 : args.plan.parts, stream);
}

}  // namespace dl4ds
