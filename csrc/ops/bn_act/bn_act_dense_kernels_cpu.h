// The backward pass of a dense block's BatchNorms, on rows (see bn_act_cpu.h). Included once per ISA by
// bn_act_kernels_cpu.h.
namespace dl4ds {
namespace DL4DS_ISA {

/// Besides the sums (see ReduceRows): the gradient of this BatchNorm added to its channels', and the
/// activation again.
template <typename scalar_type, Activation kAct>
struct DenseRows {
    using scalar_t = scalar_type;

    template <int kRows, bool kPartial>
    static DL4DS_INLINE void lanes(const BnDenseBwdArgs& p, int64_t r, int64_t i, int64_t n,
                                   acc_t<scalar_t>* sum1, acc_t<scalar_t>* sum2) {
        using T = acc_t<scalar_t>;
        const Vec<T> mean = channel_value<T, false>(p.mean, i), scale = channel_value<T, false>(p.scale, i);
        const Vec<T> shift = channel_value<T, false>(p.shift, i);
        const Vec<T> slope = broadcast<T>(static_cast<T>(p.slope));
        Vec<T> s1 = load(sum1 + i), s2 = load(sum2 + i);
        for (int k = 0; k < kRows; ++k) {
            scalar_t* dz_at = static_cast<scalar_t*>(p.dz) + (r + k) * p.pitch + i;
            const scalar_t* x_at = static_cast<const scalar_t*>(p.x) + (r + k) * p.x_pitch + i;
            const scalar_t* grad_at = static_cast<const scalar_t*>(p.grad) + (r + k) * p.grad_pitch + i;
            scalar_t* out_at = static_cast<scalar_t*>(p.out) + (r + k) * p.out_pitch + i;
            if constexpr (kRows == kFront) {
                // The same place in the next front: rows are far apart, and the streams too many to be
                // followed.
                __builtin_prefetch(x_at + kFront * p.x_pitch);
                __builtin_prefetch(grad_at + kFront * p.grad_pitch);
            }
            const Vec<T> centered = load_lanes<kPartial>(x_at, n) - mean;
            const Vec<T> z = multiply_add(centered, scale, shift);
            const Vec<T> dz = act_bwd<kAct, T>(load_lanes<kPartial>(dz_at, n), round_to<scalar_t>(z), slope);
            s1 += dz;
            s2 += dz * centered;
            const Vec<T> grad = load_lanes<kPartial>(grad_at, n);
            store_lanes<kPartial>(out_at, multiply_add(dz, scale, grad), n, false);
            if (p.activate) {
                store_lanes<kPartial>(dz_at, act_fwd<kAct, T>(z, slope), n, false);
            }
        }
        store(sum1 + i, s1);
        store(sum2 + i, s2);
    }
};

template <typename scalar_t, Activation kAct>
void dense_bwd(const BnDenseBwdArgs& args) {
    sum_per_element<DenseRows<scalar_t, kAct>>(args);
}

template <typename scalar_t, bool kPartial>
DL4DS_INLINE void dense_take_lanes(const BnDenseTakeArgs& p, int64_t r, int64_t i, int64_t n) {
    using T = acc_t<scalar_t>;
    const Vec<T> grad = load_lanes<kPartial>(static_cast<const scalar_t*>(p.grad) + r * p.grad_pitch + i, n);
    const Vec<T> centered = load_lanes<kPartial>(static_cast<const scalar_t*>(p.x) + r * p.x_pitch + i, n) -
                            channel_value<T, false>(p.mean, i);
    const Vec<T> linear =
        multiply_add(centered, channel_value<T, false>(p.factor, i), channel_value<T, false>(p.offset, i));
    store_lanes<kPartial>(static_cast<scalar_t*>(p.out) + r * p.len + i, grad + linear, n, false);
}

template <typename scalar_t>
void dense_take(const BnDenseTakeArgs& args) {
    const BnDenseTakeArgs p = args;  // see apply()
    constexpr int W = kLanes<acc_t<scalar_t>>;
    for (int64_t r = 0; r < p.rows; ++r) {
        int64_t i = 0;
        for (; i + W <= p.len; i += W) {
            dense_take_lanes<scalar_t, false>(p, r, i, W);
        }
        if (i < p.len) {
            dense_take_lanes<scalar_t, true>(p, r, i, p.len - i);
        }
    }
}

}  // namespace DL4DS_ISA
}  // namespace dl4ds
