// The direct algorithm of a training step (conv_train_cpu.h): packing a weight's taps, and the gradient of x.
#include <vector>

#include "ops/conv_bn_act/conv_cut_cpu.h"
#include "ops/conv_bn_act/conv_train_cpu.h"

namespace dl4ds {
namespace {

/// Rows or columns first, first + stride, … of x: what a convolution of dout gives them.
struct Residue {
    int64_t first, count;     // of them
    int64_t first_tap, taps;  // taps that reach them: first_tap, first_tap + stride, …
    int64_t pad, more;        // of that convolution
    bool meets_padding() const { return pad > 0 || more > 0; }
};

Residue residue_of(int64_t first, int64_t size, int64_t out, int64_t kernel, int64_t stride, int64_t pad,
                   int64_t dilation) {
    Residue r{first, 0, (first + pad) % stride, 0, 0, 0};
    r.count = first < size ? ceil_div(size - first, stride) : 0;
    r.taps = r.first_tap < kernel ? ceil_div(kernel - r.first_tap, stride) : 0;
    const int64_t reach = dilation * (r.taps - 1);
    r.pad = reach - (first + pad - r.first_tap) / stride;  // the last tap comes first in the turned kernel
    r.more = r.count - (out + 2 * r.pad - reach);
    return r;
}

Residue row_residue(const ConvShape& s, int64_t first) {
    return residue_of(first, s.height, s.out_height(), s.kernel_h, s.stride_h, s.pad_h, s.dilation_h);
}

Residue column_residue(const ConvShape& s, int64_t first) {
    return residue_of(first, s.width, s.out_width(), s.kernel_w, s.stride_w, s.pad_w, s.dilation_w);
}

/// The convolution of dout that gives dx at these rows and columns.
ConvShape turned(const ConvShape& s, const Residue& rows, const Residue& columns) {
    ConvShape back = s;
    back.channels = s.channels_out, back.channels_out = s.channels;
    back.height = s.out_height(), back.width = s.out_width();
    back.kernel_h = rows.taps, back.kernel_w = columns.taps;
    back.stride_h = back.stride_w = 1;
    back.pad_h = rows.pad, back.pad_w = columns.pad;
    back.more_h = rows.more, back.more_w = columns.more;
    return back;
}

std::vector<int64_t> turned_taps(const ConvShape& s, const FilterLayout& layout, const Residue& rows,
                                 const Residue& columns) {
    std::vector<int64_t> taps;
    for (int64_t i = rows.taps - 1; i >= 0; --i) {
        for (int64_t j = columns.taps - 1; j >= 0; --j) {
            const int64_t r = rows.first_tap + i * s.stride_h, q = columns.first_tap + j * s.stride_w;
            taps.push_back((r * s.kernel_w + q) * layout.tap);
        }
    }
    return taps;
}

/// The convolution of dout, plus `added`, into `out`, a dense map of the residue's pixels. False: see
/// conv_dgrad_direct.
bool run_turned(const DgradArgs& args, const Residue& rows, const Residue& columns, const float* added,
                float* out) {
    const ConvShape back = turned(args.shape, rows, columns);
    const int64_t floats = conv_packed_floats(ConvAlgorithm::kDirect, back);
    const int64_t entries = back.channels_out + conv_kernels().panel;
    Scratch scratch((floats + 2 * entries) * 4);
    float *packed = scratch.as<float>(), *scale = packed + floats, *shift = scale + entries;
    const bool finite = conv_pack_taps(back, args.weight, args.layout, /*gradient=*/true,
                                       turned_taps(args.shape, args.layout, rows, columns), packed);
    if (!finite && (rows.meets_padding() || columns.meets_padding())) {
        return false;
    }
    std::fill(scale, scale + entries, 1.0f);
    std::fill(shift, shift + entries, 0.0f);
    ConvArgs run{};
    run.shape = back, run.packed = packed, run.out = out, run.threads = args.threads;
    run.x = args.dout, run.stride_n = args.stride_n, run.stride_h = args.stride_h,
    run.stride_w = args.stride_w;
    run.epilogue = {scale, shift, added, Activation::kNone, 0.0f};
    run.back = args.back;
    return conv_run(ConvAlgorithm::kDirect, run);
}

/// to = from + added, zeros for what is null.
void place_pixel(int64_t channels, const float* from, const float* added, float* to) {
    if (from == nullptr || added == nullptr) {
        const float* const only = from == nullptr ? added : from;
        if (only == nullptr) {
            std::fill(to, to + channels, 0.0f);
        } else {
            std::copy(only, only + channels, to);
        }
        return;
    }
    for (int64_t c = 0; c < channels; ++c) {
        to[c] = from[c] + added[c];
    }
}

/// Pixels of `from` (null: zeros) to the residue's places in dx, plus what is added there.
void place(const DgradArgs& args, const Residue& rows, const Residue& columns, const float* from) {
    const ConvShape& s = args.shape;
    const int64_t lines = s.n * rows.count, bytes = lines * columns.count * s.channels * 8;
    parallel_for(lines, bytes, [&](int64_t begin, int64_t end) {
        for (int64_t line = begin; line < end; ++line) {
            const int64_t image = line / rows.count, y = rows.first + line % rows.count * s.stride_h;
            const float* pixel = from == nullptr ? nullptr : from + line * columns.count * s.channels;
            for (int64_t x = 0; x < columns.count; ++x) {
                const int64_t at =
                    ((image * s.height + y) * s.width + columns.first + x * s.stride_w) * s.channels;
                place_pixel(s.channels, pixel == nullptr ? nullptr : pixel + x * s.channels,
                            args.added == nullptr ? nullptr : args.added + at, args.dx + at);
            }
        }
    });
}

template <typename Fn>
bool for_each_residue(const ConvShape& s, const Fn& fn) {
    for (int64_t y = 0; y < s.stride_h; ++y) {
        for (int64_t x = 0; x < s.stride_w; ++x) {
            const Residue rows = row_residue(s, y), columns = column_residue(s, x);
            if (rows.count > 0 && columns.count > 0 && !fn(rows, columns)) {
                return false;
            }
        }
    }
    return true;
}

}  // namespace

bool conv_pack_taps(const ConvShape& s, const float* weight, const FilterLayout& layout, bool gradient,
                    const std::vector<int64_t>& taps, float* packed) {
    constexpr int64_t kRows = 128;  // of one item
    const int64_t width = conv_kernels().panel, panels = ceil_div(s.channels_out, width);
    // Lanes are what the running convolution gives out, rows what it sums over.
    const int64_t lane = gradient ? layout.in : layout.out, row = gradient ? layout.out : layout.in;
    const int64_t parts = ceil_div(s.channels, kRows), count = static_cast<int64_t>(taps.size());
    std::atomic<bool> finite{true};
    parallel_for(
        panels * count * parts, s.channels * s.channels_out * count * 8, [&](int64_t begin, int64_t end) {
            bool all_finite = true;
            for (int64_t item = begin; item < end; ++item) {
                const int64_t first = item % parts * kRows, tap = item / parts % count,
                              panel = item / parts / count;
                all_finite &= train_kernels().pack_lanes(
                    {weight + taps[static_cast<size_t>(tap)] + panel * width * lane + first * row, lane, row,
                     std::min(width, s.channels_out - panel * width), std::min(kRows, s.channels - first),
                     packed + ((panel * count + tap) * s.channels + first) * width});
            }
            if (!all_finite) {
                finite.store(false, std::memory_order_relaxed);
            }
        });
    return finite.load();
}

bool conv_dgrad_direct_supports(const ConvShape& s) {
    if ((s.stride_h > 1 && s.dilation_h > 1) || (s.stride_w > 1 && s.dilation_w > 1) || s.groups != 1) {
        return false;
    }
    return for_each_residue(s, [&](const Residue& rows, const Residue& columns) {
        return rows.taps == 0 || columns.taps == 0 || (rows.pad >= 0 && columns.pad >= 0);
    });
}

bool conv_dgrad_direct(const DgradArgs& args) {
    const ConvShape& s = args.shape;
    if (s.stride_h == 1 && s.stride_w == 1) {
        return run_turned(args, row_residue(s, 0), column_residue(s, 0), args.added, args.dx);
    }
    return for_each_residue(s, [&](const Residue& rows, const Residue& columns) {
        if (rows.taps == 0 || columns.taps == 0) {
            place(args, rows, columns, nullptr);
            return true;
        }
        Scratch scratch(s.n * rows.count * columns.count * s.channels * 4);
        if (!run_turned(args, rows, columns, nullptr, scratch.as<float>())) {
            return false;
        }
        place(args, rows, columns, scratch.as<float>());
        return true;
    });
}

}  // namespace dl4ds
