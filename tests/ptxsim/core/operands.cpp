// Decode: modifiers and operands of one statement.
#include <algorithm>
#include <cctype>
#include <cstdlib>

#include "decoder.h"

namespace ptxsim {

Decode::Decode(KernelBuilder& builder_, const Statement& statement_, Instruction& in_)
    : in(in_),
      builder(builder_),
      statement(statement_),
      operands(statement_.operands),
      understood_(statement_.modifiers.size(), false) {
    for (size_t i = 0; i < statement.modifiers.size(); i++)
        if (auto type = type_from(statement.modifiers[i])) types_.push_back(*type), understood_[i] = true;
    if (!types_.empty()) in.type = types_.back();
}

void Decode::unsupported(const std::string& why) const {
    throw Error("unsupported" + (why.empty() ? "" : ": " + why));
}

bool Decode::has(const char* modifier) {
    bool found = false;
    for (size_t i = 0; i < understood_.size(); i++)
        if (statement.modifiers[i] == modifier) found = true, understood_[i] = true;
    return found;
}

Type Decode::type(size_t i) const {
    if (i >= types_.size()) throw Error("a type is missing");
    return types_[i];
}

Round Decode::rounding() {
    Round round = Round::Nearest;
    if (has("rna")) round = Round::NearestAway;
    if (any("rz", "rzi")) round = Round::Zero;
    if (any("rm", "rmi")) round = Round::Down;
    if (any("rp", "rpi")) round = Round::Up;
    ignore("rn", "rni");
    return round;
}

Space Decode::space() {
    Space space = Space::Generic;
    if (any("global")) space = Space::Global;
    if (any("shared", "shared::cta")) space = Space::Shared;
    if (any("local")) space = Space::Local;
    if (any("param", "param::entry", "param::func")) space = Space::Param;
    if (any("const")) space = Space::Const;
    return in.space = space;
}

u32 Decode::number_after(const char* prefix) {
    const size_t length = std::string(prefix).size();
    for (size_t i = 0; i < understood_.size(); i++) {
        const std::string& m = statement.modifiers[i];
        if (m.size() == length + 1 && m.compare(0, length, prefix) == 0 &&
            std::isdigit(static_cast<unsigned char>(m[length]))) {
            understood_[i] = true;
            return static_cast<u32>(m[length] - '0');
        }
    }
    return 0;
}

void Decode::expect_operands(size_t least, size_t most) const {
    if (operands.size() < least || operands.size() > most) throw Error("number of operands");
}

void Decode::finish() const {
    for (size_t i = 0; i < understood_.size(); i++)
        if (!understood_[i]) throw Error("modifier ." + statement.modifiers[i]);
}

static int special_register(const std::string& name) {
    static const std::unordered_map<std::string, int> table = {{"%tid.x", TidX},
                                                               {"%tid.y", TidY},
                                                               {"%tid.z", TidZ},
                                                               {"%ntid.x", NtidX},
                                                               {"%ntid.y", NtidY},
                                                               {"%ntid.z", NtidZ},
                                                               {"%ctaid.x", CtaidX},
                                                               {"%ctaid.y", CtaidY},
                                                               {"%ctaid.z", CtaidZ},
                                                               {"%nctaid.x", NctaidX},
                                                               {"%nctaid.y", NctaidY},
                                                               {"%nctaid.z", NctaidZ},
                                                               {"%laneid", LaneId},
                                                               {"%warpid", WarpId},
                                                               {"%lanemask_eq", LanemaskEq},
                                                               {"%lanemask_lt", LanemaskLt},
                                                               {"%lanemask_le", LanemaskLe},
                                                               {"%lanemask_gt", LanemaskGt},
                                                               {"%lanemask_ge", LanemaskGe}};
    auto found = table.find(name);
    return found == table.end() ? -1 : found->second;
}

u32 Decode::value(const std::string& name, Type type, u8* width) {
    const u32 bytes = bytes_of(type);
    if (width) *width = static_cast<u8>(bytes);
    if (const Register* r = builder.find_register(name)) {
        const u32 have = bytes_of(r->type);
        if ((r->type == Type::Pred) != (type == Type::Pred) || have < bytes || (have != bytes && !width))
            throw Error("register width of " + name);
        if (width) *width = static_cast<u8>(have);
        return r->slot;
    }
    if (int special = special_register(name); special >= 0) {
        if (bytes != 4) throw Error("width of " + name);
        return builder.kernel().special[special];
    }
    if (name == "WARP_SZ") return builder.constant(bytes, kLanes);
    // time stands still and there is one processor: only kernels that would misbehave anyway can tell
    if (name == "%clock" || name == "%clock64" || name == "%globaltimer" || name == "%smid")
        return builder.constant(bytes, 0);
    if (name.empty() || name[0] == '%') throw Error("register " + name);
    if (std::isdigit(static_cast<unsigned char>(name[0])) || name[0] == '-') {
        u64 raw = parse_literal(name, type);
        if (type == Type::Pred) raw = raw ? ~0ull : 0;
        if (bytes < 8) raw &= (1ull << 8 * bytes) - 1;
        return builder.constant(bytes, raw);
    }
    const size_t plus = name.find('+');
    const Symbol* symbol = builder.find_symbol(trim(name.substr(0, plus)));
    if (!symbol) throw Error("unknown name " + name);
    const u64 add = plus == std::string::npos ? 0 : std::strtoull(name.c_str() + plus + 1, nullptr, 0);
    if (bytes < 4) throw Error("address in a narrow register");
    const u64 address = symbol->value + add;
    return builder.constant(bytes, bytes == 4 ? address & 0xffffffffull : address);
}

u32 Decode::source(size_t operand, Type type) { return value(operands.at(operand), type, nullptr); }

u32 Decode::predicate(size_t operand, bool& negated) {
    const std::string& name = operands.at(operand);
    negated = name[0] == '!';
    return value(negated ? trim(name.substr(1)) : name, Type::Pred, nullptr);
}

u32 Decode::destination(size_t operand, Type type) {
    u8 width;
    const u32 slot = loose(operands.at(operand), type, true, width);
    if (width && width != bytes_of(type)) throw Error("width of the destination");
    return slot;
}

u32 Decode::loose(const std::string& name, Type type, bool writes, u8& width) {
    if (name == "_") {
        width = 0;
        return builder.kernel().special[Trash];
    }
    if (writes && !builder.find_register(name)) throw Error("destination " + name);
    return value(name, type, &width);
}

void Decode::pair(size_t operand, Type first, Type second) {
    const std::vector<std::string> names = split(operands.at(operand), '|');
    u8 width;
    in.d = loose(names.at(0), first, true, width);
    in.e = names.size() > 1 ? loose(names[1], second, true, width) : builder.kernel().special[Trash];
}

void Decode::vector_operand(size_t operand, Type type, bool writes, bool wider) {
    const std::string& text = operands.at(operand);
    const std::vector<std::string> names =
        text[0] == '{' ? split(text.substr(1, text.rfind('}') - 1), ',') : std::vector<std::string>{text};
    for (const std::string& name : names) {
        u8 width;
        in.slots.push_back(loose(name, type, writes, width));
        if (!wider && width && width != bytes_of(type)) throw Error("register width of " + name);
        in.widths.push_back(width);
    }
}

void Decode::address(size_t operand) {
    const std::string& text = operands.at(operand);
    if (text.front() != '[' || text.back() != ']') throw Error("not an address: " + text);
    std::string base = trim(text.substr(1, text.size() - 2));
    const size_t sign = base.find_first_of("+-", 1);
    in.offset = 0;
    if (sign != std::string::npos) {
        std::string number = trim(base.substr(sign + 1));
        in.offset = static_cast<i64>(parse_literal(number, Type::S64));
        if (base[sign] == '-') in.offset = -in.offset;
        base = trim(base.substr(0, sign));
    }
    if (const Register* r = builder.find_register(base)) {
        in.a = r->slot;
        in.wide_address = bytes_of(r->type) == 8;
        if (bytes_of(r->type) < 4) throw Error("address register " + base);
        return;
    }
    in.wide_address = true;
    if (std::isdigit(static_cast<unsigned char>(base[0]))) {
        in.a = builder.constant(8, parse_literal(base, Type::U64));
        return;
    }
    const Symbol* symbol = builder.find_symbol(base);
    if (!symbol) throw Error("unknown name " + base);
    in.a = builder.constant(8, symbol->value);
    // a parameter of a called function lives in per-thread memory
    if (in.space == Space::Param || in.space == Space::Generic) in.space = symbol->space;
}

u64 Decode::immediate(size_t operand, Type type) const { return parse_literal(operands.at(operand), type); }

}  // namespace ptxsim
