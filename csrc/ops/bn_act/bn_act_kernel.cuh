// What the forward and backward kernels of bn_act share: how operands are walked and normalised.
#pragma once

#include "common/cuda/launch.cuh"
#include "common/cuda/raw.cuh"
#include "common/cuda/reduce.cuh"
#include "common/geometry.h"

namespace dl4ds {

/// Both walks over the operands; `use_rows` says which one applies and `vectors` whether 16-byte accesses do.
/// `dense`: the planes of all operands lie one behind the other.
struct Walk {
    bool use_rows = true, vectors = false, dense = false;
    Rows rows;
    RowStrides row_strides[kMaxOperands];
    Planes planes;
    PlaneStrides plane_strides[kMaxOperands];
};

/// Where the per-channel scale and shift of z = x * scale + shift come from: a table that an earlier kernel
/// wrote, or (table null) the vectors themselves.
struct Affine {
    const void* table = nullptr;  // [2][table_stride] in the accumulator type: scale, shift
    int64_t table_stride = 0;
    ChannelVector mean, spread;  // spread: rstd, or a variance
    bool spread_is_variance = false, eps_std = false;
    double eps = 0;
    ChannelVector weight, bias;
};

__device__ __forceinline__ uint32_t divide(uint32_t n, const Divider& d) {
    return (__umulhi(n, d.magic) + n) >> d.shift;
}

__device__ __forceinline__ int64_t row_offset(const Rows& rows, const RowStrides& s, int64_t row) {
    if (!rows.sliced) {
        return row * s.inner;
    }
    const uint32_t r = static_cast<uint32_t>(row), line = divide(r, rows.inner),
                   outer = divide(line, rows.mid);
    return outer * s.outer + (line - outer * rows.mid.divisor) * s.mid +
           (r - line * rows.inner.divisor) * s.inner;
}

/// The same of rows that are known not to be sliced, or not known to.
template <bool kDense>
__device__ __forceinline__ int64_t row_place(const Rows& rows, const RowStrides& s, int64_t row) {
    if constexpr (kDense) {
        return row * s.inner;
    } else {
        return row_offset(rows, s, row);
    }
}

/// Of a place in a plane, from the plane's first value on.
__device__ __forceinline__ int64_t plane_place(const Planes& planes, const PlaneStrides& s, int pos) {
    if (!planes.pitched) {
        return pos;
    }
    const uint32_t p = static_cast<uint32_t>(pos), line = divide(p, planes.width);
    return line * s.line + (p - line * planes.width.divisor);
}

template <bool kDense>
__device__ __forceinline__ int64_t plane_place(const Planes& planes, const PlaneStrides& s, int pos) {
    return kDense ? pos : plane_place(planes, s, pos);
}

__device__ __forceinline__ int64_t plane_offset(const Planes& planes, const PlaneStrides& s, int64_t n, int c,
                                                int pos) {
    return n * s.n + c * s.c + plane_place(planes, s, pos);
}

/// Bit k is set where place pos + k of a window lies in its plane.
template <int kVec>
__device__ __forceinline__ unsigned window_bits(int pos, int length) {
    unsigned bits = (1u << kVec) - 1;
    bits = pos < 0 ? bits & (bits << -pos) : bits;
    return length - pos >= kVec ? bits : length > pos ? bits & ((1u << (length - pos)) - 1) : 0;
}

/// A distance in NCHW order, split so that a walk needs no division.
struct PlaneStep {
    int64_t n = 0;
    int c = 0, pos = 0;
};

inline PlaneStep plane_step(const Planes& planes, int64_t elements) {
    const int64_t whole = elements / planes.length;
    return {whole / planes.channels, static_cast<int>(whole % planes.channels),
            static_cast<int>(elements % planes.length)};
}

/// A place in NCHW order that moves back step by step.
struct PlaneCursor {
    int64_t n;
    int c, pos;

