// What the CUDA host functions share: device and stream, memory from torch's caching allocator, launch
// errors. Includes torch's stable headers, so never include it from a .cu or .cuh file.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/c/shim.h>

#include "common/geometry.h"
#include "common/layout.h"

namespace dl4ds {

/// Makes x's device the current one while it lives, and knows the current stream there.
class CudaScope {
  public:
    explicit CudaScope(const TensorInfo& x) : guard_(x.device_index) {
        shim_check(aoti_torch_get_current_cuda_stream(x.device_index, &stream_), "get_current_cuda_stream");
    }
    void* stream() const { return stream_; }

  private:
    torch::stable::accelerator::DeviceGuard guard_;
    void* stream_ = nullptr;
};

/// Throws torch's message for the error code of a launcher.
inline void check_launch(int error, const char* op) {
    if (error == 0) [[likely]] {
        return;
    }
    char* text = nullptr;
    torch_c10_cuda_check_msg(error, __FILE__, op, __LINE__, true, &text);
    const std::string message = text != nullptr ? text : "CUDA error " + std::to_string(error);
    if (text != nullptr) {
        torch_c10_cuda_free_error_msg(text);
    }
    throw_check_failure(op, ": the kernel launch failed: ", message);
}

inline void check_cuda(const char* op, const TensorInfo& x) {
    DL4DS_CHECK(x.device_type == aoti_torch_device_type_cuda(), op, ": x: expected a CUDA tensor");
}

inline Activation checked_activation(const char* op, int64_t code) {
    DL4DS_CHECK(code >= 0 && code < kNumActivations, op, ": activation: expected a code in [0, ",
                kNumActivations, "), got ", code);
    return static_cast<Activation>(code);
}

/// Uninitialised memory on x's device.
inline Tensor empty_cuda(const TensorInfo& x, const int64_t* sizes, const int64_t* strides, int64_t dim,
                         DType dtype) {
    AtenTensorHandle handle = nullptr;
    shim_check(aoti_torch_empty_strided(dim, sizes, strides, kDTypeCodes.to_torch(dtype), x.device_type,
                                        x.device_index, &handle),
               "empty_strided");
    return Tensor(handle);
}

inline Tensor empty_vector_cuda(const TensorInfo& x, int64_t size, DType dtype) {
    const int64_t stride = 1;
    return empty_cuda(x, &size, &stride, 1, dtype);
}

inline Tensor empty_like_cuda(const TensorInfo& x, Format format) {
    return empty_cuda(x, x.sizes, dense_strides(x.sizes, x.dim, format).data(), x.dim, x.dtype);
}

/// An input as the kernels read it: the tensor itself, or a copy that stays alive with this object.
struct Operand {
    TensorInfo info;
    std::optional<Tensor> tensor;

    Operand() = default;
    explicit Operand(const Tensor& t) : info(tensor_info(t)), tensor(t) {}
    explicit Operand(const std::optional<Tensor>& t) : info(tensor_info(t)), tensor(t) {}

    void copy_to(const int64_t* strides) {
        tensor = copy_with_strides(*tensor, info, strides);
        info = tensor_info(*tensor);
    }
    void copy_to(Format format) { copy_to(dense_strides(info.sizes, info.dim, format).data()); }
};

/// A checked (C,) vector without gaps.
inline Operand channel_operand(const char* op, const char* name, const std::optional<Tensor>& t,
                               const TensorInfo& x) {
    Operand v(t);
    check_channel_vector(op, name, v.info, x);
    if (v.info.present && v.info.numel > 1 && v.info.strides[0] != 1) {
        v.copy_to(Format::kContiguous);
    }
    return v;
}

inline ChannelVector channel_vector(const Operand& v) {
    return v.info.present ? ChannelVector{v.info.data, v.info.dtype} : ChannelVector{};
}

/// Sizes or strides of (N, C, *spatial) with the spatial dimensions last; missing ones get 1.
inline Dims as_dims(const int64_t* values, int64_t dim) {
    Dims d{values[0], values[1], 1, 1, 1};
    int64_t* const spatial[3] = {&d.w, &d.h, &d.d};
    for (int64_t i = 0; i + 2 < dim; ++i) {
        *spatial[i] = values[dim - 1 - i];
    }
    return d;
}

}  // namespace dl4ds
