// Compiles one kernel source for several instruction sets in one translation unit. A *_cpu.cpp says
//     #define DL4DS_ISA_SOURCE "ops/add_act/add_act_kernels_cpu.h"
//     #include "common/cpu/foreach_isa.h"
// and the source is included once per ISA, inside namespace dl4ds::<isa> by means of DL4DS_ISA and under that
// ISA's code generation flags. isa.h chooses at run time. Rules for such a source:
//   * it defines everything in namespace dl4ds::DL4DS_ISA and has no include guard;
//   * it includes nothing (standard headers come first, below): an inline function of the standard library
//   compiled
//     under AVX-512 flags could be the copy that the linker keeps for everyone;
//   * no lambdas on the hot path: they do not inherit the flags on every compiler.
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "common/activation.h"
#include "common/cpu/bit_mask.h"
#include "common/cpu/isa.h"
#include "common/cpu/storage_types.h"

#if defined(__x86_64__)
#include <immintrin.h>

#define DL4DS_ISA avx512
#define DL4DS_VEC_BYTES 64
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c"))), \
                             apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
#endif
#include "common/cpu/simd.h"
#include DL4DS_ISA_SOURCE
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#undef DL4DS_ISA
#undef DL4DS_VEC_BYTES

#define DL4DS_ISA avx2
#define DL4DS_VEC_BYTES 32
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif
#include "common/cpu/simd.h"
#include DL4DS_ISA_SOURCE
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#undef DL4DS_ISA
#undef DL4DS_VEC_BYTES

#endif  // __x86_64__

// 16-byte vectors: SSE2 on x86-64, NEON on 64-bit Arm, whatever the compiler makes of them elsewhere.
#define DL4DS_ISA baseline
#define DL4DS_VEC_BYTES 16
#include "common/cpu/simd.h"
#include DL4DS_ISA_SOURCE
#undef DL4DS_ISA
#undef DL4DS_VEC_BYTES
