// Which kernels a CUDA convolution layer takes: the fused one, with which tile and how many slices, or the
// library's convolution followed by bn_act's pass over its output. A static table and a model, no
// measurement: nothing here has run on a GPU. Plain host code: docs/gpu-conv.md explains the numbers.
#pragma once

#include <algorithm>
#include <cstdint>

#include "ops/conv_bn_act/conv_bn_act.h"

namespace dl4ds {

constexpr double kConvReached = 0.65, kMemoryReached = 0.9;  // of a peak, by a good kernel

/// What is assumed of a GPU of some compute capability. Peaks are the vendor's for dense fp16 with fp32 sums.
struct ConvMachine {
    int architecture;       // the lowest compute capability that the row describes
    double tflops;          // of the library's convolution at its best
    double bandwidth_gb;    // of device memory
    double mainloop_share;  // of the library's speed that our mma.sync main loop is trusted with

    /// Flops and bytes of a microsecond.
    constexpr double peak(DType dtype) const {
        return tflops * (dtype == DType::kFloat32 ? 0.5 : 1.0) * kConvReached * 1e6;
    }
    constexpr double memory() const { return bandwidth_gb * kMemoryReached * 1e3; }
};

/// The newest row not above the capability applies. Shares are guesses on the safe side: 0.85 where the
/// library runs the same instructions, less where it has others (wgmma on 90, tcgen05 on 100).
constexpr ConvMachine kConvMachines[] = {
    {80, 312.0, 1940.0, 0.85}, {86, 71.0, 936.0, 0.85},    {89, 165.0, 1008.0, 0.85},
    {90, 989.0, 3350.0, 0.50}, {100, 2250.0, 8000.0, 0.2}, {120, 209.0, 1792.0, 0.85},
};
constexpr double kLaunchUs = 3.0;    // a kernel more or less
constexpr double kConvMargin = 0.9;  // of the library's modelled time that the fused kernel must stay below
// Of the main loop's speed, with a prologue: by ConvTile, on the safe side of what the instructions between
// loads and mma leave (sm_80's machine code: 375, 325 and 202 a step, whose mma take 512, 256 and 128
// cycles).
constexpr double kPrologueShare[] = {0.8, 0.6, 0.5};
// Grids and slices depend on the shape alone, not on the GPU at hand: results are then the same bits on all
// GPUs that take the fused kernel. 108 multiprocessors (A100) stand for all.
constexpr int64_t kConvProcessors = 108;

/// The machine of a compute capability such as 80.
constexpr ConvMachine conv_machine(int architecture) {
    ConvMachine machine = kConvMachines[0];
    for (const ConvMachine& row : kConvMachines) {
        machine = row.architecture <= architecture ? row : machine;
    }
    return machine;
}

struct ConvChoice {
    ConvTile tile = ConvTile::k128x128;
    int slices = 1;
    double fused_us = 0, library_us = 0;  // modelled
    bool fused = false;                   // the model's answer
};

constexpr int64_t conv_tiles(int64_t rows, int64_t columns, int64_t m, int64_t n) {
    return (rows + m - 1) / m * ((columns + n - 1) / n);
}

/// Tile and slices. rows: pixels of the output; steps of the main loop are 64 bytes of channels.
inline void choose_conv_tile(int64_t rows, int64_t columns, int64_t channel_steps, int64_t taps, bool vectors,
                             ConvChoice& choice) {
    // Blocks of a multiprocessor at once (registers, shared memory), and the speed of its tensor cores beside
    // that of the largest tile, whose operands are read least often from shared memory.
    constexpr struct {
        ConvTile tile;
        int64_t m, n, resident;
        double speed;
    } kTiles[] = {{ConvTile::k128x128, 128, 128, 2, 1.0},
                  {ConvTile::k128x64, 128, 64, 3, 0.9},
                  {ConvTile::k64x64, 64, 64, 3, 0.75}};
    double best = 0;
    for (const auto& t : kTiles) {
        const int64_t tiles = conv_tiles(rows, columns, t.m, t.n), at_once = kConvProcessors * t.resident;
        // Blocks that do not fill a multiprocessor do not slow each other down either.
        const int64_t whole = tiles / at_once, rest = tiles % at_once;
        const int64_t deepest = whole * t.resident + (rest + kConvProcessors - 1) / kConvProcessors;
        const double cost = static_cast<double>(deepest * t.m * t.n) / t.speed;
        // Other channel counts than whole vectors have only the smallest tile.
        if ((vectors || t.m == 64) && (best == 0 || cost < best)) {
            best = cost;
            choice.tile = t.tile;
        }
    }
    choice.slices = 1;
    const int64_t tiles = conv_tiles(rows, columns, 64, 64);
    // Under three quarters of the multiprocessors at work: cut the channels, eight steps a slice or more.
    if (choice.tile == ConvTile::k64x64 && 4 * tiles < 3 * kConvProcessors) {
        const int64_t wanted = 2 * kConvProcessors / tiles;
        const int64_t longest = std::max<int64_t>(1, channel_steps * taps / 8);
        choice.slices = static_cast<int>(std::min({wanted, longest, channel_steps, int64_t(32)}));
        // No slice shorter than the others where that costs nothing: fewer slices of the same length.
        const int64_t length = (channel_steps + choice.slices - 1) / choice.slices;
        choice.slices = static_cast<int>((channel_steps + length - 1) / length);
    }
}

/// The whole choice; architecture is a compute capability such as 80. stats: for training, where both ways
/// give the convolution itself and its batch statistics, the library's by reading its output again.
inline ConvChoice choose_conv(int architecture, DType dtype, int64_t rows, int64_t columns, int64_t channels,
                              int64_t taps, int64_t input_pixels, bool residual, bool stats = false) {
    ConvChoice choice;
    const int64_t size = dtype_size(dtype), k_step = 64 / size;
    choose_conv_tile(rows, columns, (channels + k_step - 1) / k_step, taps, columns * size % 16 == 0, choice);
    const ConvMachine machine = conv_machine(architecture);
    const double peak = machine.peak(dtype), memory = machine.memory();
    const double flops = 2.0 * rows * columns * channels * taps, out = 1.0 * rows * columns * size;
    const double moved = (1.0 * input_pixels * channels + 1.0 * columns * channels * taps) * size + out;
    const double added = residual ? out : 0.0;
    if (stats) {
        choice.slices = 1;
        // Two floats for each channel of a tile of pixels, written and read once.
        const double moments = 16.0 * columns * (rows / (choice.tile == ConvTile::k64x64 ? 64.0 : 128.0));
        choice.library_us = std::max(flops / peak, moved / memory) + out / memory + 2 * kLaunchUs;
        choice.fused_us =
            std::max(flops / (peak * machine.mainloop_share), moved / memory) + moments / memory + kLaunchUs;
        choice.fused = choice.fused_us < kConvMargin * choice.library_us;
        return choice;
    }
    choice.library_us = std::max(flops / peak, moved / memory) + (2 * out + added) / memory + 2 * kLaunchUs;
    const double partial =
        choice.slices > 1 ? 8.0 * choice.slices * rows * columns : 0.0;  // written and read
    choice.fused_us = std::max(flops / (peak * machine.mainloop_share), (moved + added) / memory) +
                      partial / memory + (choice.slices > 1 ? 2 : 1) * kLaunchUs;
    choice.fused = choice.fused_us < kConvMargin * choice.library_us;
    return choice;
}

/// The choice for a 1x1 convolution whose input gets BatchNorm and relu: all in one kernel, or bn_act's pass
/// over the input and then the better way of the convolution. epilogue: a BatchNorm behind it too.
inline ConvChoice choose_prologue_conv(int architecture, DType dtype, int64_t rows, int64_t columns,
                                       int64_t channels, int64_t input_pixels, bool residual, bool epilogue) {
    ConvChoice choice = choose_conv(architecture, dtype, rows, columns, channels, 1, input_pixels, residual);
    if (dtype == DType::kFloat32 && choice.tile == ConvTile::k128x128) {
        choice.tile = ConvTile::k128x64;  // as ConvPrologue does
    }
    const ConvMachine machine = conv_machine(architecture);
    const double size = static_cast<double>(dtype_size(dtype)), memory = machine.memory();
    const double peak = machine.peak(dtype), flops = 2.0 * rows * columns * channels;
    const double out = rows * columns * size, in = input_pixels * channels * size;
    // A strided filter reads the pixels that it needs; the pass goes over all of them.
    const double read = std::min<double>(rows, input_pixels) * channels * size;
    const double moved = read + columns * channels * size + out + (residual ? out : 0.0);
    const double behind = choice.fused ? choice.fused_us : choice.library_us;
    const double alone = std::max(flops / peak, moved / memory) + kLaunchUs;
    choice.slices = 1;
    choice.library_us = 2 * in / memory + kLaunchUs + (epilogue ? behind : alone);
    choice.fused_us =
        std::max(flops / (peak * machine.mainloop_share * kPrologueShare[static_cast<int>(choice.tile)]),
                 moved / memory) +
        kLaunchUs;
    choice.fused = choice.fused_us < kConvMargin * choice.library_us;
    return choice;
}

}  // namespace dl4ds
