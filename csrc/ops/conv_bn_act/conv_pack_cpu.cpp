// Packing of convolution weights for the engine of conv_engine_cpu.h; done once per weight.
#include <algorithm>
#include <vector>

#include "common/cpu/parallel.h"
#include "ops/conv_bn_act/conv_depthwise_cpu.h"
#include "ops/conv_bn_act/conv_narrow_cpu.h"

namespace dl4ds {
namespace {

int64_t panels_of(int64_t channels_out, int64_t panel) { return (channels_out + panel - 1) / panel; }

/// G of F(m x m, 3x3) with all divisors of Toom-Cook's interpolation: (m + 2) x 3, row major.
std::vector<double> filter_transform(int m) {
    // The transforms of conv_winograd_kernels_cpu.h are for these points.
    const std::vector<double> points = m == 2   ? std::vector<double>{0, 1, -1}
                                       : m == 4 ? std::vector<double>{0, 0.625, -0.625, 1.5, -1.5}
                                                : std::vector<double>{0, 0.5625, -0.5625, 1, -1, 2, -2};
    std::vector<double> g;
    for (size_t i = 0; i < points.size(); ++i) {
        double divisor = 1;
        for (size_t j = 0; j < points.size(); ++j) {
            divisor *= i == j ? 1.0 : points[i] - points[j];
        }
        for (int power = 0; power < 3; ++power) {
            g.push_back((power == 0 ? 1.0 : power == 1 ? points[i] : points[i] * points[i]) / divisor);
        }
    }
    g.insert(g.end(), {0.0, 0.0, 1.0});  // the point at infinity
    return g;
}

/// U[panel][position][c][panel width]; rounded once, from double.
void pack_winograd(int m, const ConvShape& s, const float* weight, float* packed) {
    const int64_t width = conv_kernels().panel, n = m + 2, channels = s.channels;
    const std::vector<double> g = filter_transform(m);
    const int64_t panels = panels_of(s.channels_out, width);
    parallel_for(panels, s.channels_out * channels * n * n * 8, [&](int64_t begin, int64_t end) {
        std::vector<double> half(n * 3 * width);
        for (int64_t p = begin; p < end; ++p) {
            float* u = packed + p * n * n * channels * width;
            const int64_t columns = std::min(width, s.channels_out - p * width);
            for (int64_t c = 0; c < channels; ++c) {
                // One panel's worth of filters at a time, lanes innermost: the compiler vectorises them.
                for (int64_t i = 0; i < n; ++i) {
                    for (int64_t q = 0; q < 3; ++q) {
                        double* to = half.data() + (i * 3 + q) * width;
                        for (int64_t k = 0; k < columns; ++k) {
                            const float* w = weight + ((p * width + k) * channels + c) * 9 + q;
                            to[k] = g[i * 3] * w[0] + g[i * 3 + 1] * w[3] + g[i * 3 + 2] * w[6];
                        }
                    }
                }
                for (int64_t i = 0; i < n; ++i) {
                    const double* row = half.data() + i * 3 * width;
                    for (int64_t j = 0; j < n; ++j) {
                        float* to = u + ((i * n + j) * channels + c) * width;
                        for (int64_t k = 0; k < columns; ++k) {
                            to[k] = static_cast<float>(row[k] * g[j * 3] + row[width + k] * g[j * 3 + 1] +
                                                       row[2 * width + k] * g[j * 3 + 2]);
                        }
                        std::fill(to + columns, to + width, 0.0f);
                    }
                }
            }
        }
    });
}

/// B[group][panel][tap][c][panel width].
void pack_direct(const ConvShape& s, const float* weight, float* packed) {
    const int64_t width = conv_kernels().panel, channels = s.group_channels(),
                  outputs = s.group_channels_out();
    const int64_t taps = s.taps(), k = channels * taps, panels = panels_of(outputs, width);
    parallel_for(s.groups * panels, s.channels_out * k * 8, [&](int64_t begin, int64_t end) {
        for (int64_t item = begin; item < end; ++item) {
            const int64_t group = item / panels, first = item % panels * width;
            const int64_t columns = std::min(width, outputs - first);
            const float* w = weight + (group * outputs + first) * k;
            float* to = packed + item * k * width;
            for (int64_t tap = 0; tap < taps; ++tap) {
                for (int64_t c = 0; c < channels; ++c, to += width) {
                    for (int64_t j = 0; j < columns; ++j) {
                        to[j] = w[j * k + c * taps + tap];
                    }
                    std::fill(to + columns, to + width, 0.0f);
                }
            }
        }
    });
}

/// U[panel of the left half][product][c of the upper half][panel width].
void pack_strassen(const ConvShape& s, const float* weight, float* packed) {
    const int64_t width = conv_kernels().panel, k = s.channels / 2, half = s.channels_out / 2;
    parallel_for(half / width, s.channels_out * s.channels * 11, [&](int64_t begin, int64_t end) {
        for (int64_t p = begin; p < end; ++p) {
            float* u = packed + p * 7 * k * width;
            for (int64_t c = 0; c < k; ++c) {
                for (int64_t j = 0; j < width; ++j) {
                    const float *left = weight + (p * width + j) * 2 * k + c, *right = left + half * 2 * k;
                    const float b11 = left[0], b21 = left[k], b12 = right[0], b22 = right[k];
                    const float sums[7] = {b11 + b22, b11, b12 - b22, b21 - b11, b22, b11 + b12, b21 + b22};
                    for (int64_t i = 0; i < 7; ++i) {
                        u[(i * k + c) * width + j] = sums[i];
                    }
                }
            }
        }
    });
}

}  // namespace

int64_t conv_packed_floats(ConvAlgorithm algorithm, const ConvShape& s) {
    if (algorithm == ConvAlgorithm::kDepthwise) {
        return depthwise_packed_floats(s);
    }
    if (algorithm == ConvAlgorithm::kNarrow) {
        return narrow_packed_floats(s);
    }
    const int64_t width = conv_kernels().panel;
    if (algorithm == ConvAlgorithm::kStrassen) {
        return s.channels_out * s.channels / 4 * 7;
    }
    const int64_t lanes = panels_of(s.group_channels_out(), width) * width * s.groups;
    const int64_t positions = is_winograd(algorithm) ? winograd_positions(algorithm) : s.taps();
    return lanes * s.group_channels() * positions;
}

void conv_pack_weight(ConvAlgorithm algorithm, const ConvShape& s, const float* weight, float* packed) {
    if (algorithm == ConvAlgorithm::kDirect) {
        pack_direct(s, weight, packed);
    } else if (algorithm == ConvAlgorithm::kStrassen) {
        pack_strassen(s, weight, packed);
    } else if (algorithm == ConvAlgorithm::kDepthwise) {
        depthwise_pack_weight(s, weight, packed);
    } else if (algorithm == ConvAlgorithm::kNarrow) {
        narrow_pack_weight(s, weight, packed);
    } else {
        pack_winograd(static_cast<int>(algorithm), s, weight, packed);
    }
}

}  // namespace dl4ds
