// Packing of receptive fields with few channels (an image's three: the stem of a network), where a kernel
// row's values lie side by side but do not fall on whole chunks. Included once per ISA by conv_kernels_cpu.h,
// after the general packing, which writes a field as one line first and then spreads it: two passes, and
// loads that cross the stores just made.
namespace dl4ds {
namespace DL4DS_ISA {

/// A part of one kernel row inside one vector: from lane `at` on, what lies `offset` behind the field's
/// corner in lane 0.
struct Piece {
    int64_t offset;
    int at;
};

/// The pieces of every vector in the order of k; begin[vector] .. begin[vector + 1].
struct Pieces {
    static constexpr int kMost = 128;
    Piece piece[kMost];
    int begin[kMost];
    int vectors;

    /// `rows` kernel rows of `length` values, `step` apart in memory. False: too many.
    DL4DS_INLINE bool fill(int64_t rows, int64_t length, int64_t step) {
        int count = 0, at = 0;
        vectors = 0;
        begin[0] = 0;
        for (int64_t row = 0; row < rows; ++row) {
            for (int64_t from = 0; from < length;) {
                if (count + 1 >= kMost || vectors + 2 >= kMost) {
                    return false;
                }
                piece[count++] = {row * step + from - at, at};
                const int64_t left = length - from, room = kLanes<float> - at, n = left < room ? left : room;
                from += n, at += static_cast<int>(n);
                if (at == kLanes<float>) {
                    at = 0;
                    begin[++vectors] = count;
                }
            }
        }
        if (at > 0) {
            begin[++vectors] = count;
        }
        return true;
    }
};

/// Vector `v` of the fields at the corners into its places of the panel; a null corner is left out.
DL4DS_INLINE void join_pieces(const Pieces& pieces, int v, const float* const* corner, int64_t rows,
                              float* to) {
    const Piece* piece = pieces.piece + pieces.begin[v];
    const int count = pieces.begin[v + 1] - pieces.begin[v];
    const Mask<float> lane = lane_index<float>();
    if (count == 1) {
        for (int64_t i = 0; i < rows; ++i, to += kChunk) {
            if (corner[i] != nullptr) {
                store(to, load(corner[i] + piece->offset));
            }
        }
    } else if (count == 2) {
        const int64_t first = piece[0].offset, second = piece[1].offset;
        const Mask<float> left = lane < piece[1].at;
        for (int64_t i = 0; i < rows; ++i, to += kChunk) {
            if (corner[i] != nullptr) {
                store(to, left ? load(corner[i] + first) : load(corner[i] + second));
            }
        }
    } else {
        for (int64_t i = 0; i < rows; ++i, to += kChunk) {
            if (corner[i] != nullptr) {
                Vec<float> value = load(corner[i] + piece[0].offset);
                for (int q = 1; q < count; ++q) {
                    value = lane < piece[q].at ? value : load(corner[i] + piece[q].offset);
                }
                store(to, value);
            }
        }
    }
}

/// Corners of the fields of consecutive output pixels, without a division for each.
struct Corners {
    int64_t n, y, x, wo, ho;

    DL4DS_INLINE Corners(int64_t pixel, int64_t wo_, int64_t ho_)
        : n(pixel / (wo_ * ho_)), y(pixel % (wo_ * ho_) / wo_), x(pixel % wo_), wo(wo_), ho(ho_) {}
    DL4DS_INLINE void next() {
        if (++x == wo) {
            x = 0;
            if (++y == ho) {
                y = 0, ++n;
            }
        }
    }
};

/// One A panel, vector by vector: each is put together in a register and stored once.
inline void pack_fields(const PackArgs& args) {
    const PackArgs p = args;
    const ConvShape s = *p.shape;
    const int64_t channels = s.group_channels(), length = s.kernel_w * channels, wo = s.out_width(),
                  ho = s.out_height();
    const int64_t pitch = p.pitch > 0 ? p.pitch : p.rows;
    Pieces pieces;
    // Longer kernel rows than a few chunks lose little by the general way.
    const bool dense = s.dilation_w == 1 && p.stride_w == channels && p.stride_h >= s.width * channels;
    if (channels >= kChunk || s.taps() == 1 || length > 4 * kChunk || !dense || s.width * channels < kChunk ||
        !pieces.fill(s.kernel_h, length, s.dilation_h * p.stride_h)) {
        return pack(args);
    }
    constexpr int kMostRows = kMaxRows;
    const float* corner[kMostRows];  // null: the field is not safely inside the map
    int64_t slow = 0;
    Corners at(p.first, wo, ho);
    for (int64_t i = 0; i < p.rows; ++i, at.next()) {
        const int64_t y0 = at.y * s.stride_h - s.pad_h, x0 = at.x * s.stride_w - s.pad_w;
        const int64_t bottom = y0 + (s.kernel_h - 1) * s.dilation_h;
        // A vector reads up to kLanes - 1 values behind a kernel row (and before one, but the first): the
        // map's last row must have them.
        const bool room =
            bottom + 1 < s.height || (x0 * channels + length + kChunk - 1 <= s.width * channels);
        const bool inside = y0 >= 0 && bottom < s.height && x0 >= 0 && x0 + s.kernel_w <= s.width && room;
        corner[i] = inside ? p.x + at.n * p.stride_n + y0 * p.stride_h + x0 * channels : nullptr;
        slow += inside ? 0 : 1;
    }
    if (slow < p.rows) {
        constexpr int kPerChunk = kChunk / kLanes<float>;
        for (int v = 0; v < pieces.vectors; ++v) {
            join_pieces(pieces, v, corner, p.rows,
                        p.a + v / kPerChunk * pitch * kChunk + v % kPerChunk * kLanes<float>);
        }
    }
    if (slow > 0) {
        Corners place(p.first, wo, ho);
        for (int64_t i = 0; i < p.rows; ++i, place.next()) {
            if (corner[i] == nullptr) {
                gather_line(p, p.x + place.n * p.stride_n, place.y * s.stride_h - s.pad_h,
                            place.x * s.stride_w - s.pad_w);
                spread(p.line, s.kernel_h * length, p.a + i * kChunk, pitch);
            }
        }
    }
}

}  // namespace DL4DS_ISA
}  // namespace dl4ds
