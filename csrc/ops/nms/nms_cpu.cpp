// NMS on the CPU: nms, batched_nms, nms_padded. float32 and float64; 16-bit floats are widened, which is
// exact.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <bit>
#include <optional>
#include <tuple>
#include <vector>

#include "ops/nms/nms_host.h"
#include "ops/nms/nms_solve.h"

#define DL4DS_ISA_SOURCE "ops/nms/nms_kernels_cpu.h"
#include "common/cpu/foreach_isa.h"

namespace dl4ds {
namespace {

using nms::check_boxes;
using nms::check_classes;
using nms::check_max_output;
using nms::Keyed;
using nms::new_indices;
using nms::Segment;
using nms::Solver;
using torch::stable::Tensor;

constexpr int64_t kBoxesPerThread = 8192;  // less work than this is not worth a thread

template <typename T>
using KeyOf = decltype(nms::descending_key(T{}));

/// The SIMD kernels. AVX-512 machines take the 32-byte ones: short dependent steps decide here, not width,
/// and they were measured 5 to 20 % faster.
template <typename T>
const nms::Kernels<T>& kernels() {
#if defined(__x86_64__)
    return active_isa() == Isa::kBaseline ? baseline::kNmsKernels<T> : avx2::kNmsKernels<T>;
#else
    return baseline::kNmsKernels<T>;
#endif
}

/// One image: (n, 4) boxes, (n,) scores, and class ids or null.
template <typename T>
struct Image {
    const T* boxes;
    const T* scores;
    const int64_t* classes;
    int64_t n;
};

/// Indices in torch's stable descending order of score; with a score threshold, of the boxes above it only.
template <typename T>
void sort_by_score(const Image<T>& image, std::optional<double> score_threshold,
                   std::vector<uint32_t>& order) {
    std::vector<Keyed<KeyOf<T>>> items, spare;
    items.reserve(image.n);
    for (int64_t i = 0; i < image.n; ++i) {
        if (!score_threshold || static_cast<double>(image.scores[i]) > *score_threshold) {
            items.push_back({nms::descending_key(image.scores[i]), static_cast<uint32_t>(i)});
        }
    }
    spare.resize(items.size());
    const int64_t n = static_cast<int64_t>(items.size());
    const auto* sorted =
        nms::radix_sort(items.data(), spare.data(), n, 8 * static_cast<int>(sizeof(KeyOf<T>)));
    order.resize(n);
    for (int64_t i = 0; i < n; ++i) {
        order[i] = sorted[i].index;
    }
}

/// Ranks grouped by class, score order kept within a class; `starts` gets the first position of each class
/// and the end.
std::vector<uint32_t> group_by_class(const int64_t* classes, const std::vector<uint32_t>& order,
                                     std::vector<int64_t>& starts) {
    const int64_t n = static_cast<int64_t>(order.size());
    int64_t lowest = n ? classes[order[0]] : 0, highest = lowest;
    for (const uint32_t row : order) {
        lowest = std::min(lowest, classes[row]);
        highest = std::max(highest, classes[row]);
    }
    std::vector<Keyed<uint64_t>> items(n), spare(n);
    for (int64_t rank = 0; rank < n; ++rank) {
        const uint64_t key = static_cast<uint64_t>(classes[order[rank]]) - static_cast<uint64_t>(lowest);
        items[rank] = {key, static_cast<uint32_t>(rank)};
    }
    const uint64_t range = static_cast<uint64_t>(highest) - static_cast<uint64_t>(lowest);
    const auto* sorted =
        nms::radix_sort(items.data(), spare.data(), n, static_cast<int>(std::bit_width(range)));
    std::vector<uint32_t> ranks(n);
    for (int64_t i = 0; i < n; ++i) {
        ranks[i] = sorted[i].index;
        if (i == 0 || sorted[i].key != sorted[i - 1].key) {
            starts.push_back(i);
        }
    }
    starts.push_back(n);
    return ranks;
}

/// Solves every class of an image by itself and gives the kept rows of all, in score order.
template <typename T>
std::vector<uint32_t> solve_classes(const Image<T>& image, const std::vector<uint32_t>& order,
                                    double threshold, int64_t max_keep, bool parallel) {
    std::vector<int64_t> starts;
    const std::vector<uint32_t> ranks = group_by_class(image.classes, order, starts);
    const int64_t n = static_cast<int64_t>(ranks.size()),
                  num_classes = static_cast<int64_t>(starts.size()) - 1;
    std::vector<uint32_t> members(n);
    for (int64_t i = 0; i < n; ++i) {
        members[i] = order[ranks[i]];
    }
    std::vector<uint8_t> kept(n, 0);  // by rank
    std::atomic<int64_t> next{0};
    const auto work = [&](bool split) {
        Solver<T> solver(kernels<T>(), threshold);
        for (int64_t c = next++; c < num_classes; c = next++) {
            const int64_t start = starts[c];
            const Segment<T> segment{
                image.boxes, members.data() + start, nullptr, starts[c + 1] - start, T(0), max_keep};
            for (const uint32_t local : solver.solve(segment, split)) {
                kept[ranks[start + local]] = 1;
            }
        }
    };
    const int64_t threads =
        std::min<int64_t>({num_classes, n / kBoxesPerThread, torch::stable::get_num_threads()});
    if (parallel && threads > 1) {
        torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
            for (int64_t worker = begin; worker < end; ++worker) {
                work(false);
            }
        });
    } else {
        work(parallel);
    }
    std::vector<uint32_t> rows;
    for (int64_t rank = 0; rank < n && static_cast<int64_t>(rows.size()) < max_keep; ++rank) {
        if (kept[rank]) {
            rows.push_back(order[rank]);
        }
    }
    return rows;
}

