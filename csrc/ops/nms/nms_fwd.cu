// Launches of NMS. The sequence depends on sizes only; see nms_work.cuh for the plan.
#include <utility>

#include "ops/nms/nms_kernel.cuh"
#include "ops/nms/nms_plan.cuh"

namespace dl4ds {
namespace {

using namespace nms;

/// Counts launches and keeps the first error.
struct Launches {
    void* stream;
    bool dry;  // only count
    int count = 0;
    int error = 0;

    template <typename... Params, typename... Args>
    void operator()(void (*kernel)(Params...), int64_t blocks, int threads, const Args&... args) {
        ++count;
        if (!dry && error == 0) {
            error = launch(kernel, blocks, threads, stream, args...);
        }
    }
};

template <typename Key>
void sort(Launches& go, SortPass<Key> pass, int passes, int64_t batch, Key* other_keys,
          uint32_t* other_values) {
    const int64_t blocks = batch * pass.tiles;
    Key* keys = const_cast<Key*>(pass.keys);
    uint32_t* values = const_cast<uint32_t*>(pass.values);
    for (int i = 0; i < passes; ++i) {
        pass.keys = keys, pass.values = values;
        pass.keys_out = other_keys, pass.values_out = other_values;
        pass.shift = 8 * i;
        go(nms_count_kernel<Key>, blocks, kSortThreads, pass);
        go(nms_scan_kernel, batch, kScanThreads, pass.counters, int64_t{kDigits} * pass.tiles);
        go(nms_scatter_kernel<Key>, blocks, kSortThreads, pass);
        std::swap(keys, other_keys);
        std::swap(values, other_values);
    }
}

template <typename T>
void run_image_blocks(Launches& go, const NmsFwdParams& p) {
    int size = 1;
    while (size < p.count) {
        size *= 2;
    }
    const int threads = size <= 128 ? 64 : size <= 256 ? 128 : size <= 512 ? 256 : 512;
    go(nms_image_kernel<T>, p.batch, threads, p, size);
}

template <typename T>
void run_sorted(Launches& go, const NmsFwdParams& p) {
    using Rule = rule_of<T>;
    using acc_t = typename Rule::acc_t;
    using Key = typename ScoreKey<T>::type;
    const Plan<T> plan(p);
    const Work<acc_t>& w = plan.work;
    const int share = static_cast<int>(grid_blocks(p.count));
    const int64_t blocks = p.batch * share;
    const int tile_count = static_cast<int>(tiles(p));
    // Passes are even in number, so both sorts end where they began.
    go(nms_keys_kernel<T>, blocks, kThreads, p, w, share, plan.sort.keys[0]);
    const SortPass<Key> by_score{plan.sort.keys[0],  w.order, nullptr,    nullptr,
                                 plan.sort.counters, p.count, tile_count, 0};
    sort(go, by_score, ScoreKey<T>::kPasses, p.batch, plan.sort.keys[1], plan.sort.values);
    if (p.classes != nullptr) {
        go(nms_classes_kernel<T>, blocks, kThreads, w, share, plan.sort.keys[0]);
        const SortPass<uint32_t> by_bin{w.bin_at,           w.rank,  nullptr,    nullptr,
                                        plan.sort.counters, p.count, tile_count, 0};
        sort(go, by_bin, kClassPasses, p.batch, plan.sort.bins, plan.sort.values);
    }
    go(nms_gather_kernel<T>, blocks, kThreads, p, w, share, plan.sort.keys[0]);
    go(nms_large_kernel<acc_t>, p.batch, kScanThreads, w);
    if (has_small_bins(p)) {
        const int shared = w.bins < 256 ? w.bins : 256;
        go(nms_bins_kernel<Rule>, p.batch * shared, kThreads, w, shared);
    }
    const int64_t most = p.classes != nullptr ? p.count / kBlockLimit : 1;
    const int slots = static_cast<int>(most < kLargeSlots ? most : kLargeSlots);
    const int deciders = static_cast<int>(most < 128 ? most : 128);
    for (int64_t round = 0; round < rounds(p); ++round) {
        const uint32_t r = static_cast<uint32_t>(round);
        go(nms_mask_kernel<Rule>, p.batch * kTriangle * slots, kThreads, w, r, slots);
        go(nms_decide_kernel<acc_t>, p.batch * deciders, 32 * kWords, w, r, deciders);
        const int64_t done = (round + 1) * kChunk;  // positions that cannot come after a chunk of this round
        if (done < p.count) {
            const int64_t push = ceil_div(p.count - done, kPushBoxes);
            go(nms_push_kernel<Rule>, p.batch * push, kThreads, w, r, done, static_cast<int>(push));
        }
    }
    go(nms_output_kernel<acc_t>, p.batch, kScanThreads, w, p.keep, p.kept);
}

template <typename Fn>
int dispatch(DType dtype, const Fn& fn) {
    switch (dtype) {
        case DType::kFloat32:
            return fn(TypeTag<float>{});
        case DType::kFloat64:
            return fn(TypeTag<double>{});
        case DType::kFloat16:
            return fn(TypeTag<__half>{});
        case DType::kBFloat16:
            return fn(TypeTag<__nv_bfloat16>{});
        default:
            return static_cast<int>(cudaErrorInvalidValue);
    }
}

int run(const NmsFwdParams& p, Launches& go) {
    if (p.batch < 0 || p.count < 0 || p.count > INT32_MAX || p.max_output < 0) {
        return static_cast<int>(cudaErrorInvalidValue);
    }
    if (p.batch == 0) {
        return 0;
    }
    return dispatch(p.dtype, [&](auto type) {
        using T = typename decltype(type)::type;
        if (solved_by_one_block(p)) {
            run_image_blocks<T>(go, p);
        } else {
            run_sorted<T>(go, p);
        }
        return go.error;
    });
}

}  // namespace

int64_t nms_fwd_workspace(const NmsFwdParams& p) {
    if (p.batch == 0 || solved_by_one_block(p)) {
        return 0;
    }
    int64_t bytes = 0;
    dispatch(p.dtype, [&](auto type) {
        bytes = Plan<typename decltype(type)::type>(p).bytes;
        return 0;
    });
    return bytes;
}

int nms_fwd_launches(const NmsFwdParams& p) {
    Launches count{nullptr, true};
    run(p, count);
    return count.count;
}

int launch_nms_fwd(const NmsFwdParams& p, void* stream) {
    Launches go{stream, false};
    return run(p, go);
}

}  // namespace dl4ds
