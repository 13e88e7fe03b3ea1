#include "arithmetic.h"

namespace ptxsim {
namespace {

using Family = void (*)(Decode&);

void choose(Decode& d, Family integers, Family reals, Family halves) {
    Family chosen = integers;
    switch (d.last_type()) {
        case Type::F32:
        case Type::F64:
            chosen = reals;
            break;
        case Type::F16:
        case Type::BF16:
        case Type::F16x2:
        case Type::BF16x2:
            chosen = halves;
            break;
        default:
            break;
    }
    if (!chosen) d.unsupported("type");
    chosen(d);
}

}  // namespace

void add_arithmetic_opcodes(OpcodeTable& t) {
    t["add"] = [](Decode& d) { choose(d, integer::add, real::add, half::add); };
    t["sub"] = [](Decode& d) { choose(d, integer::sub, real::sub, half::sub); };
    t["mul"] = [](Decode& d) { choose(d, integer::mul, real::mul, half::mul); };
    t["mad"] = [](Decode& d) { choose(d, integer::mad, real::fma, nullptr); };
    t["fma"] = [](Decode& d) { choose(d, nullptr, real::fma, half::fma); };
    t["div"] = [](Decode& d) { choose(d, integer::div, real::div, nullptr); };
    t["min"] = [](Decode& d) { choose(d, integer::min, real::min, half::min); };
    t["max"] = [](Decode& d) { choose(d, integer::max, real::max, half::max); };
    t["neg"] = [](Decode& d) { choose(d, integer::neg, real::neg, half::neg); };
    t["abs"] = [](Decode& d) { choose(d, integer::abs, real::abs, half::abs); };
    t["ex2"] = [](Decode& d) { choose(d, nullptr, real::ex2, half::ex2); };
    t["tanh"] = [](Decode& d) { choose(d, nullptr, real::tanh, half::tanh); };
}

}  // namespace ptxsim
