#include "common/cpu/isa.h"

#include <unistd.h>

#include <cstdlib>
#include <string_view>

#include "common/checks.h"

namespace dl4ds {
namespace {

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

CacheSizes read_cache_sizes() {
    CacheSizes sizes{1 << 20, 16 << 20};
#if defined(_SC_LEVEL2_CACHE_SIZE) && defined(_SC_LEVEL3_CACHE_SIZE)
    const long l2 = sysconf(_SC_LEVEL2_CACHE_SIZE);
    const long l3 = sysconf(_SC_LEVEL3_CACHE_SIZE);
    if (l2 > 0) {
        sizes.l2_bytes = l2;
    }
    if (l3 > 0) {
        sizes.llc_bytes = l3;
    }
#endif
    return sizes;
}

}  // namespace

Isa active_isa() {
    static const Isa isa = choose_isa();
    return isa;
}

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

const CacheSizes& cache_sizes() {
    static const CacheSizes sizes = read_cache_sizes();
    return sizes;
}

}  // namespace dl4ds
