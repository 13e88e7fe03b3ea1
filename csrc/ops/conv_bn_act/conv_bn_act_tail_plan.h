// Whether the end of a bottleneck block is one kernel or two layers, each by its own best way: a model like
// conv_bn_act_plan.h's, on the same assumptions. Plain host code: docs/gpu-conv.md explains the numbers.
#pragma once

#include "ops/conv_bn_act/conv_bn_act_plan.h"
#include "ops/conv_bn_act/conv_bn_act_tail.h"

namespace dl4ds {

constexpr double kTailSpeed = 0.75;  // of the largest tile's, as choose_conv_tile has it for 64 x 64
constexpr double kCacheReached =
    2;  // L2's bandwidth by device memory's: weights that every block reads again

struct ConvTailChoice {
    int parts = 1;
    double fused_us = 0, apart_us = 0;  // modelled
    bool fused = false;                 // the model's answer
};

/// Blocks of a tile of pixels: more where one each leaves half of the multiprocessors idle. Every part makes
/// the first convolution's sums again, on multiprocessors that had nothing else to do.
inline int tail_parts(int64_t rows, int64_t columns) {
    const int64_t tiles = conv_tiles(rows, 1, 64, 1), chunks = conv_tiles(1, columns, 1, kTailChunk);
    int64_t parts = std::min(chunks, std::max<int64_t>(1, kConvProcessors / tiles));
    return static_cast<int>((chunks + (chunks + parts - 1) / parts - 1) / ((chunks + parts - 1) / parts));
}

/// rows: pixels of the output; columns: its channels; channels, taps, input_pixels: of the first convolution.
inline ConvTailChoice choose_conv_tail(int architecture, DType dtype, int64_t rows, int64_t columns,
                                       int64_t channels, int64_t taps, int64_t input_pixels, bool residual) {
    ConvTailChoice choice;
    choice.parts = tail_parts(rows, columns);
    const ConvMachine machine = conv_machine(architecture);
    const double size = static_cast<double>(dtype_size(dtype)), memory = machine.memory();
    const int64_t blocks = conv_tiles(rows, 1, 64, 1) * choice.parts;
    // A wave of blocks takes as long as one of them, and its two products follow one another. The other way's
    // model knows nothing of waves, which leaves this one on the safe side.
    const double waves = static_cast<double>((blocks + kConvProcessors - 1) / kConvProcessors);
    const double block_peak = machine.peak(dtype) * machine.mainloop_share * kTailSpeed / kConvProcessors;
    const double filter = 1.0 * channels * taps * kTailMiddle;
    const double own = 1.0 * kTailMiddle * ((columns + choice.parts - 1) / choice.parts);
    const double reread = blocks * (filter + own) * size / (kCacheReached * memory);
    const double first = std::max({waves * 2 * 64 * filter / block_peak,
                                   (1.0 * input_pixels * channels + filter) * size / memory, reread});
    const double moved = (1.0 * rows * columns * (residual ? 2 : 1) + 1.0 * kTailMiddle * columns) * size;
    const double second = std::max(waves * 2 * 64 * own / block_peak, moved / memory);
    choice.fused_us = first + second + kLaunchUs;
    const auto layer = [&](int64_t layer_columns, int64_t layer_channels, int64_t layer_taps, int64_t pixels,
                           bool added) {
        const ConvChoice found =
            choose_conv(architecture, dtype, rows, layer_columns, layer_channels, layer_taps, pixels, added);
        return found.fused ? found.fused_us : found.library_us;
    };
    choice.apart_us = layer(kTailMiddle, channels, taps, input_pixels, false) +
                      layer(columns, kTailMiddle, 1, rows, residual);
    choice.fused = choice.fused_us < kConvMargin * choice.apart_us;
    return choice;
}

}  // namespace dl4ds
