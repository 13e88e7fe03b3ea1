// Output tensors and scratch memory of the CPU ops.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/c/shim.h>

#include <memory>

#include "common/cpu/pool.h"
#include "common/layout.h"
#include "common/shim.h"

namespace dl4ds {

/// torch_from_blob of torch 2.11 and later, null before it: the build is for 2.10, whose headers do not
/// declare it.
using FromBlobFn = AOTITorchError(void* data, int64_t dim, const int64_t* sizes, const int64_t* strides,
                                  int64_t offset, int32_t dtype, int32_t device_type, int32_t device_index,
                                  AtenTensorHandle* result, int32_t layout, const uint8_t* metadata,
                                  int64_t metadata_size, void (*deleter)(void* data, void* context),
                                  void* context);

inline FromBlobFn* from_blob_fn() { return kShim<FromBlobFn, "torch_from_blob">; }

/// torch's codes of a device and a layout, asked for while the library is loaded (see kShim).
inline const int32_t kCpuCode = aoti_torch_device_type_cpu(), kStridedCode = aoti_torch_layout_strided();

/// An uninitialised CPU tensor: from the pool if it is large, from torch's allocator if not (or if this torch
/// cannot give a block back to us: 2.10).
inline Tensor empty_cpu(const int64_t* sizes, const int64_t* strides, int64_t dim, DType dtype,
                        PoolBlock* (*acquire)(size_t) = &pool_acquire) {
    int64_t bytes = dtype_size(dtype);
    for (int64_t d = 0; d < dim; ++d) {
        bytes *= sizes[d];
    }
    const int32_t code = kDTypeCodes.to_torch(dtype);
    AtenTensorHandle handle = nullptr;
    if (bytes < kPoolMinBytes || !pool_enabled() || from_blob_fn() == nullptr) {
        shim_check(aoti_torch_empty_strided(dim, sizes, strides, code, kCpuCode, 0, &handle),
                   "empty_strided");
        return Tensor(handle);
    }
    PoolBlock* block = acquire(static_cast<size_t>(bytes));
    const auto release = [](void*, void* context) { pool_release(static_cast<PoolBlock*>(context)); };
    const auto error = from_blob_fn()(block->data, dim, sizes, strides, 0, code, kCpuCode,
                                      /*device_index=*/-1, &handle, kStridedCode, nullptr, 0, release, block);
    if (error != 0) {
        pool_release(block);
        shim_check(error, "torch_from_blob");
    }
    return Tensor(handle);
}

/// An uninitialised vector of n elements; n = 0 gives the empty tensor that stands for "not computed".
inline Tensor empty_vector_cpu(int64_t n, DType dtype) {
    const int64_t stride = 1;
    return empty_cpu(&n, &stride, 1, dtype);
}

/// Memory of n elements for packed weights, which stay.
inline Tensor empty_pack_cpu(int64_t n, DType dtype) {
    const int64_t stride = 1;
    return empty_cpu(&n, &stride, 1, dtype, &pool_acquire_apart);
}

/// Uninitialised, 64-byte aligned working memory that lives as long as this object.
class Scratch {
  public:
    explicit Scratch(int64_t bytes) {
        if (bytes > kInlineBytes) {
            block_ = pool_acquire(static_cast<size_t>(bytes));
        }
    }
    ~Scratch() {
        if (block_ != nullptr) {
            pool_release(block_);
        }
    }
    Scratch(const Scratch&) = delete;
    Scratch& operator=(const Scratch&) = delete;

    template <typename T>
    T* as() {
        return static_cast<T*>(block_ != nullptr ? block_->data : inline_);
    }

  private:
    static constexpr int64_t kInlineBytes = 16 << 10;
    alignas(64) unsigned char inline_[kInlineBytes];
    PoolBlock* block_ = nullptr;
};

}  // namespace dl4ds
