// What the next block of a direct convolution will read and write, asked for (into L2) while this block is
// multiplied. The micro-kernel spends one prefetch on every step of k and needs only part of them for the
// weight; the rest is handed out here. Without it a 1x1 layer waits for its rows each time it packs them:
// measured on ResNet-50's layers, 155 instead of 193 GFLOP/s once the maps do not fit L2.
#pragma once

#include <algorithm>
#include <cstdint>

#include "ops/conv_bn_act/conv_engine_cpu.h"

namespace dl4ds {

/// A queue of address ranges. Prefetches are hints: a range may be cut short or overshot.
class Ahead {
  public:
    void add(const float* from, const float* to) {
        if (count_ < kRanges && from != nullptr && from < to) {
            ranges_[count_++] = {reinterpret_cast<const char*>(from), reinterpret_cast<const char*>(to)};
        }
    }

    /// Where to prefetch `bytes` from, one line after the other; `instead` when nothing is left.
    const char* take(int64_t bytes, const char* instead) {
        if (next_ == count_) {
            return instead;
        }
        Range& range = ranges_[next_];
        const char* from = range.from;
        range.from += bytes;
        next_ += range.from >= range.to ? 1 : 0;
        return from;
    }

  private:
    struct Range {
        const char *from, *to;
    };
    static constexpr int kRanges = 64;  // a DenseNet layer has up to 49 sources
    Range ranges_[kRanges];
    int count_ = 0, next_ = 0;
};

/// Pixel `pixel` of a map (N, C, H, W) in channels_last, or a slice of its channels.
struct InputRows {
    const float* x;
    int64_t stride_n, stride_h, stride_w, channels;

    /// Whether most of what lies between two pixels is theirs.
    bool dense() const { return stride_w <= 2 * channels; }
};

/// The input rows that output pixels [first, last] need and the pixels before them did not.
inline void add_input(Ahead& ahead, const InputRows& in, const ConvShape& s, int64_t first, int64_t last) {
    if (!in.dense() || s.groups > 1 || (s.taps() == 1 && s.stride_h > 1)) {
        return;  // most of the lines between would be asked for in vain
    }
    const int64_t wo = s.out_width(), plane = wo * s.out_height();
    const int64_t below = (s.kernel_h - 1) * s.dilation_h - s.pad_h;
    const auto offset = [&](int64_t pixel) {
        const int64_t y = pixel % plane / wo * s.stride_h + below, x = pixel % wo * s.stride_w;
        return std::clamp<int64_t>(y, 0, s.height) * in.stride_h + x * in.stride_w;
    };
    const int64_t image = last / plane;
    const int64_t from = first / plane == image ? offset(first) : 0;
    const float* base = in.x + image * in.stride_n;
    ahead.add(base + from, base + offset(last) + in.stride_w);
}

/// The same for what a prologue reads.
inline void add_sources(Ahead& ahead, const ConvPrologue& prologue, const ConvShape& s, int64_t first,
                        int64_t last) {
    ConvShape read = s;  // pooling reads as a kernel of its size does
    read.kernel_h = read.kernel_w = read.stride_h = read.stride_w = prologue.pool;
    read.height *= prologue.pool, read.width *= prologue.pool;
    for (int64_t i = 0; i < prologue.count; ++i) {
        const ConvSource& in = prologue.sources[i];
        add_input(ahead, {in.x, in.stride_n, in.stride_h, in.stride_w, in.channels}, read, first, last);
    }
}

}  // namespace dl4ds