/// The kept rows of an image in score order, at most max_keep.
template <typename T>
std::vector<uint32_t> solve_image(const Image<T>& image, double threshold,
                                  std::optional<double> score_threshold, int64_t max_keep, bool parallel) {
    std::vector<uint32_t> order;
    if (image.classes) {
        sort_by_score(image, score_threshold, order);
        return solve_classes(image, order, threshold, max_keep, parallel);
    }
    Solver<T> solver(kernels<T>(), threshold);
    if (score_threshold) {
        sort_by_score(image, score_threshold, order);
        const Segment<T> segment{image.boxes, order.data(), nullptr, static_cast<int64_t>(order.size()),
                                 T(0),        max_keep};
        std::vector<uint32_t> rows = solver.solve(segment, parallel);
        for (uint32_t& row : rows) {
            row = order[row];
        }
        return rows;
    }
    order.resize(image.n);
    const Segment<T> segment{image.boxes, nullptr, order.data(), image.n, T(0), max_keep};
    return solver.solve(segment, parallel, [&] { sort_by_score(image, std::nullopt, order); });
}

/// Contiguous, and float32 for the 16-bit floats.
Tensor prepare(const Tensor& x, DType dtype) {
    using torch::headeronly::ScalarType;
    const bool half = dtype == DType::kFloat16 || dtype == DType::kBFloat16;
    return torch::stable::contiguous(half ? torch::stable::to(x, ScalarType::Float) : x);
}

/// The inputs of a call in the layout and dtype the solvers read, kept alive while they do.
template <typename T>
struct Inputs {
    Tensor boxes, scores, classes;
    bool has_classes;

    Inputs(const Tensor& boxes_, const Tensor& scores_, const std::optional<Tensor>& classes_, DType dtype)
        : boxes(prepare(boxes_, dtype)),
          scores(prepare(scores_, dtype)),
          classes(classes_ ? torch::stable::contiguous(*classes_) : scores),
          has_classes(classes_.has_value()) {}

