// exp and the activations on vectors: the same formulas as activation.h, lane by lane.
// Included once per ISA (see foreach_isa.h), after simd.h.
namespace dl4ds {
namespace DL4DS_ISA {

template <typename T>
struct ExpConstants;
template <>
struct ExpConstants<float> {
    static constexpr float kLow = -104.0f, kHigh = 89.0f, kRound = 12582912.0f;  // 1.5 * 2^23
    static constexpr float kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f;
    static constexpr int kDegree = 7;
};
template <>
struct ExpConstants<double> {
    static constexpr double kLow = -746.0, kHigh = 710.0, kRound = 6755399441055744.0;  // 1.5 * 2^52
    static constexpr double kLn2High = 0.693145751953125, kLn2Low = 1.42860682030941723212e-6;
    static constexpr int kDegree = 13;
};

/// exp(x) to about one unit in the last place; NaN stays, overflow gives inf.
template <typename T>
DL4DS_INLINE Vec<T> exp_vec(Vec<T> x) {
    using C = ExpConstants<T>;
    using Int = Mask<T>;
    x = x < C::kLow ? broadcast<T>(C::kLow) : x;
    x = x > C::kHigh ? broadcast<T>(C::kHigh) : x;
    // x = n ln 2 + r. Adding kRound leaves the integer n in the low bits of the sum.
    const Vec<T> sum = multiply_add(x, broadcast<T>(T(1.4426950408889634)), broadcast<T>(C::kRound));
    const Vec<T> n = sum - C::kRound;
    const Int n_int = bit_cast_vec<Int>(sum) - bit_cast_vec<Int>(broadcast<T>(C::kRound));
    const Vec<T> r = (x - n * C::kLn2High) - n * C::kLn2Low;
    // Taylor's series by Horner's rule, from the smallest term: p = 1 + r/1 (1 + r/2 (1 + r/3 (...))).
    Vec<T> p = broadcast<T>(T(1));
    for (int k = C::kDegree; k >= 1; --k) {
        p = multiply_add(p * r, broadcast<T>(T(1) / T(k)), broadcast<T>(T(1)));
    }
    // 2^n in two factors, since n may pass either end of the exponent's range.
    const Int half = n_int >> 1;
    const Int bias = Int{} + VecTypes<T>::kExponentBias;
    const Vec<T> scale_a = bit_cast_vec<Vec<T>>((half + bias) << VecTypes<T>::kMantissaBits);
    const Vec<T> scale_b = bit_cast_vec<Vec<T>>((n_int - half + bias) << VecTypes<T>::kMantissaBits);
    return p * scale_a * scale_b;
}

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
