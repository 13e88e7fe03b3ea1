// Vocabulary of the simulator: PTX types, state spaces, lane masks, errors.
#pragma once
#include <cstdint>
#include <optional>
#include <stdexcept>
#include <string>

namespace ptxsim {

using u8 = uint8_t;
using u16 = uint16_t;
using u32 = uint32_t;
using u64 = uint64_t;
using i8 = int8_t;
using i16 = int16_t;
using i32 = int32_t;
using i64 = int64_t;
using Mask = u32;  // one bit per lane of a warp

constexpr int kLanes = 32;
constexpr Mask kAllLanes = ~0u;

enum class Type : u8 {
    Pred,
    B8,
    U8,
    S8,
    B16,
    U16,
    S16,
    F16,
    BF16,
    B32,
    U32,
    S32,
    F32,
    F16x2,
    BF16x2,
    TF32,
    B64,
    U64,
    S64,
    F64,
    B128
};
enum class Space : u8 { Generic, Global, Shared, Local, Param, Const };

// Generic addresses of shared and local memory lie in these windows; shared offset 0 is never handed out
// (null).
constexpr u64 kSharedWindow = 0x7100000000000000ull;
constexpr u64 kLocalWindow = 0x7200000000000000ull;
constexpr u32 kSharedBase = 1024;
// Bits 48..55 of a global address name the tensor it was derived from (0: no tag).
constexpr int kTagShift = 48;
constexpr u64 kAddressMask = (1ull << kTagShift) - 1;

struct TypeInfo {
    const char* name;
    u8 bytes;
    bool is_signed, is_float;
};
const TypeInfo& info(Type type);
std::optional<Type> type_from(const std::string& name);
inline u32 bytes_of(Type type) { return info(type).bytes; }
inline bool is_signed(Type type) { return info(type).is_signed; }
inline bool is_float(Type type) { return info(type).is_float; }

// Stops a launch (or a load): the message is for the person who wrote the kernel.
struct Error : std::runtime_error {
    using std::runtime_error::runtime_error;
};

std::string format(const char* pattern, ...) __attribute__((format(printf, 1, 2)));
std::string shortened(const std::string& text,
                      size_t length);  // CUTLASS names run to thousands of characters

}  // namespace ptxsim
