// add, sub, mul, … exist for integers, floats and 16-bit floats: isa_arithmetic.cpp picks the family by type.
#pragma once
#include <limits>

#include "lanes.h"

namespace ptxsim {

namespace integer {
void add(Decode&), sub(Decode&), mul(Decode&), mad(Decode&), div(Decode&), min(Decode&), max(Decode&),
    neg(Decode&), abs(Decode&);
}
namespace real {  // f32 and f64
void add(Decode&), sub(Decode&), mul(Decode&), fma(Decode&), div(Decode&), min(Decode&), max(Decode&),
    neg(Decode&), abs(Decode&);
void ex2(Decode&), tanh(Decode&);
}  // namespace real
namespace half {  // f16, bf16 and their pairs
void add(Decode&), sub(Decode&), mul(Decode&), fma(Decode&), min(Decode&), max(Decode&), neg(Decode&),
    abs(Decode&);
void ex2(Decode&), tanh(Decode&);
}  // namespace half

// IEEE 754-2008 minNum and maxNum: a NaN loses, -0 < +0; `nan` makes a NaN win instead
template <class T>
inline T minimum(T a, T b, bool nan) {
    if (a != a || b != b)
        return nan || (a != a && b != b) ? std::numeric_limits<T>::quiet_NaN() : a != a ? b : a;
    if (a == b) return std::signbit(a) ? a : b;
    return a < b ? a : b;
}
template <class T>
inline T maximum(T a, T b, bool nan) {
    if (a != a || b != b)
        return nan || (a != a && b != b) ? std::numeric_limits<T>::quiet_NaN() : a != a ? b : a;
    if (a == b) return std::signbit(a) ? b : a;
    return a > b ? a : b;
}

}  // namespace ptxsim
