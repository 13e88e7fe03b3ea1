// When one box suppresses another on a GPU: torchvision's CUDA arithmetic, bit for bit, without its division.
//
// What torchvision's compiled kernel computes (read from its machine code), `a` being the box of higher
// score:
//   float32, float64: I = w * h, U = fma(w_b, h_b, w_a * h_a) - I, I / U > threshold
//   float16: corners of the overlap, its sides and the boxes' heights are rounded to float16, their widths
//   are
//            not; U = fma(w_a, h_a, w_b * h_b) - I in float32
// max and min drop NaN; the threshold is narrowed to float for every dtype. bfloat16, which torchvision
// refuses, is computed as float32.
//
// The division. With r = fma(-t, U, I), one rounding, |r| above kSlack * I says on which side of t the
// rounded quotient lies: the slack is a little more than one unit in the last place of t. Only pairs nearer
// than that are divided, and those where under- or overflow could void the argument (t below 1e-4 among
// them).
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace dl4ds::nms {

/// A box in the accumulator type. float16 and bfloat16 corners are exact in it.
template <typename acc_t>
struct alignas(16) Box {
    acc_t x1, y1, x2, y2;
};

__device__ __forceinline__ float widen(float v) { return v; }
__device__ __forceinline__ double widen(double v) { return v; }
__device__ __forceinline__ float widen(__half v) { return __half2float(v); }
__device__ __forceinline__ float widen(__nv_bfloat16 v) { return __bfloat162float(v); }

/// Intersection and union, each operation rounded as torchvision's kernel rounds it.
template <typename acc_t>
struct Overlap {
    acc_t inter, uni;
};

struct Float32Rule {
    using acc_t = float;
    static constexpr float kSlack = 1.2e-7f, kSmall = 1e-30f, kLarge = 1e30f;

    __device__ __forceinline__ static Overlap<float> overlap(const Box<float>& a, const Box<float>& b) {
        const float w = fmaxf(__fsub_rn(fminf(a.x2, b.x2), fmaxf(a.x1, b.x1)), 0.f);
        const float h = fmaxf(__fsub_rn(fminf(a.y2, b.y2), fmaxf(a.y1, b.y1)), 0.f);
        const float inter = __fmul_rn(w, h);
        const float area_a = __fmul_rn(__fsub_rn(a.x2, a.x1), __fsub_rn(a.y2, a.y1));
        const float both = __fmaf_rn(__fsub_rn(b.x2, b.x1), __fsub_rn(b.y2, b.y1), area_a);
        return {inter, __fsub_rn(both, inter)};
    }
    __device__ __forceinline__ static float remainder(float t, const Overlap<float>& o) {
        return __fmaf_rn(-t, o.uni, o.inter);
    }
    __device__ __forceinline__ static float quotient(const Overlap<float>& o) {
        return __fdiv_rn(o.inter, o.uni);
    }
};

struct Float16Rule : Float32Rule {
    __device__ __forceinline__ static float to_half(float v) { return __half2float(__float2half_rn(v)); }

    __device__ __forceinline__ static Overlap<float> overlap(const Box<float>& a, const Box<float>& b) {
        const float w = fmaxf(to_half(__fsub_rn(fminf(a.x2, b.x2), fmaxf(a.x1, b.x1))), 0.f);
        const float h = fmaxf(to_half(__fsub_rn(fminf(a.y2, b.y2), fmaxf(a.y1, b.y1))), 0.f);
        const float inter = __fmul_rn(w, h);
        const float area_b = __fmul_rn(__fsub_rn(b.x2, b.x1), to_half(__fsub_rn(b.y2, b.y1)));
        const float both = __fmaf_rn(__fsub_rn(a.x2, a.x1), to_half(__fsub_rn(a.y2, a.y1)), area_b);
        return {inter, __fsub_rn(both, inter)};
    }
};

struct Float64Rule {
    using acc_t = double;
    static constexpr double kSlack = 2.3e-16, kSmall = 1e-250, kLarge = 1e250;

    __device__ __forceinline__ static Overlap<double> overlap(const Box<double>& a, const Box<double>& b) {
        const double w = fmax(__dsub_rn(fmin(a.x2, b.x2), fmax(a.x1, b.x1)), 0.);
        const double h = fmax(__dsub_rn(fmin(a.y2, b.y2), fmax(a.y1, b.y1)), 0.);
        const double inter = __dmul_rn(w, h);
        const double area_a = __dmul_rn(__dsub_rn(a.x2, a.x1), __dsub_rn(a.y2, a.y1));
        const double both = __fma_rn(__dsub_rn(b.x2, b.x1), __dsub_rn(b.y2, b.y1), area_a);
        return {inter, __dsub_rn(both, inter)};
    }
    __device__ __forceinline__ static double remainder(double t, const Overlap<double>& o) {
        return __fma_rn(-t, o.uni, o.inter);
    }
    __device__ __forceinline__ static double quotient(const Overlap<double>& o) {
        return __ddiv_rn(o.inter, o.uni);
    }
};

/// The rule of an element type.
template <typename T>
struct RuleOf {
    using type = Float32Rule;
};
template <>
struct RuleOf<__half> {
    using type = Float16Rule;
};
template <>
struct RuleOf<double> {
    using type = Float64Rule;
};
template <typename T>
using rule_of = typename RuleOf<T>::type;

/// Whether a kept box `a` suppresses `b`, which scores less.
template <typename Rule>
__device__ __forceinline__ bool suppresses(const Box<typename Rule::acc_t>& a,
                                           const Box<typename Rule::acc_t>& b, float threshold) {
    using acc_t = typename Rule::acc_t;
    const Overlap<acc_t> o = Rule::overlap(a, b);
    if (o.inter == 0 && threshold >= 0) {
        return false;  // 0 / U is a zero or NaN
    }
    if (threshold >= 1e-4f && o.inter > Rule::kSmall && o.uni > 0 && o.uni < Rule::kLarge) {
        const acc_t r = Rule::remainder(threshold, o);
        if ((r < 0 ? -r : r) > Rule::kSlack * o.inter) {
            return r > 0;
        }
    }
    return Rule::quotient(o) > acc_t(threshold);
}

}  // namespace dl4ds::nms
