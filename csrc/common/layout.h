// Tensor metadata for the host functions (CPU and CUDA): one struct read through torch's C shims, the memory
// format rule, dense copies, and the shape/dtype checks that protect memory. Includes torch's stable headers,
// so never include it from a .cu or .cuh file.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <array>
#include <optional>

#include "common/checks.h"
#include "common/dispatch.h"
#include "common/shim.h"

namespace dl4ds {

using torch::stable::Tensor;

constexpr int64_t kMaxDims = 5;
constexpr int64_t kMaxElementwiseDims = 16;

/// torch's dtype codes, asked for while the library is loaded (see kShim).
struct DTypeCodes {
    int32_t float32 = aoti_torch_dtype_float32();
    int32_t float64 = aoti_torch_dtype_float64();
    int32_t float16 = aoti_torch_dtype_float16();
    int32_t bfloat16 = aoti_torch_dtype_bfloat16();
    int32_t uint8 = aoti_torch_dtype_uint8();

    DType from_torch(int32_t code) const {
        return code == float32    ? DType::kFloat32
               : code == float64  ? DType::kFloat64
               : code == float16  ? DType::kFloat16
               : code == bfloat16 ? DType::kBFloat16
               : code == uint8    ? DType::kUInt8
                                  : DType::kOther;
    }
    int32_t to_torch(DType dtype) const {
        switch (dtype) {
            case DType::kFloat64:
                return float64;
            case DType::kFloat16:
                return float16;
            case DType::kBFloat16:
                return bfloat16;
            case DType::kUInt8:
                return uint8;
            default:
                return float32;
        }
    }
};

inline const DTypeCodes kDTypeCodes;

/// What a kernel needs to know of a tensor. sizes and strides (in elements) are borrowed from the tensor.
struct TensorInfo {
    void* data = nullptr;
    int64_t dim = 0;
    int64_t numel = 0;
    const int64_t* sizes = nullptr;
    const int64_t* strides = nullptr;
    DType dtype = DType::kOther;
    int32_t device_type = 0;
    int32_t device_index = 0;
    bool present = false;  // false for an absent optional tensor

