// Values that are made at their first use and kept.
#pragma once

#include <atomic>
#include <cstring>

namespace dl4ds {

/// What `make` gives, an enumerator or a bool, kept from the first call on. Without the guard of a
/// function-local static (see kShim in common/shim.h): two first calls at a time both make it.
template <auto make>
auto once() {
    static std::atomic<int> known{-1};
    int value = known.load(std::memory_order_relaxed);
    if (value < 0) {
        value = static_cast<int>(make());
        known.store(value, std::memory_order_relaxed);
    }
    return static_cast<decltype(make())>(value);
}

/// Whether a variable of the environment leaves what it names switched on.
inline bool is_on(const char* text) { return text == nullptr || std::strcmp(text, "0") != 0; }

}  // namespace dl4ds
