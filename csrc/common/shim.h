// Calls of libtorch's C functions: errors to exceptions, and functions that not every torch has, looked up by
// name.
#pragma once

#include <dlfcn.h>

#include <algorithm>

#include "common/checks.h"

namespace dl4ds {

/// A name as a template argument.
template <size_t kSize>
struct ShimName {
    char text[kSize];
    constexpr ShimName(const char (&name)[kSize]) { std::copy_n(name, kSize, text); }
};

/// The function called `name` in this process (torch's libraries are loaded before ours), or null.
///
/// Looked up while the library is loaded, as everything that is made once: a function-local static has a
/// guard, and a child that another thread's fork() makes during the first call waits for that guard forever.
template <typename Fn, ShimName name>
inline Fn* const kShim = reinterpret_cast<Fn*>(dlsym(RTLD_DEFAULT, name.text));

/// Throws if a C function reported an error, with torch's own message where this torch tells it (2.13 and
/// later).
inline void shim_check(int32_t error, const char* what) {
    if (error == 0) [[likely]] {
        return;
    }
    auto* const last_message = kShim<const char*(), "torch_exception_get_what_without_backtrace">;
    const char* message = last_message != nullptr ? last_message() : nullptr;
    throw_check_failure(what, " failed", message != nullptr ? ": " : "", message != nullptr ? message : "");
}

}  // namespace dl4ds
