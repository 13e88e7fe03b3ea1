#include "ops/max_pool_indices/max_pool_indices_cpu.h"

#include <torch/csrc/stable/library.h>

#include <tuple>

#include "common/cpu/isa.h"
#include "common/cpu/output.h"
#include "common/cpu/parallel.h"

namespace dl4ds {
namespace {

Tensor in_format(const Tensor& t, const TensorInfo& info, Format format) {
    const auto strides = dense_strides(info.sizes, info.dim, format);
    return same_strides(info.strides, strides.data(), info.sizes, info.dim)
               ? t
               : copy_with_strides(t, info, strides.data());
}

Tensor empty_in_format(const int64_t* sizes, DType dtype, Format format) {
    const auto strides = dense_strides(sizes, 4, format);
    return empty_cpu(sizes, strides.data(), 4, dtype);
}

void check_maps(const char* op, const char* name, const TensorInfo& x) {
    DL4DS_CHECK(x.dim == 4, op, ": ", name, ": expected (N, C, H, W), got shape ", x.shape());
    DL4DS_CHECK(is_floating(x.dtype), op, ": ", name,
                ": expected dtype float32, float64, float16 or bfloat16, got ", dtype_name(x.dtype));
}

void check_even(const char* op, const char* name, const TensorInfo& x) {
    DL4DS_CHECK(x.sizes[2] % 2 == 0 && x.sizes[3] % 2 == 0, op, ": ", name,
                ": expected an even height and width, got ", x.shape());
}

void check_where(const char* op, const TensorInfo& where, const int64_t* sizes) {
    check_dtype(op, "where", where, DType::kUInt8);
    bool fits = where.dim == 4;
    for (int64_t d = 0; fits && d < 4; ++d) {
        fits = where.sizes[d] == sizes[d];
    }
    DL4DS_CHECK(fits, op, ": where: expected shape ", shape_to_string(sizes, 4), ", got ", where.shape());
}

char* at(void* base, int64_t bytes) { return static_cast<char*>(base) + bytes; }

/// Rows of windows: channels_last has one for each n and y, contiguous one for each n, c and y.
struct Rows {
    int64_t count, width, channels;

