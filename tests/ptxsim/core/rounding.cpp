// Arithmetic with a direction: this file alone switches the host's rounding mode, and is compiled with
// -frounding-math.
#include <cfenv>

#include "numeric.h"

namespace ptxsim {
namespace {

class RoundingMode {
  public:
    explicit RoundingMode(Round round) : saved_(std::fegetround()) {
        static const int modes[] = {FE_TONEAREST, FE_TOWARDZERO, FE_DOWNWARD, FE_UPWARD, FE_TONEAREST};
        std::fesetround(modes[static_cast<int>(round)]);
    }
    ~RoundingMode() { std::fesetround(saved_); }
    RoundingMode(const RoundingMode&) = delete;
    RoundingMode& operator=(const RoundingMode&) = delete;

  private:
    int saved_;
};

// volatile keeps the compiler from moving the operation across the mode switch
template <class T, class Operation>
T rounded(Round round, T a, T b, T c, Operation operation) {
    volatile T x = a, y = b, z = c, result;
    {
        RoundingMode mode(round);
        result = operation(x, y, z);
    }
    return result;
}

}  // namespace

#define PTXSIM_DIRECTED(T)                                                              \
    T add_rounded(T a, T b, Round r) {                                                  \
        return rounded<T>(r, a, b, 0, [](T x, T y, T) { return x + y; });               \
    }                                                                                   \
    T mul_rounded(T a, T b, Round r) {                                                  \
        return rounded<T>(r, a, b, 0, [](T x, T y, T) { return x * y; });               \
    }                                                                                   \
    T fma_rounded(T a, T b, T c, Round r) {                                             \
        return rounded<T>(r, a, b, c, [](T x, T y, T z) { return std::fma(x, y, z); }); \
    }                                                                                   \
    T div_rounded(T a, T b, Round r) {                                                  \
        return rounded<T>(r, a, b, 0, [](T x, T y, T) { return x / y; });               \
    }                                                                                   \
    T sqrt_rounded(T a, Round r) {                                                      \
        return rounded<T>(r, a, 0, 0, [](T x, T, T) { return std::sqrt(x); });          \
    }
PTXSIM_DIRECTED(float)
PTXSIM_DIRECTED(double)
#undef PTXSIM_DIRECTED

double integer_to_double(bool negative, u64 magnitude, Round round) {
    volatile u64 raw = magnitude;
    volatile double result;
    {
        RoundingMode mode(negative && round == Round::Down ? Round::Up
                          : negative && round == Round::Up ? Round::Down
                                                           : round);
        result = static_cast<double>(raw);
    }
    return negative ? -result : result;
}

double round_to_integer(double value, Round round) {
    switch (round) {
        case Round::Zero:
            return std::trunc(value);
        case Round::Down:
            return std::floor(value);
        case Round::Up:
            return std::ceil(value);
        case Round::NearestAway:
            return std::round(value);
        default:
            return std::nearbyint(value);
    }
}

}  // namespace ptxsim
