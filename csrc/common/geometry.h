// How GPU kernels walk an activation (N, C, D, H, W): as NHWC rows or as NCHW planes, sliced inputs included.
// Plain structs that host code fills and kernels take by value: no torch, no CUDA header.
#pragma once

#include <cstdint>

#include "common/dispatch.h"

namespace dl4ds {

/// Sizes, or element strides, of an activation; missing spatial dimensions have size 1.
struct Dims {
    int64_t n = 1, c = 1, d = 1, h = 1, w = 1;

    constexpr int64_t plane() const { return d * h * w; }
    constexpr int64_t numel() const { return n * c * plane(); }
};

constexpr Dims dense_dims(const Dims& size, bool channels_last) {
    if (channels_last) {
        return {size.plane() * size.c, 1, size.h * size.w * size.c, size.w * size.c, size.c};
    }
    return {size.c * size.plane(), size.plane(), size.h * size.w, size.w, 1};
}

/// A vector of C values of any floating dtype; data is null where there is none.
struct ChannelVector {
    const void* data = nullptr;
    DType dtype = DType::kFloat32;
};

/// Division of n <= INT32_MAX by a fixed divisor as a multiplication: the divisor d with s = ceil(log2 d) and
/// m = floor(2^32 * (2^s - d) / d) + 1 gives n / d = (mulhi(n, m) + n) >> s (Granlund and Montgomery 1994).
struct Divider {
    uint32_t divisor = 1, magic = 1, shift = 0;

    Divider() = default;
    explicit Divider(uint32_t d) : divisor(d) {
        while ((uint64_t(1) << shift) < d) {
            ++shift;
        }
        magic = static_cast<uint32_t>((uint64_t(1) << 32) * ((uint64_t(1) << shift) - d) / d + 1);
    }
};

/// Row r of an NHWC activation is one pixel: C values side by side. Rows are numbered in memory order of the
/// dense tensor; if `sliced`, r = (outer * mid + m) * inner + i, else every operand has one pitch for all.
struct Rows {
    int64_t count = 0;
    Divider mid, inner;
    bool sliced = false;
};

struct RowStrides {
    int64_t outer = 0, mid = 0, inner = 0;
};

/// A plane of an NCHW activation: `length` values of one channel of one image, in lines of `width` if an
/// operand has a line pitch (`pitched`; else the whole plane is one run in every operand).
struct Planes {
    int64_t batch = 0, channels = 0, length = 0;
    Divider width;
    bool pitched = false;
};

struct PlaneStrides {
    int64_t n = 0, c = 0, line = 0;
};

constexpr int kMaxOperands = 3;

namespace detail {

/// Merges neighbouring dimensions (outermost first) that every operand walks with one stride and drops those
/// of size 1; returns how many are left.
inline int merge_dims(int dims, int64_t* size, int operands, int64_t (*stride)[4]) {
    int kept = 0;
    for (int d = 0; d < dims; ++d) {
        if (size[d] == 1) {
            continue;
        }
        bool joins = kept > 0;
        for (int k = 0; joins && k < operands; ++k) {
            joins = stride[k][kept - 1] == stride[k][d] * size[d];
        }
        const int to = joins ? kept - 1 : kept++;
        size[to] = joins ? size[to] * size[d] : size[d];
        for (int k = 0; k < operands; ++k) {
            stride[k][to] = stride[k][d];
        }
    }
    return kept;
}

}  // namespace detail

/// Describes the operands (all of size `size`) as NHWC rows. False if that is not possible (the channels of
/// a pixel are apart, or there are more than three levels of pitch): the caller then makes a dense copy.
inline bool as_rows(const Dims& size, int operands, const Dims* strides, Rows& rows, RowStrides* out) {
    int64_t sizes[4] = {size.n, size.d, size.h, size.w}, stride[kMaxOperands][4];
    for (int k = 0; k < operands; ++k) {
        const Dims& s = strides[k];
        if (s.c != 1 && size.c != 1) {
            return false;
        }
        const int64_t all[4] = {s.n, s.d, s.h, s.w};
        for (int d = 0; d < 4; ++d) {
            stride[k][d] = all[d];
        }
    }
    const int levels = detail::merge_dims(4, sizes, operands, stride);
    rows = Rows{};
    rows.count = size.n * size.plane();
    rows.sliced = levels > 1;
    // Sliced rows are split with 32-bit divisions.
    if (levels > 3 || (rows.sliced && rows.count > INT32_MAX)) {
        return false;
    }
    rows.inner = Divider(levels > 1 ? static_cast<uint32_t>(sizes[levels - 1]) : 1);
    rows.mid = Divider(levels > 2 ? static_cast<uint32_t>(sizes[1]) : 1);
    for (int k = 0; k < operands; ++k) {
        out[k].inner = levels > 0 ? stride[k][levels - 1] : size.c;
        out[k].mid = levels > 2 ? stride[k][1] : 0;
        out[k].outer = levels > 1 ? stride[k][0] : 0;
    }
    return true;
}

/// The same as NCHW planes. False where the values of a line are apart or a plane has more than one pitch.
inline bool as_planes(const Dims& size, int operands, const Dims* strides, Planes& planes,
                      PlaneStrides* out) {
    int64_t sizes[4] = {size.d, size.h, size.w, 1}, stride[kMaxOperands][4];
    for (int k = 0; k < operands; ++k) {
        const int64_t all[4] = {strides[k].d, strides[k].h, strides[k].w, 1};
        for (int d = 0; d < 4; ++d) {
            stride[k][d] = all[d];
        }
    }
    const int levels = detail::merge_dims(3, sizes, operands, stride);
    // A slice of lines of one value each: the pitch is then the only stride left.
    bool single = false;
    for (int k = 0; k < operands; ++k) {
        single = single || (levels == 1 && size.w == 1 && stride[k][0] != 1);
    }
    planes = Planes{size.n, size.c, size.plane(), Divider(), levels == 2 || single};
    // Positions are ints, and a vector may reach beyond the last.
    if (levels > 2 || size.plane() > INT32_MAX - 64) {
        return false;
    }
    planes.width = Divider(levels == 2 ? static_cast<uint32_t>(sizes[1]) : 1);
    for (int k = 0; k < operands; ++k) {
        if (levels > 0 && !single && stride[k][levels - 1] != 1) {
            return false;
        }
        out[k] = {strides[k].n, strides[k].c, planes.pitched ? stride[k][0] : 0};
        // The stride of a dimension of size 1 is arbitrary: its dense value keeps "is dense" one comparison.
        if (size.c == 1) {
            out[k].c = size.plane();
        }
        if (size.n == 1) {
            out[k].n = size.c * out[k].c;
        }
    }
    return true;
}

}  // namespace dl4ds
