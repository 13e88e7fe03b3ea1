// Launches of bn_act's backward kernels.
#include "ops/bn_act/bn_act.h"
#include "ops/bn_act/bn_act_bwd_kernel.cuh"

namespace dl4ds {
namespace {

bool recomputes(const BnActBwdParams& p) { return p.mask == nullptr && p.activation != Activation::kNone; }

Walk walk_of(const BnActBwdParams& p, bool& readable) {
    Walk walk;
    const Dims strides[kMaxOperands] = {p.dout_strides, p.x_strides, p.residual_strides};
    const int operands = recomputes(p) && p.residual != nullptr ? 3 : 2;
    readable = plan_walk(p.dtype, p.channels_last, p.size, operands, strides, walk);
    return walk;
}

/// The table of the elementwise pass, then the partial sums.
struct BwdWorkspace {
    ReducePlan plan;
    int64_t partial_offset, bytes;

    BwdWorkspace(const BnActBwdParams& p, const Walk& walk, bool vectors)
        : plan(plan_reduce(walk, p.size.c, vectors ? vector_width(p.dtype) : 1)) {
        const int64_t acc_size = dtype_size(acc_dtype(p.dtype));
        partial_offset = 4 * p.size.c * acc_size;
        bytes = partial_offset + round_up(plan.parts * 2 * p.size.c * acc_size, 16);
    }
};

BnActGradientArgs gradient_args(const BnActBwdParams& p, const Walk& walk) {
    BnActGradientArgs in{};
    in.dout = p.dout;
    in.x = p.x;
    in.residual = p.residual;
    in.mask = p.mask;
    in.activation = p.activation;
    in.slope = p.negative_slope;
    in.rows = walk.rows;
    in.dout_rows = walk.row_strides[0];
    in.x_rows = walk.row_strides[1];
    in.residual_rows = walk.row_strides[2];
    in.planes = walk.planes;
    in.dout_planes = walk.plane_strides[0];
    in.x_planes = walk.plane_strides[1];
    in.residual_planes = walk.plane_strides[2];
    in.channels = p.size.c;
    in.numel = p.size.numel();
    return in;
}

Affine affine_of(const BnActBwdParams& p) {
    Affine affine;
    affine.mean = {p.mean, acc_dtype(p.dtype)};
    affine.spread = {p.rstd, acc_dtype(p.dtype)};
    affine.weight = p.weight;
    affine.bias = p.bias;
    return affine;
}

}  // namespace

bool bn_act_bwd_reads(const BnActBwdParams& p) {
    bool readable;
    walk_of(p, readable);
    return readable;
}

int64_t bn_act_bwd_workspace(const BnActBwdParams& p) {
    bool readable;
    const Walk walk = walk_of(p, readable);
    const int64_t vectors = BwdWorkspace(p, walk, true).bytes, single = BwdWorkspace(p, walk, false).bytes;
    return vectors > single ? vectors : single;
}

int launch_bn_act_bwd(const BnActBwdParams& p, void* stream) {
    bool readable;
    const Walk walk = walk_of(p, readable);
    if (!readable) {
        return static_cast<int>(cudaErrorInvalidValue);
    }
    if (p.size.c == 0) {
        return 0;
    }
    const bool vectors = walk.vectors && aligned16(p.dout) && aligned16(p.x) && aligned16(p.residual) &&
                         aligned16(p.dx) && aligned16(p.dresidual);
    const BwdWorkspace workspace(p, walk, vectors);
    const bool empty = p.size.numel() == 0;
    const bool given = p.steps == BnActBwdSteps::kSums, table_only = p.steps == BnActBwdSteps::kElements;
    // Two calls that share a table have to agree on its order: neither may lose its vectors by a pointer
    // alone.
    if (p.steps != BnActBwdSteps::kAll &&
        (p.table == nullptr || p.dtype == DType::kFloat64 || walk.vectors != vectors)) {
        return static_cast<int>(cudaErrorInvalidValue);
    }
    void* const table = p.steps == BnActBwdSteps::kAll ? p.workspace : p.table;
    const bool sums = !empty && (given || p.dweight != nullptr || (p.training && p.dx != nullptr));
    const bool elements = !empty && (p.dx != nullptr || p.dresidual != nullptr);

    BnActReduceArgs reduce{};
    reduce.in = gradient_args(p, walk);
    reduce.affine = affine_of(p);
    reduce.plan = workspace.plan;
    reduce.partial = static_cast<char*>(p.workspace) + workspace.partial_offset;
    int error = dispatch_vec(p.dtype, vectors, [&](auto type, auto vec) {
        using T = typename decltype(type)::type;
        constexpr int kVec = decltype(vec)::value;
        reduce.in.row_vecs = p.size.c / kVec;
        const int64_t blocks =
            sums && p.steps == BnActBwdSteps::kAll ? reduce.plan.tiles * reduce.plan.parts : 0;
        if (walk.use_rows) {
            return launch(bn_act_bwd_reduce_kernel_nhwc<T, kVec>, blocks, kThreads, stream, reduce);
        }
        return dispatch_whole<kVec, true>(reduce.plan.planes.whole, [&](auto whole) {
            constexpr bool kWhole = decltype(whole)::value;
            return launch(bn_act_bwd_reduce_kernel_nchw<T, kVec, kWhole>, blocks, kThreads, stream, reduce);
        });
    });
    if (error != 0) {
        return error;
    }

    BnActBwdFinalizeArgs final{};
    final.channels = p.size.c;
    final.parts = given ? p.sums_parts : sums ? reduce.plan.parts : 0;
    final.count = static_cast<double>(empty ? 1 : p.size.n * p.size.plane());
    final.partial = given ? p.sums : reduce.partial;
    final.affine = reduce.affine;
    final.rstd = p.rstd;
    final.training = p.training;
    final.eps_std = p.eps_std;
    final.eps = p.eps;
    final.table = table;
    final.vec = walk.use_rows && vectors ? vector_width(p.dtype) : 1;
    final.dweight = p.dweight;
    final.dbias = p.dbias;
    const auto kernel =
        p.dtype == DType::kFloat64 ? bn_act_bwd_finalize_kernel<double> : bn_act_bwd_finalize_kernel<float>;
    error = launch(kernel, table_only ? 0 : ceil_div(p.size.c, kFinalizeChannels),
                   kFinalizeChannels * kFinalizeGroups, stream, final);
    if (error != 0 || !elements || given) {
        return error;
    }

    BnActBwdArgs args{};
    args.in = reduce.in;
    args.table = table;
    args.training = p.training;
    args.dx = p.dx;
    args.dresidual = p.dresidual;
    return dispatch_vec(p.dtype, vectors, [&](auto type, auto vec) {
        using T = typename decltype(type)::type;
        constexpr int kVec = decltype(vec)::value;
        args.vecs = ceil_div(args.in.numel, kVec);
        int64_t blocks = grid_blocks(args.vecs, walk.use_rows ? args.in.row_vecs : 1);
        if (walk.use_rows) {
            args.row_step = blocks * kThreads / args.in.row_vecs;
            return launch(bn_act_bwd_kernel_nhwc<T, kVec>, blocks, kThreads, stream, args);
        }
        const bool channels = by_channel(walk, kVec, p.mask != nullptr);
        blocks = deal_planes<kVec>(args, walk, channels, blocks);
        return dispatch_whole<kVec, false>(channels, [&](auto whole) {
            constexpr bool kWhole = decltype(whole)::value;
            return launch(bn_act_bwd_kernel_nchw<T, kVec, kWhole>, blocks, kThreads, stream, args);
        });
    });
}

}  // namespace dl4ds
