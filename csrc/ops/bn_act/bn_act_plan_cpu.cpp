#include "ops/bn_act/bn_act_plan_cpu.h"

#include <numeric>

#include "common/cpu/isa.h"

namespace dl4ds {
namespace {

constexpr int64_t kGroupElements = 256;      // rows of a dense tensor are at least this long ...
constexpr int64_t kMaxGroupElements = 4096;  // ... unless a whole number of vectors would need more than this
constexpr int64_t kBlockBytes = 256 << 10;
constexpr int64_t kMaxBlocks = 256;

/// Merges x's dims other than C, outermost first, where one continues the other.
void collapse_pixels(const TensorInfo& x, BnPlan& plan) {
    plan.outer_dims = 0;
    for (int64_t d = 0; d < x.dim; ++d) {
        if (d == 1 || x.sizes[d] == 1) {
            continue;
        }
        const int64_t last = plan.outer_dims - 1;
        if (last >= 0 && plan.outer_strides[last] == x.strides[d] * x.sizes[d]) {
            plan.outer_sizes[last] *= x.sizes[d];
            plan.outer_strides[last] = x.strides[d];
        } else {
            plan.outer_sizes[plan.outer_dims] = x.sizes[d];
            plan.outer_strides[plan.outer_dims] = x.strides[d];
            ++plan.outer_dims;
        }
    }
    if (plan.outer_dims == 0) {
        plan.outer_dims = 1;
        plan.outer_sizes[0] = 1;
        plan.outer_strides[0] = plan.channels;
    }
}

bool plan_per_element(const TensorInfo& x, BnPlan& plan) {
    if (plan.channels > 1 && x.strides[1] != 1) {
        return false;
    }
    collapse_pixels(x, plan);
    const int64_t pixels = plan.count();
    const bool dense = plan.outer_dims == 1 && plan.outer_strides[0] == plan.channels;
    if (dense) {
        const int64_t whole = kPadElements / std::gcd(plan.channels, kPadElements);
        const int64_t step = whole * plan.channels;
        plan.group = std::max<int64_t>(1, kGroupElements / step) * whole;
        if (plan.group * plan.channels > kMaxGroupElements || plan.group > pixels) {
            plan.group = 1;
        }
    }
    plan.rows = pixels / plan.group;
    plan.tail = pixels % plan.group;
    plan.len = plan.channels * plan.group;
    plan.outer_strides[plan.outer_dims - 1] *= plan.group;
    return true;
}

bool plan_per_row(const TensorInfo& x, BnPlan& plan) {
    plan.stride_n = x.strides[0];
    plan.stride_c = x.strides[1];
    int64_t size = 1, rows = 1, pitch = 0;
    // From the innermost dim outwards: `size` elements without gaps, then `rows` of them, `pitch` apart.
    for (int64_t d = x.dim - 1; d >= 2; --d) {
        if (x.sizes[d] == 1) {
            continue;
        }
        if (rows == 1 && x.strides[d] == size) {
            size *= x.sizes[d];
        } else if (rows == 1 && size > 1) {
            rows = x.sizes[d];
            pitch = x.strides[d];
        } else if (rows > 1 && x.strides[d] == rows * pitch) {
            rows *= x.sizes[d];
        } else {
            return false;
        }
    }
    plan.plane_rows = rows;
    plan.plane_len = size;
    plan.plane_pitch = rows == 1 ? size : pitch;
    return true;
}

/// Arguments of the rows [first, first + count) of a per-element plan, x at x_offset.
BnApplyArgs apply_rows(const BnPlan& plan, const BnApplyArgs& whole, int64_t element, int64_t x_offset,
                       int64_t count, int64_t len, int64_t x_pitch) {
    const int64_t size = dtype_size(plan.dtype);
    BnApplyArgs p = whole;
    p.x = byte_offset(whole.x, x_offset * size);
    p.residual = byte_offset(whole.residual, element * size);
    p.out = byte_offset(whole.out, element * size);
    p.rows = count;
    p.len = len;
    p.x_pitch = x_pitch;
    p.pitch = len;
    return p;
}

void apply_per_element(const BnPlan& plan, Activation act, const BnApplyArgs& whole, uint8_t* mask,
                       bool backwards) {
    const auto kernel = bn_kernels().apply[static_cast<int>(plan.dtype)][0][static_cast<int>(act)];
    const Blocks blocks = row_blocks(plan);
    const int64_t pitch = plan.outer_strides[plan.outer_dims - 1];
    parallel_for(blocks.count, 2 * plan.bytes(), [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
            const int64_t block = backwards ? begin + (end - 1 - i) : i;
            BitWriter bits{mask == nullptr ? nullptr : mask + blocks.begin(block) * plan.len / 8};
            for_each_run(
                plan, blocks.begin(block), blocks.end(block), [&](int64_t row, int64_t count, int64_t x_at) {
                    BnApplyArgs p = apply_rows(plan, whole, row * plan.len, x_at, count, plan.len, pitch);
                    p.mask = mask == nullptr ? nullptr : &bits;
                    kernel(p);
                });
            bits.finish();
        }
    });
    if (plan.tail > 0) {
        const int64_t at = plan.rows * plan.len;
        BitWriter bits{mask == nullptr ? nullptr : mask + at / 8};
        BnApplyArgs p = apply_rows(plan, whole, at, at, plan.tail, plan.channels, plan.channels);
        p.mask = mask == nullptr ? nullptr : &bits;
        kernel(p);
        bits.finish();
    }
}

/// One plane (n, c) of the per-row layout.
void apply_plane(const BnPlan& plan, Activation act, const BnApplyArgs& whole, BitWriter* bits, int64_t n,
                 int64_t c) {
    const int64_t acc_size = dtype_size(acc_dtype(plan.dtype));
    BnApplyArgs p =
        apply_rows(plan, whole, (n * plan.channels + c) * plan.spatial, n * plan.stride_n + c * plan.stride_c,
                   plan.plane_rows, plan.plane_len, plan.plane_pitch);
    p.mask = bits;
    p.mean = byte_offset(whole.mean, c * acc_size);
    p.scale = byte_offset(whole.scale, c * acc_size);
    p.shift = byte_offset(whole.shift, c * acc_size);
    bn_kernels().apply[static_cast<int>(plan.dtype)][1][static_cast<int>(act)](p);
}

}  // namespace

