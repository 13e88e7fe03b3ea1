// The kernels of bn_act on rows (see bn_act_cpu.h), compiled once per ISA by foreach_isa.h.
#include "common/cpu/vec_activation.h"

namespace dl4ds {
namespace DL4DS_ISA {

/// Rows that the per-element reductions sum in the accumulator type before they go to doubles.
constexpr int kRowGroup = 8;
/// Rows that they read side by side, so that sums are loaded and stored once for all of them. Side by side is more
/// streams than a hardware prefetcher follows (half the bandwidth), hence prefetch_ahead().
constexpr int kFront = 4;
constexpr int64_t kPrefetchBytes = 8 << 10;
/// Rows that share one shift in the statistics. With the shift the mean of kRowGroup of n rows, the squared distance
/// of shift and mean is at most n / kRowGroup variances, which bounds the cancellation in the variance.
constexpr int64_t kStatsRows = 512;

/// The channel's constants for one vector: an array entry each (per element) or one value (per row).
template <typename T, bool kPerRow>
DL4DS_INLINE Vec<T> channel_value(const void* values, int64_t i) {
    const T* array = static_cast<const T*>(values);
    if constexpr (kPerRow) {
        return broadcast<T>(array[0]);
    } else {
        return load(array + i);
    }
}

/// Asks for the memory kPrefetchBytes ahead, in the order of addresses, while column i of row k of a front is read.
template <typename scalar_t>
DL4DS_INLINE void prefetch_ahead(const scalar_t* first_row, int64_t i, int k) {
    const scalar_t* now = first_row + i * kFront + k * kLanes<acc_t<scalar_t>>;
    __builtin_prefetch(reinterpret_cast<const char*>(now) + kPrefetchBytes);
}

// ---- statistics -------------------------------------------------------------------------------------------------

/// Merges (count_b, mean_b, m2_b) into (count, mean, m2) by Chan's formula.
DL4DS_INLINE void merge_moments(double count, double& mean, double& m2, double count_b, double mean_b, double m2_b) {
    const double total = count + count_b;
    const double delta = mean_b - mean;
    mean += delta * (count_b / total);
    m2 += m2_b + delta * delta * (count * count_b / total);
}

/// Adds kRows rows to the running sums of d = x - shift and of d * d.
template <typename scalar_t, int kRows, bool kPartial>
DL4DS_INLINE void stats_lanes(const scalar_t* x, int64_t pitch, int64_t i, int64_t n, const acc_t<scalar_t>* shift,
                              acc_t<scalar_t>* sum, acc_t<scalar_t>* square) {
    using T = acc_t<scalar_t>;
    const Vec<T> center = load(shift + i);
    Vec<T> s = load(sum + i), q = load(square + i);
    for (int k = 0; k < kRows; ++k) {
        if constexpr (kRows == kFront) {
            prefetch_ahead(x, i, k);
        }
        const Vec<T> d = load_lanes<kPartial>(x + k * pitch + i, n) - center;
        s += d;
        q += d * d;
    }
    store(sum + i, s);
    store(square + i, q);
}

template <typename scalar_t, int kRows>
DL4DS_INLINE void stats_rows(const scalar_t* x, int64_t pitch, int64_t len, const acc_t<scalar_t>* shift,
                             acc_t<scalar_t>* sum, acc_t<scalar_t>* square) {
    constexpr int W = kLanes<acc_t<scalar_t>>;
    int64_t i = 0;
    for (; i + W <= len; i += W) {
        stats_lanes<scalar_t, kRows, false>(x, pitch, i, W, shift, sum, square);
    }
    if (i < len) {
        stats_lanes<scalar_t, kRows, true>(x, pitch, i, len - i, shift, sum, square);
    }
}

/// Moves sums of the accumulator type to doubles and starts them anew. `entries` is a padded length.
template <typename T>
DL4DS_INLINE void flush_sums(T* sums, double* totals, int64_t entries) {
    for (int64_t i = 0; i < entries; i += kLanes<T>) {
        add_to_doubles<T>(totals + i, load(sums + i));
        store(sums + i, Vec<T>{});
    }
}

/// shift[i] = mean of the first few rows' element i.
template <typename scalar_t>
void stats_shift(const scalar_t* x, int64_t pitch, int rows, int64_t len, acc_t<scalar_t>* shift) {
    using T = acc_t<scalar_t>;
    constexpr int W = kLanes<T>;
    const T factor = T(1) / static_cast<T>(rows);
    for (int64_t i = 0; i < len; i += W) {
        Vec<T> s{};
        for (int r = 0; r < rows; ++r) {
            const scalar_t* row = x + r * pitch + i;
            s += i + W <= len ? load(row) : load_partial(row, len - i);
        }
        store(shift + i, s * factor);
    }
}

/// Merges `count` rows' sums of x - shift into p.mean and p.m2, which stand for the `before` rows before them.
template <typename T>
DL4DS_INLINE void merge_stats(const BnStatsArgs& p, double before, double count, const T* shift, const double* sum,
                              const double* square) {
    for (int64_t i = 0; i < p.len; ++i) {
        const double offset = sum[i] / count;
        const double mean = static_cast<double>(shift[i]) + offset;
        const double m2 = square[i] - sum[i] * offset;
        if (before == 0) {
            p.mean[i] = mean;
            p.m2[i] = m2;
        } else {
            merge_moments(before, p.mean[i], p.m2[i], count, mean, m2);
        }
    }
}

template <typename scalar_t>
void stats_per_element(const BnStatsArgs& p) {
    using T = acc_t<scalar_t>;
    const int64_t padded = pad_elements(p.len);
    double* total = static_cast<double*>(p.scratch);
    double* total_square = total + padded;
    T* shift = reinterpret_cast<T*>(total_square + padded);
    T *sum = shift + padded, *square = sum + padded;
    for (int64_t i = 0; i < padded; ++i) {
        sum[i] = square[i] = 0;
    }
    for (int64_t begin = 0; begin < p.rows; begin += kStatsRows) {
        const int64_t rows = p.rows - begin < kStatsRows ? p.rows - begin : kStatsRows;
        const scalar_t* x = static_cast<const scalar_t*>(p.x) + begin * p.x_pitch;
        stats_shift(x, p.x_pitch, rows < kRowGroup ? static_cast<int>(rows) : kRowGroup, p.len, shift);
        for (int64_t i = 0; i < padded; ++i) {
            total[i] = total_square[i] = 0;
        }
        for (int64_t r = 0; r < rows;) {
            if (r + kFront <= rows) {
                stats_rows<scalar_t, kFront>(x + r * p.x_pitch, p.x_pitch, p.len, shift, sum, square);
                r += kFront;
            } else {
                stats_rows<scalar_t, 1>(x + r * p.x_pitch, p.x_pitch, p.len, shift, sum, square);
                r += 1;
            }
            if (r % kRowGroup == 0 || r == rows) {
                flush_sums<T>(sum, total, padded);
                flush_sums<T>(square, total_square, padded);
            }
        }
        merge_stats<T>(p, static_cast<double>(begin), static_cast<double>(rows), shift, total, total_square);
    }
}

/// Sums of a piece of one channel: n elements from each of `rows` rows.
template <typename scalar_t>
DL4DS_INLINE void stats_piece(const scalar_t* x, int64_t pitch, int64_t rows, int64_t n, acc_t<scalar_t> shift,
                              double& sum, double& square) {
    using T = acc_t<scalar_t>;
    constexpr int W = kLanes<T>;
    const Vec<T> shift_vec = broadcast<T>(shift);
    Vec<T> s[4] = {}, q[4] = {};
    for (int64_t r = 0; r < rows; ++r) {
        const scalar_t* row = x + r * pitch;
        int64_t i = 0;
        for (; i + 4 * W <= n; i += 4 * W) {
            for (int k = 0; k < 4; ++k) {
                const Vec<T> d = load(row + i + k * W) - shift_vec;
                s[k] += d;
                q[k] += d * d;
            }
        }
        for (; i < n; i += W) {
            const Vec<T> d = i + W <= n ? load(row + i) - shift_vec
                                        : keep_first<T>(load_partial(row + i, n - i) - shift_vec, n - i);
            s[0] += d;
            q[0] += d * d;
        }
    }
    double lanes[2][kLanes<T>] = {};
    for (int k = 0; k < 4; ++k) {
        add_to_doubles<T>(lanes[0], s[k]);
        add_to_doubles<T>(lanes[1], q[k]);
    }
    for (int i = 0; i < W; ++i) {
        sum += lanes[0][i];
        square += lanes[1][i];
    }
}

/// One channel. Pieces of about kPieceElements share a shift, taken from the piece's first elements.
template <typename scalar_t>
void stats_per_row(const BnStatsArgs& p) {
    using T = acc_t<scalar_t>;
    constexpr int64_t kPieceElements = 256 * kLanes<T>;
    const scalar_t* x = static_cast<const scalar_t*>(p.x);
    const int64_t piece_len = p.len < kPieceElements ? p.len : kPieceElements;
    const int64_t piece_rows = kPieceElements / piece_len;
    double count = 0, mean = 0, m2 = 0;
    for (int64_t r = 0; r < p.rows; r += piece_rows) {
        const int64_t rows = p.rows - r < piece_rows ? p.rows - r : piece_rows;
        for (int64_t i = 0; i < p.len; i += piece_len) {
            const int64_t n = p.len - i < piece_len ? p.len - i : piece_len;
            const scalar_t* piece = x + r * p.x_pitch + i;
            double shift = 0, square = 0;
            const int64_t samples = n < 4 * kLanes<T> ? n : 4 * kLanes<T>;
            stats_piece<scalar_t>(piece, p.x_pitch, 1, samples, T(0), shift, square);
            const T center = static_cast<T>(shift / static_cast<double>(samples));
            double sum = 0;
            square = 0;
            stats_piece<scalar_t>(piece, p.x_pitch, rows, n, center, sum, square);
            const double piece_count = static_cast<double>(rows * n);
            const double offset = sum / piece_count;
            merge_moments(count, mean, m2, piece_count, static_cast<double>(center) + offset, square - sum * offset);
            count += piece_count;
        }
    }
    p.mean[0] = mean;
    p.m2[0] = m2;
}

// ---- forward: normalise and activate ----------------------------------------------------------------------------

/// Lanes of one row from element i on. Returns nothing; the mask bits go to `bits` if p.mask is set.
template <typename scalar_t, Activation kAct, bool kPerRow, bool kPartial>
DL4DS_INLINE void apply_lanes(const BnApplyArgs& p, const scalar_t* x, const scalar_t* residual, scalar_t* out,
                              int64_t i, int64_t n, bool streaming, BitWriter& bits) {
    using T = acc_t<scalar_t>;
    const Vec<T> centered = load_lanes<kPartial>(x + i, n) - channel_value<T, kPerRow>(p.mean, i);
    Vec<T> z = multiply_add(centered, channel_value<T, kPerRow>(p.scale, i), channel_value<T, kPerRow>(p.shift, i));
    if (residual != nullptr) {
        z += load_lanes<kPartial>(residual + i, n);
    }
    if constexpr (activation_has_mask(kAct)) {
        if (p.mask != nullptr) {
            const uint32_t positive = to_bits<T>(act_positive<kAct, T>(round_to<scalar_t>(z)));
            bits.put(kPartial ? positive & ((1u << n) - 1u) : positive, static_cast<int>(n));
        }
    }
    store_lanes<kPartial>(out + i, act_fwd<kAct, T>(z, broadcast<T>(static_cast<T>(p.slope))), n, streaming);
}

template <typename scalar_t, Activation kAct, bool kPerRow>
void apply(const BnApplyArgs& args) {
    const BnApplyArgs p = args;  // a copy that no store can alias stays in registers
    constexpr int W = kLanes<acc_t<scalar_t>>;
    BitWriter bits = p.mask != nullptr ? *p.mask : BitWriter{};
    for (int64_t r = 0; r < p.rows; ++r) {
        const scalar_t* x = static_cast<const scalar_t*>(p.x) + r * p.x_pitch;
        const scalar_t* residual =
            p.residual ? static_cast<const scalar_t*>(p.residual) + r * p.pitch : nullptr;
        scalar_t* out = static_cast<scalar_t*>(p.out) + r * p.pitch;
        int64_t i = 0;
        bool streaming = p.streaming;
        if (streaming) {
            const int64_t head = elements_to_alignment(out, p.len);
            if (kPerRow && head > 0) {
                apply_lanes<scalar_t, kAct, kPerRow, true>(p, x, residual, out, 0, head, false, bits);
                i = head;
            } else if (head > 0) {
                streaming = false;
            }
        }
        for (; i + W <= p.len; i += W) {
            apply_lanes<scalar_t, kAct, kPerRow, false>(p, x, residual, out, i, W, streaming, bits);
        }
        if (i < p.len) {
            apply_lanes<scalar_t, kAct, kPerRow, true>(p, x, residual, out, i, p.len - i, false, bits);
        }
    }
    if (p.mask != nullptr) {
        *p.mask = bits;
    }
    if (p.streaming) {
        stream_fence();
    }
}

// ---- backward ---------------------------------------------------------------------------------------------------

/// dz and x - mean of the lanes of row r from element i on.
template <typename T>
struct Dz {
    Vec<T> dz, centered;
};

template <typename scalar_t, Activation kAct, bool kPerRow, bool kPartial>
DL4DS_INLINE Dz<acc_t<scalar_t>> dz_lanes(const BnBwdArgs& p, int64_t r, int64_t i, int64_t n) {
    using T = acc_t<scalar_t>;
    const int64_t at = r * p.pitch + i;
    const Vec<T> dout = load_lanes<kPartial>(static_cast<const scalar_t*>(p.dout) + at, n);
    const Vec<T> x = load_lanes<kPartial>(static_cast<const scalar_t*>(p.x) + r * p.x_pitch + i, n);
    const Vec<T> centered = x - channel_value<T, kPerRow>(p.mean, i);
    if constexpr (kAct == Activation::kNone) {
        return {dout, centered};
    } else {
        const Vec<T> slope = broadcast<T>(static_cast<T>(p.slope));
        if constexpr (activation_has_mask(kAct)) {
            if (p.mask != nullptr) {
                const uint32_t positive = read_bits(p.mask, p.mask_bit + at, static_cast<int>(n));
                return {act_bwd_masked<kAct, T>(dout, from_bits<T>(positive), slope), centered};
            }
        }
        Vec<T> z = multiply_add(centered, channel_value<T, kPerRow>(p.scale, i),
                                channel_value<T, kPerRow>(p.shift, i));
        if (p.residual != nullptr) {
            z += load_lanes<kPartial>(static_cast<const scalar_t*>(p.residual) + at, n);
        }
        return {act_bwd<kAct, T>(dout, round_to<scalar_t>(z), slope), centered};
    }
}

/// Adds kRows rows from row r on to the running sums of dz and dz * (x - mean).
template <typename scalar_t, Activation kAct, int kRows, bool kPartial>
DL4DS_INLINE void reduce_lanes(const BnBwdArgs& p, int64_t r, int64_t i, int64_t n, acc_t<scalar_t>* sum1,
                               acc_t<scalar_t>* sum2) {
    using T = acc_t<scalar_t>;
    Vec<T> s1 = load(sum1 + i), s2 = load(sum2 + i);
    for (int k = 0; k < kRows; ++k) {
        if constexpr (kRows == kFront) {
            prefetch_ahead(static_cast<const scalar_t*>(p.x) + r * p.x_pitch, i, k);
            prefetch_ahead(static_cast<const scalar_t*>(p.dout) + r * p.pitch, i, k);
        }
        Dz<T> v = dz_lanes<scalar_t, kAct, false, kPartial>(p, r + k, i, n);
        if constexpr (kPartial) {
            v.dz = keep_first<T>(v.dz, n);
        }
        s1 += v.dz;
        s2 += v.dz * v.centered;
    }
    store(sum1 + i, s1);
    store(sum2 + i, s2);
}

template <typename scalar_t, Activation kAct, int kRows>
DL4DS_INLINE void reduce_rows(const BnBwdArgs& p, int64_t r, acc_t<scalar_t>* sum1, acc_t<scalar_t>* sum2) {
    constexpr int W = kLanes<acc_t<scalar_t>>;
    int64_t i = 0;
    for (; i + W <= p.len; i += W) {
        reduce_lanes<scalar_t, kAct, kRows, false>(p, r, i, W, sum1, sum2);
    }
    if (i < p.len) {
        reduce_lanes<scalar_t, kAct, kRows, true>(p, r, i, p.len - i, sum1, sum2);
    }
}

template <typename scalar_t, Activation kAct>
void reduce_per_element(const BnBwdArgs& args) {
    using T = acc_t<scalar_t>;
    const BnBwdArgs p = args;  // see apply()
    const int64_t padded = pad_elements(p.len);
    T* sum1 = static_cast<T*>(p.scratch);
    T* sum2 = sum1 + padded;
    for (int64_t i = 0; i < padded; ++i) {
        sum1[i] = sum2[i] = 0;
    }
    for (int64_t r = 0; r < p.rows;) {
        if (r + kFront <= p.rows) {
            reduce_rows<scalar_t, kAct, kFront>(p, r, sum1, sum2);
            r += kFront;
        } else {
            reduce_rows<scalar_t, kAct, 1>(p, r, sum1, sum2);
            r += 1;
        }
        if (r % kRowGroup == 0 || r == p.rows) {
            flush_sums<T>(sum1, p.s1, padded);
            flush_sums<T>(sum2, p.s2, padded);
        }
    }
}

/// One channel: sums of up to kChunk vectors stay in registers before they are added to doubles.
template <typename scalar_t, Activation kAct>
void reduce_per_row(const BnBwdArgs& args) {
    const BnBwdArgs p = args;  // see apply()
    using T = acc_t<scalar_t>;
    constexpr int W = kLanes<T>;
    constexpr int kChunk = 64;
    double lanes[2][kLanes<T>] = {};
    Vec<T> s1[2] = {}, s2[2] = {};
    int pending = 0;
    for (int64_t r = 0; r < p.rows; ++r) {
        for (int64_t i = 0; i < p.len;) {
            Dz<T> v;
            if (i + W <= p.len) {
                v = dz_lanes<scalar_t, kAct, true, false>(p, r, i, W);
            } else {
                v = dz_lanes<scalar_t, kAct, true, true>(p, r, i, p.len - i);
                v.dz = keep_first<T>(v.dz, p.len - i);
                v.centered = keep_first<T>(v.centered, p.len - i);
            }
            s1[pending & 1] += v.dz;
            s2[pending & 1] += v.dz * v.centered;
            i += W;
            if (++pending == kChunk) {
                add_to_doubles<T>(lanes[0], s1[0] + s1[1]);
                add_to_doubles<T>(lanes[1], s2[0] + s2[1]);
                s1[0] = s1[1] = s2[0] = s2[1] = Vec<T>{};
                pending = 0;
            }
        }
    }
    add_to_doubles<T>(lanes[0], s1[0] + s1[1]);
    add_to_doubles<T>(lanes[1], s2[0] + s2[1]);
    for (int i = 0; i < W; ++i) {
        p.s1[0] += lanes[0][i];
        p.s2[0] += lanes[1][i];
    }
}

template <typename scalar_t, Activation kAct, bool kPerRow>
void bwd_reduce(const BnBwdArgs& p) {
    if constexpr (kPerRow) {
        reduce_per_row<scalar_t, kAct>(p);
    } else {
        reduce_per_element<scalar_t, kAct>(p);
    }
}

template <typename scalar_t, Activation kAct, bool kPerRow, bool kPartial>
DL4DS_INLINE void bwd_apply_lanes(const BnBwdArgs& p, int64_t r, int64_t i, int64_t n, bool streaming) {
    using T = acc_t<scalar_t>;
    const Dz<T> v = dz_lanes<scalar_t, kAct, kPerRow, kPartial>(p, r, i, n);
    const int64_t at = r * p.pitch + i;
    if (p.dresidual != nullptr) {
        store_lanes<kPartial>(static_cast<scalar_t*>(p.dresidual) + at, v.dz, n, streaming);
    }
    if (p.dx != nullptr) {
        Vec<T> dx = v.dz * channel_value<T, kPerRow>(p.scale, i);
        if (p.training) {
            dx = multiply_add(v.dz, channel_value<T, kPerRow>(p.scale, i),
                              multiply_add(v.centered, channel_value<T, kPerRow>(p.factor_x, i),
                                           channel_value<T, kPerRow>(p.offset, i)));
        }
        store_lanes<kPartial>(static_cast<scalar_t*>(p.dx) + at, dx, n, streaming);
    }
}

template <typename scalar_t, Activation kAct, bool kPerRow>
void bwd_apply(const BnBwdArgs& args) {
    const BnBwdArgs p = args;  // see apply()
    constexpr int W = kLanes<acc_t<scalar_t>>;
    const scalar_t* stored = static_cast<const scalar_t*>(p.dx != nullptr ? p.dx : p.dresidual);
    for (int64_t r = 0; r < p.rows; ++r) {
        int64_t i = 0;
        bool streaming = p.streaming;
        if (streaming) {
            // dx and dresidual come from equally aligned blocks, so one head serves both.
            const int64_t head = elements_to_alignment(stored + r * p.pitch, p.len);
            if (kPerRow && head > 0) {
                bwd_apply_lanes<scalar_t, kAct, kPerRow, true>(p, r, 0, head, false);
                i = head;
            } else if (head > 0) {
                streaming = false;
            }
        }
        for (; i + W <= p.len; i += W) {
            bwd_apply_lanes<scalar_t, kAct, kPerRow, false>(p, r, i, W, streaming);
        }
        if (i < p.len) {
            bwd_apply_lanes<scalar_t, kAct, kPerRow, true>(p, r, i, p.len - i, false);
        }
    }
    if (p.streaming) {
        stream_fence();
    }
}

// ---- table ------------------------------------------------------------------------------------------------------

#define DL4DS_ALL_ACTIVATIONS(kernel, scalar_t, per_row)                                                     \
    {                                                                                                        \
        &kernel<scalar_t, Activation::kNone, per_row>, &kernel<scalar_t, Activation::kRelu, per_row>,        \
            &kernel<scalar_t, Activation::kLeakyRelu, per_row>, &kernel<scalar_t, Activation::kRelu6, per_row>, \
            &kernel<scalar_t, Activation::kSilu, per_row>, &kernel<scalar_t, Activation::kHardswish, per_row>   \
    }
#define DL4DS_BOTH_LAYOUTS(kernel, scalar_t) \
    { DL4DS_ALL_ACTIVATIONS(kernel, scalar_t, false), DL4DS_ALL_ACTIVATIONS(kernel, scalar_t, true) }
#define DL4DS_ALL_DTYPES(kernel)                                                    \
    {                                                                               \
        DL4DS_BOTH_LAYOUTS(kernel, float), DL4DS_BOTH_LAYOUTS(kernel, double),      \
            DL4DS_BOTH_LAYOUTS(kernel, half_t), DL4DS_BOTH_LAYOUTS(kernel, bfloat16_t) \
    }

const BnKernels kBnKernels = {
    {{&stats_per_element<float>, &stats_per_row<float>},
     {&stats_per_element<double>, &stats_per_row<double>},
     {&stats_per_element<half_t>, &stats_per_row<half_t>},
     {&stats_per_element<bfloat16_t>, &stats_per_row<bfloat16_t>}},
    DL4DS_ALL_DTYPES(apply),
    DL4DS_ALL_DTYPES(bwd_reduce),
    DL4DS_ALL_DTYPES(bwd_apply),
};

#undef DL4DS_ALL_ACTIVATIONS
#undef DL4DS_BOTH_LAYOUTS
#undef DL4DS_ALL_DTYPES

}  // namespace DL4DS_ISA
}  // namespace dl4ds