    template <typename T>
    T* as() const {
        return static_cast<T*>(data);
    }
    std::string shape() const { return shape_to_string(sizes, dim); }
};

inline TensorInfo tensor_info(AtenTensorHandle handle) {
    TensorInfo info;
    int64_t *sizes = nullptr, *strides = nullptr;
    int32_t dtype = 0;
    // One check for all: none of these fails on a dense tensor, and && stops at the first that does.
    const bool ok =
        aoti_torch_get_data_ptr(handle, &info.data) == 0 && aoti_torch_get_dim(handle, &info.dim) == 0 &&
        aoti_torch_get_numel(handle, &info.numel) == 0 && aoti_torch_get_sizes(handle, &sizes) == 0 &&
        aoti_torch_get_strides(handle, &strides) == 0 && aoti_torch_get_dtype(handle, &dtype) == 0 &&
        aoti_torch_get_device_type(handle, &info.device_type) == 0 &&
        aoti_torch_get_device_index(handle, &info.device_index) == 0;
    DL4DS_CHECK(ok, "dl4ds_kernels: expected a dense tensor with storage");
    info.sizes = sizes;
    info.strides = strides;
    info.present = true;
    info.dtype = kDTypeCodes.from_torch(dtype);
    return info;
}

inline TensorInfo tensor_info(const Tensor& tensor) { return tensor_info(tensor.get()); }

/// Info of an optional tensor; present stays false where it is absent.
inline TensorInfo tensor_info(const std::optional<Tensor>& tensor) {
    return tensor ? tensor_info(tensor->get()) : TensorInfo{};
}

enum class Format { kContiguous, kChannelsLast };

/// True for C order; dims of size 1 do not count.
inline bool is_contiguous(const int64_t* sizes, const int64_t* strides, int64_t dim) {
    int64_t step = 1;
    for (int64_t d = dim - 1; d >= 0; --d) {
        if (sizes[d] > 1 && strides[d] != step) {
            return false;
        }
        step *= sizes[d];
    }
    return true;
}

/// The memory format of a normalisation's output, as torch's batch_norm decides it: contiguous if the input
/// is (an ambiguous one too: C = 1, H = W = 1), else what Tensor.suggest_memory_format says: channels last
/// for 4 and 5 dims whose strides grow in the order C, W, H, (D,) N, contiguous for everything else.
inline Format suggest_format(const int64_t* sizes, const int64_t* strides, int64_t dim) {
    if ((dim != 4 && dim != 5) || strides[1] == 0 || is_contiguous(sizes, strides, dim)) {
        return Format::kContiguous;
    }
    int64_t least = 0;
    // Order of the walk: C, then the spatial dims from the last to the first, then N.
    for (int64_t i = 0; i < dim; ++i) {
        const int64_t d = i == 0 ? 1 : (i == dim - 1 ? 0 : dim - i);
        if (sizes[d] == 0 || strides[d] < least) {
            return Format::kContiguous;
        }
        if (d == 0 && least == strides[1]) {
            return Format::kContiguous;  // all sizes but N are 1: torch calls the tie contiguous
        }
        least = strides[d] * (sizes[d] > 1 ? sizes[d] : 1);
    }
    return Format::kChannelsLast;
}

inline Format suggest_format(const TensorInfo& x) { return suggest_format(x.sizes, x.strides, x.dim); }

/// Strides of a dense tensor of these sizes in the given format.
inline std::array<int64_t, kMaxDims> dense_strides(const int64_t* sizes, int64_t dim, Format format) {
    std::array<int64_t, kMaxDims> strides{};
    int64_t step = 1;
    const auto place = [&](int64_t d) {
        strides[d] = step;
        step *= sizes[d] > 1 ? sizes[d] : 1;
    };
    const bool channels_last = format == Format::kChannelsLast;
    if (channels_last) {
        place(1);
    }
    for (int64_t d = dim - 1; d >= 0; --d) {
        if (!(channels_last && d == 1)) {
            place(d);
        }
    }
    return strides;
}

/// True if both stride sets address the same elements (dims of size 1 do not count).
inline bool same_strides(const int64_t* a, const int64_t* b, const int64_t* sizes, int64_t dim) {
    for (int64_t d = 0; d < dim; ++d) {
        if (sizes[d] > 1 && a[d] != b[d]) {
            return false;
        }
    }
    return true;
}

/// True if the elements fill one block of memory without gaps or overlap, in whatever order of dims.
inline bool is_dense(const TensorInfo& x) {
    if (x.numel <= 1) {
        return true;
    }
    int64_t expected = 1;
    bool used[kMaxElementwiseDims] = {};
    if (x.dim > kMaxElementwiseDims) {
        return false;
    }
    for (int64_t round = 0; round < x.dim; ++round) {
        int64_t found = -1;
        for (int64_t d = 0; d < x.dim && found < 0; ++d) {
            if (!used[d] && (x.sizes[d] == 1 || x.strides[d] == expected)) {
                found = d;
            }
        }
        if (found < 0) {
            return false;
        }
        used[found] = true;
        expected *= x.sizes[found];
    }
    return true;
}

/// C-order strides for x's sizes.
inline std::array<int64_t, kMaxElementwiseDims> contiguous_strides(const TensorInfo& x) {
    DL4DS_CHECK(x.dim <= kMaxElementwiseDims, "expected at most ", kMaxElementwiseDims, " dims, got ", x.dim);
    std::array<int64_t, kMaxElementwiseDims> strides{};
    int64_t step = 1;
    for (int64_t d = x.dim - 1; d >= 0; --d) {
        strides[d] = step;
        step *= x.sizes[d] > 1 ? x.sizes[d] : 1;
    }
    return strides;
}

/// Strides of an elementwise result over dense operands that lie like x, as torch's own ops give them: C
/// order where x is contiguous, channels last where it is that, x's strides otherwise. Dims of size 1 get the
/// format's stride, not x's.
inline std::array<int64_t, kMaxElementwiseDims> elementwise_strides(const TensorInfo& x) {
    auto strides = contiguous_strides(x);
    if (x.numel == 0 || is_contiguous(x.sizes, x.strides, x.dim)) {
        return strides;
    }
    std::copy(x.strides, x.strides + x.dim, strides.begin());
    if (x.dim == 4 || x.dim == 5) {
        const auto channels_last = dense_strides(x.sizes, x.dim, Format::kChannelsLast);
        if (same_strides(x.strides, channels_last.data(), x.sizes, x.dim)) {
            std::copy(channels_last.begin(), channels_last.end(), strides.begin());
        }
    }
    return strides;
}

/// A copy of x with the given strides, in torch's own memory.
inline Tensor copy_with_strides(const Tensor& x, const TensorInfo& info, const int64_t* strides) {
    AtenTensorHandle handle = nullptr;
    shim_check(aoti_torch_empty_strided(info.dim, info.sizes, strides, kDTypeCodes.to_torch(info.dtype),
                                        info.device_type, info.device_index, &handle),
               "empty_strided");
    Tensor copy(handle);
    shim_check(aoti_torch_copy_(copy.get(), x.get(), 0), "copy_");
    return copy;
}

// Checks that protect memory. The Python layer has already said the same with torch's exception types.

inline void check_dtype(const char* op, const char* name, const TensorInfo& x, DType expected) {
    DL4DS_CHECK(x.dtype == expected, op, ": ", name, ": expected dtype ", dtype_name(expected), ", got ",
                dtype_name(x.dtype));
}

inline void check_same_device(const char* op, const char* name, const TensorInfo& t, const TensorInfo& x) {
    DL4DS_CHECK(t.device_type == x.device_type && t.device_index == x.device_index, op, ": ", name,
                ": expected the device of x");
}

inline void check_same_shape(const char* op, const char* name, const TensorInfo& t, const TensorInfo& x) {
    bool same = t.dim == x.dim;
    for (int64_t d = 0; same && d < x.dim; ++d) {
        same = t.sizes[d] == x.sizes[d];
    }
    DL4DS_CHECK(same, op, ": ", name, ": expected shape ", x.shape(), ", got ", t.shape());
}

/// A per-channel vector: (C,), x's dtype or the accumulator dtype, on x's device. Absent is fine.
inline void check_channel_vector(const char* op, const char* name, const TensorInfo& v, const TensorInfo& x) {
    if (!v.present) {
        return;
    }
    const int64_t channels = x.sizes[1];
    DL4DS_CHECK(v.dim == 1 && v.sizes[0] == channels, op, ": ", name, ": expected shape (C,) = (", channels,
                ",), got ", v.shape());
    DL4DS_CHECK(v.dtype == x.dtype || v.dtype == acc_dtype(x.dtype), op, ": ", name, ": expected dtype ",
                dtype_name(x.dtype), " or ", dtype_name(acc_dtype(x.dtype)), ", got ", dtype_name(v.dtype));
    check_same_device(op, name, v, x);
}

/// x of bn_act and its like: (N, C, *spatial), 2 to 5 dims, a floating dtype.
inline void check_batched(const char* op, const TensorInfo& x) {
    DL4DS_CHECK(x.dim >= 2 && x.dim <= kMaxDims, op, ": x: expected 2 to 5 dims (N, C, *spatial), got shape ",
                x.shape());
    DL4DS_CHECK(is_floating(x.dtype), op, ": x: expected dtype float32, float64, float16 or bfloat16, got ",
                dtype_name(x.dtype));
}

}  // namespace dl4ds
