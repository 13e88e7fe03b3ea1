#pragma once
#include <cstdint>

namespace sample {

enum class Kind : int32_t { kFloat, kDouble = 5 };

struct Extent {
    int64_t count = 0;
    int step = 1;
    constexpr int64_t needed() const { return count * step; }
};

struct ScaleParams {
    Kind kind = Kind::kFloat;
    bool halve = false, big_shared = false;
    Extent size;
    double factor = 2.0;
    const void* x = nullptr;
    void* out = nullptr;
};

int launch_scale(const ScaleParams& params, void* stream);
int count_calls();

}  // namespace sample
