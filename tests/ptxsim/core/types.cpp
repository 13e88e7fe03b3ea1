#include "types.h"

#include <cstdarg>
#include <cstdio>
#include <unordered_map>

namespace ptxsim {

static const TypeInfo kTypes[] = {
    {"pred", 4, false, false},  {"b8", 1, false, false},  {"u8", 1, false, false},   {"s8", 1, true, false},
    {"b16", 2, false, false},   {"u16", 2, false, false}, {"s16", 2, true, false},   {"f16", 2, true, true},
    {"bf16", 2, true, true},    {"b32", 4, false, false}, {"u32", 4, false, false},  {"s32", 4, true, false},
    {"f32", 4, true, true},     {"f16x2", 4, true, true}, {"bf16x2", 4, true, true}, {"tf32", 4, true, true},
    {"b64", 8, false, false},   {"u64", 8, false, false}, {"s64", 8, true, false},   {"f64", 8, true, true},
    {"b128", 16, false, false},
};

const TypeInfo& info(Type type) { return kTypes[static_cast<int>(type)]; }

std::optional<Type> type_from(const std::string& name) {
    static const auto table = [] {
        std::unordered_map<std::string, Type> map;
        for (size_t i = 0; i < sizeof(kTypes) / sizeof(kTypes[0]); i++)
            map[kTypes[i].name] = static_cast<Type>(i);
        return map;
    }();
    auto found = table.find(name);
    if (found == table.end()) return std::nullopt;
    return found->second;
}

std::string format(const char* pattern, ...) {
    va_list args, again;
    va_start(args, pattern);
    va_copy(again, args);
    std::string text(static_cast<size_t>(vsnprintf(nullptr, 0, pattern, args)), '\0');
    vsnprintf(text.data(), text.size() + 1, pattern, again);
    va_end(args);
    va_end(again);
    return text;
}

std::string shortened(const std::string& text, size_t length) {
    return text.size() <= length ? text : text.substr(0, length - 3) + "...";
}

}  // namespace ptxsim
