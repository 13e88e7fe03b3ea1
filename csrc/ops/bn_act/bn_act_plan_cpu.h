// How bn_act's host functions cut tensors into the rows of bn_act_cpu.h, and the loops over them.
#pragma once

#include <vector>

#include "common/cpu/output.h"
#include "common/cpu/parallel.h"
#include "common/cpu/storage_types.h"
#include "common/layout.h"
#include "ops/bn_act/bn_act_cpu.h"

namespace dl4ds {

/// The rows of x (N, C, *spatial) and of a dense tensor of the same shape in x's memory format.
struct BnPlan {
    DType dtype = DType::kOther;
    bool per_row = false;
    Format format = Format::kContiguous;
    int64_t n = 0, channels = 0, spatial = 0;
    int64_t numel = 0;

    // Per element: pixels in memory order, `group` of them in a row where x is dense (so that a row is long
    // and a whole number of vectors); `tail` pixels are left and form rows of one pixel each.
    int64_t group = 1, rows = 0, len = 0, tail = 0;
    int64_t outer_dims = 0;  // dims over pixels after merging, outermost first
    int64_t outer_sizes[kMaxDims] = {}, outer_strides[kMaxDims] = {};

    // Per row: the planes of x.
    int64_t stride_n = 0, stride_c = 0, plane_rows = 0, plane_len = 0, plane_pitch = 0;

    int64_t bytes() const { return numel * dtype_size(dtype); }
    int64_t count() const { return n * spatial; }  // values per channel
    /// Entries of a channel vector as the kernels want it, padding included.
    int64_t vector_entries() const { return per_row ? channels : pad_elements(len); }
    bool single_plane_row() const { return plane_rows == 1; }
};

/// The plan for x, or false if x's strides need a dense copy first.
bool make_bn_plan(const TensorInfo& x, Format format, BnPlan& plan);

/// x's plan; x is replaced by a dense copy (in x's memory format) where its strides fit no kernel.
BnPlan bn_plan_or_copy(Tensor& x, TensorInfo& info);

/// t as it is if it is dense in the plan's order, else a copy that is.
Tensor in_plan_order(const Tensor& t, const TensorInfo& info, const BnPlan& plan);

/// Channel vectors in the accumulator dtype as the kernels read them: `count` arrays of
/// plan.vector_entries().
template <typename T>
class ChannelArrays {
  public:
    ChannelArrays(const BnPlan& plan, int64_t count)
        : plan_(plan), entries_(plan.vector_entries()), memory_(count * entries_ * int64_t{sizeof(T)}) {}
    T* array(int64_t k) { return memory_.as<T>() + k * entries_; }

    /// Repeats the first `channels` entries of every array over the group's pixels, and zeroes the padding.
    void replicate(int64_t count) {
        if (plan_.per_row) {
            return;
        }
        for (int64_t k = 0; k < count; ++k) {
            T* values = array(k);
            for (int64_t i = plan_.channels; i < plan_.len; ++i) {
                values[i] = values[i - plan_.channels];
            }
            for (int64_t i = plan_.len; i < entries_; ++i) {
                values[i] = T(0);
            }
        }
    }

  private:
    const BnPlan& plan_;
    int64_t entries_;
    Scratch memory_;
};

/// Entry c of a per-channel tensor in any of the floating dtypes.
template <typename T>
T channel_entry(const TensorInfo& v, int64_t c, T absent) {
    if (!v.present) {
        return absent;
    }
    const int64_t at = c * v.strides[0];
    switch (v.dtype) {
        case DType::kFloat32:
            return static_cast<T>(v.as<float>()[at]);
        case DType::kFloat64:
            return static_cast<T>(v.as<double>()[at]);
        case DType::kFloat16:
            return static_cast<T>(to_float(v.as<half_t>()[at]));
        default:
            return static_cast<T>(to_float(v.as<bfloat16_t>()[at]));
    }
}

/// The row blocks of the per-element layout: the same in both passes of an op, so that a thread meets its own
/// data again. A block is a multiple of 8 rows, hence whole mask bytes.
Blocks row_blocks(const BnPlan& plan);

/// True if the outputs of an op (their total size) should be stored past the caches.
bool use_streaming(int64_t output_bytes);

/// Runs the apply kernel over a whole tensor. `whole` has the pointers to the tensors' first elements and the
/// channel arrays; rows, len, pitches and mask are filled in here. mask: the mask's bytes, or null.
/// backwards: from the last block to the first, for a second pass over data of which the first pass left the
/// end in cache.
void bn_apply_all(const BnPlan& plan, Activation act, const BnApplyArgs& whole, uint8_t* mask,
                  bool backwards);

/// The part of bn_apply_all that belongs to one channel of the per-row layout. A mask needs spatial % 8 == 0.
void bn_apply_channel(const BnPlan& plan, Activation act, const BnApplyArgs& whole, uint8_t* mask, int64_t c);

/// Calls fn(first_row, rows, x_offset) for the runs of equally spaced rows within [begin, end).
template <typename Fn>
void for_each_run(const BnPlan& plan, int64_t begin, int64_t end, const Fn& fn) {
    const int64_t inner = plan.outer_dims == 1 ? plan.rows : plan.outer_sizes[plan.outer_dims - 1];
    const int64_t pitch = plan.outer_strides[plan.outer_dims - 1];
    for (int64_t row = begin; row < end;) {
        const int64_t within = row % inner;
        const int64_t count = std::min(end - row, inner - within);
        int64_t offset = within * pitch, rest = row / inner;
        for (int64_t d = plan.outer_dims - 2; d >= 0; --d) {
            offset += rest % plan.outer_sizes[d] * plan.outer_strides[d];
            rest /= plan.outer_sizes[d];
        }
        fn(row, count, offset);
        row += count;
    }
}

inline const void* byte_offset(const void* base, int64_t bytes) {
    return base == nullptr ? nullptr : static_cast<const char*>(base) + bytes;
}
inline void* byte_offset(void* base, int64_t bytes) {
    return base == nullptr ? nullptr : static_cast<char*>(base) + bytes;
}

}  // namespace dl4ds
