// Forward: normalise, add, activate, on rows (see bn_act_cpu.h). Included once per ISA by
// bn_act_kernels_cpu.h.
namespace dl4ds {
namespace DL4DS_ISA {

/// Lanes of one row from element i on. Returns nothing; the mask bits go to `bits` if p.mask is set.
template <typename scalar_t, Activation kAct, bool kPerRow, bool kPartial>
DL4DS_INLINE void apply_lanes(const BnApplyArgs& p, const scalar_t* x, const scalar_t* residual,
                              scalar_t* out, int64_t i, int64_t n, bool streaming, BitWriter& bits) {
    using T = acc_t<scalar_t>;
    const Vec<T> centered = load_lanes<kPartial>(x + i, n) - channel_value<T, kPerRow>(p.mean, i);
    Vec<T> z =
        multiply_add(centered, channel_value<T, kPerRow>(p.scale, i), channel_value<T, kPerRow>(p.shift, i));
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

}  // namespace DL4DS_ISA
}  // namespace dl4ds