    Image<T> image(int64_t index, int64_t n) const {
        return {static_cast<const T*>(boxes.data_ptr()) + index * n * 4,
                static_cast<const T*>(scores.data_ptr()) + index * n,
                has_classes ? static_cast<const int64_t*>(classes.data_ptr()) + index * n : nullptr, n};
    }
};

/// Calls fn(T{}) for the type the arithmetic is done in.
template <typename Fn>
decltype(auto) dispatch_acc(DType dtype, const Fn& fn) {
    return dtype == DType::kFloat64 ? fn(double{}) : fn(float{});
}

Tensor solve_one(const char* op, const Tensor& boxes, const Tensor& scores,
                 const std::optional<Tensor>& classes, double iou_threshold) {
    const TensorInfo info = tensor_info(boxes), score_info = tensor_info(scores);
    check_boxes(op, info, score_info, 0);
    if (classes) {
        check_classes(op, *classes, score_info);
    }
    return dispatch_acc(info.dtype, [&](auto zero) {
        using T = decltype(zero);
        const Inputs<T> inputs(boxes, scores, classes, info.dtype);
        const int64_t n = score_info.numel;
        const std::vector<uint32_t> rows =
            solve_image(inputs.image(0, n), iou_threshold, std::nullopt, n, true);
        Tensor keep = new_indices(boxes, {static_cast<int64_t>(rows.size())});
        std::copy(rows.begin(), rows.end(), static_cast<int64_t*>(keep.data_ptr()));
        return keep;
    });
}

Tensor nms_cpu(const Tensor& boxes, const Tensor& scores, double iou_threshold) {
    return solve_one("nms", boxes, scores, std::nullopt, iou_threshold);
}

Tensor batched_nms_cpu(const Tensor& boxes, const Tensor& scores, const Tensor& idxs, double iou_threshold) {
    return solve_one("batched_nms", boxes, scores, idxs, iou_threshold);
}

std::tuple<Tensor, Tensor> nms_padded_cpu(const Tensor& boxes, const Tensor& scores,
                                          const std::optional<Tensor>& class_ids, double iou_threshold,
                                          double score_threshold, int64_t max_output) {
    const char* op = "nms_padded";
    const TensorInfo info = tensor_info(boxes), score_info = tensor_info(scores);
    check_boxes(op, info, score_info, 1);
    if (class_ids) {
        check_classes(op, *class_ids, score_info);
    }
    check_max_output(op, max_output);
    const int64_t batch = info.sizes[0], n = info.sizes[1];
    return dispatch_acc(info.dtype, [&](auto zero) {
        using T = decltype(zero);
        const Inputs<T> inputs(boxes, scores, class_ids, info.dtype);
        Tensor keep = new_indices(boxes, {batch, max_output}), count = new_indices(boxes, {batch});
        int64_t* keep_data = static_cast<int64_t*>(keep.data_ptr());
        int64_t* count_data = static_cast<int64_t*>(count.data_ptr());
        const auto solve_batch = [&](int64_t begin, int64_t end) {
            for (int64_t b = begin; b < end; ++b) {
                const std::vector<uint32_t> rows =
                    solve_image(inputs.image(b, n), iou_threshold, score_threshold, max_output, batch == 1);
                int64_t* out = std::copy(rows.begin(), rows.end(), keep_data + b * max_output);
                std::fill(out, keep_data + (b + 1) * max_output, int64_t{-1});
                count_data[b] = static_cast<int64_t>(rows.size());
            }
        };
        torch::stable::parallel_for(0, batch, 1 + kBoxesPerThread / (n + 1), solve_batch);
        return std::tuple(keep, count);
    });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dl4ds_kernels, CPU, m) {
    m.impl("nms", TORCH_BOX(&nms_cpu));
    m.impl("batched_nms", TORCH_BOX(&batched_nms_cpu));
    m.impl("nms_padded", TORCH_BOX(&nms_padded_cpu));
}

}  // namespace dl4ds
