// Whether the gradient of a convolution's input takes our kernel, with what a backward pass needs around it,
// or the library's and kernels behind it. The model of conv_bn_act_plan.h; nothing here has run on a GPU.
#pragma once

#include "ops/conv_bn_act/conv_bn_act_plan.h"

namespace dl4ds {

/// What comes with the gradient.
struct DgradWork {
    int sums = 0;  // of this many BatchNorms in front: none, one, or two that were added
    bool added = false;
    int64_t step = 1;  // of what is added
};

/// The choice for a gradient of `rows` pixels and `columns` channels from dout of `pixels` pixels and
/// `channels` channels. The tile is the one of a forward convolution of these sizes.
inline ConvChoice choose_dgrad(int architecture, DType dtype, int64_t rows, int64_t columns, int64_t channels,
                               int64_t taps, int64_t pixels, const DgradWork& work) {
    ConvChoice choice = choose_conv(architecture, dtype, rows, columns, channels, taps, pixels, false, true);
    const ConvMachine machine = conv_machine(architecture);
    const double size = static_cast<double>(dtype_size(dtype)), memory = machine.memory();
    const double peak = machine.peak(dtype), flops = 2.0 * rows * columns * channels * taps;
    const double filter = 1.0 * columns * channels * taps * size, out = 1.0 * rows * columns * size;
    const double moved = 1.0 * pixels * channels * size + filter + out;
    const double share = 1.0 / static_cast<double>(work.step * work.step);
    const double partial =
        8.0 * (1 + work.sums) * columns * (rows / (choice.tile == ConvTile::k64x64 ? 64.0 : 128.0));
    // The library: what is added is written by an elementwise pass, or with zeros between its pixels, and a
    // kernel adds it; the sums read the gradient once more, and what was normalised.
    const double around = (work.added ? 4.0 : 0.0) + (work.sums > 0 ? 1.0 + work.sums : 0.0);
    choice.library_us = std::max(flops / peak, moved / memory) + around * out / memory +
                        (1 + int(work.added) + int(work.sums > 0)) * kLaunchUs;
    const double inside = (work.added ? share : 0.0) + work.sums;
    choice.fused_us = std::max(flops / (peak * machine.mainloop_share), (moved + inside * out) / memory) +
                      (2 * filter + (work.sums > 0 ? partial : 0.0)) / memory + 2 * kLaunchUs;
    choice.fused = choice.fused_us < kConvMargin * choice.library_us;
    return choice;
}

}  // namespace dl4ds