    __device__ __forceinline__ PlaneCursor(const Planes& planes, int64_t element) {
        const int64_t plane = element / planes.length;
        pos = static_cast<int>(element - plane * planes.length);
        n = plane / planes.channels;
        c = static_cast<int>(plane - n * planes.channels);
    }
    __device__ __forceinline__ void back(const Planes& planes, const PlaneStep& step) {
        pos -= step.pos;
        c -= step.c;
        n -= step.n;
        if (pos < 0) {
            pos += static_cast<int>(planes.length);
            --c;
        }
        if (c < 0) {
            c += static_cast<int>(planes.channels);
            --n;
        }
    }
};

template <typename acc_t>
__device__ __forceinline__ acc_t root(acc_t v) {
    if constexpr (sizeof(acc_t) == 8) {
        return ::sqrt(v);
    } else {
        return ::sqrtf(v);
    }
}

/// kVec channels' scale = weight * rstd and shift = bias - mean * scale, the latter with one rounding: its
/// error is no larger than that of a mean rounded to the accumulator type.
template <typename acc_t, int kVec>
__device__ __forceinline__ void load_affine(const Affine& a, int64_t c, acc_t (&scale)[kVec],
                                            acc_t (&shift)[kVec]) {
    if (a.table != nullptr) {
        const acc_t* table = static_cast<const acc_t*>(a.table) + c;
        load_channels_as<acc_t, acc_t, kVec>(table, scale);
        load_channels_as<acc_t, acc_t, kVec>(table + a.table_stride, shift);
        return;
    }
    load_channels<acc_t, kVec>(a.spread, c, scale);
    if (a.spread_is_variance) {
        const acc_t eps = static_cast<acc_t>(a.eps);
#pragma unroll
        for (int k = 0; k < kVec; ++k) {
            scale[k] = a.eps_std ? acc_t(1) / (root(scale[k]) + eps) : acc_t(1) / root(scale[k] + eps);
        }
    }
    if (a.weight.data != nullptr) {
        acc_t weight[kVec];
        load_channels<acc_t, kVec>(a.weight, c, weight);
#pragma unroll
        for (int k = 0; k < kVec; ++k) {
            scale[k] *= weight[k];
        }
    }
    acc_t mean[kVec];
    load_channels<acc_t, kVec>(a.mean, c, mean);
    if (a.bias.data != nullptr) {
        load_channels<acc_t, kVec>(a.bias, c, shift);
    } else {
#pragma unroll
        for (int k = 0; k < kVec; ++k) {
            shift[k] = 0;
        }
    }
#pragma unroll
    for (int k = 0; k < kVec; ++k) {
        shift[k] = fma(-mean[k], scale[k], shift[k]);
    }
}

/// The planes of one channel as vectors ("windows"), dealt out to the threads of `parts` blocks in turn. In a
/// dense tensor planes need not begin at a vector: a window may then hold values of a neighbouring plane.
struct ChannelWindows {
    bool whole = false;  // every window lies in one plane
    int parts = 1;
    int windows = 1;                 // of a plane
    int64_t full = 0;                // steps that every thread makes
    int rest = 0;                    // threads, counted over all parts, that make one more
    int64_t step_n = 0, last_n = 0;  // planes of a step, and from a thread's first step to the last
    int step_window = 0, last_window = 0;

    __host__ __device__ int64_t steps() const { return full + (rest > 0); }
};

/// A window of a channel: the planes' index and the place in the plane.
struct WindowCursor {
    int64_t n;
    int window;

