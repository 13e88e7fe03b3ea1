// The kernels of bn_act on rows (see bn_act_cpu.h), compiled once per ISA by foreach_isa.h.
#include "common/cpu/vec_activation.h"

namespace dl4ds {
namespace DL4DS_ISA {

/// Rows that the per-element reductions sum in the accumulator type before they go to doubles.
constexpr int kRowGroup = 8;
/// Rows that they read side by side, so that sums are loaded and stored once for all of them. Side by side is
/// more streams than a hardware prefetcher follows (half the bandwidth), hence prefetch_ahead().
constexpr int kFront = 4;
constexpr int64_t kPrefetchBytes = 8 << 10;
/// Rows that share one shift in the statistics. With the shift the mean of kRowGroup of n rows, the squared
/// distance of shift and mean is at most n / kRowGroup variances, which bounds the cancellation in the
/// variance.
constexpr int64_t kStatsRows = 512;

/// The channel's constants for one vector: an array entry each (per element) or one value (per row).
template <typename T, bool kPerRow>
DL4DS_INLINE Vec<T> channel_value(const void* values, int64_t i) {
    const T* array = static_cast<const T*>(values);
    if constexpr (kPerRow) {
        return broadcast<T>(array[0]);
    } else {
        return load(array + i);
    }
}

/// Asks for the memory kPrefetchBytes ahead, in the order of addresses, while column i of row k of a front is
/// read.
template <typename scalar_t>
DL4DS_INLINE void prefetch_ahead(const scalar_t* first_row, int64_t i, int k) {
    const scalar_t* now = first_row + i * kFront + k * kLanes<acc_t<scalar_t>>;
    __builtin_prefetch(reinterpret_cast<const char*>(now) + kPrefetchBytes);
}

/// Moves sums of the accumulator type to doubles and starts them anew. `entries` is a padded length.
template <typename T>
DL4DS_INLINE void flush_sums(T* sums, double* totals, int64_t entries) {
    for (int64_t i = 0; i < entries; i += kLanes<T>) {
        add_to_doubles<T>(totals + i, load(sums + i));
        store(sums + i, Vec<T>{});
    }
}

}  // namespace DL4DS_ISA
}  // namespace dl4ds

#include "ops/bn_act/bn_act_apply_kernels_cpu.h"
#include "ops/bn_act/bn_act_bwd_kernels_cpu.h"
#include "ops/bn_act/bn_act_dense_kernels_cpu.h"
#include "ops/bn_act/bn_act_stats_kernels_cpu.h"

namespace dl4ds {
namespace DL4DS_ISA {

#define DL4DS_ALL_ACTIVATIONS(kernel, scalar_t, per_row)                                                 \
    {&kernel<scalar_t, Activation::kNone, per_row>,      &kernel<scalar_t, Activation::kRelu, per_row>,  \
     &kernel<scalar_t, Activation::kLeakyRelu, per_row>, &kernel<scalar_t, Activation::kRelu6, per_row>, \
     &kernel<scalar_t, Activation::kSilu, per_row>,      &kernel<scalar_t, Activation::kHardswish, per_row>}
#define DL4DS_BOTH_LAYOUTS(kernel, scalar_t) \
    {DL4DS_ALL_ACTIVATIONS(kernel, scalar_t, false), DL4DS_ALL_ACTIVATIONS(kernel, scalar_t, true)}
#define DL4DS_ALL_DTYPES(kernel)                                            \
    {DL4DS_BOTH_LAYOUTS(kernel, float), DL4DS_BOTH_LAYOUTS(kernel, double), \
     DL4DS_BOTH_LAYOUTS(kernel, half_t), DL4DS_BOTH_LAYOUTS(kernel, bfloat16_t)}

#define DL4DS_EVERY_ACTIVATION(kernel, scalar_t)                                       \
    {&kernel<scalar_t, Activation::kNone>,      &kernel<scalar_t, Activation::kRelu>,  \
     &kernel<scalar_t, Activation::kLeakyRelu>, &kernel<scalar_t, Activation::kRelu6>, \
     &kernel<scalar_t, Activation::kSilu>,      &kernel<scalar_t, Activation::kHardswish>}

const BnKernels kBnKernels = {
    {{&stats_per_element<float>, &stats_per_row<float>},
     {&stats_per_element<double>, &stats_per_row<double>},
     {&stats_per_element<half_t>, &stats_per_row<half_t>},
     {&stats_per_element<bfloat16_t>, &stats_per_row<bfloat16_t>}},
    DL4DS_ALL_DTYPES(apply),
    DL4DS_ALL_DTYPES(bwd_reduce),
    DL4DS_ALL_DTYPES(bwd_apply),
    {DL4DS_EVERY_ACTIVATION(dense_bwd, float), DL4DS_EVERY_ACTIVATION(dense_bwd, double),
     DL4DS_EVERY_ACTIVATION(dense_bwd, half_t), DL4DS_EVERY_ACTIVATION(dense_bwd, bfloat16_t)},
    {&dense_take<float>, &dense_take<double>, &dense_take<half_t>, &dense_take<bfloat16_t>},
};

#undef DL4DS_ALL_ACTIVATIONS
#undef DL4DS_BOTH_LAYOUTS
#undef DL4DS_ALL_DTYPES
#undef DL4DS_EVERY_ACTIVATION

}  // namespace DL4DS_ISA
}  // namespace dl4ds
