// One block solves up to kBlockLimit boxes wholly in shared memory: a call's image where it has no more, and
// the small bins of larger calls.
#pragma once

#include "ops/nms/nms_work.cuh"

namespace dl4ds::nms {

/// Boxes by descending score, and what is known of them.
template <typename acc_t>
struct BlockBoxes {
    Box<acc_t> box[kBlockLimit];
    uint64_t row[64];                  // of the current 64 boxes: the later ones of them that each suppresses
    uint32_t alive[kBlockLimit / 32];  // not suppressed so far
    uint64_t kept[kBlockLimit / 64];
};

/// Decides the first n boxes, 64 at a time, with two barriers each, until max_output are kept. s.kept holds
/// the result after the caller's next barrier. same(i, j): whether two boxes compete.
template <typename Rule, typename acc_t, typename Same>
__device__ __forceinline__ void solve_in_block(BlockBoxes<acc_t>& s, int n, int64_t max_output,
                                               float threshold, const Same& same) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
    const int words = (n + 63) / 64;
    for (int w = threadIdx.x; w < kBlockLimit / 32; w += blockDim.x) {
        s.alive[w] = n >= 32 * w + 32 ? 0xffffffffu : n <= 32 * w ? 0u : (1u << (n - 32 * w)) - 1;
    }
    for (int w = threadIdx.x; w < kBlockLimit / 64; w += blockDim.x) {
        s.kept[w] = 0;
    }
    __syncthreads();
    int64_t count = 0;
    uint64_t kept = 0;  // of the 64 boxes before the current ones
    for (int word = 0; word < words; ++word) {
        // Boxes from here on against those kept last: a warp has 32 boxes, one word of s.alive.
        for (int w = 2 * word + warp; w < 2 * words && kept != 0; w += warps) {
            const uint32_t before = s.alive[w];
            bool live = before >> lane & 1;
            if (before != 0) {
                const int i = 32 * w + lane;
                const Box<acc_t> b = s.box[i < n ? i : 0];
                for (uint64_t left = kept; left != 0 && live; left &= left - 1) {
                    const int k = 64 * (word - 1) + __ffsll(static_cast<long long>(left)) - 1;
                    live = !(suppresses<Rule>(s.box[k], b, threshold) && same(k, i));
                }
                const unsigned after = __ballot_sync(0xffffffffu, live);
                if (lane == 0) {
                    s.alive[w] = after;
                }
            }
        }
        // And the current 64 among themselves: a warp takes a row at a time.
        for (int r = warp; r < 64; r += warps) {
            const int i = 64 * word + r;
            uint64_t row = 0;
            if (i < n) {
                const Box<acc_t> a = s.box[i];
#pragma unroll 1
                for (int half = r / 32; half < 2; ++half) {
                    const int j = 64 * word + 32 * half + lane;
                    const bool hit = j > i && j < n && suppresses<Rule>(a, s.box[j], threshold) && same(i, j);
                    row |= uint64_t{__ballot_sync(0xffffffffu, hit)} << (32 * half);
                }
            }
            if (lane == 0) {
                s.row[r] = row;
            }
        }
        __syncthreads();
        if (warp == 0) {
            const uint64_t alive = uint64_t{s.alive[2 * word + 1]} << 32 | s.alive[2 * word];
            const uint64_t result = survivors(alive, s.row[lane], s.row[lane + 32]);
            if (lane == 0) {
                s.kept[word] = result;
            }
        }
        __syncthreads();
        kept = s.kept[word];
        count += __popcll(static_cast<long long>(kept));
        if (count >= max_output) {
            break;
        }
    }
}

/// The place of box i among the kept ones.
template <typename acc_t>
__device__ __forceinline__ int place_in_block(const BlockBoxes<acc_t>& s, int i) {
    int place = __popcll(static_cast<long long>(s.kept[i / 64] & ((uint64_t{1} << (i % 64)) - 1)));
    for (int w = 0; w < i / 64; ++w) {
        place += __popcll(static_cast<long long>(s.kept[w]));
    }
    return place;
}

/// Sorts `size` (a power of two) pairs by key, then value: values differ, so the order is the stable one.
template <typename Key>
__device__ __forceinline__ void sort_in_block(Key* keys, uint32_t* values, int size) {
    for (int width = 2; width <= size; width *= 2) {
        for (int step = width / 2; step > 0; step /= 2) {
            for (int t = threadIdx.x; t < size / 2; t += blockDim.x) {
                const int i = 2 * t - (t & (step - 1)), j = i + step;
                const Key a = keys[i], b = keys[j];
                const uint32_t x = values[i], y = values[j];
                const bool descends = a > b || (a == b && x > y);
                if (descends == ((i & width) == 0)) {
                    keys[i] = b, keys[j] = a;
                    values[i] = y, values[j] = x;
                }
            }
            __syncthreads();
        }
    }
}

