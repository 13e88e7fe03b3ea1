// Which algorithm each of a training step's convolutions takes: cycles of one core, as in
// conv_choose_cpu.cpp, but with the weight's packing or transform, which every step pays again.
#include <algorithm>
#include <cstdlib>

#include "common/cpu/isa.h"
#include "common/once.h"
#include "ops/conv_bn_act/conv_train_cpu.h"

namespace dl4ds {
namespace {

constexpr double kPositions = 16.0;
// Below, a direct sum is so short that the transforms' own rounding, twice stock's, is most of the error.
constexpr double kMinTiles = 32.0;
// Cycles of one core on an AVX-512 machine, for a vector multiply-add a cycle (estimated from single layers,
// not fitted).
constexpr double kLibraryUse = 0.85;   // of the peak that oneDNN reaches
constexpr double kGemmCost = 1.08;     // a vector multiply-add of a product
constexpr double kTileInCost = 100.0;  // a vector of channels of an input tile
constexpr double kTileOutCost = 80.0;
constexpr double kFilterCost = 45.0;    // a vector of filters, forth
constexpr double kGradientCost = 40.0;  // and back

// Of the direct product: below, the weight's packing costs more than the sums, or there is little to gain.
constexpr int64_t kMinPixels = 96, kMinWeights = 8192;
constexpr int64_t kMinFieldChannels = 64, kMinTaps = 16, kNarrow = 5;

double up(int64_t a, int64_t b) { return static_cast<double>((a + b - 1) / b); }

bool winograd_allowed() {
    return once<[] { return is_on(std::getenv("DL4DS_WINOGRAD")); }>();
}

bool direct_allowed() {
    return once<[] { return is_on(std::getenv("DL4DS_TRAIN_GEMM")); }>();
}

void choose_winograd(const ConvShape& s, TrainChoice& choice) {
    const double lanes = static_cast<double>(conv_kernels().panel) / 2.0;
    const double in = static_cast<double>(s.channels), out = static_cast<double>(s.channels_out);
    const double padded_in = up(s.channels, conv_kernels().panel) * lanes * 2.0;
    const double padded_out = up(s.channels_out, conv_kernels().panel) * lanes * 2.0;
    const auto tiles = [&](int64_t h, int64_t w) { return static_cast<double>(s.n) * up(h, 2) * up(w, 2); };
    const double filters = in * out / lanes;  // vectors of filters
    const double direct = static_cast<double>(s.macs()) / lanes / kLibraryUse;
    const auto forward = [&](double count, double from, double to, double padded_to) {
        const double gemm = kPositions * count * from * padded_to / lanes * kGemmCost;
        return gemm + count * (from * kTileInCost + to * kTileOutCost) / lanes + filters * kFilterCost;
    };
    const double count = tiles(s.out_height(), s.out_width());
    if (forward(count, in, out, padded_out) < direct) {
        choice.forward = ConvAlgorithm::kWinograd2;
    }
    if (forward(tiles(s.height, s.width), out, in, padded_in) < direct) {
        choice.dgrad = ConvAlgorithm::kWinograd2;
    }
    const double gemm =
        kPositions * count * padded_in * up(s.channels_out, kChunk) * kChunk / lanes * kGemmCost;
    if (count >= kMinTiles &&
        gemm + count * (in + out) * kTileInCost / lanes + filters * kGradientCost < direct) {
        choice.wgrad = ConvAlgorithm::kWinograd2;
    }
}

/// The direct product where it was measured ahead of oneDNN: on the layers of ResNet-18, ResNet-50 and
/// DenseNet-121 (batches 16 and 1; docs/cpu-engine.md), with cold caches. Nearly all of its gain are copies
/// and packs, so that rules of thumb on the sizes describe it better than cycles do.
void choose_direct(const ConvShape& s, TrainChoice& choice) {
    const int64_t panel = conv_kernels().panel, pixels = s.n * s.out_height() * s.out_width();
    // Lanes that compute nothing may cost a twentieth.
    const auto filled = [](int64_t channels, int64_t unit) {
        return up(channels, unit) * static_cast<double>(unit) <= 1.06 * static_cast<double>(channels);
    };
    const bool fills_in = filled(s.channels, panel), fills_out = filled(s.channels_out, panel);
    if (s.taps() == 1 && s.pad_h == 0 && s.pad_w == 0) {
        if (pixels < kMinPixels || s.channels * s.channels_out < kMinWeights) {
            return;
        }
        choice.forward = fills_out ? ConvAlgorithm::kDirect : choice.forward;
        choice.dgrad = fills_in && conv_dgrad_direct_supports(s) ? ConvAlgorithm::kDirect : choice.dgrad;
        choice.wgrad = fills_in && filled(s.channels_out, kChunk) ? ConvAlgorithm::kDirect : choice.wgrad;
        return;
    }
    // Larger kernels: forward, and the gradient of x of wide maps, are the library's, who has no fields to
    // copy.
    const bool strided = s.stride_h > 1 && s.stride_w > 1;
    if (!strided || s.channels < kMinFieldChannels || s.channels_out < kMinFieldChannels ||
        pixels < kMinTaps) {
        return;
    }
    if (filled(s.channels * s.taps(), panel) && filled(s.channels_out, kChunk)) {
        choice.wgrad = ConvAlgorithm::kDirect;
    }
    if (s.out_width() <= kNarrow && fills_in && conv_dgrad_direct_supports(s)) {
        choice.dgrad = ConvAlgorithm::kDirect;
    }
}

}  // namespace

TrainChoice conv_train_choose(const ConvShape& s) {
    TrainChoice choice{ConvAlgorithm::kLibrary, ConvAlgorithm::kLibrary, ConvAlgorithm::kLibrary};
    if (active_isa() == Isa::kBaseline || s.groups != 1 || s.out_height() < 1 || s.out_width() < 1) {
        return choice;
    }
    if (winograd_allowed() && s.pad_h <= 2 && s.pad_w <= 2 && conv_supports(ConvAlgorithm::kWinograd2, s)) {
        choose_winograd(s, choice);
    }
    if (direct_allowed()) {
        choose_direct(s, choice);
    }
    return choice;
}

}  // namespace dl4ds
