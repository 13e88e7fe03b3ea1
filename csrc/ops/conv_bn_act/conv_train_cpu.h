// Training on the CPU: what the engine of conv_engine_cpu.h does not need for inference. Weights change at
// every step, so that packing and transforming them has to be cheap, and the gradient of the weight is a
// product of its own. No torch header. fp32, one group, channels last; the direct algorithm for any kernel
// and stride, Winograd's F(2x2, 3x3) for 3x3, stride 1, dilation 1.
//
// Direct: the output is the engine's. The gradient of x is, for every residue of its rows and columns modulo
// the stride, a convolution of dout with those taps that reach it. The gradient of the weight is the product
// of dout's pixels with the receptive fields, both copied block by block into the order of the kernel.
//
// The gradient of the filters in the transformed domain: with V = B^T d B of an input tile and E = A e A^T of
// a tile of dout, dU[position] = sum over tiles of E[position] V[position]^T, and dW = G^T dU G: 16 products
// for the 36 of the direct sum, with additions of two or three numbers before and behind, as in F(2x2, 3x3)
// itself.
#pragma once

#include <vector>

#include "ops/conv_bn_act/conv_engine_cpu.h"

namespace dl4ds {

/// A weight (C_out, C, kH, kW) of any layout that is dense over the taps; strides in elements.
struct FilterLayout {
    int64_t out, in, tap;
};

/// One tap of some filters as [row][panel], zeros in the lanes that no channel fills.
struct PackLanesArgs {
    const float* weight;    // the tap of the panel's first channel and the first row
    int64_t lane, row;      // strides of the panel's channels, of the rows
    int64_t columns, rows;  // channels of the panel that exist
    float* packed;
};

/// Transformed filters of `rows` input channels and one panel of output channels: U[position][row][panel].
struct FilterArgs {
    const float* weight;     // tap 0 of the panel's first channel and the first row
    int64_t lane, row, tap;  // strides of the panel's channels, of the rows, of the taps
    bool flipped;            // the filter turned by 180 degrees
    int64_t columns, rows;   // channels of the panel that exist
    float* u;
    int64_t u_position;  // between positions
    float* scratch;      // kFilterRows * 9 panels
};
constexpr int64_t kFilterRows = 16;  // that are gathered at a time where lanes are not neighbours

/// One 2x2 tile of dout, all channels: E[position][chunk][tile][kChunk].
struct WgradInArgs {
    const float* dout;  // the tile's first pixel
    int64_t stride_h, stride_w;
    int64_t rows, columns;  // pixels of the tile that exist
    int64_t channels;
    float* e;
    int64_t e_position, e_chunk;
};

/// D[row][panel] (+)= sum over k of a[k][row] b[k][panel]; rows of a and b lie kChunk floats apart. A long
/// sum is made in three steps, so that its rounding error grows like a tree's: `chain` values of k in
/// registers, the chains of a call one after the other, then (the caller) the calls.
constexpr int64_t kTileChain = 16;    // of transformed tiles, whose rounding is twice that of pixels
constexpr int64_t kPixelChain = 144;  // of pixels: a whole call of conv_wgrad_direct_cpu.cpp
struct WgradGemmArgs {
    const float* a;
    const float* b;
    int64_t b_chunk;  // from one chunk of the panel to the next
    int64_t k, chain;
    float* d;
    bool add;
    const char* prefetch;  // as in GemmArgs
};

/// The gradients of one output channel's filters for one panel of input channels.
struct WgradOutArgs {
    const float* d;  // [panel], positions d_position apart
    int64_t d_position;
    int64_t columns;
    float* dweight;  // the first filter's first tap
    int64_t in, tap;
};

/// Kernels of one ISA; the panel is that of ConvKernels.
struct TrainKernels {
    int64_t gemm_rows;                         // Groups(kChunk, gemm_rows) of a chunk at a time
    bool (*pack_lanes)(const PackLanesArgs&);  // false: a value is infinite or NaN
    void (*filter)(const FilterArgs&);
    void (*wgrad_in)(const WgradInArgs&);
    void (*const* wgrad_gemm)(const WgradGemmArgs&);  // [rows]
    bool (*wgrad_out)(const WgradOutArgs&);           // false: a gradient is infinite or NaN
};

const TrainKernels& train_kernels();

/// The packed weight of kWinograd2 for the convolution (from: `weight`) or, `gradient`, for the convolution
/// of dout that gives dx: filters turned, channels in and out exchanged. `s` is the shape of what will run.
void conv_pack_filters2(const ConvShape& s, const float* weight, const FilterLayout& layout, bool gradient,
                        float* packed);

/// The packed weight of kDirect for a convolution of shape `s`: of the weight's taps those at `taps` (offsets
/// in elements), in the order in which `s` runs over them. False: a value is infinite or NaN, which a zero of
/// the padding must not meet.
bool conv_pack_taps(const ConvShape& s, const float* weight, const FilterLayout& layout, bool gradient,
                    const std::vector<int64_t>& taps, float* packed);

/// The gradient of x of a convolution of shape `shape`, into a dense channels-last dx.
struct DgradArgs {
    ConvShape shape;
    const float* dout;
    int64_t stride_n, stride_h, stride_w;  // of dout
    const float* weight;
    FilterLayout layout;
    float* dx;
    int64_t threads;
    const float* added = nullptr;      // of dx's shape: dx becomes the gradient plus this
    const ConvBnBack* back = nullptr;  // 1x1, stride 1: see ConvArgs; then there is no `added`
};

/// Whether conv_dgrad_direct can run it: not with dilation and a stride at once, nor where dx has rows that
/// lie deeper in the padding than the kernel reaches.
bool conv_dgrad_direct_supports(const ConvShape& shape);

/// False: a weight is infinite or NaN and would meet padding; dx is incomplete.
bool conv_dgrad_direct(const DgradArgs& args);

struct WgradArgs {
    ConvShape shape;
    const float* x;
    int64_t stride_n, stride_h, stride_w;  // of x
    const float* dout;                     // dense channels last
    float* dweight;
    FilterLayout layout;
    int64_t threads;
    const ConvPrologue* prologue = nullptr;  // 1x1, stride 1, direct: then x is not read
};

/// False: a gradient came out infinite or NaN, and the caller must compute it directly.
bool conv_wgrad_winograd2(const WgradArgs& args);

/// False: as above, and only with padding, whose zeros an infinite dout turns into NaN.
bool conv_wgrad_direct(const WgradArgs& args);

/// Algorithms of a training step's three convolutions: kLibrary, kDirect or kWinograd2.
struct TrainChoice {
    ConvAlgorithm forward, dgrad, wgrad;
};
TrainChoice conv_train_choose(const ConvShape& shape);

}  // namespace dl4ds