/// A whole image of at most kBlockLimit boxes: sort, solve, write. One block an image.
template <typename T>
__global__ void __launch_bounds__(512) nms_image_kernel(const NmsFwdParams p, int size) {
    using Rule = rule_of<T>;
    using acc_t = typename Rule::acc_t;
    using Key = typename ScoreKey<T>::type;
    __shared__ BlockBoxes<acc_t> s;
    __shared__ Key keys[kBlockLimit];
    __shared__ uint32_t index[kBlockLimit];
    __shared__ int valid;
    const int64_t image = blockIdx.x;
    const T* const scores = static_cast<const T*>(p.scores) + image * p.count;
    const T* const boxes = static_cast<const T*>(p.boxes) + image * p.count * 4;
    const int64_t* const classes = p.classes != nullptr ? p.classes + image * p.count : nullptr;
    if (threadIdx.x == 0) {
        valid = 0;
    }
    for (int i = threadIdx.x; i < size; i += blockDim.x) {
        Key key = ScoreKey<T>::kNone;
        if (i < p.count) {
            const T score = scores[i];
            const bool takes_part = !p.filter || static_cast<double>(widen(score)) > p.score_threshold;
            key = takes_part ? ScoreKey<T>::of(score) : key;
        }
        keys[i] = key;
        index[i] = i;
    }
    __syncthreads();
    sort_in_block(keys, index, size);
    for (int i = threadIdx.x; i < size; i += blockDim.x) {
        if (keys[i] != ScoreKey<T>::kNone) {
            const T* const b = boxes + int64_t(index[i]) * 4;
            s.box[i] = {widen(b[0]), widen(b[1]), widen(b[2]), widen(b[3])};
            if (i + 1 == size || keys[i + 1] == ScoreKey<T>::kNone) {
                valid = i + 1;
            }
        }
    }
    __syncthreads();
    const auto same = [&](int i, int j) {
        return classes == nullptr || classes[index[i]] == classes[index[j]];
    };
    const int n = valid;
    solve_in_block<Rule>(s, n, p.max_output, static_cast<float>(p.iou_threshold), same);
    __syncthreads();
    int64_t* const keep = p.keep + image * p.max_output;
    for (int i = threadIdx.x; i < n; i += blockDim.x) {
        if (s.kept[i / 64] >> (i % 64) & 1) {
            const int place = place_in_block(s, i);
            if (place < p.max_output) {
                keep[place] = index[i];
            }
        }
    }
    int64_t count = 0;
    for (int w = 0; w < kBlockLimit / 64; ++w) {
        count += __popcll(static_cast<long long>(s.kept[w]));
    }
    count = count < p.max_output ? count : p.max_output;
    for (int64_t i = count + threadIdx.x; i < p.max_output; i += blockDim.x) {
        keep[i] = -1;
    }
    if (threadIdx.x == 0) {
        p.kept[image] = count;
    }
}

/// Bins of at most kBlockLimit boxes, one block each; `blocks` of an image share its bins.
template <typename Rule>
__global__ void __launch_bounds__(kThreads)
    nms_bins_kernel(const Work<typename Rule::acc_t> all, int blocks) {
    __shared__ BlockBoxes<typename Rule::acc_t> s;
    const auto w = all.at(blockIdx.x / blocks);
    for (int bin = blockIdx.x % blocks; bin < w.bins; bin += blocks) {
        const uint32_t first = w.bin_start[bin], n = w.bin_end[bin] - first;
        if (n == 0 || n > kBlockLimit) {
            continue;
        }
        __syncthreads();  // the previous bin's bits have been read
        for (uint32_t i = threadIdx.x; i < n; i += kThreads) {
            s.box[i] = w.boxes[first + i];
        }
        __syncthreads();
        const auto same = [&](int i, int j) { return w.same_class(first + i, first + j); };
        solve_in_block<Rule>(s, static_cast<int>(n), w.max_output, w.threshold, same);
        __syncthreads();
        for (uint32_t i = threadIdx.x; i < n; i += kThreads) {
            if (s.kept[i / 64] >> (i % 64) & 1) {
                w.keep[w.rank_of(first + i)] = 1;
            }
        }
    }
}

}  // namespace dl4ds::nms
