// wgmma (sm_90): products of 64 rows by four warps, operands described in shared memory. Each warp makes its
// own 16 rows. A product is made when its group is waited for (lazy copies, the default) or when it is
// issued, so that numbers show a missing wait; the operands are checked for races at both times, for they may
// be read at any time between. Not modelled: fence.proxy.async, and that the four warps go together.
#include <algorithm>
#include <cstring>

#include "access.h"
#include "arithmetic.h"

namespace ptxsim {
namespace {

// Instruction::type is the operands' type, in.bytes its size, in.vector results per lane, in.mode these bits.
enum Mode : u32 { kRegistersA = 1, kMajorA = 2, kMajorB = 4, kNegateA = 8, kNegateB = 16, kHalfResult = 32 };
constexpr u32 kRows = 16, kMostColumns = 256, kMostK = 16;

// Shared address of element (row or column mn, k): the canonical layouts of the PTX ISA. `mn_major`:
// neighbours in mn lie side by side, else neighbours in k.
u32 element_address(u64 descriptor, bool mn_major, u32 bytes, u32 mn, u32 k) {
    const auto field = [&](int shift) { return static_cast<u32>(descriptor >> shift & 0x3fff) << 4; };
    const u32 base = field(0), leading = field(16), stride = field(32),
              kind = static_cast<u32>(descriptor >> 62);
    const u32 width = kind == 1 ? 128 : kind == 2 ? 64 : kind == 3 ? 32 : 16;  // bytes of a swizzled row
    const u32 along = mn_major ? mn : k, across = mn_major ? k : mn;
    u32 at;
    if (kind && !mn_major)
        at = base + across / 8 * stride + across % 8 * width + along * bytes;
    else if (kind)
        at = base + along / (width / bytes) * leading + across / 8 * stride + across % 8 * width +
             along % (width / bytes) * bytes;
    else {
        const u32 per = 16 / bytes;
        const u32 blocks = mn_major ? along / per * stride + across / 8 * leading
                                    : across / 8 * stride + along / per * leading;
        at = base + blocks + across % 8 * 16 + along % per * bytes;
    }
    return at ^ (at >> 7 & (width / 16 - 1)) << 4;
}

double value_of(const u8* at, Type type) {
    u32 raw = 0;
    std::memcpy(&raw, at, bytes_of(type));
    if (type == Type::F16) return half_to_float(static_cast<u16>(raw));
    if (type == Type::BF16) return bfloat_to_float(static_cast<u16>(raw));
    return bits<float>(raw & 0xffffe000u);  // TF32: the low 13 bits are not read
}

// Reads rows first .. first + count of one operand, 16 bytes at a time.
void fetch(Warp& w, const Instruction& in, u64 descriptor, bool mn_major, u32 first, u32 count,
           double (*out)[kMostK]) {
    const u32 per = 16 / in.bytes, k_size = 32 / in.bytes;
    const u32 rows = mn_major ? k_size : count, groups = (mn_major ? count : k_size) / per;
    for (u32 r = 0; r < rows; r++)
        for (u32 g = 0; g < groups; g++) {
            const u32 mn = first + (mn_major ? g * per : r), k = mn_major ? r : g * per;
            const u32 address = element_address(descriptor, mn_major, in.bytes, mn, k);
            const int lane = static_cast<int>((r * groups + g) % kLanes);
            u8 values[16];
            std::memcpy(values, resolve_shared(w, in, lane, address, {kAllLanes, 16, Touch::Read}), 16);
            for (u32 e = 0; e < per; e++)
                out[mn - first + (mn_major ? e : 0)][k + (mn_major ? 0 : e)] =
                    value_of(values + e * in.bytes, in.type);
        }
}

struct Operands {
    double a[kRows][kMostK], b[kMostColumns][kMostK];
};

u32 columns_of(const Instruction& in) { return in.vector * (in.mode & kHalfResult ? 4u : 2u); }

void fetch_both(Warp& w, const MatrixProduct& p, Operands& values) {
    const Instruction& in = *p.instruction;
    if (in.mode & kRegistersA) {  // as mma.m16n8kK
        const u32 per = in.bytes == 2 ? 2 : 1;
        for (u32 r = 0; r < 4; r++)
            for (u32 l = 0; l < kLanes; l++)
                for (u32 e = 0; e < per; e++)
                    values.a[(l >> 2) + r % 2 * 8][(l & 3) * per + e + r / 2 * 4 * per] =
                        value_of(w.registers + in.slots[in.vector + r] + l * 4 + e * in.bytes, in.type);
    } else {
        fetch(w, in, p.a, in.mode & kMajorA, w.id % 4 * kRows, kRows, values.a);
    }
    fetch(w, in, p.b, in.mode & kMajorB, 0, columns_of(in), values.b);
}

void multiply(Warp& w, const MatrixProduct& p) {
    static thread_local Operands values;
    const Instruction& in = *p.instruction;
    w.step++;
    fetch_both(w, p, values);
    const double sign = !(in.mode & kNegateA) == !(in.mode & kNegateB) ? 1 : -1;
    const u32 k_size = 32 / in.bytes;
    for (u32 r = 0; r < in.vector; r++)
        for (u32 l = 0; l < kLanes; l++)
            for (u32 e = 0; e < (in.mode & kHalfResult ? 2u : 1u); e++) {
                const u32 place =
                    in.mode & kHalfResult ? r * 2 + e : r;  // two columns, eight rows on, next columns
                const u32 row = (l >> 2) + place / 2 % 2 * 8,
                          column = place / 4 * 8 + (l & 3) * 2 + place % 2;
                u16* half = w.reg<u16>(in.slots[r]) + 2 * l + e;
                float* whole = w.reg<float>(in.slots[r]) + l;
                double sum = 0;
                if (p.accumulate) sum = in.mode & kHalfResult ? half_to_float(*half) : *whole;
                for (u32 k = 0; k < k_size; k++) sum += sign * values.a[row][k] * values.b[column][k];
                if (in.mode & kHalfResult)
                    *half = static_cast<u16>(encode(sum, kHalf, Round::Nearest));
                else
                    *whole = canonical(static_cast<float>(sum));
            }
}

void issue(Warp& w, const Instruction& in, Mask) {
    MatrixProduct p;
    p.instruction = &in;
    p.a = in.mode & kRegistersA ? 0 : *w.reg<u64>(in.a);
    p.b = *w.reg<u64>(in.b);
    p.accumulate = w.predicate(in.c, in.negate_c) & 1;
    p.group = w.product_group;
    w.launch().counters.mma++;
    if (!w.launch().options.lazy_copies) {
        multiply(w, p);
    } else {
        static thread_local Operands ignored;
        w.step++;
        fetch_both(w, p, ignored);
        w.products.push_back(p);
    }
}

void commit(Warp& w, const Instruction&, Mask) { w.product_group++; }

void wait(Warp& w, const Instruction& in, Mask) {
    const auto open = std::find_if(w.products.begin(), w.products.end(), [&](const MatrixProduct& p) {
        return p.group + in.mode >= w.product_group;
    });
    for (auto p = w.products.begin(); p != open; ++p) multiply(w, *p);
    w.products.erase(w.products.begin(), open);
}

void decode_product(Decode& d) {
    Instruction& in = d.in;
    if (d.types() != 3 || d.type(1) != d.type(2)) d.unsupported("types");
    in.type = d.type(1);
    if (in.type != Type::F16 && in.type != Type::BF16 && in.type != Type::TF32) d.unsupported("operand type");
    in.bytes = static_cast<u8>(bytes_of(in.type));
    const bool half = d.type(0) == Type::F16;
    if (half ? in.type != Type::F16 : d.type(0) != Type::F32) d.unsupported("accumulator type");
    u32 columns = 0;
    for (u32 n = 8; n <= kMostColumns; n += 8)
        if (d.has(format("m64n%uk%u", n, 32u / in.bytes).c_str())) columns = n;
    if (!columns) d.unsupported("shape");
    in.mode = half ? kHalfResult : 0;
    d.vector_operand(0, half ? Type::B32 : Type::F32, true, false);
    in.vector = static_cast<u8>(columns / (half ? 4 : 2));
    if (in.slots.size() != in.vector) d.unsupported("number of registers");
    if (d.operands.at(1)[0] == '{') {
        d.vector_operand(1, Type::B32, false, false);
        if (in.slots.size() != in.vector + 4u) d.unsupported("number of registers");
        in.mode |= kRegistersA;
    } else {
        in.a = d.source(1, Type::B64);
    }
    in.b = d.source(2, Type::B64);
    in.c = d.predicate(3, in.negate_c);
    const bool transposes = in.bytes == 2;
    const size_t flags = 2 + (transposes ? (in.mode & kRegistersA ? 1 : 2) : 0);
    d.expect_operands(4 + flags, 4 + flags);
    const auto flag = [&](size_t i) { return static_cast<i32>(d.immediate(4 + i, Type::S32)); };
    if (flag(0) != 1) in.mode |= kNegateA;
    if (flag(1) != 1) in.mode |= kNegateB;
    if (transposes && !(in.mode & kRegistersA) && flag(2)) in.mode |= kMajorA;
    if (transposes && flag(flags - 1)) in.mode |= kMajorB;
    in.run = issue;
}

void decode_wgmma(Decode& d) {
    d.ignore("sync", "aligned");
    d.in.converge = Converge::Full;
    if (d.has("mma_async")) return decode_product(d);
    if (d.has("fence")) {
        d.in.run = [](Warp&, const Instruction&, Mask) {};
    } else if (d.has("commit_group")) {
        d.in.run = commit;
    } else if (d.has("wait_group")) {
        d.in.mode = static_cast<u32>(d.immediate(0, Type::U32));
        d.in.run = wait;
    } else {
        d.unsupported();
    }
}

}  // namespace

void add_wgmma_opcodes(OpcodeTable& t) { t["wgmma"] = decode_wgmma; }

}  // namespace ptxsim
