// Backward: the two sums and the gradients, on rows (see bn_act_cpu.h). Included once per ISA by
// bn_act_kernels_cpu.h.
namespace dl4ds {
namespace DL4DS_ISA {

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

/// What a pass over rows does to kRows of them from row r on, one vector of channels: it adds to the sums of
/// dz and dz * (x - mean). Lanes past the last channel add to sums that nobody reads.
template <typename scalar_type, Activation kAct>
struct ReduceRows {
    using scalar_t = scalar_type;

    template <int kRows, bool kPartial>
    static DL4DS_INLINE void lanes(const BnBwdArgs& p, int64_t r, int64_t i, int64_t n, acc_t<scalar_t>* sum1,
                                   acc_t<scalar_t>* sum2) {
        using T = acc_t<scalar_t>;
        Vec<T> s1 = load(sum1 + i), s2 = load(sum2 + i);
        for (int k = 0; k < kRows; ++k) {
            if constexpr (kRows == kFront) {
                prefetch_ahead(static_cast<const scalar_t*>(p.x) + r * p.x_pitch, i, k);
                prefetch_ahead(static_cast<const scalar_t*>(p.dout) + r * p.pitch, i, k);
            }
            const Dz<T> v = dz_lanes<scalar_t, kAct, false, kPartial>(p, r + k, i, n);
            s1 += v.dz;
            s2 += v.dz * v.centered;
        }
        store(sum1 + i, s1);
        store(sum2 + i, s2);
    }
};

template <typename Pass, int kRows, typename Args, typename T>
DL4DS_INLINE void sum_rows(const Args& p, int64_t r, T* sum1, T* sum2) {
    constexpr int W = kLanes<T>;
    int64_t i = 0;
    for (; i + W <= p.len; i += W) {
        Pass::template lanes<kRows, false>(p, r, i, W, sum1, sum2);
    }
    if (i < p.len) {
        Pass::template lanes<kRows, true>(p, r, i, p.len - i, sum1, sum2);
    }
}

/// All rows of a task by Pass, front by front; two sums a channel, added to doubles after every kRowGroup
/// rows.
template <typename Pass, typename Args>
void sum_per_element(const Args& args) {
    using T = acc_t<typename Pass::scalar_t>;
    const Args p = args;  // see apply()
    const int64_t padded = pad_elements(p.len);
    T* sum1 = static_cast<T*>(p.scratch);
    T* sum2 = sum1 + padded;
    for (int64_t i = 0; i < padded; ++i) {
        sum1[i] = sum2[i] = 0;
    }
    for (int64_t r = 0; r < p.rows;) {
        if (r + kFront <= p.rows) {
            sum_rows<Pass, kFront>(p, r, sum1, sum2);
            r += kFront;
        } else {
            sum_rows<Pass, 1>(p, r, sum1, sum2);
            r += 1;
        }
        if (r % kRowGroup == 0 || r == p.rows) {
            flush_sums<T>(sum1, p.s1, padded);
            flush_sums<T>(sum2, p.s2, padded);
        }
    }
}

template <typename scalar_t, Activation kAct>
void reduce_per_element(const BnBwdArgs& args) {
    sum_per_element<ReduceRows<scalar_t, kAct>>(args);
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

}  // namespace DL4DS_ISA
}  // namespace dl4ds