    Rows(const int64_t* sizes, Format format)
        : count(format == Format::kChannelsLast ? sizes[0] * sizes[2] : sizes[0] * sizes[1] * sizes[2]),
          width(sizes[3]),
          channels(format == Format::kChannelsLast ? sizes[1] : 1) {}
    int64_t elements() const { return width * channels; }
};

/// y at its places in maps of twice the size, zeros elsewhere; laid out like `where`.
Tensor unpool(const char* op, const char* name, const Tensor& y, const Tensor& where) {
    const TensorInfo yi = tensor_info(y), wi = tensor_info(where);
    check_maps(op, name, yi);
    check_where(op, wi, yi.sizes);
    check_same_device(op, "where", wi, yi);
    const Format format = suggest_format(wi);
    const int64_t sizes[4] = {yi.sizes[0], yi.sizes[1], 2 * yi.sizes[2], 2 * yi.sizes[3]};
    Tensor out = empty_in_format(sizes, yi.dtype, format);
    const Tensor y_dense = in_format(y, yi, format), where_dense = in_format(where, wi, format);
    void *const y_data = tensor_info(y_dense).data, *const out_data = tensor_info(out).data;
    const uint8_t* const places = tensor_info(where_dense).as<uint8_t>();
    const Rows rows(yi.sizes, format);
    const int64_t size = dtype_size(yi.dtype), n = rows.elements();
    const auto kernel = max_pool_kernels().unpool[static_cast<int>(yi.dtype)][rows.channels == 1];
    parallel_for(rows.count, 5 * yi.numel * size, [&](int64_t first, int64_t last) {
        for (int64_t r = first; r < last; ++r) {
            kernel({at(y_data, r * n * size),
                    places + r * n,
                    {at(out_data, 4 * r * n * size), at(out_data, (4 * r + 2) * n * size)},
                    rows.width,
                    rows.channels});
        }
    });
    return out;
}

}  // namespace

std::tuple<Tensor, Tensor> max_pool_indices_fwd_cpu(Tensor x) {
    constexpr const char* kOp = "max_pool_indices";
    const TensorInfo xi = tensor_info(x);
    check_maps(kOp, "x", xi);
    check_even(kOp, "x", xi);
    const Format format = suggest_format(xi);
    const int64_t sizes[4] = {xi.sizes[0], xi.sizes[1], xi.sizes[2] / 2, xi.sizes[3] / 2};
    Tensor out = empty_in_format(sizes, xi.dtype, format);
    Tensor where = empty_in_format(sizes, DType::kUInt8, format);
    const Tensor dense = in_format(x, xi, format);
    void *const x_data = tensor_info(dense).data, *const out_data = tensor_info(out).data;
    uint8_t* const places = tensor_info(where).as<uint8_t>();
    const Rows rows(sizes, format);
    const int64_t size = dtype_size(xi.dtype), n = rows.elements();
    const auto kernel = max_pool_kernels().pool[static_cast<int>(xi.dtype)][rows.channels == 1];
    parallel_for(rows.count, 5 * rows.count * n * size, [&](int64_t first, int64_t last) {
        for (int64_t r = first; r < last; ++r) {
            kernel({{at(x_data, 4 * r * n * size), at(x_data, (4 * r + 2) * n * size)},
                    at(out_data, r * n * size),
                    places + r * n,
                    rows.width,
                    rows.channels});
        }
    });
    return {out, where};
}

Tensor max_pool_indices_bwd_cpu(Tensor dout, Tensor where) {
    return unpool("max_pool_indices_bwd", "dout", dout, where);
}

Tensor max_unpool_fwd_cpu(Tensor y, Tensor where) { return unpool("max_unpool", "y", y, where); }

Tensor max_unpool_bwd_cpu(Tensor dout, Tensor where) {
    constexpr const char* kOp = "max_unpool_bwd";
    const TensorInfo di = tensor_info(dout), wi = tensor_info(where);
    check_maps(kOp, "dout", di);
    check_even(kOp, "dout", di);
    const int64_t sizes[4] = {di.sizes[0], di.sizes[1], di.sizes[2] / 2, di.sizes[3] / 2};
    check_where(kOp, wi, sizes);
    check_same_device(kOp, "where", wi, di);
    const Format format = suggest_format(wi);
    Tensor dy = empty_in_format(sizes, di.dtype, format);
    const Tensor dense = in_format(dout, di, format), where_dense = in_format(where, wi, format);
    void *const dout_data = tensor_info(dense).data, *const dy_data = tensor_info(dy).data;
    const uint8_t* const places = tensor_info(where_dense).as<uint8_t>();
    const Rows rows(sizes, format);
    const int64_t size = dtype_size(di.dtype), n = rows.elements();
    const auto kernel = max_pool_kernels().gather[static_cast<int>(di.dtype)][rows.channels == 1];
    parallel_for(rows.count, 5 * rows.count * n * size, [&](int64_t first, int64_t last) {
        for (int64_t r = first; r < last; ++r) {
            kernel({{at(dout_data, 4 * r * n * size), at(dout_data, (4 * r + 2) * n * size)},
                    places + r * n,
                    at(dy_data, r * n * size),
                    rows.width,
                    rows.channels});
        }
    });
    return dy;
}

STABLE_TORCH_LIBRARY_IMPL(dl4ds_kernels, CPU, m) {
    m.impl("max_pool_indices", TORCH_BOX(&max_pool_indices_fwd_cpu));
    m.impl("max_pool_indices_bwd", TORCH_BOX(&max_pool_indices_bwd_cpu));
    m.impl("max_unpool", TORCH_BOX(&max_unpool_fwd_cpu));
    m.impl("max_unpool_bwd", TORCH_BOX(&max_unpool_bwd_cpu));
}

}  // namespace dl4ds
