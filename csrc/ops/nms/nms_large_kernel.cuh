// Bins of more than kBlockLimit boxes, in rounds of one chunk: all multiprocessors compare the chunk's boxes
// with one another (bit mask, upper triangle), one block decides the chunk (one barrier per 64 boxes), all
// multiprocessors compare the later boxes with those just kept. Work O(n * kept) beyond the chunks'
// triangles, memory O(n). Every block finds out by itself whether there is anything to do in its round.
#pragma once

#include "ops/nms/nms_work.cuh"

namespace dl4ds::nms {

constexpr int kTriangle = kWords * (kWords + 1) / 2;  // pairs of 64-box blocks of a chunk
constexpr int kLargeSlots = 4;                        // blocks that share an image's large bins
constexpr int kPushBoxes = 32;  // later boxes per block: a lane each, the warps share the kept

/// 64 rows against 64 columns: thread (r, q) takes row r and the columns 4 k + q.
template <typename Rule>
__global__ void __launch_bounds__(kThreads)
    nms_mask_kernel(const Work<typename Rule::acc_t> all, uint32_t round, int slots) {
    using acc_t = typename Rule::acc_t;
    __shared__ Box<acc_t> columns[64];
    const auto w = all.at(blockIdx.x / (kTriangle * slots));
    // Row blocks a and kWords - 1 - a of the triangle together have kWords + 1 column blocks.
    const int a_block = blockIdx.x % kTriangle / (kWords + 1), at = blockIdx.x % kTriangle % (kWords + 1);
    const int row_block = at < kWords - a_block ? a_block : kWords - 1 - a_block;
    const int column_block = row_block + (at < kWords - a_block ? at : at - (kWords - a_block));
    const int r = threadIdx.x / 4, q = threadIdx.x % 4;
    for (uint32_t slot = blockIdx.x / kTriangle % slots; slot < w.large[0]; slot += slots) {
        uint32_t first;
        const int n = static_cast<int>(w.chunk(w.large[1 + slot], round, first));
        const int i = 64 * row_block + r, j0 = 64 * column_block;
        if (j0 >= n) {
            continue;
        }
        __syncthreads();  // the columns of the previous bin have been read
        if (threadIdx.x < 64 && j0 + static_cast<int>(threadIdx.x) < n) {
            columns[threadIdx.x] = w.boxes[first + j0 + threadIdx.x];
        }
        __syncthreads();
        uint64_t bits = 0;
        if (i < n && w.alive[first + i]) {
            const Box<acc_t> a = w.boxes[first + i];
#pragma unroll 2
            for (int k = 0; k < 16; ++k) {
                const int c = 4 * k + q, j = j0 + c;
                if (j > i && j < n && suppresses<Rule>(a, columns[c], w.threshold) &&
                    w.same_class(first + i, first + j)) {
                    bits |= uint64_t{1} << c;
                }
            }
        }
        bits |= __shfl_xor_sync(0xffffffffu, bits, 1);
        bits |= __shfl_xor_sync(0xffffffffu, bits, 2);
        if (q == 0 && i < n) {
            const int64_t row = w.classes != nullptr ? first + i : i;
            w.mask[column_block * w.mask_rows + row] = bits;
        }
    }
}

/// Warp v owns the v-th 64 boxes of the chunk: it decides them when all before them are decided.
template <typename acc_t>
__global__ void __launch_bounds__(32 * kWords)
    nms_decide_kernel(const Work<acc_t> all, uint32_t round, int slots) {
    __shared__ uint64_t kept[kWords];
    const auto w = all.at(blockIdx.x / slots);
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    for (uint32_t slot = blockIdx.x % slots; slot < w.large[0]; slot += slots) {
        const uint32_t bin = w.large[1 + slot];
        uint32_t first;
        const int n = static_cast<int>(w.chunk(bin, round, first));
        if (n == 0) {
            continue;
        }
        const int64_t row0 = w.classes != nullptr ? first : 0;
        const uint64_t* const column = w.mask + warp * w.mask_rows + row0;
        const int low = 64 * warp + lane, high = low + 32;
        const bool has_low = low < n, has_high = high < n;
        const unsigned alive_low = __ballot_sync(0xffffffffu, has_low && w.alive[first + low]);
        const unsigned alive_high = __ballot_sync(0xffffffffu, has_high && w.alive[first + high]);
        uint64_t alive = uint64_t{alive_high} << 32 | alive_low;
        const uint64_t own_low = has_low ? column[low] : 0, own_high = has_high ? column[high] : 0;
        const int words = (n + 63) / 64;
        for (int v = 0; v < words; ++v) {
            // Rows of the v-th 64, fetched before it is known which of them are kept.
            uint64_t row_low = 0, row_high = 0;
            if (v < warp && warp < words) {
                row_low = column[64 * v + lane], row_high = column[64 * v + lane + 32];
            }
            if (warp == v) {
                const uint64_t result = survivors(alive, own_low, own_high);
                if (lane == 0) {
                    kept[v] = result;
                }
            }
            __syncthreads();
            if (v < warp && warp < words) {
                const uint64_t chosen = kept[v];
                uint64_t hit =
                    (chosen >> lane & 1 ? row_low : 0) | (chosen >> (lane + 32) & 1 ? row_high : 0);
                const uint32_t hit_low = __reduce_or_sync(0xffffffffu, static_cast<uint32_t>(hit));
                const uint32_t hit_high = __reduce_or_sync(0xffffffffu, static_cast<uint32_t>(hit >> 32));
                alive &= ~(uint64_t{hit_high} << 32 | hit_low);
            }
        }
        uint32_t before = 0, total = 0;
        for (int v = 0; v < words; ++v) {
            const uint32_t size = __popcll(static_cast<long long>(kept[v]));
            before += v < warp ? size : 0;
            total += size;
        }
        const uint64_t mine = warp < words ? kept[warp] : 0;
        for (int half = 0; half < 2; ++half) {
            const int bit = lane + 32 * half;
            if (mine >> bit & 1) {
                const uint32_t position = first + 64 * warp + bit;
                const uint32_t place =
                    first + before + __popcll(static_cast<long long>(mine & ((uint64_t{1} << bit) - 1)));
                w.keep[w.rank_of(position)] = 1;
                w.kept_at[place] = position;
                w.kept_boxes[place] = w.boxes[position];
            }
        }
        __syncthreads();  // bin_kept and kept have been read
        if (threadIdx.x == 0) {
            w.round_kept[bin] = total;
            w.bin_kept[bin] += total;
        }
    }
}

/// Later boxes of the chunk's bins: a lane per box, the warps of the block share the boxes just kept.
template <typename Rule>
__global__ void __launch_bounds__(kThreads)
    nms_push_kernel(const Work<typename Rule::acc_t> all, uint32_t round, int64_t skip, int blocks) {
    using acc_t = typename Rule::acc_t;
    __shared__ uint8_t suppressed[kThreads];
    const auto w = all.at(blockIdx.x / blocks);
    const int64_t position = skip + int64_t(blockIdx.x % blocks) * kPushBoxes + threadIdx.x % kPushBoxes;
    uint32_t first = 0, count = 0;
    if (position < w.count) {
        const uint32_t bin = w.classes != nullptr ? w.bin_at[position] : 0;
        if (bin < w.bins && w.alive[position]) {
            const uint32_t start = w.bin_start[bin], end = w.bin_end[bin];
            first = start + round * kChunk;
            const bool later =
                end - start > kBlockLimit && position >= int64_t(first) + kChunk && position < end;
            count = later && w.bin_kept[bin] < w.max_output ? w.round_kept[bin] : 0;
        }
    }
    if (!__syncthreads_or(count != 0)) {
        return;
    }
    bool hit = false;
    if (count != 0) {
        const Box<acc_t> b = w.boxes[position];
        for (uint32_t k = threadIdx.x / kPushBoxes; k < count && !hit; k += kThreads / kPushBoxes) {
            const Box<acc_t> kept = w.kept_boxes[first + k];  // by value: one load, not one per corner
            hit = suppresses<Rule>(kept, b, w.threshold) &&
                  w.same_class(w.kept_at[first + k], static_cast<uint32_t>(position));
        }
    }
    suppressed[threadIdx.x] = hit;
    __syncthreads();
    if (threadIdx.x < kPushBoxes && count != 0) {
        for (int t = threadIdx.x + kPushBoxes; t < kThreads; t += kPushBoxes) {
            hit |= suppressed[t] != 0;
        }
        if (hit) {
            w.alive[position] = 0;
        }
    }
}

}  // namespace dl4ds::nms
