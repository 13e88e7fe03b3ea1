#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <fstream>
#include <string>
#include <string_view>

#include "common/checks.h"
#include "common/cpu/isa.h"
#include "common/once.h"

namespace dl4ds {
namespace {

constexpr int64_t kMaxLlcBytes = int64_t{64} << 20;

bool cpu_has(Isa isa) {
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool avx2 =
        __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    if (isa == Isa::kAvx2) {
        return avx2;
    }
    if (isa == Isa::kAvx512) {
        return avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
               __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    }
#endif
    return isa == Isa::kBaseline;
}

Isa choose_isa() {
    const char* forced = std::getenv("DL4DS_CPU_ISA");
    if (forced != nullptr && *forced != '\0') {
        const std::string_view name = forced;
        DL4DS_CHECK(name == "baseline" || name == "avx2" || name == "avx512",
                    "DL4DS_CPU_ISA: expected baseline, avx2 or avx512, got ", name);
        const Isa isa = name == "avx512" ? Isa::kAvx512 : name == "avx2" ? Isa::kAvx2 : Isa::kBaseline;
        DL4DS_CHECK(cpu_has(isa), "DL4DS_CPU_ISA: this machine does not have ", name);
        return isa;
    }
    return cpu_has(Isa::kAvx512) ? Isa::kAvx512 : cpu_has(Isa::kAvx2) ? Isa::kAvx2 : Isa::kBaseline;
}

/// Bytes of cpu0's largest cache of this level by sysfs; 0 where it does not say.
int64_t sysfs_cache_bytes(int wanted_level) {
    int64_t bytes = 0;
    for (int index = 0; index < 8; ++index) {
        const std::string folder = "/sys/devices/system/cpu/cpu0/cache/index" + std::to_string(index) + "/";
        std::ifstream level_file(folder + "level"), size_file(folder + "size");
        int level = 0;
        int64_t size = 0;
        char unit = ' ';
        if (level_file >> level && size_file >> size >> unit && level == wanted_level) {
            bytes = std::max(bytes, size << (unit == 'M' ? 20 : 10));
        }
    }
    return bytes;
}

/// sysfs first: the C library's figure for the last level can be the sum over all of a server's caches.
CacheSizes read_cache_sizes() {
    CacheSizes sizes{sysfs_cache_bytes(2), sysfs_cache_bytes(3)};
#if defined(_SC_LEVEL2_CACHE_SIZE) && defined(_SC_LEVEL3_CACHE_SIZE)
    if (sizes.l2_bytes == 0) {
        sizes.l2_bytes = sysconf(_SC_LEVEL2_CACHE_SIZE);
    }
    if (sizes.llc_bytes == 0) {
        sizes.llc_bytes = sysconf(_SC_LEVEL3_CACHE_SIZE);
    }
#endif
    sizes.l2_bytes = sizes.l2_bytes > 0 ? sizes.l2_bytes : int64_t{1} << 20;
    sizes.llc_bytes = sizes.llc_bytes > 0 ? sizes.llc_bytes : int64_t{16} << 20;
    // A core shares the last level with others, and often with other machines: count on no more than this.
    sizes.llc_bytes = std::min(sizes.llc_bytes, kMaxLlcBytes);
    return sizes;
}

/// Read while the library is loaded: see kShim in common/shim.h.
const CacheSizes kCacheSizes = read_cache_sizes();

}  // namespace

/// Chosen at the first call, for it may throw.
Isa active_isa() { return once<choose_isa>(); }

const char* isa_name(Isa isa) {
    if (isa == Isa::kBaseline) {
#if defined(__x86_64__)
        return "sse2";
#elif defined(__aarch64__)
        return "neon";
#else
        return "baseline";
#endif
    }
    return isa == Isa::kAvx512 ? "avx512" : "avx2";
}

const CacheSizes& cache_sizes() { return kCacheSizes; }

}  // namespace dl4ds
