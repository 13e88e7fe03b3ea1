// Batch statistics of bn_act: every block's counts, means and sums of squared deviations, in both layouts.
#pragma once

#include "ops/bn_act/bn_act_kernel.cuh"

namespace dl4ds {

struct BnActStatsArgs {
    const void* x;
    Rows rows;
    RowStrides x_rows;
    Planes planes;
    PlaneStrides x_planes;
    int64_t channels;
    ReducePlan plan;
    // Means are kept relative to the channel's first value, so that rounding a partial mean costs nothing
    // where the mean is large beside the spread.
    void* origin;   // [channels]: that first value
    void* partial;  // [parts][2][channels]: mean - origin, sum of squared deviations
    void* counts;   // [parts]
};

template <typename acc_t>
__device__ __forceinline__ void store_moments(const BnActStatsArgs& a, int64_t part, int64_t c, acc_t origin,
                                              const Moments<acc_t>& m) {
    if (part == 0) {
        static_cast<acc_t*>(a.origin)[c] = origin;
    }
    acc_t* partial = static_cast<acc_t*>(a.partial) + part * 2 * a.channels + c;
    partial[0] = m.v[1];
    partial[a.channels] = m.v[2];
    if (c == 0) {
        static_cast<acc_t*>(a.counts)[part] = m.v[0];
    }
}

/// A block takes one channel tile and every parts-th group of `height` rows, so that all blocks move through
/// x together and its end is in the L2 cache when the elementwise pass begins there.
template <typename T, int kVec>
__global__ void __launch_bounds__(kThreads, 4) bn_act_stats_kernel_nhwc(const BnActStatsArgs a) {
    using acc_t = acc_type<T>;
    constexpr int kUnroll = 4;
    __shared__ alignas(16) acc_t shared[Moments<acc_t>::kFields * kThreads * kVec];
    const int width = a.plan.width, height = a.plan.height;
    const int tx = threadIdx.x % width, ty = threadIdx.x / width;
    const unsigned tiles = static_cast<unsigned>(a.plan.tiles), tile = blockIdx.x % tiles,
                   part = blockIdx.x / tiles;
    const int64_t c = (int64_t(tile) * width + tx) * kVec;
    const int64_t first = int64_t(part) * height + ty, step = a.plan.row_step;
    Moments<acc_t> own[kVec];
    if (ty < height && c < a.channels && first < a.rows.count) {
        const T* x = static_cast<const T*>(a.x) + c;
        acc_t shift[kVec], sum[kVec], squares[kVec];
        get_values<T, kVec, kVec>(load_raw<T, kVec>(x + row_offset(a.rows, a.x_rows, first)), 0, shift);
#pragma unroll
        for (int k = 0; k < kVec; ++k) {
            sum[k] = squares[k] = 0;
        }
        const auto add = [&](RawPack<T, kVec>& raw) {
            acc_t v[kVec];
            pin<T, kVec>(raw);
            get_values<T, kVec, kVec>(raw, 0, v);
#pragma unroll
            for (int k = 0; k < kVec; ++k) {
                const acc_t d = v[k] - shift[k];
                sum[k] += d;
                squares[k] += d * d;
            }
        };
        int64_t row = first + step;
        int count = 1;
        RawPack<T, kVec> raw[kUnroll];
        for (; row + (kUnroll - 1) * step < a.rows.count; row += kUnroll * step, count += kUnroll) {
#pragma unroll
            for (int u = 0; u < kUnroll; ++u) {
                raw[u] = load_raw<T, kVec>(x + row_offset(a.rows, a.x_rows, row + u * step));
            }
#pragma unroll
            for (int u = 0; u < kUnroll; ++u) {
                add(raw[u]);
            }
        }
        // The rows that are left are loaded together too.
#pragma unroll
        for (int u = 0; u < kUnroll - 1; ++u) {
            if (row + u * step < a.rows.count) {
                raw[u] = load_raw<T, kVec>(x + row_offset(a.rows, a.x_rows, row + u * step));
            }
        }
#pragma unroll
        for (int u = 0; u < kUnroll - 1; ++u) {
            if (row + u * step < a.rows.count) {
                add(raw[u]);
                ++count;
            }
        }
        acc_t origin[kVec];
        get_values<T, kVec, kVec>(load_raw<T, kVec>(x), 0, origin);
#pragma unroll
        for (int k = 0; k < kVec; ++k) {
            own[k] = Moments<acc_t>::from_shifted(static_cast<acc_t>(count), shift[k] - origin[k], sum[k],
                                                  squares[k]);
        }
    }
    const Moments<acc_t> merged = column_merge<Moments<acc_t>, acc_t, kVec>(own, width, height, shared);
    const int64_t channel = int64_t(tile) * width * kVec + threadIdx.x;
    if (threadIdx.x < width * kVec && channel < a.channels) {
        store_moments(a, part, channel, to_acc(static_cast<const T*>(a.x)[channel]), merged);
    }
}

/// A block takes one channel and every parts-th group of kThreads windows. kWhole: a.plan.planes.whole; else
/// x is dense, and values of a window that belong to a neighbouring plane are left out.
template <typename T, int kVec, bool kWhole>
__global__ void __launch_bounds__(kThreads, 4) bn_act_stats_kernel_nchw(const BnActStatsArgs a) {
    using acc_t = acc_type<T>;
    constexpr int kUnroll = kVec == 1 ? 2 : kWhole ? 8 : 4;
    __shared__ Moments<acc_t> shared[kThreads / 32];
    const ChannelWindows& w = a.plan.planes;
    const int part = static_cast<int>(blockIdx.x % w.parts), c = static_cast<int>(blockIdx.x / w.parts);
    const int index = part * kThreads + threadIdx.x, length = static_cast<int>(a.planes.length);
    const T* x = static_cast<const T*>(a.x) + c * a.x_planes.c;
    const acc_t origin = to_acc(*x);
    WindowCursor at(w, index);
    int left = static_cast<int>(w.full) + (index < w.rest), count = 0;  // windows to come, values seen
    acc_t shift = 0, sum = 0, squares = 0;
    const auto add = [&](acc_t v) {
        const acc_t d = v - shift;
        sum += d;
        squares += d * d;
    };
    if constexpr (kWhole) {
        const int all = left;
        count = left * kVec;
        RawPack<T, kVec> raw[kUnroll];
        const auto load = [&](int u) {
            raw[u] = load_raw<T, kVec>(x + at.n * a.x_planes.n +
                                       plane_place(a.planes, a.x_planes, at.window * kVec));
            at.forward(w, w.step_n, w.step_window);
        };
        const auto use = [&](int u) {
            acc_t v[kVec];
            pin<T, kVec>(raw[u]);
            get_values<T, kVec, kVec>(raw[u], 0, v);
            if (u == 0 && left == all) {
                shift = v[0];
            }
#pragma unroll
            for (int k = 0; k < kVec; ++k) {
                add(v[k]);
            }
        };
        for (; left >= kUnroll; left -= kUnroll) {
#pragma unroll
            for (int u = 0; u < kUnroll; ++u) {
                load(u);
            }
#pragma unroll
            for (int u = 0; u < kUnroll; ++u) {
                use(u);
            }
        }
#pragma unroll
        for (int u = 0; u < kUnroll - 1; ++u) {
            if (u < left) {
                load(u);
            }
        }
#pragma unroll
        for (int u = 0; u < kUnroll - 1; ++u) {
            if (u < left) {
                use(u);
            }
        }
    } else {
        const int64_t image = a.planes.channels * a.planes.length, numel = a.planes.batch * image;
        const T* tail = nullptr;  // the tensor's last vector if it is cut short; its values are of one plane
        for (; left > 0; left -= kUnroll) {
            RawPack<T, kVec> raw[kUnroll];
            unsigned inside[kUnroll];
#pragma unroll
            for (int u = 0; u < kUnroll; ++u) {
                const int64_t start = at.n * image + int64_t(c) * length;
                const int pos = at.window * kVec - static_cast<int>(start & (kVec - 1));
                inside[u] = u < left ? window_bits<kVec>(pos, length) : 0;
                const T* p = static_cast<const T*>(a.x) + start + pos;
                if (inside[u] != 0) {
                    if (start + pos + kVec > numel) {
                        tail = p;
                        inside[u] = 0;
                    } else {
                        raw[u] = load_raw<T, kVec>(p);
                    }
                }
                at.forward(w, w.step_n, w.step_window);
            }
#pragma unroll
            for (int u = 0; u < kUnroll; ++u) {
                if (inside[u] == 0) {
                    continue;
                }
                acc_t v[kVec];
                pin<T, kVec>(raw[u]);
                get_values<T, kVec, kVec>(raw[u], 0, v);
                if (count == 0) {
#pragma unroll
                    for (int k = kVec - 1; k >= 0; --k) {
                        shift = (inside[u] >> k) & 1 ? v[k] : shift;
                    }
                }
#pragma unroll
                for (int k = 0; k < kVec; ++k) {
                    add((inside[u] >> k) & 1 ? v[k] : shift);
                }
                count += __popc(inside[u]);
            }
        }
        if (tail != nullptr) {
            for (const T* p = tail; p < static_cast<const T*>(a.x) + numel; ++p, ++count) {
                const acc_t v = to_acc(*p);
                shift = count == 0 ? v : shift;
                add(v);
            }
        }
    }
    const auto own = Moments<acc_t>::from_shifted(static_cast<acc_t>(count), shift - origin, sum, squares);
    const Moments<acc_t> merged = block_merge(own, shared);
    if (threadIdx.x == 0) {
        store_moments(a, part, c, origin, merged);
    }
}

}  // namespace dl4ds
