// The CPU convolution engine of conv_bn_act: plain structs that its planner, drivers and kernels share. No
// torch header. fp32; x is read pixel by pixel (channels last: stride 1 between channels), the output is
// dense channels last.
//
// Three algorithms, one GEMM micro-kernel:
//   direct    implicit GEMM: the receptive fields of a block of output pixels are packed into A panels, and
//             every B panel (kPanel output channels of the weight) runs over them; scale, shift, residual and
//             activation are applied to the accumulators.
//   winograd  F(m x m, 3x3), m = 2, 4 or 6, stride 1: a block of tiles is transformed (A panels per
//   position),
//             multiplied position by position, transformed back and finished, while the block is in cache.
//   strassen  1x1 convolutions as seven products of half the size instead of eight, in the same way.
// An output element is computed in an order that depends on the algorithm alone: not on the blocking, not on
// the number of threads.
#pragma once

#include <cstdint>

#include "common/activation.h"

namespace dl4ds {

enum class ConvAlgorithm : int {
    kLibrary = 0,    // oneDNN's primitive, then a pass of ours
    kDirect = 1,     // implicit GEMM
    kWinograd2 = 2,  // F(2x2, 3x3): error like direct convolution's
    kDepthwise = 3,  // one filter a channel, no GEMM
    kWinograd4 = 4,  // F(4x4, 3x3): error at most 1e-4 of the output's scale
    kWinograd6 = 6,  // F(6x6, 3x3): the same bound, up to four times kWinograd4's error
    kStrassen = 7,   // 1x1: error like kWinograd4's, relative to the scale of the whole output
    kNarrow = 8,     // 1x1 to a few channels: dot products, no GEMM
};

/// Sizes of a convolution; `channels` and `channels_out` are totals over the groups.
struct ConvShape {
    int64_t n, channels, height, width;
    int64_t channels_out, kernel_h, kernel_w;
    int64_t stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w;
    int64_t groups;
    // kDirect: zeros behind the padding at the bottom and at the right; below zero: rows and columns of the
    // padded map that are not looked at.
    int64_t more_h = 0, more_w = 0;

