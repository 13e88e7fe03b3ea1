// Run-time dtype and activation codes to compile-time types. No torch header needed: the Params structs of
// the CUDA launchers carry a DType, and layout.h translates torch's dtype codes to it.
#pragma once

#include <cstdint>
#include <type_traits>

#include "common/activation.h"
#include "common/checks.h"

namespace dl4ds {

enum class DType : int32_t {
    kFloat32 = 0,
    kFloat64 = 1,
    kFloat16 = 2,
    kBFloat16 = 3,
    kUInt8 = 4,
    kOther = 5
};

constexpr int64_t dtype_size(DType dtype) {
    switch (dtype) {
        case DType::kFloat32:
            return 4;
        case DType::kFloat64:
            return 8;
        case DType::kFloat16:
        case DType::kBFloat16:
            return 2;
        case DType::kUInt8:
            return 1;
        case DType::kOther:
            break;
    }
    return 0;
}

constexpr const char* dtype_name(DType dtype) {
    switch (dtype) {
        case DType::kFloat32:
            return "float32";
        case DType::kFloat64:
            return "float64";
        case DType::kFloat16:
            return "float16";
        case DType::kBFloat16:
            return "bfloat16";
        case DType::kUInt8:
            return "uint8";
        case DType::kOther:
            break;
    }
    return "an unsupported dtype";
}

/// The accumulator dtype: float64 for float64, float32 for the rest.
constexpr DType acc_dtype(DType dtype) {
    return dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32;
}

constexpr bool is_floating(DType dtype) { return static_cast<int32_t>(dtype) <= 3; }

template <DType kValue>
using DTypeConstant = std::integral_constant<DType, kValue>;
template <Activation kValue>
using ActivationConstant = std::integral_constant<Activation, kValue>;

/// Calls fn(DTypeConstant<d>{}) for the floating dtype d.
template <typename Fn>
decltype(auto) dispatch_dtype(const char* op, DType dtype, Fn&& fn) {
    switch (dtype) {
        case DType::kFloat32:
            return fn(DTypeConstant<DType::kFloat32>{});
        case DType::kFloat64:
            return fn(DTypeConstant<DType::kFloat64>{});
        case DType::kFloat16:
            return fn(DTypeConstant<DType::kFloat16>{});
        case DType::kBFloat16:
            return fn(DTypeConstant<DType::kBFloat16>{});
        default:
            throw_check_failure(op,
                                ": expected a tensor of dtype float32, float64, float16 or bfloat16, got ",
                                dtype_name(dtype));
    }
}

/// The cases of a switch over all activations but kNone: host code and kernels write the switch once each,
/// with their own idea of what else there may be (dispatch_activation below, switch_activation in
/// activation.cuh).
#define DL4DS_ACTIVATION_CASE(name) \
    case Activation::name:          \
        return fn(ActivationConstant<Activation::name>{});
#define DL4DS_NONLINEAR_CASES         \
    DL4DS_ACTIVATION_CASE(kRelu)      \
    DL4DS_ACTIVATION_CASE(kLeakyRelu) \
    DL4DS_ACTIVATION_CASE(kRelu6)     \
    DL4DS_ACTIVATION_CASE(kSilu)      \
    DL4DS_ACTIVATION_CASE(kHardswish)

/// Calls fn(ActivationConstant<a>{}) for the activation a.
template <typename Fn>
decltype(auto) dispatch_activation(const char* op, Activation act, Fn&& fn) {
    switch (act) { DL4DS_ACTIVATION_CASE(kNone) DL4DS_NONLINEAR_CASES }
    throw_check_failure(op, ": activation: expected a code in [0, ", kNumActivations, "), got ",
                        static_cast<int>(act));
}

}  // namespace dl4ds
