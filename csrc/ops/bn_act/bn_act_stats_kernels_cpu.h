// Batch statistics on rows (see bn_act_cpu.h). Included once per ISA by
// bn_act_kernels_cpu.h.
namespace dl4ds {
namespace DL4DS_ISA {

/// Merges (count_b, mean_b, m2_b) into (count, mean, m2) by Chan's formula.
DL4DS_INLINE void merge_moments(double count, double& mean, double& m2, double count_b, double mean_b,
                                double m2_b) {
    const double total = count + count_b;
    const double delta = mean_b - mean;
    mean += delta * (count_b / total);
    m2 += m2_b + delta * delta * (count * count_b / total);
}

/// Adds kRows rows to the running sums of d = x - shift and of d * d.
template <typename scalar_t, int kRows, bool kPartial>
DL4DS_INLINE void stats_lanes(const scalar_t* x, int64_t pitch, int64_t i, int64_t n,
                              const acc_t<scalar_t>* shift, acc_t<scalar_t>* sum, acc_t<scalar_t>* square) {
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

/// Merges `count` rows' sums of x - shift into p.mean and p.m2, which stand for the `before` rows before
/// them.
template <typename T>
DL4DS_INLINE void merge_stats(const BnStatsArgs& p, double before, double count, const T* shift,
                              const double* sum, const double* square) {
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
DL4DS_INLINE void stats_piece(const scalar_t* x, int64_t pitch, int64_t rows, int64_t n,
                              acc_t<scalar_t> shift, double& sum, double& square) {
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
            merge_moments(count, mean, m2, piece_count, static_cast<double>(center) + offset,
                          square - sum * offset);
            count += piece_count;
        }
    }
    p.mean[0] = mean;
    p.m2[0] = m2;
}

}  // namespace DL4DS_ISA
}  // namespace dl4ds
