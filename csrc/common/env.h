// Switches in the environment.
#pragma once

#include <atomic>
#include <cstdlib>
#include <cstring>

namespace dl4ds {

/// A variable that leaves something switched on unless it is 0; read at the first call, without a guard (see
/// kShim in common/shim.h).
class EnvSwitch {
  public:
    constexpr explicit EnvSwitch(const char* name) : name_(name) {}

    bool on() {
        int known = known_.load(std::memory_order_relaxed);
        if (known < 0) {
            const char* text = std::getenv(name_);
            known = text == nullptr || std::strcmp(text, "0") != 0;
            known_.store(known, std::memory_order_relaxed);
        }
        return known != 0;
    }

  private:
    const char* name_;
    std::atomic<int> known_{-1};
};

}  // namespace dl4ds
