// ldmatrix, stmatrix, movmatrix and mma.sync. Sums are formed in double and rounded once: more exact than any
// tensor core.
#include <cstring>

#include "access.h"
#include "arithmetic.h"

namespace ptxsim {
namespace {

void row_addresses(Warp& w, const Instruction& in, u32* row) {
    u64 address[kLanes];
    operand_addresses(w, in, address);
    for (int l = 0; l < kLanes; l++) row[l] = static_cast<u32>(address[l]);
}

Mask row_lanes(u32 matrices) { return matrices == 4 ? kAllLanes : (1u << 8 * matrices) - 1; }

// Lane l holds elements 2 (l % 4) and the next of row l / 4; transposed: of column l / 4.
void exchange(u16 tile[8][8], u32* lanes, bool transposed, bool to_lanes) {
    for (int l = 0; l < kLanes; l++) {
        const int major = l >> 2, minor = (l & 3) * 2;
        u16& low = transposed ? tile[minor][major] : tile[major][minor];
        u16& high = transposed ? tile[minor + 1][major] : tile[major][minor + 1];
        if (to_lanes)
            lanes[l] = low | static_cast<u32>(high) << 16;
        else
            low = static_cast<u16>(lanes[l]), high = static_cast<u16>(lanes[l] >> 16);
    }
}

void load_matrix(Warp& w, const Instruction& in, Mask) {
    u32 row[kLanes], lanes[4][kLanes];
    row_addresses(w, in, row);
    w.step++;
    for (u32 k = 0; k < in.vector; k++) {
        u16 tile[8][8];
        for (u32 r = 0; r < 8; r++) {
            const int lane = static_cast<int>(k * 8 + r);
            std::memcpy(tile[r], resolve_shared(w, in, lane, row[lane], {kAllLanes, 16, Touch::Read}), 16);
        }
        exchange(tile, lanes[k], in.mode, true);
    }
    for (u32 k = 0; k < in.vector; k++) store_lanes(w, in.slots[k], lanes[k], kAllLanes);
    count_banks(w, in, row_lanes(in.vector), row, 16);
}

void store_matrix(Warp& w, const Instruction& in, Mask) {
    u32 row[kLanes];
    row_addresses(w, in, row);
    w.step++;
    for (u32 k = 0; k < in.vector; k++) {
        u16 tile[8][8];
        exchange(tile, w.reg<u32>(in.slots[k]), in.mode, false);
        for (u32 r = 0; r < 8; r++) {
            const int lane = static_cast<int>(k * 8 + r);
            std::memcpy(resolve_shared(w, in, lane, row[lane], {kAllLanes, 16, Touch::Write}), tile[r], 16);
        }
    }
    count_banks(w, in, row_lanes(in.vector), row, 16);
}

void decode_matrix(Decode& d, bool loads) {
    d.ignore("sync", "aligned");
    const bool shape = d.has("m8n8");
    if (!shape || bytes_of(d.type()) != 2) d.unsupported("shape");
    d.space();
    d.in.space = Space::Shared;
    d.in.mode = d.has("trans");
    d.in.vector = static_cast<u8>(d.number_after("x"));
    d.address(loads ? 1 : 0);
    d.vector_operand(loads ? 0 : 1, Type::B32, loads, false);
    if (d.in.slots.size() != d.in.vector) d.unsupported("vector width");
    d.in.converge = Converge::Full;
    d.in.run = loads ? load_matrix : store_matrix;
}

void move_matrix(Warp& w, const Instruction& in, Mask) {
    u16 tile[8][8];
    u32 out[kLanes];
    exchange(tile, w.reg<u32>(in.a), false, false);
    exchange(tile, out, true, true);
    store_lanes(w, in.d, out, kAllLanes);
}

void decode_movmatrix(Decode& d) {
    d.ignore("sync", "aligned", "trans", "m8n8");
    d.in.d = d.destination(0, Type::B32);
    d.in.a = d.source(1, Type::B32);
    d.in.converge = Converge::Full;
    d.in.run = move_matrix;
}

// --- mma.sync.m16n8kK: A is 16 x K, B is K x 8. Registers hold groups of `per` elements of one row (A) or
// column (B).

struct Operand {  // how a register's elements become numbers
    Type type;
    u32 per() const { return type == Type::TF32 || type == Type::F64 ? 1 : 4 / bytes_of(type); }
    double value(Warp& w, u32 slot, int lane, u32 element) const {
        const u8* at = w.registers + slot + lane * (type == Type::F64 ? 8 : 4) + element * bytes_of(type);
        u16 half;
        std::memcpy(&half, at, type == Type::F16 || type == Type::BF16 ? 2 : 1);
        switch (type) {
            case Type::F16:
                return half_to_float(half);
            case Type::BF16:
                return bfloat_to_float(half);
            case Type::S8:
                return static_cast<i8>(*at);
            case Type::U8:
                return *at;
            case Type::TF32: {
                u32 raw;
                std::memcpy(&raw, at, 4);
                return bits<float>(raw & 0xffffe000u);  // the low 13 bits are not read
            }
            default: {
                double value;
                std::memcpy(&value, at, 8);
                return value;
            }
        }
    }
};

template <Type AType, Type BType>
void multiply_accumulate(Warp& w, const Instruction& in, Mask) {
    constexpr Operand a_kind{AType}, b_kind{BType};
    w.launch().counters.mma++;
    const u32 k_size = in.mode, per = a_kind.per(), group = 4 * per;  // four lanes cover one group of k
    const Type out_type = in.type;
    const u32 results = out_type == Type::F16 ? 2 : 4;
    const u32 rows = in.bytes, a_rows = rows / 8, a_registers = a_rows * k_size / group,
              b_registers = k_size / group;
    const u32 *d = in.slots.data(), *a = d + results * rows / 16, *b = a + a_registers, *c = b + b_registers;
    alignas(64) double A[16][32], B[32][8], sum[16][8];
    for (u32 r = 0; r < a_registers; r++)
        for (int l = 0; l < kLanes; l++)
            for (u32 e = 0; e < per; e++)
                A[(l >> 2) + (r % a_rows) * 8]
                 [(l & 3) * static_cast<int>(per) + static_cast<int>(e + r / a_rows * group)] =
                     a_kind.value(w, a[r], l, e);
    for (u32 r = 0; r < b_registers; r++)
        for (int l = 0; l < kLanes; l++)
            for (u32 e = 0; e < per; e++)
                B[(l & 3) * static_cast<int>(per) + static_cast<int>(e + r * group)][l >> 2] =
                    b_kind.value(w, b[r], l, e);
    auto each_result = [&](auto visit) {  // register, element in it, row and column
        for (u32 i = 0; i < rows / 8 * 2; i++) {
            const u32 r = out_type == Type::F16 ? i / 2 : i, e = out_type == Type::F16 ? i % 2 : 0;
            for (int l = 0; l < kLanes; l++)
                visit(r, l, e, (l >> 2) + static_cast<int>(i / 2) * 8, (l & 3) * 2 + static_cast<int>(i % 2));
        }
    };
    each_result([&](u32 r, int l, u32 e, int row, int column) {
        switch (out_type) {
            case Type::F16:
                sum[row][column] = half_to_float(w.reg<u16>(c[r])[2 * l + static_cast<int>(e)]);
                break;
            case Type::F32:
                sum[row][column] = w.reg<float>(c[r])[l];
                break;
            case Type::S32:
                sum[row][column] = w.reg<i32>(c[r])[l];
                break;
            default:
                sum[row][column] = w.reg<double>(c[r])[l];
                break;
        }
    });
    for (u32 i = 0; i < rows; i++)
        for (u32 k = 0; k < k_size; k++)
            for (u32 n = 0; n < 8; n++) sum[i][n] += A[i][k] * B[k][n];
    each_result([&](u32 r, int l, u32 e, int row, int column) {
        const double v = sum[row][column];
        switch (out_type) {
            case Type::F16:
                w.reg<u16>(d[r])[2 * l + static_cast<int>(e)] =
                    static_cast<u16>(encode(v, kHalf, Round::Nearest));
                break;
            case Type::F32:
                w.reg<float>(d[r])[l] = canonical(static_cast<float>(v));
                break;
            case Type::S32: {
                i64 exact = static_cast<i64>(v);
                if (in.strong)
                    exact = std::min<i64>(std::max<i64>(exact, INT32_MIN), INT32_MAX);  // .satfinite
                w.reg<u32>(d[r])[l] = static_cast<u32>(exact);
                break;
            }
            default:
                w.reg<double>(d[r])[l] = v;
                break;
        }
    });
}

Handler mma_handler(Type a, Type b) {
    if (a == Type::F16 && b == a) return multiply_accumulate<Type::F16, Type::F16>;
    if (a == Type::BF16 && b == a) return multiply_accumulate<Type::BF16, Type::BF16>;
    if (a == Type::TF32 && b == a) return multiply_accumulate<Type::TF32, Type::TF32>;
    if (a == Type::F64 && b == a) return multiply_accumulate<Type::F64, Type::F64>;
    if (a == Type::S8 && b == Type::S8) return multiply_accumulate<Type::S8, Type::S8>;
    if (a == Type::S8 && b == Type::U8) return multiply_accumulate<Type::S8, Type::U8>;
    if (a == Type::U8 && b == Type::S8) return multiply_accumulate<Type::U8, Type::S8>;
    if (a == Type::U8 && b == Type::U8) return multiply_accumulate<Type::U8, Type::U8>;
    return nullptr;
}

void decode_mma(Decode& d) {
    Instruction& in = d.in;
    d.ignore("sync", "aligned");
    if (!d.has("row") || !d.has("col")) d.unsupported("layout");
    static const std::pair<const char*, u32> shapes[] = {
        {"m16n8k4", 4}, {"m16n8k8", 8}, {"m16n8k16", 16}, {"m16n8k32", 32}};
    for (auto& [name, k] : shapes)
        if (d.has(name)) in.mode = k, in.bytes = 16;
    if (d.has("m8n8k4")) in.mode = 4, in.bytes = 8;
    if (in.mode == 0 || d.types() != 4 || d.type(0) != d.type(3)) d.unsupported("shape or types");
    const Type a = d.type(1), b = d.type(2);
    in.type = d.type(0);
    if (in.bytes == 8 && a != Type::F64) d.unsupported("m8n8k4 of this type");
    const bool integers = a == Type::S8 || a == Type::U8;
    const bool fits = integers         ? in.type == Type::S32
                      : a == Type::F64 ? in.type == a
                                       : in.type == Type::F32 || (in.type == Type::F16 && a == Type::F16);
    if (!fits) d.unsupported("accumulator type");
    in.strong = d.has("satfinite");
    const Type storage = a == Type::F64 ? Type::F64 : Type::B32,
               accumulator = in.type == Type::F16 ? Type::B32 : in.type;
    d.vector_operand(0, accumulator, true, false);
    d.vector_operand(1, storage, false, false);
    d.vector_operand(2, storage, false, false);
    d.vector_operand(3, accumulator, false, false);
    const u32 group = 4 * Operand{a}.per(), results = in.type == Type::F16 ? 2 : in.bytes / 4;
    const u32 expected = 2 * results + in.bytes / 8 * in.mode / group + in.mode / group;
    if (in.slots.size() != expected) d.unsupported("number of registers");
    in.converge = Converge::Full;
    in.run = mma_handler(a, b);
}

}  // namespace

void add_matrix_opcodes(OpcodeTable& t) {
    t["ldmatrix"] = [](Decode& d) { decode_matrix(d, true); };
    t["stmatrix"] = [](Decode& d) { decode_matrix(d, false); };
    t["movmatrix"] = decode_movmatrix;
    t["mma"] = decode_mma;
}

}  // namespace ptxsim
