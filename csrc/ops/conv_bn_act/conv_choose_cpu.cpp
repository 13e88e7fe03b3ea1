// Which algorithm a convolution takes: a small cost model in cycles of one core, for one vector multiply-add
// a cycle. Its constants were fitted to bench/ops/conv.py on an AVX-512 machine with weights out of cache, as
// they are in a network.
#include <algorithm>
#include <cstdlib>

#include "common/cpu/isa.h"
#include "common/once.h"
#include "ops/conv_bn_act/conv_depthwise_cpu.h"
#include "ops/conv_bn_act/conv_narrow_cpu.h"

namespace dl4ds {
namespace {

double ceil_div(int64_t a, int64_t b) { return static_cast<double>((a + b - 1) / b); }

/// Reading weights from memory: all cores together get about ten bytes a cycle.
constexpr double kCyclesPerWeightByte = 0.1;

/// What a larger pack has to save, in cycles a byte: a megabyte for some 30 us a call. ResNet-50 at batch 1
/// takes 50 MB less than by the cycles alone, and no more time that could be measured (docs/cpu-engine.md).
constexpr double kCyclesPerPackedByte = 0.1;

/// Writing tiles of an output that has left the L2 caches, where a direct product writes pixel after pixel.
constexpr double kCyclesPerFarByte = 0.08;

/// Input channels for which F(6x6) is taken, and what it has to gain on the next best algorithm: it errs more
/// (on normal inputs 1.2e-5 of the output's scale for 128 channels, 2.3e-5 for 256). With fewer, transforms
/// decide.
constexpr int64_t kFewestChannelsOf6 = 16, kMostChannelsOf6 = 256;
constexpr double least_gain_of_6(int64_t channels) { return channels > 128 ? 1.12 : 1.06; }

/// What products cost whose smallest block of transformed tiles is larger than L2.
constexpr double kBeyondL2 = 1.07;

/// GEMM of `rows` rows (pixels or tiles) with `panels` panels over k, on all threads.
double gemm_cycles(double rows, double panels, double k, double rows_end, double threads) {
    const ConvKernels& kernels = conv_kernels();
    const double groups = std::max(1.0, rows / static_cast<double>(kernels.max_rows));
    const double vectors = 2.0;  // of a panel
    return panels * (rows * vectors * k + rows * rows_end + groups * 30.0) / threads;
}

/// What the packed weight takes, beside the weight as it is.
double packed_bytes(ConvAlgorithm algorithm, const ConvShape& s) {
    const double weight = static_cast<double>(s.channels_out * s.group_channels()) * 4.0;
    switch (algorithm) {
        case ConvAlgorithm::kWinograd2:
        case ConvAlgorithm::kWinograd4:
        case ConvAlgorithm::kWinograd6:
            return static_cast<double>(winograd_positions(algorithm)) * weight;
        case ConvAlgorithm::kStrassen:
            return 7.0 / 4.0 * weight;
        case ConvAlgorithm::kNarrow:
            return weight;
        default:
            return static_cast<double>(s.taps()) * weight;
    }
}

double direct_cycles(const ConvShape& s, double threads) {
    const ConvKernels& kernels = conv_kernels();
    const double pixels = static_cast<double>(s.n * s.out_height() * s.out_width());
    const double k = static_cast<double>(s.group_channels() * s.taps());
    const double panels = static_cast<double>(s.groups) * ceil_div(s.group_channels_out(), kernels.panel);
    const double pack = pixels * static_cast<double>(s.groups) * (k / 8.0 + 10.0) / threads;
    const double bytes = packed_bytes(ConvAlgorithm::kDirect, s);
    return std::max(gemm_cycles(pixels, panels, k, 8.0, threads) + pack, bytes * kCyclesPerWeightByte);
}

double winograd_cycles(ConvAlgorithm algorithm, const ConvShape& s, double threads) {
    const int m = static_cast<int>(algorithm);
    const ConvKernels& kernels = conv_kernels();
    const double tiles = static_cast<double>(s.n) * ceil_div(s.out_height(), m) * ceil_div(s.out_width(), m);
    const double positions = (m + 2) * (m + 2), panels = ceil_div(s.channels_out, kernels.panel);
    const double lanes = static_cast<double>(kernels.panel) / 2.0;
    // The 64 vectors of F(6x6) fill the registers twice.
    const double each_in = m == 6 ? 7.0 : 6.0, each_out = m == 6 ? 5.5 : 4.5;
    const double in = tiles * ceil_div(s.channels, kChunk) * (kChunk / lanes) * positions * each_in;
    const double out = tiles * panels * 2.0 * positions * each_out;
    // With few tiles the threads share output channels, and each transforms the whole input.
    const double in_threads = tiles >= 2.0 * static_cast<double>(kernels.max_rows) * threads ? threads : 1.0;
    const double bytes = packed_bytes(algorithm, s);
    const double block = positions * static_cast<double>(s.channels + kernels.panel) * 4.0 *
                         std::min(tiles, 2.0 * static_cast<double>(kernels.max_rows));
    const double gemm = positions *
                        gemm_cycles(tiles, panels, static_cast<double>(s.channels), 3.0, threads) *
                        (block > static_cast<double>(cache_sizes().l2_bytes) ? kBeyondL2 : 1.0);
    const double written = static_cast<double>(s.n * s.out_height() * s.out_width() * s.channels_out) * 4.0;
    const double near = static_cast<double>(cache_sizes().l2_bytes) * threads;
    const double far = written > near ? written * kCyclesPerFarByte : 0.0;
    return std::max(gemm, bytes * kCyclesPerWeightByte) + in / in_threads + out / threads + far;
}

double narrow_cycles(const ConvShape& s, double threads) {
    const double pixels = static_cast<double>(s.n * s.out_height() * s.out_width());
    const double lanes = static_cast<double>(conv_kernels().panel) / 2.0;
    const double vectors = static_cast<double>(s.channels) / lanes, lane_sum = lanes > 8.0 ? 25.0 : 20.0;
    return pixels * (static_cast<double>(s.channels_out) * (vectors + lane_sum) + vectors) / threads;
}

double strassen_cycles(const ConvShape& s, double threads) {
    const ConvKernels& kernels = conv_kernels();
    const double tiles = static_cast<double>(s.n) * ceil_div(s.out_height() * s.out_width(), 2);
    const double panels = static_cast<double>(s.channels_out / 2 / kernels.panel);
    const double k = static_cast<double>(s.channels) / 2.0, lanes = static_cast<double>(kernels.panel) / 2.0;
    const double in = tiles * k / lanes * 30.0, out = tiles * panels * 2.0 * 100.0;
    const double in_threads = tiles >= 2.0 * static_cast<double>(kernels.max_rows) * threads ? threads : 1.0;
    const double bytes = packed_bytes(ConvAlgorithm::kStrassen, s);
    const double gemm = 7.0 * gemm_cycles(tiles, panels, k, 3.0, threads);
    return std::max(gemm, bytes * kCyclesPerWeightByte) + in / in_threads + out / threads;
}

bool winograd_allowed() {
    return once<[] { return is_on(std::getenv("DL4DS_WINOGRAD")); }>();
}

bool strassen_allowed() {
    return once<[] { return is_on(std::getenv("DL4DS_STRASSEN")); }>();
}

}  // namespace

bool conv_supports(ConvAlgorithm algorithm, const ConvShape& s) {
    if (is_winograd(algorithm)) {
        return s.kernel_h == 3 && s.kernel_w == 3 && s.stride_h == 1 && s.stride_w == 1 &&
               s.dilation_h == 1 && s.dilation_w == 1 && s.groups == 1;
    }
    if (algorithm == ConvAlgorithm::kStrassen) {
        return s.taps() == 1 && s.pad_h == 0 && s.pad_w == 0 && s.groups == 1 &&
               s.channels % (2 * kChunk) == 0 && s.channels_out % (2 * conv_kernels().panel) == 0;
    }
    if (algorithm == ConvAlgorithm::kNarrow) {
        return is_narrow(s);
    }
    return algorithm != ConvAlgorithm::kDepthwise || is_depthwise(s);
}

ConvAlgorithm conv_choose(const ConvShape& s, int64_t threads, bool exact) {
    // With 16-byte vectors the library's own kernels for the machine are the better bet (not measured there).
    if (active_isa() == Isa::kBaseline || s.out_height() < 1 || s.out_width() < 1) {
        return ConvAlgorithm::kLibrary;
    }
    if (is_depthwise(s)) {
        return ConvAlgorithm::kDepthwise;
    }
    // Groups narrower than half a panel leave most of a register empty.
    if (s.groups > 1 && s.group_channels_out() * 2 <= conv_kernels().panel) {
        return ConvAlgorithm::kLibrary;
    }
    const double t = static_cast<double>(std::max<int64_t>(1, threads));
    ConvAlgorithm best = ConvAlgorithm::kDirect;
    double least = direct_cycles(s, t);
    const auto consider = [&](ConvAlgorithm algorithm, double cycles) {
        const double more = packed_bytes(algorithm, s) - packed_bytes(best, s);
        if (cycles + kCyclesPerPackedByte * std::max(0.0, more) < least) {
            best = algorithm, least = cycles;
        }
    };
    if (is_narrow(s)) {
        consider(ConvAlgorithm::kNarrow, narrow_cycles(s, t));
    }
    if (!exact && strassen_allowed() && conv_supports(ConvAlgorithm::kStrassen, s)) {
        consider(ConvAlgorithm::kStrassen, strassen_cycles(s, t));
    }
    if (winograd_allowed() && conv_supports(ConvAlgorithm::kWinograd4, s)) {
        consider(ConvAlgorithm::kWinograd2, winograd_cycles(ConvAlgorithm::kWinograd2, s, t));
        if (!exact) {
            consider(ConvAlgorithm::kWinograd4, winograd_cycles(ConvAlgorithm::kWinograd4, s, t));
            if (s.channels >= kFewestChannelsOf6 && s.channels <= kMostChannelsOf6) {
                consider(ConvAlgorithm::kWinograd6,
                         least_gain_of_6(s.channels) * winograd_cycles(ConvAlgorithm::kWinograd6, s, t));
            }
        }
    }
    return best;
}

}  // namespace dl4ds
