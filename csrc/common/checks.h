// DL4DS_CHECK: argument checks of the C++ host functions. No torch header needed.
//
// A failed check throws std::runtime_error, which torch's dispatcher turns into Python's RuntimeError.
// Messages read "bn_act: weight: expected shape (C,) = (64,), got (63,)": op, argument, expected, got.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <sstream>
#include <stdexcept>
#include <string>

namespace dl4ds {

template <typename... Parts>
[[noreturn]] void throw_check_failure(const Parts&... parts) {
    std::ostringstream message;
    (message << ... << parts);
    throw std::runtime_error(message.str());
}

/// "(2, 63, 7)" or "(63,)": a shape as Python prints it.
inline std::string shape_to_string(const int64_t* sizes, int64_t dim) {
    std::ostringstream text;
    text << '(';
    for (int64_t i = 0; i < dim; ++i) {
        text << (i ? ", " : "") << sizes[i];
    }
    text << (dim == 1 ? ",)" : ")");
    return text.str();
}

inline std::string shape_to_string(std::initializer_list<int64_t> sizes) {
    return shape_to_string(sizes.begin(), static_cast<int64_t>(sizes.size()));
}

}  // namespace dl4ds

/// DL4DS_CHECK(condition, parts...): throws with the parts streamed into one message when the condition is
/// false. The parts are evaluated only then.
#define DL4DS_CHECK(condition, ...)                    \
    do {                                               \
        if (!(condition)) [[unlikely]] {               \
            ::dl4ds::throw_check_failure(__VA_ARGS__); \
        }                                              \
    } while (false)
