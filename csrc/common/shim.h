// Calls of libtorch's C functions: errors to exceptions, and functions that not every torch has, looked up by
// name.
#pragma once

#include <dlfcn.h>

#include "common/checks.h"

namespace dl4ds {

/// The function called `name` in this process (torch's libraries are loaded before ours), or null. Keep the
/// result in a function-local static.
template <typename Fn>
Fn* find_shim(const char* name) {
    return reinterpret_cast<Fn*>(dlsym(RTLD_DEFAULT, name));
}

/// Throws if a C function reported an error, with torch's own message where this torch tells it (2.13 and
/// later).
inline void shim_check(int32_t error, const char* what) {
    if (error == 0) [[likely]] {
        return;
    }
    static auto* const last_message = find_shim<const char*()>("torch_exception_get_what_without_backtrace");
    const char* message = last_message != nullptr ? last_message() : nullptr;
    throw_check_failure(what, " failed", message != nullptr ? ": " : "", message != nullptr ? message : "");
}

}  // namespace dl4ds
