// PTX text to a syntax tree: statements, labels, declarations and scopes, nothing resolved yet.
#pragma once
#include <map>
#include <string>
#include <variant>
#include <vector>

#include "types.h"

namespace ptxsim {

struct Position {
    int file = 0, line = 0;  // from .loc; line 0: none known
};

struct Statement {
    std::string text, opcode;
    std::vector<std::string> modifiers, operands;
    std::string guard;  // predicate register, empty when unconditional
    bool guard_negated = false;
    Position at;
};
struct Declaration {
    Space space = Space::Generic;
    bool is_register = false;
    Type type = Type::B8;
    std::string name;
    int count = -1;  // `.reg .b32 %r<7>`: 7
    u64 elements = 1;
    u32 align = 0;
    bool unsized = false;     // extern __shared__ array
    std::vector<u8> initial;  // initialised variables
    u64 size() const { return elements * bytes_of(type); }
};
struct Label {
    std::string name;
};
struct BranchTargets {  // the table of a brx.idx
    std::string name;
    std::vector<std::string> labels;
};
struct ScopeOpen {};
struct ScopeClose {};
using Item = std::variant<Statement, Label, Declaration, BranchTargets, ScopeOpen, ScopeClose>;

struct Function {
    std::string name;
    bool is_kernel = false;
    std::vector<Declaration> parameters, results;
    std::vector<Item> body;
};
struct ModuleText {
    std::map<int, std::string> files;
    std::vector<Declaration> variables;
    std::vector<Function> functions;
};

ModuleText parse_module(const std::string& source);

// Shared with the decoder: split at a separator outside brackets; number literals (0f…, 0d…, 0x…,
// decimal, 1.5).
std::vector<std::string> split(const std::string& text, char separator);
std::string trim(const std::string& text);
u64 parse_literal(const std::string& text, Type type);

}  // namespace ptxsim
