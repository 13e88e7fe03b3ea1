// Which instruction set the CPU kernels use in this process, and the cache sizes they plan with.
#pragma once

#include <cstdint>

namespace dl4ds {

enum class Isa : int { kBaseline = 0, kAvx2 = 1, kAvx512 = 2 };

/// The best ISA of this machine that the kernels are compiled for; DL4DS_CPU_ISA=baseline|avx2|avx512 forces
/// one (an ISA the machine lacks is refused with an exception). Read once.
Isa active_isa();

/// "avx512", "avx2", or the name of the 16-byte baseline: "sse2", "neon", "baseline".
const char* isa_name(Isa isa);

struct CacheSizes {
    int64_t l2_bytes;   // per core
    int64_t llc_bytes;  // last level, shared
};

/// Read from the operating system once; 1 MiB and 16 MiB where it does not say.
const CacheSizes& cache_sizes();

}  // namespace dl4ds

/// The table `name` (same type for every ISA) of the active ISA: DL4DS_ISA_TABLE(kBnActKernels).
#if defined(__x86_64__)
#define DL4DS_ISA_TABLE(name)                                      \
    (::dl4ds::active_isa() == ::dl4ds::Isa::kAvx512 ? avx512::name \
     : ::dl4ds::active_isa() == ::dl4ds::Isa::kAvx2 ? avx2::name   \
                                                    : baseline::name)
#else
#define DL4DS_ISA_TABLE(name) (baseline::name)
#endif
