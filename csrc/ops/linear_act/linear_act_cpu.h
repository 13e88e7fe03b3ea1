// What the CPU kernel of linear_act works on: a few rows of x and some rows of the weight, fp32, all of them
// contiguous. No torch header.
#pragma once

#include <cstdint>

#include "common/activation.h"

namespace dl4ds {

constexpr int64_t kLinearMostRows = 8;  // of x: with more, a matrix product that reuses the weight is faster

/// out[m][j] = act(dot(x[m], weight[j]) + bias[j]) for `rows` rows of x and `outputs` rows of the weight.
struct LinearArgs {
    const float* x;  // rows k apart
    int64_t rows;    // 1 .. kLinearMostRows
    const float* weight;
    const float* bias;  // null: none
    int64_t outputs, k;
    float* out;  // rows `pitch` apart
    int64_t pitch;
    Activation activation;
    float slope;
};

struct LinearKernels {
    void (*run)(const LinearArgs&);
};

/// The table of the active ISA.
const LinearKernels& linear_kernels();

}  // namespace dl4ds
