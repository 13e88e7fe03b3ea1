#include "ops/upsample_add/upsample_add_cpu.h"

#include <torch/csrc/stable/library.h>

#include <optional>

#include "common/cpu/isa.h"
#include "common/cpu/output.h"
#include "common/cpu/parallel.h"

namespace dl4ds {
namespace {

/// A tensor in the given dense format: itself where it lies so, else a copy.
Tensor in_format(const Tensor& t, const TensorInfo& info, Format format) {
    const auto strides = dense_strides(info.sizes, info.dim, format);
    return same_strides(info.strides, strides.data(), info.sizes, info.dim)
               ? t
               : copy_with_strides(t, info, strides.data());
}

void check_maps(const char* op, const char* name, const TensorInfo& x) {
    DL4DS_CHECK(x.dim == 4, op, ": ", name, ": expected (N, C, H, W), got shape ", x.shape());
    DL4DS_CHECK(is_floating(x.dtype), op, ": ", name,
                ": expected dtype float32, float64, float16 or bfloat16, got ", dtype_name(x.dtype));
}

char* at(void* base, int64_t elements, int64_t size) { return static_cast<char*>(base) + elements * size; }

/// Rows of the small map, and the elements of one: channels_last has a row for each n and y, contiguous one
/// for each n, c and y.
struct Rows {
    int64_t count, width, channels;

    Rows(const int64_t* sizes, Format format)
        : count(format == Format::kChannelsLast ? sizes[0] * sizes[2] : sizes[0] * sizes[1] * sizes[2]),
          width(sizes[3]),
          channels(format == Format::kChannelsLast ? sizes[1] : 1) {}
    int64_t elements() const { return width * channels; }
};

}  // namespace

Tensor upsample_add_fwd_cpu(Tensor low, Tensor skip) {
    constexpr const char* kOp = "upsample_add";
    const TensorInfo li = tensor_info(low), si = tensor_info(skip);
    check_maps(kOp, "low", li);
    check_maps(kOp, "skip", si);
    check_dtype(kOp, "skip", si, li.dtype);
    check_same_device(kOp, "skip", si, li);
    DL4DS_CHECK(si.sizes[0] == li.sizes[0] && si.sizes[1] == li.sizes[1] && si.sizes[2] == 2 * li.sizes[2] &&
                    si.sizes[3] == 2 * li.sizes[3],
                kOp, ": skip: expected twice the height and width of low ", li.shape(), ", got ", si.shape());
    const Format format = suggest_format(si);
    const auto strides = dense_strides(si.sizes, 4, format);
    Tensor out = empty_cpu(si.sizes, strides.data(), 4, si.dtype);
    const Tensor low_dense = in_format(low, li, format), skip_dense = in_format(skip, si, format);
    void* const low_data = tensor_info(low_dense).data;
    void* const skip_data = tensor_info(skip_dense).data;
    void* const out_data = tensor_info(out).data;
    const Rows rows(li.sizes, format);
    const int64_t size = dtype_size(li.dtype), n = rows.elements();
    const auto kernel = upsample_add_kernels().fwd[static_cast<int>(li.dtype)][rows.channels == 1];
    parallel_for(rows.count, 9 * li.numel * size, [&](int64_t first, int64_t last) {
        for (int64_t r = first; r < last; ++r) {
            const int64_t upper = 4 * r * n, lower = upper + 2 * n;
            kernel({at(low_data, r * n, size),
                    {at(skip_data, upper, size), at(skip_data, lower, size)},
                    {at(out_data, upper, size), at(out_data, lower, size)},
                    rows.width,
                    rows.channels});
        }
    });
    return out;
}

Tensor upsample_add_bwd_cpu(Tensor dout) {
    constexpr const char* kOp = "upsample_add_bwd";
    const TensorInfo di = tensor_info(dout);
    check_maps(kOp, "dout", di);
    DL4DS_CHECK(di.sizes[2] % 2 == 0 && di.sizes[3] % 2 == 0, kOp,
                ": dout: expected an even height and width, got ", di.shape());
    const Format format = suggest_format(di);
    const int64_t sizes[4] = {di.sizes[0], di.sizes[1], di.sizes[2] / 2, di.sizes[3] / 2};
    const auto strides = dense_strides(sizes, 4, format);
    Tensor dlow = empty_cpu(sizes, strides.data(), 4, di.dtype);
    const Tensor dense = in_format(dout, di, format);
    void* const dout_data = tensor_info(dense).data;
    void* const dlow_data = tensor_info(dlow).data;
    const Rows rows(sizes, format);
    const int64_t size = dtype_size(di.dtype), n = rows.elements();
    const auto kernel = upsample_add_kernels().bwd[static_cast<int>(di.dtype)][rows.channels == 1];
    parallel_for(rows.count, 5 * rows.count * n * size, [&](int64_t first, int64_t last) {
        for (int64_t r = first; r < last; ++r) {
            kernel({{at(dout_data, 4 * r * n, size), at(dout_data, (4 * r + 2) * n, size)},
                    at(dlow_data, r * n, size),
                    rows.width,
                    rows.channels});
        }
    });
    return dlow;
}

STABLE_TORCH_LIBRARY_IMPL(dl4ds_kernels, CPU, m) {
    m.impl("upsample_add", TORCH_BOX(&upsample_add_fwd_cpu));
    m.impl("upsample_add_bwd", TORCH_BOX(&upsample_add_bwd_cpu));
}

}  // namespace dl4ds
