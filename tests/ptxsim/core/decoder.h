// Syntax tree to executable kernel: registers and symbols get slots, every statement a handler.
#pragma once
#include <unordered_map>

#include "machine.h"
#include "numeric.h"

namespace ptxsim {

struct Register {
    u32 slot;
    Type type;
};
struct Symbol {
    Space space;
    u64 value;  // address within its space
};

// Names and storage of one kernel while it is decoded.
class KernelBuilder {
  public:
    KernelBuilder(Module& module, Kernel& kernel);
    void build(const Function& entry);

    const Register* find_register(const std::string& name) const;
    const Symbol* find_symbol(const std::string& name) const;
    u32 constant(u32 bytes, u64 value);
    u32 allocate(u32 bytes);
    Kernel& kernel() { return kernel_; }
    void branch_to(const std::string& label, Instruction& in);
    void branch_table(const std::string& name, Instruction& in);
    void call(const std::vector<std::string>& operands, Instruction& in);

  private:
    struct Scope {
        int parent;
        std::unordered_map<std::string, Register> registers;
        std::unordered_map<std::string, Symbol> symbols;
        std::unordered_map<std::string, u32> labels;
        std::unordered_map<std::string, std::vector<std::string>> tables;
    };
    struct Fixup {
        u32 instruction;
        int scope;
        std::string name;
        bool table;
    };
    struct Called {
        u32 entry;
        std::vector<Symbol> parameters, results;
        bool open;  // being decoded: a call now would be recursion
    };

    void place_shared_variables(const Function& function);
    void declare(const Declaration& declaration);
    void body(const Function& function);
    void statement(const Statement& statement);
    void resolve_branches();
    u32 label(int scope, const std::string& name) const;
    const Function* function_named(const std::string& name) const;
    Symbol local_variable(const Declaration& declaration);

    Module& module_;
    Kernel& kernel_;
    std::vector<Scope> scopes_;
    int scope_ = -1;
    std::map<std::pair<u32, u64>, u32> constants_;
    std::vector<Fixup> fixups_;
    std::vector<std::pair<u32, std::string>> pending_calls_;
    std::map<std::string, Called> called_;
};

// One statement being decoded. Every modifier must be asked for: what no decoder understood stops the kernel.
class Decode {
  public:
    Decode(KernelBuilder& builder, const Statement& statement, Instruction& in);

    Instruction& in;
    KernelBuilder& builder;
    const Statement& statement;
    const std::vector<std::string>& operands;

    bool has(const char* modifier);
    template <class... Names>
    bool any(Names... names) {
        return (0 | ... | static_cast<int>(has(names))) != 0;
    }
    template <class... Names>
    void ignore(Names... names) {
        any(names...);
    }
    size_t types() const { return types_.size(); }
    Type type(size_t i = 0) const;
    Type last_type() const { return type(types_.size() - 1); }
    Round rounding();  // .rn .rz .rm .rp .rna; nearest when none
    Space space();
    u32 number_after(const char* prefix);  // `.v4` after "v": 4; 0 if absent
    void expect_operands(size_t least, size_t most) const;
    void finish() const;  // throws if a modifier was not understood

    u32 source(size_t operand, Type type);
    u32 predicate(size_t operand, bool& negated);
    u32 destination(size_t operand, Type type);
    void pair(size_t operand, Type first, Type second);  // `%r|%p` into in.d, in.e
    void address(size_t operand);  // `[register + offset]` into in.a, in.offset, in.wide_address
    void vector_operand(size_t operand, Type type, bool writes,
                        bool loose);  // `{…}` into in.slots, in.widths
    u64 immediate(size_t operand, Type type) const;
    // loose: a register wider than the type is allowed (ld, st, cvt); width receives its bytes
    u32 loose(const std::string& name, Type type, bool writes, u8& width);
    [[noreturn]] void unsupported(const std::string& why = "") const;

  private:
    u32 value(const std::string& name, Type type, u8* width);
    std::vector<Type> types_;
    std::vector<bool> understood_;
};

using DecodeFunction = void (*)(Decode&);
using OpcodeTable = std::unordered_map<std::string, DecodeFunction>;
const OpcodeTable& opcodes();

// one per instruction family (isa_*.cpp)
void add_integer_opcodes(OpcodeTable& table);
void add_float_opcodes(OpcodeTable& table);
void add_arithmetic_opcodes(OpcodeTable& table);
void add_logic_opcodes(OpcodeTable& table);
void add_compare_opcodes(OpcodeTable& table);
void add_convert_opcodes(OpcodeTable& table);
void add_memory_opcodes(OpcodeTable& table);
void add_async_opcodes(OpcodeTable& table);
void add_warp_opcodes(OpcodeTable& table);
void add_matrix_opcodes(OpcodeTable& table);
void add_wgmma_opcodes(OpcodeTable& table);
void add_control_opcodes(OpcodeTable& table);

}  // namespace ptxsim