    /// The first window of a thread, `index` counted over all parts.
    __device__ __forceinline__ WindowCursor(const ChannelWindows& w, int index) {
        n = index / w.windows;
        window = index - static_cast<int>(n) * w.windows;
    }
    __device__ __forceinline__ void forward(const ChannelWindows& w, int64_t planes, int places) {
        n += planes;
        window += places;
        if (window >= w.windows) {
            window -= w.windows;
            ++n;
        }
    }
    __device__ __forceinline__ void back(const ChannelWindows& w) {
        n -= w.step_n;
        window -= w.step_window;
        if (window < 0) {
            window += w.windows;
            --n;
        }
    }
};

/// How a reduction over all but channels is cut into blocks: from the shape alone.
struct ReducePlan {
    int width = 0, height = 0;  // rows: threads of a block that share a row, and rows of threads
    int tile_channels = 0;      // rows: width vectors
    int64_t tiles = 0;          // rows: channel tiles; planes: channels
    int64_t parts = 0;          // partial results per channel
    int64_t row_step = 0;       // rows that the blocks of a tile cover together
    ChannelWindows planes;
};

constexpr int kFinalizeChannels = 8, kFinalizeGroups = 64;

/// Merges one channel's partial values by groups of threads and a tree; thread group 0 gets the sum.
template <int kValues>
__device__ __forceinline__ void finalize_sum(double (&value)[kValues],
                                             double (*shared)[kFinalizeGroups][kFinalizeChannels]) {
    const int lane = threadIdx.x % kFinalizeChannels, group = threadIdx.x / kFinalizeChannels;
#pragma unroll
    for (int k = 0; k < kValues; ++k) {
        shared[k][group][lane] = value[k];
    }
    for (int half = kFinalizeGroups / 2; half > 0; half /= 2) {
        __syncthreads();
        if (group < half) {
#pragma unroll
            for (int k = 0; k < kValues; ++k) {
                value[k] += shared[k][group + half][lane];
                shared[k][group][lane] = value[k];
            }
        }
    }
}

/// Chooses the walk; false if the kernels can't read the operands as they lie. In NHWC a row of C values that
/// is no multiple of 16 bytes (C = 63 in fp16) leaves single accesses, eight times as many in fp16: right,
/// but slow. NCHW has no such case: a vector may begin in one plane and end in the next.
inline bool plan_walk(DType dtype, bool channels_last, const Dims& size, int operands, const Dims* strides,
                      Walk& walk) {
    if (size.numel() == 0) {
        walk = Walk{};
        return true;
    }
    if (size.c > INT32_MAX) {
        return false;
    }
    // Where C or the plane is 1 both orders are the same memory: take the one with long vectors.
    const bool rows_first = size.plane() == 1 || (channels_last && size.c > 1);
    const bool either = size.plane() == 1 || size.c == 1;
    const bool rows = as_rows(size, operands, strides, walk.rows, walk.row_strides);
    const bool planes = as_planes(size, operands, strides, walk.planes, walk.plane_strides);
    walk.use_rows = rows && (rows_first || (either && !planes));
    const int64_t vec = vector_width(dtype);
    walk.vectors = vec > 1;
    const auto fits = [&](int64_t stride) { walk.vectors = walk.vectors && stride % vec == 0; };
    if (walk.use_rows) {
        fits(size.c);
        for (int k = 0; k < operands; ++k) {
            const RowStrides& s = walk.row_strides[k];
            fits(s.outer), fits(s.mid), fits(s.inner);
        }
        return true;
    }
    if (!planes || (rows_first && !either)) {
        return false;
    }
    walk.dense = !walk.planes.pitched;
    for (int k = 0; k < operands; ++k) {
        const PlaneStrides& s = walk.plane_strides[k];
        walk.dense = walk.dense && s.c == size.plane() && s.n == size.c * size.plane();
    }
    if (walk.dense) {
        walk.vectors = walk.vectors && size.plane() >= vec;
        return true;
    }
    fits(size.plane()), fits(walk.planes.pitched ? walk.planes.width.divisor : vec);
    for (int k = 0; k < operands; ++k) {
        const PlaneStrides& s = walk.plane_strides[k];
        fits(s.n), fits(s.c), fits(s.line);
    }
    return true;
}

inline int64_t windows_of(const Planes& planes, int vec) {
    // A dense plane of any length is read in aligned vectors, which may hang over at both ends.
    return ceil_div(planes.length + (planes.length % vec ? vec - 1 : 0), vec);
}

inline ChannelWindows deal_windows(const Planes& planes, int vec, int64_t parts) {
    ChannelWindows w;
    w.whole = planes.length % vec == 0;
    w.parts = static_cast<int>(parts);
    w.windows = static_cast<int>(windows_of(planes, vec));
    const int64_t stride = parts * kThreads, total = planes.batch * w.windows;
    w.full = total / stride;
    w.rest = static_cast<int>(total % stride);
    w.step_n = stride / w.windows;
    w.step_window = static_cast<int>(stride % w.windows);
    const int64_t last = (w.steps() - 1) * stride;
    w.last_n = last / w.windows;
    w.last_window = static_cast<int>(last % w.windows);
    return w;
}

/// Whether an elementwise pass takes channel by channel, so that a thread keeps its scale and shift: whole
/// windows, enough of them for a block, and none of the mask's bytes shared by two planes. Single accesses
/// and the rest go through the tensor in order.
inline bool by_channel(const Walk& walk, int vec, bool has_mask) {
    const int64_t length = walk.planes.length;
    return vec > 1 && length % vec == 0 && (!has_mask || length % 8 == 0) &&
           (!walk.dense || walk.planes.batch * (length / vec) >= kThreads / 4);
}

/// Blocks of such a pass for each channel.
inline int64_t channel_parts(const Planes& planes, int vec) {
    const int64_t most = ceil_div(planes.batch * windows_of(planes, vec), kThreads);
    const int64_t wanted = kMaxBlocks / planes.channels;
    return wanted < 1 ? 1 : wanted < most ? wanted : most;
}

/// Fills in how an elementwise pass in NCHW order walks, and returns its blocks: those for `channels`
/// (by_channel()), or `blocks` through the tensor in order.
template <int kVec, typename Args>
int64_t deal_planes(Args& args, const Walk& walk, bool channels, int64_t blocks) {
    if (channels) {
        args.windows = deal_windows(walk.planes, kVec, channel_parts(walk.planes, kVec));
        return args.windows.parts * walk.planes.channels;
    }
    args.plane_step = plane_step(walk.planes, blocks * kThreads * kVec);
    return blocks;
}

/// Calls fn with std::bool_constant<whole>; of single accesses there is one kernel only, kSingle's.
template <int kVec, bool kSingle, typename Fn>
int dispatch_whole(bool whole, Fn&& fn) {
    if constexpr (kVec == 1) {
        return fn(std::bool_constant<kSingle>{});
    } else {
        return whole ? fn(std::true_type{}) : fn(std::false_type{});
    }
}

/// min_steps: rows, or windows, of a thread, at least and on average. Five are a first value to subtract and
/// one round of an unrolled loop. wave_steps: the same of rows where blocks fill more than one wave.
inline ReducePlan plan_reduce(const Walk& walk, int64_t channels, int vec, int64_t min_steps = 5,
                              int64_t wave_steps = 5) {
    // Whole waves of four blocks on each of an H100's 132 multiprocessors, so that none is short of loads in
    // flight (an A100's last is two thirds full).
    constexpr int64_t kWave = 4 * 132, kBlocks = 3 * kWave, kMaxSteps = 256;
    ReducePlan plan;
    int64_t steps;  // of all threads together that work on one channel tile
    if (walk.use_rows) {
        const int64_t vecs = channels > vec ? ceil_div(channels, vec) : 1, widest = vec > 1 ? 32 : 64;
        plan.tiles = ceil_div(vecs, widest);
        plan.width = static_cast<int>(ceil_div(vecs, plan.tiles));
        plan.height = kThreads / plan.width;
        plan.tile_channels = plan.width * vec;
        steps = ceil_div(walk.rows.count, plan.height);
    } else {
        plan.tiles = channels;
        steps = ceil_div(walk.planes.batch * windows_of(walk.planes, vec), kThreads);
    }
    const int64_t wanted = kBlocks / plan.tiles;
    plan.parts = wanted < steps / min_steps ? wanted : steps / min_steps;
    if (walk.use_rows && plan.parts * plan.tiles > kWave) {
        const int64_t most = plan.parts < steps / wave_steps ? plan.parts : steps / wave_steps;
        const int64_t waves = most * plan.tiles / kWave;
        plan.parts = (waves > 1 ? waves : 1) * kWave / plan.tiles;
    }
    plan.parts = plan.parts > ceil_div(steps, kMaxSteps) ? plan.parts : ceil_div(steps, kMaxSteps);
    plan.parts = plan.parts > 1 ? plan.parts : 1;
    plan.row_step = plan.parts * plan.height;
    if (!walk.use_rows && walk.planes.length > 0) {
        plan.planes = deal_windows(walk.planes, vec, plan.parts);
    }
    return plan;
}

}  // namespace dl4ds
