// What the CPU kernels of pool2d work on: one row of the output, channels_last, fp32. No torch header.
#pragma once

#include <algorithm>
#include <cstdint>

namespace dl4ds {

/// One spatial dimension of a pooling: `size` places in, `out` windows of `kernel` taps.
struct PoolAxis {
    int64_t size, out, kernel, stride, padding, dilation;

    /// First tap's place, and the taps [begin, end) that are inside.
    struct Window {
        int64_t first, begin, end;
    };
    Window window(int64_t o) const {
        const int64_t first = o * stride - padding;
        const int64_t begin = first >= 0 ? 0 : (dilation - 1 - first) / dilation;
        const int64_t end = first >= size ? 0 : std::min(kernel, (size - first + dilation - 1) / dilation);
        return {first, begin, std::max(begin, end)};
    }
    /// Taps that an average counts when it counts the padding: those up to the padded end (ceil_mode goes
    /// past it).
    int64_t padded_taps(int64_t o) const {
        const int64_t first = o * stride - padding;
        return std::min(first + kernel, size + padding) - first;
    }
};

/// The taps of one output row: rows of the map, and per output pixel the columns.
struct PoolRowArgs {
    const float* x;          // the first row of taps that is inside
    int64_t row_step, rows;  // from one row of taps to the next; how many
    int64_t column_step;     // from one column of the map to the next
    int64_t channels;
    const PoolAxis* columns;
    float* out;
};

/// The gradient of a maximum pooling, for one row of the output: each window's goes to its largest value.
struct MaxPoolBackArgs {
    PoolRowArgs row;     // out: null
    const float* dout;   // the row of the output's gradient
    float* dx;           // the gradient at the place of row.x, which is added to,
    int64_t begin, end;  // in these rows of taps: others are somebody else's
};

struct AveragePoolArgs {
    PoolRowArgs row;
    int64_t divisor;  // 0: per window
    bool count_include_pad;
    int64_t padded_rows;  // PoolAxis::padded_taps of this row
};

/// out = mean of `pixels` pixels, channels [0, channels); kept in blocks so that the rounding error stays
/// small.
struct GlobalPoolArgs {
    const float* x;
    int64_t pixels, step, channels;
    float* out;
};

struct PoolKernels {
    void (*max_row)(const PoolRowArgs&);
    void (*max_row_back)(const MaxPoolBackArgs&);
    void (*average_row)(const AveragePoolArgs&);
    void (*global_average)(const GlobalPoolArgs&);
};

/// The table of the active ISA.
const PoolKernels& pool_kernels();

}  // namespace dl4ds