    int64_t out_height() const {
        return (height + 2 * pad_h + more_h - dilation_h * (kernel_h - 1) - 1) / stride_h + 1;
    }
    int64_t out_width() const {
        return (width + 2 * pad_w + more_w - dilation_w * (kernel_w - 1) - 1) / stride_w + 1;
    }
    int64_t group_channels() const { return channels / groups; }
    int64_t group_channels_out() const { return channels_out / groups; }
    int64_t taps() const { return kernel_h * kernel_w; }
    /// Multiply-adds of the direct algorithm.
    int64_t macs() const { return n * out_height() * out_width() * channels_out * group_channels() * taps(); }
};

/// What happens to a sum of products: out = act(sum * scale + shift [+ residual]).
struct ConvEpilogue {
    const float* scale;  // channels_out entries, padded to whole panels
    const float* shift;
    const float* residual;  // laid out as the output; null: none
    Activation activation;
    float slope;
};

// ---- what the kernels of one ISA are called with

/// A panels are [k / kChunk][row][kChunk]: a row's values of one chunk lie side by side, so that the kernel
/// broadcasts at constant offsets from one pointer.
constexpr int64_t kChunk = 16;

/// Values of k that one accumulator sums up in a row (a multiple of kChunk). Longer sums are made in pieces,
/// as libraries make them: one chain over the 25,088 values of a 7x7 convolution with 512 channels erred
/// three times as much as oneDNN's. 512 costs the micro-kernel under 1 % and leaves most sums of a network in
/// a handful of pieces.
constexpr int64_t kLongestChain = 256;

constexpr int64_t chunks_of(int64_t k) { return (k + kChunk - 1) / kChunk; }

/// D[row][panel] = A * B over k; rows of D are `pitch` apart.
struct GemmArgs {
    const float* a;
    const float* b;  // [k][panel]
    int64_t k;
    float* d;
    int64_t pitch;
    const char* prefetch;  // 64 bytes a step of k are asked for from here on, into L2
};

/// D is the output: the epilogue is applied, and only the first `columns` of the panel exist.
struct GemmFinish {
    const float* scale;
    const float* shift;
    const float* residual;  // rows `pitch` apart, like D; null: none
    int64_t columns;
    Activation activation;
    float slope;
};

/// The same for one panel and the rows of one A panel, see ConvBnBack; D is the output.
struct GemmBack {
    const float *x, *grad;
    int64_t x_pitch, grad_pitch;
    const float *mean, *scale, *shift;
    float low, high;  // the activation's derivative is 1 but for z <= low and z >= high; NaN: no such bound
    float *sum, *product;
    int64_t columns;
};

/// Receptive fields of `rows` consecutive output pixels (in the order n, h, w) into one A panel.
struct PackArgs {
    const float* x;  // first channel of the group
    int64_t stride_n, stride_h, stride_w;
    const ConvShape* shape;
    int64_t first, rows;
    float* a;
    float* line;        // scratch: one receptive field, padded to whole chunks
    int64_t pitch = 0;  // rows of the panel where `rows` are only a part of it; 0: they are all
};

/// A part of the channels of a convolution's input: pixels of channels_last tensors, which need not be
/// joined.
struct ConvSource {
    const float* x;
    int64_t channels;  // a multiple of kChunk, except in the last source
    int64_t stride_n, stride_h, stride_w;
};

/// clamp((x - mean) * scale + shift), then the mean of pool x pool pixels, on the way into a 1x1 convolution.
struct ConvPrologue {
    const ConvSource* sources;
    int64_t count;
    const float* scale;  // of all channels, padded to a chunk
    const float* shift;
    Activation activation;  // kNone, kRelu or kRelu6
    int64_t pool;           // 1 or 2; the shape's height and width are those after it
    const float* mean =
        nullptr;  // null: nothing is subtracted; else pool is 1 (training: bn_act's very bits)
};

/// Behind the gradient of a 1x1 convolution's input (kDirect), which act((x - mean) * scale + shift) made:
/// the sums are taken through the activation, their totals and those of their products with x - mean noted,
/// and scale times them added to a gradient that may lie in the output. Rows of all maps are `pitch` apart.
struct ConvBnBack {
    const float* x;
    const float* grad;
    int64_t x_pitch, grad_pitch, out_pitch;
    const float *mean, *scale, *shift;  // padded to whole panels
    Activation activation;              // kNone, kRelu or kRelu6
    float* sums;                        // [block][2][whole panels of channels]: conv_back_blocks of them
};

struct PackSourcesArgs {
    const ConvPrologue* prologue;
    const ConvShape* shape;
    int64_t first, rows;
    float* a;
    int64_t pitch = 0;  // as in PackArgs
};

/// One tile of the input, all channels: V[position][chunk][tile][kChunk].
struct WinogradInArgs {
    const float* x;  // pixel (0, 0) of the image
    int64_t stride_h, stride_w;
    int64_t y0, x0, height, width;  // the tile's corner, may be outside
    int64_t channels;
    const float* zeros;  // `channels` zeros, padded to a chunk
    float* v;
    int64_t v_position, v_chunk;
};

/// One tile of the output, one panel of channels.
struct WinogradOutArgs {
    const float* m;  // [position][panel]
    float* out;      // the tile's first pixel and channel
    int64_t stride_h, stride_w;
    int64_t rows, columns;  // pixels of the tile that exist
    GemmFinish finish;      // finish.residual: at the tile's first pixel and channel
};

/// A tile of two pixels, `channels` of either half.
struct StrassenInArgs {
    const float *top, *bottom;
    int64_t channels;
    float* v;
    int64_t v_product, v_chunk;
};

/// One panel of the left half of the output channels and the same of the right, for consecutive pixels.
struct StrassenOutArgs {
    const float* m;     // [tile][product][panel]
    float* out;         // first pixel, left channel
    int64_t pitch;      // between pixels
    int64_t half;       // from left to right
    int64_t pixels;     // two a tile, the last tile may have one
    GemmFinish finish;  // at the left channel
};

/// One output row of a depthwise convolution.
struct DepthwiseArgs {
    const float* x;  // pixel (0, 0) of the image
    int64_t stride_h, stride_w;
    const ConvShape* shape;
    int64_t y;            // the output row
    const float* weight;  // [tap][padded]
    int64_t padded;
    float* out;         // the row's first pixel
    GemmFinish finish;  // of all channels; finish.residual: at the row's first pixel
};

/// Consecutive pixels of a 1x1 convolution to a few channels.
struct NarrowArgs {
    const float* x;
    int64_t stride;  // between pixels of x
    int64_t pixels, channels;
    const float* weight;  // [output][padded]
    int64_t padded;
    float* out;
    GemmFinish finish;
};

/// BatchNorm with running statistics (after a convolution with a bias) as scale and shift of every channel;
/// all vectors are contiguous, null: absent. In double, as in bn_act.
struct ScaleShiftArgs {
    const float *mean, *var, *weight, *bias, *conv_bias;
    int64_t channels;
    double eps;
    bool eps_std;
    float *scale, *shift;
};

/// Where the transforms of F(m x m, 3x3) lie in ConvKernels.
constexpr int winograd_index(int m) { return m / 2 - 1; }

/// Kernels of one ISA.
struct ConvKernels {
    int64_t panel;                                                   // output channels of a B panel
    int64_t max_rows;                                                // rows of an A panel
    void (*const* gemm)(const GemmArgs&);                            // [rows]
    void (*const* gemm_finish)(const GemmArgs&, const GemmFinish&);  // [rows]
    void (*const* gemm_back)(const GemmArgs&, const GemmBack&);      // [rows]
    void (*pack)(const PackArgs&);
    void (*pack_sources)(const PackSourcesArgs&);
    void (*winograd_in[3])(const WinogradInArgs&);
    bool (*winograd_out[3])(const WinogradOutArgs&);  // false: a sum is infinite or NaN
    void (*strassen_in)(const StrassenInArgs&);
    bool (*strassen_out)(const StrassenOutArgs&);  // false: as winograd_out
    void (*scale_shift)(const ScaleShiftArgs&);
    void (*depthwise_row)(const DepthwiseArgs&);
    void (*const* narrow)(const NarrowArgs&);  // [outputs]
};

/// The table of the active ISA.
const ConvKernels& conv_kernels();

// ---- plan and drivers

/// Whether the algorithm is one of the Winograd family.
constexpr bool is_winograd(ConvAlgorithm algorithm) {
    return algorithm == ConvAlgorithm::kWinograd2 || algorithm == ConvAlgorithm::kWinograd4 ||
           algorithm == ConvAlgorithm::kWinograd6;
}

/// Transformed positions of a Winograd algorithm.
constexpr int64_t winograd_positions(ConvAlgorithm algorithm) {
    return (static_cast<int64_t>(algorithm) + 2) * (static_cast<int64_t>(algorithm) + 2);
}

/// Floats of the packed weight for an algorithm other than kLibrary.
int64_t conv_packed_floats(ConvAlgorithm algorithm, const ConvShape& shape);

/// Packs a contiguous weight (channels_out, channels / groups, kernel_h, kernel_w).
void conv_pack_weight(ConvAlgorithm algorithm, const ConvShape& shape, const float* weight, float* packed);

/// Whether the algorithm can run this convolution at all.
bool conv_supports(ConvAlgorithm algorithm, const ConvShape& shape);

/// The algorithm expected to be fastest. exact: only those whose error is like direct convolution's.
ConvAlgorithm conv_choose(const ConvShape& shape, int64_t threads, bool exact);

struct ConvArgs {
    ConvShape shape;
    const float* x;
    int64_t stride_n, stride_h, stride_w;  // of x, in elements; the channel stride is 1
    const float* packed;
    float* out;
    ConvEpilogue epilogue;
    int64_t threads;
    const ConvPrologue* prologue =
        nullptr;  // kDirect, 1x1, stride 1, no padding, one group: then x is not read
    // Winograd: the channels lie in these tensors, and x is not read; none: they lie in x.
    const ConvSource* parts = nullptr;
    int64_t part_count = 0;
    const ConvBnBack* back = nullptr;  // kDirect, 1x1, stride 1, one group: then there is no epilogue
};

/// Blocks of rows that a convolution with ConvArgs::back is cut into, for any number of threads.
int64_t conv_back_blocks(const ConvShape& shape);

/// Runs the convolution. False: a transformed sum was infinite or NaN, the output is incomplete, and the
/// caller must compute it directly (a transform spreads one such value over a whole tile).
bool conv_run(ConvAlgorithm algorithm, const ConvArgs& args);

}  // namespace dl4ds