bool make_bn_plan(const TensorInfo& x, Format format, BnPlan& plan) {
    plan = BnPlan{};
    plan.dtype = x.dtype;
    plan.format = format;
    plan.n = x.sizes[0];
    plan.channels = x.sizes[1];
    plan.numel = x.numel;
    plan.spatial = 1;
    for (int64_t d = 2; d < x.dim; ++d) {
        plan.spatial *= x.sizes[d];
    }
    plan.per_row = format == Format::kContiguous && plan.spatial > 1;
    if (plan.numel == 0) {
        plan.outer_dims = 1;
        plan.outer_sizes[0] = 0;
        plan.plane_rows = plan.plane_len = 1;
        plan.len = plan.channels;
        return true;
    }
    return plan.per_row ? plan_per_row(x, plan) : plan_per_element(x, plan);
}

BnPlan bn_plan_or_copy(Tensor& x, TensorInfo& info) {
    BnPlan plan;
    const Format format = suggest_format(info);
    if (!make_bn_plan(info, format, plan)) {
        x = copy_with_strides(x, info, dense_strides(info.sizes, info.dim, format).data());
        info = tensor_info(x);
        make_bn_plan(info, format, plan);
    }
    return plan;
}

Tensor in_plan_order(const Tensor& t, const TensorInfo& info, const BnPlan& plan) {
    const auto strides = dense_strides(info.sizes, info.dim, plan.format);
    if (same_strides(info.strides, strides.data(), info.sizes, info.dim)) {
        return t;
    }
    return copy_with_strides(t, info, strides.data());
}

Blocks row_blocks(const BnPlan& plan) {
    return fixed_blocks(plan.rows, plan.len * dtype_size(plan.dtype), kBlockBytes, 8, kMaxBlocks);
}

bool use_streaming(int64_t output_bytes) { return output_bytes > cache_sizes().llc_bytes / 2; }

void bn_apply_channel(const BnPlan& plan, Activation act, const BnApplyArgs& whole, uint8_t* mask,
                      int64_t c) {
    if (mask == nullptr && plan.single_plane_row()) {
        const int64_t acc_size = dtype_size(acc_dtype(plan.dtype));
        BnApplyArgs p = apply_rows(plan, whole, c * plan.spatial, c * plan.stride_c, plan.n, plan.plane_len,
                                   plan.stride_n);
        p.pitch = plan.channels * plan.spatial;
        p.mask = nullptr;
        p.mean = byte_offset(whole.mean, c * acc_size);
        p.scale = byte_offset(whole.scale, c * acc_size);
        p.shift = byte_offset(whole.shift, c * acc_size);
        bn_kernels().apply[static_cast<int>(plan.dtype)][1][static_cast<int>(act)](p);
        return;
    }
    for (int64_t n = 0; n < plan.n; ++n) {
        BitWriter bits{mask == nullptr ? nullptr : mask + (n * plan.channels + c) * plan.spatial / 8};
        apply_plane(plan, act, whole, mask == nullptr ? nullptr : &bits, n, c);
        bits.finish();
    }
}

void bn_apply_all(const BnPlan& plan, Activation act, const BnApplyArgs& whole, uint8_t* mask,
                  bool backwards) {
    if (plan.numel == 0) {
        return;
    }
    if (!plan.per_row) {
        apply_per_element(plan, act, whole, mask, backwards);
        return;
    }
    // Planes in memory order, eight at a time: eight planes fill whole mask bytes whatever their size.
    const int64_t planes = plan.n * plan.channels;
    const Blocks blocks =
        fixed_blocks(planes, plan.spatial * dtype_size(plan.dtype), kBlockBytes / 4, 8, int64_t{1} << 40);
    const int64_t units = mask != nullptr ? blocks.count : planes;
    parallel_for(units, 2 * plan.bytes(), [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
            const int64_t unit = backwards ? begin + (end - 1 - i) : i;
            if (mask == nullptr) {
                apply_plane(plan, act, whole, nullptr, unit / plan.channels, unit % plan.channels);
                continue;
            }
            BitWriter bits{mask + blocks.begin(unit) * plan.spatial / 8};
            for (int64_t plane = blocks.begin(unit); plane < blocks.end(unit); ++plane) {
                apply_plane(plan, act, whole, &bits, plane / plan.channels, plane % plan.channels);
            }
            bits.finish();
        }
    });
}

}  // namespace dl4ds
