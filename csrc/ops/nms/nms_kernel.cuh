// What is done once per call: keys to sort by, bins, boxes in their order, and the result in the order of
// scores.
#pragma once

#include "ops/nms/nms_block.cuh"
#include "ops/nms/nms_large_kernel.cuh"

namespace dl4ds::nms {

/// What one of `blocks` blocks of an image does, element by element.
struct Share {
    int64_t image, begin, stride;

    __device__ __forceinline__ explicit Share(int blocks)
        : image(blockIdx.x / blocks),
          begin(int64_t(blockIdx.x % blocks) * kThreads + threadIdx.x),
          stride(int64_t(blocks) * kThreads) {}
};

/// Keys of the scores, indices, and empty bins.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    nms_keys_kernel(const NmsFwdParams p, const Work<typename rule_of<T>::acc_t> all, int blocks,
                    typename ScoreKey<T>::type* keys) {
    const Share share(blocks);
    const auto w = all.at(share.image);
    const int64_t first = share.image * p.count;
    for (int64_t i = share.begin; i < p.count; i += share.stride) {
        const T score = static_cast<const T*>(p.scores)[first + i];
        const bool takes_part = !p.filter || static_cast<double>(widen(score)) > p.score_threshold;
        keys[first + i] = takes_part ? ScoreKey<T>::of(score) : ScoreKey<T>::kNone;
        w.order[i] = static_cast<uint32_t>(i);
    }
    for (int64_t i = share.begin; i < w.bins; i += share.stride) {
        w.bin_start[i] = w.bin_end[i] = w.bin_kept[i] = w.round_kept[i] = 0;
    }
}

/// By rank: the bin of the class, and the rank itself.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    nms_classes_kernel(const Work<typename rule_of<T>::acc_t> all, int blocks,
                       const typename ScoreKey<T>::type* keys) {
    const Share share(blocks);
    const auto w = all.at(share.image);
    for (int64_t i = share.begin; i < w.count; i += share.stride) {
        const bool takes_part = keys[share.image * w.count + i] != ScoreKey<T>::kNone;
        w.bin_at[i] = takes_part ? bin_of(w.classes[w.order[i]]) : kNoBin;
        w.rank[i] = static_cast<uint32_t>(i);
    }
}

/// By position: the box, its class, and where bins begin and end.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    nms_gather_kernel(const NmsFwdParams p, const Work<typename rule_of<T>::acc_t> all, int blocks,
                      const typename ScoreKey<T>::type* keys) {
    const Share share(blocks);
    const auto w = all.at(share.image);
    const int64_t first = share.image * p.count;
    const auto bin_at = [&](int64_t at) -> uint32_t {
        return w.classes != nullptr ? w.bin_at[at] : keys[first + at] == ScoreKey<T>::kNone ? kNoBin : 0;
    };
    for (int64_t i = share.begin; i < p.count; i += share.stride) {
        const uint32_t bin = bin_at(i), position = static_cast<uint32_t>(i);
        if (bin != kNoBin) {
            if (i == 0 || bin_at(i - 1) != bin) {
                w.bin_start[bin] = position;
            }
            if (i + 1 == p.count || bin_at(i + 1) != bin) {
                w.bin_end[bin] = position + 1;
            }
        }
        const int64_t index = w.order[w.rank_of(position)];
        if (w.classes != nullptr) {
            w.class_at[i] = w.classes[index];
        }
        const T* const b = static_cast<const T*>(p.boxes) + (first + index) * 4;
        w.boxes[i] = {widen(b[0]), widen(b[1]), widen(b[2]), widen(b[3])};
        w.alive[i] = bin != kNoBin;
        w.keep[i] = 0;
        if (i == 0) {
            for (int64_t pad = p.count; pad < w.padded(); ++pad) {
                w.keep[pad] = 0;
            }
        }
    }
}

/// The list of large bins of each image, in order. One block an image.
template <typename acc_t>
__global__ void __launch_bounds__(kScanThreads) nms_large_kernel(const Work<acc_t> all) {
    __shared__ uint32_t sums[kScanThreads / 32];
    const auto w = all.at(blockIdx.x);
    uint32_t found = 0;
    for (int base = 0; base < w.bins; base += kScanThreads) {
        const int bin = base + threadIdx.x;
        const bool large = bin < w.bins && w.bin_end[bin] - w.bin_start[bin] > kBlockLimit;
        uint32_t total;
        const uint32_t place = block_sum(large, sums, total);
        if (large) {
            w.large[found + place] = bin;
        }
        found += total;
    }
    if (threadIdx.x == 0) {
        w.large[0] = found;
    }
}

/// The kept indices by rank. One block an image, eight ranks a thread at a time.
template <typename acc_t>
__global__ void __launch_bounds__(kScanThreads)
    nms_output_kernel(const Work<acc_t> all, int64_t* keep, int64_t* kept) {
    __shared__ uint32_t sums[kScanThreads / 32];
    const auto w = all.at(blockIdx.x);
    int64_t* const out = keep + blockIdx.x * w.max_output;
    int64_t found = 0;
    for (int64_t base = 0; base < w.count && found < w.max_output; base += 8 * kScanThreads) {
        const int64_t first = base + 8 * threadIdx.x;
        uint64_t flags = first < w.count ? *reinterpret_cast<const uint64_t*>(w.keep + first) : 0;
        uint32_t total;
        const uint32_t size = __popcll(static_cast<long long>(flags));
        int64_t place = found + block_sum(size, sums, total) - size;
        for (int64_t rank = first; flags != 0; ++rank, flags >>= 8) {
            if ((flags & 1) != 0 && place < w.max_output) {
                out[place++] = w.order[rank];
            }
        }
        found += total;
    }
    found = found < w.max_output ? found : w.max_output;
    for (int64_t i = found + threadIdx.x; i < w.max_output; i += kScanThreads) {
        out[i] = -1;
    }
    if (threadIdx.x == 0) {
        kept[blockIdx.x] = found;
    }
}

}  // namespace dl4ds::nms
