// The activations on vectors: the same formulas as activation.h, lane by lane.
// Included once per ISA (see foreach_isa.h), after simd.h.
namespace dl4ds {
namespace DL4DS_ISA {

template <Activation kAct, typename T>
DL4DS_INLINE Vec<T> act_fwd(Vec<T> z, [[maybe_unused]] Vec<T> slope) {
    const Vec<T> zero{};
    if constexpr (kAct == Activation::kRelu) {
        return z < zero ? zero : z;
    } else if constexpr (kAct == Activation::kLeakyRelu) {
        return z > zero ? z : z * slope;
    } else if constexpr (kAct == Activation::kRelu6) {
        const Vec<T> six = broadcast<T>(T(6));
        const Vec<T> low = z < zero ? zero : z;
        return low > six ? six : low;
    } else if constexpr (kAct == Activation::kSilu) {
        return z / (exp_vec<T>(-z) + T(1));
    } else if constexpr (kAct == Activation::kHardswish) {
        return z * act_fwd<Activation::kRelu6, T>(z + T(3), slope) / T(6);
    } else {
        return z;
    }
}

template <Activation kAct, typename T>
DL4DS_INLINE Mask<T> act_positive(Vec<T> z) {
    if constexpr (kAct == Activation::kLeakyRelu) {
        return z > T(0);
    } else if constexpr (kAct == Activation::kRelu6) {
        return ~((z <= T(0)) | (z >= T(6)));
    } else {
        return ~(z <= T(0));
    }
}

template <Activation kAct, typename T>
DL4DS_INLINE Vec<T> act_bwd_masked(Vec<T> dout, Mask<T> positive, Vec<T> slope) {
    if constexpr (kAct == Activation::kLeakyRelu) {
        return positive ? dout : dout * slope;
    } else {
        return positive ? dout : Vec<T>{};
    }
}

template <Activation kAct, typename T>
DL4DS_INLINE Vec<T> act_bwd(Vec<T> dout, Vec<T> z, Vec<T> slope) {
    if constexpr (kAct == Activation::kNone) {
        return dout;
    } else if constexpr (kAct == Activation::kSilu) {
        const Vec<T> sigmoid = T(1) / (exp_vec<T>(-z) + T(1));
        return dout * sigmoid * (z * (T(1) - sigmoid) + T(1));
    } else if constexpr (kAct == Activation::kHardswish) {
        const Vec<T> inner = z >= T(3) ? dout : dout * (z / T(3) + T(0.5));
        return z <= T(-3) ? Vec<T>{} : inner;
    } else {
        return act_bwd_masked<kAct, T>(dout, act_positive<kAct, T>(z), slope);
    }
}

}  // namespace DL4DS_ISA
}  // namespace dl4ds
