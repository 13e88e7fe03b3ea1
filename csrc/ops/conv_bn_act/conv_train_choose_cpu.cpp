// Which of a training step's convolutions run as Winograd's F(2x2, 3x3): cycles of one core, as in
// conv_choose_cpu.cpp, but with the filters' transform, which every step pays again.
#include <algorithm>
#include <cstdlib>
#include <cstring>

#include "common/cpu/isa.h"
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

double up(int64_t a, int64_t b) { return static_cast<double>((a + b - 1) / b); }

bool winograd_allowed() {
    static const bool on = [] {
        const char* text = std::getenv("DL4DS_WINOGRAD");
        return text == nullptr || std::strcmp(text, "0") != 0;
    }();
    return on;
}

}  // namespace

TrainChoice conv_train_choose(const ConvShape& s) {
    TrainChoice choice{ConvAlgorithm::kLibrary, ConvAlgorithm::kLibrary, ConvAlgorithm::kLibrary};
    if (active_isa() == Isa::kBaseline || !winograd_allowed() || s.out_height() < 1 || s.out_width() < 1 ||
        s.pad_h > 2 || s.pad_w > 2 || !conv_supports(ConvAlgorithm::kWinograd2, s)) {
        return choice;
    }
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
    return choice;
}

}  // namespace dl4ds
