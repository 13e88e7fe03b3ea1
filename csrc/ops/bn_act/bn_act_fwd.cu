// Launches of bn_act's forward kernels.
#include "ops/bn_act/bn_act.h"
#include "ops/bn_act/bn_act_fwd_kernel.cuh"
#include "ops/bn_act/bn_act_stats_kernel.cuh"

namespace dl4ds {
namespace {

int plan_operands(const BnActFwdParams& p, Dims (&strides)[kMaxOperands]) {
    strides[0] = p.x_strides;
    strides[1] = p.residual_strides;
    return p.residual != nullptr ? 2 : 1;
}

Walk walk_of(const BnActFwdParams& p, bool& readable) {
    Walk walk;
    Dims strides[kMaxOperands];
    const int operands = plan_operands(p, strides);
    readable = plan_walk(p.dtype, p.channels_last, p.size, operands, strides, walk);
    return walk;
}

/// Merging a block takes as many instructions as eighteen rows a thread, and with fewer than ten in 16-bit
/// types both take longer than the rows' bytes on an H100: so a second wave of blocks only where it leaves
/// ten. (One wave has to be full in any case: fewer blocks send too few loads.) Planes: six windows a thread,
/// so that at 14 x 14 merging a block costs less than the time of its bytes on an H100, and the last wave is
/// as full as the others.
ReducePlan plan_stats(const Walk& walk, int64_t channels, int vec) {
    return walk.use_rows ? plan_reduce(walk, channels, vec, 5, 10) : plan_reduce(walk, channels, vec, 6);
}

/// scale and shift, first values, partial results, their counts. The first two do not depend on the vector
/// width.
struct StatsWorkspace {
    ReducePlan plan;
    int64_t table_stride, origin_offset, partial_offset, counts_offset, bytes;

    StatsWorkspace(const BnActFwdParams& p, const Walk& walk, bool vectors)
        : plan(plan_stats(walk, p.size.c, vectors ? vector_width(p.dtype) : 1)) {
        const int64_t acc_size = dtype_size(acc_dtype(p.dtype));
        table_stride = round_up(p.size.c, 4);
        origin_offset = 2 * table_stride * acc_size;
        partial_offset = 3 * table_stride * acc_size;
        counts_offset = partial_offset + round_up(plan.parts * 2 * p.size.c * acc_size, 16);
        bytes = counts_offset + round_up(plan.parts * acc_size, 16);
    }
};

int launch_statistics(const BnActFwdParams& p, const Walk& walk, bool vectors, void* stream) {
    const bool empty = p.size.numel() == 0;
    const StatsWorkspace workspace(p, walk, vectors);
    BnActStatsArgs stats{};
    stats.x = p.x;
    stats.rows = walk.rows;
    stats.x_rows = walk.row_strides[0];
    stats.planes = walk.planes;
    stats.x_planes = walk.plane_strides[0];
    stats.channels = p.size.c;
    stats.plan = workspace.plan;
    stats.origin = static_cast<char*>(p.workspace) + workspace.origin_offset;
    stats.partial = static_cast<char*>(p.workspace) + workspace.partial_offset;
    stats.counts = static_cast<char*>(p.workspace) + workspace.counts_offset;
    int error = dispatch_vec(p.dtype, vectors, [&](auto type, auto vec) {
        using T = typename decltype(type)::type;
        constexpr int kVec = decltype(vec)::value;
        const int64_t blocks = empty || p.moments != nullptr ? 0 : stats.plan.tiles * stats.plan.parts;
        if (walk.use_rows) {
            return launch(bn_act_stats_kernel_nhwc<T, kVec>, blocks, kThreads, stream, stats);
        }
        return dispatch_whole<kVec, true>(stats.plan.planes.whole, [&](auto whole) {
            constexpr bool kWhole = decltype(whole)::value;
            return launch(bn_act_stats_kernel_nchw<T, kVec, kWhole>, blocks, kThreads, stream, stats);
        });
    });
    if (error != 0) {
        return error;
    }
    BnActFinalizeArgs final{};
    final.channels = p.size.c;
    final.parts = empty ? 0 : stats.plan.parts;
    final.origin = stats.origin;
    final.partial = stats.partial;
    final.counts = stats.counts;
    if (p.moments != nullptr) {
        final.parts = p.moments_parts;
        final.origin = nullptr;
        final.partial = p.moments;
        final.counts = p.moments + p.moments_parts * 2 * p.size.c;
    }
    final.eps_std = p.eps_std;
    final.eps = p.eps;
    final.momentum = p.momentum;
    final.mean = p.mean;
    final.rstd = p.rstd;
    final.weight = p.weight;
    final.bias = p.bias;
    final.table = p.workspace;
    final.table_stride = workspace.table_stride;
    final.running_mean = p.running_mean;
    final.running_var = p.running_var;
    final.new_running_mean = p.new_running_mean;
    final.new_running_var = p.new_running_var;
    const auto kernel =
        p.dtype == DType::kFloat64 ? bn_act_finalize_kernel<double> : bn_act_finalize_kernel<float>;
    return launch(kernel, ceil_div(p.size.c, kFinalizeChannels), kFinalizeChannels * kFinalizeGroups, stream,
                  final);
}

}  // namespace

bool bn_act_fwd_reads(const BnActFwdParams& p) {
    bool readable;
    walk_of(p, readable);
    return readable;
}

int64_t bn_act_fwd_workspace(const BnActFwdParams& p) {
    if (!p.training) {
        return 0;
    }
    bool readable;
    const Walk walk = walk_of(p, readable);
    // Whether vectors apply depends on addresses too, so provide for both.
    const int64_t vectors = StatsWorkspace(p, walk, true).bytes,
                  single = StatsWorkspace(p, walk, false).bytes;
    return vectors > single ? vectors : single;
}

int launch_bn_act_fwd(const BnActFwdParams& p, void* stream) {
    bool readable;
    const Walk walk = walk_of(p, readable);
    if (!readable) {
        return static_cast<int>(cudaErrorInvalidValue);
    }
    if (p.size.c == 0 || (p.size.numel() == 0 && !p.training)) {
        return 0;
    }
    const bool vectors = walk.vectors && aligned16(p.x) && aligned16(p.residual) && aligned16(p.out);
    if (p.training) {
        const int error = launch_statistics(p, walk, vectors, stream);
        if (error != 0) {
            return error;
        }
        if (p.size.numel() == 0 || p.out == nullptr) {
            return 0;
        }
    }
    BnActApplyArgs args{};
    args.x = p.x;
    args.residual = p.residual;
    args.out = p.out;
    args.mask = p.mask;
    if (p.training) {
        args.affine.table = p.workspace;
        args.affine.table_stride = round_up(p.size.c, 4);
    }
    args.affine.mean = p.running_mean;
    args.affine.spread = p.running_var;
    args.affine.spread_is_variance = true;
    args.affine.eps_std = p.eps_std;
    args.affine.eps = p.eps;
    args.affine.weight = p.weight;
    args.affine.bias = p.bias;
    args.activation = p.activation;
    args.slope = p.negative_slope;
    args.rows = walk.rows;
    args.x_rows = walk.row_strides[0];
    args.residual_rows = walk.row_strides[1];
    args.planes = walk.planes;
    args.x_planes = walk.plane_strides[0];
    args.residual_planes = walk.plane_strides[1];
    args.numel = p.size.numel();
    return dispatch_vec(p.dtype, vectors, [&](auto type, auto vec) {
        using T = typename decltype(type)::type;
        constexpr int kVec = decltype(vec)::value;
        args.row_vecs = p.size.c / kVec;
        args.vecs = ceil_div(args.numel, kVec);
        int64_t blocks = grid_blocks(args.vecs, walk.use_rows ? args.row_vecs : 1);
        if (walk.use_rows) {
            args.row_step = blocks * kThreads / args.row_vecs;
            return launch(bn_act_fwd_kernel_nhwc<T, kVec>, blocks, kThreads, stream, args);
        }
        const bool channels = by_channel(walk, kVec, p.mask != nullptr);
        blocks = deal_planes<kVec>(args, walk, channels, blocks);
        return dispatch_whole<kVec, false>(channels, [&](auto whole) {
            constexpr bool kWhole = decltype(whole)::value;
            return launch(bn_act_fwd_kernel_nchw<T, kVec, kWhole>, blocks, kThreads, stream, args);
        });
    });
}

}  // namespace dl4ds
