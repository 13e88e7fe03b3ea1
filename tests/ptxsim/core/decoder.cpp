#include "decoder.h"

#include <algorithm>
#include <cstring>

#include "launch.h"

namespace ptxsim {
namespace {

u32 align_up(u32 value, u32 alignment) { return (value + alignment - 1) / alignment * alignment; }

void stop_unsupported(Warp& warp, const Instruction& in, Mask) {
    const Kernel& kernel = *warp.block->kernel;
    throw Error(format("kernel %s line %d: unsupported instruction: %s", shortened(kernel.name, 64).c_str(),
                       in.at.line, shortened(in.text, 400).c_str()));
}

}  // namespace

const OpcodeTable& opcodes() {
    static const OpcodeTable table = [] {
        OpcodeTable t;
        for (auto add : {add_integer_opcodes, add_float_opcodes, add_arithmetic_opcodes, add_logic_opcodes,
                         add_compare_opcodes, add_convert_opcodes, add_memory_opcodes, add_async_opcodes,
                         add_warp_opcodes, add_matrix_opcodes, add_wgmma_opcodes, add_control_opcodes})
            add(t);
        return t;
    }();
    return table;
}

KernelBuilder::KernelBuilder(Module& module, Kernel& kernel) : module_(module), kernel_(kernel) {}

u32 KernelBuilder::allocate(u32 bytes) {
    u32 slot = kernel_.register_bytes;
    kernel_.register_bytes += align_up(bytes, 64);
    return slot;
}

u32 KernelBuilder::constant(u32 bytes, u64 value) {
    auto [found, fresh] = constants_.emplace(std::make_pair(bytes, value), 0);
    if (fresh) {
        found->second = allocate(kLanes * bytes);
        kernel_.constants.push_back({found->second, static_cast<u8>(bytes), value});
    }
    return found->second;
}

const Register* KernelBuilder::find_register(const std::string& name) const {
    for (int s = scope_; s >= 0; s = scopes_[static_cast<size_t>(s)].parent) {
        const auto& registers = scopes_[static_cast<size_t>(s)].registers;
        auto found = registers.find(name);
        if (found != registers.end()) return &found->second;
    }
    return nullptr;
}

const Symbol* KernelBuilder::find_symbol(const std::string& name) const {
    for (int s = scope_; s >= 0; s = scopes_[static_cast<size_t>(s)].parent) {
        const auto& symbols = scopes_[static_cast<size_t>(s)].symbols;
        auto found = symbols.find(name);
        if (found != symbols.end()) return &found->second;
    }
    return nullptr;
}

Symbol KernelBuilder::local_variable(const Declaration& d) {
    kernel_.local_bytes = align_up(kernel_.local_bytes, 16);
    Symbol symbol{Space::Local, kernel_.local_bytes};
    kernel_.local_bytes += static_cast<u32>(d.size());
    return symbol;
}

void KernelBuilder::declare(const Declaration& d) {
    Scope& scope = scopes_[static_cast<size_t>(scope_)];
    if (d.is_register) {
        const u32 bytes = d.type == Type::Pred ? 4 : kLanes * bytes_of(d.type);
        auto add = [&](const std::string& name) { scope.registers[name] = {allocate(bytes), d.type}; };
        if (d.count < 0) add(d.name);
        for (int i = 0; i < d.count; i++) add(d.name + std::to_string(i));
    } else if (d.space == Space::Shared) {
        kernel_.shared_static = align_up(kernel_.shared_static, std::max<u32>(d.align, 16));
        scope.symbols[d.name] = {Space::Shared, kSharedBase + kernel_.shared_static};
        kernel_.shared_static += static_cast<u32>(d.size());
    } else if (d.space == Space::Local || d.space == Space::Param) {
        scope.symbols[d.name] = local_variable(d);
    } else {
        throw Error("declaration of " + d.name + " inside a function");
    }
}

// Module-level shared arrays take part if the kernel (or a function, which it may call) names them.
void KernelBuilder::place_shared_variables(const Function& entry) {
    auto mentions = [&](const Function& f, const std::string& name) {
        for (const Item& item : f.body)
            if (auto* s = std::get_if<Statement>(&item))
                if (s->text.find(name) != std::string::npos) return true;
        return false;
    };
    for (const Declaration& d : module_.text.variables) {
        if (d.space != Space::Shared) continue;
        bool used = mentions(entry, d.name);
        for (const Function& f : module_.text.functions) used |= !f.is_kernel && mentions(f, d.name);
        if (!used) continue;
        if (d.unsized || d.elements == 0)
            scopes_[0].symbols[d.name] = {Space::Shared, 0};  // placed below
        else
            declare(d);
    }
    // dynamic memory lies behind every static array: body() declares those that stand inside the kernel first
    std::vector<Declaration> inner;
    for (const Item& item : entry.body)
        if (auto* d = std::get_if<Declaration>(&item))
            if (d->space == Space::Shared && !d->is_register) inner.push_back(*d);
    for (const Declaration& d : inner) declare(d);
    for (const Declaration& d : module_.text.variables)
        if (d.space == Space::Shared && (d.unsized || d.elements == 0) && scopes_[0].symbols.count(d.name))
            scopes_[0].symbols[d.name] = {Space::Shared, kSharedBase + align_up(kernel_.shared_static, 16)};
}

void KernelBuilder::build(const Function& entry) {
    kernel_.files = &module_.text.files;
    kernel_.register_bytes = 64;
    for (u32& slot : kernel_.special) slot = allocate(kLanes * 16);
    scopes_.push_back({-1, {}, {}, {}, {}});
    scope_ = 0;
    for (const auto& [name, address] : module_.symbols) scopes_[0].symbols[name] = {Space::Global, address};
    u32 offset = 0;
    for (const Declaration& p : entry.parameters) {
        offset = align_up(offset, std::max<u32>(p.align, bytes_of(p.type)));
        kernel_.parameters.push_back({p.name, offset, static_cast<u32>(p.size())});
        offset += static_cast<u32>(p.size());
    }
    kernel_.parameter_bytes.assign(offset + 16, 0);
    for (const Parameter& p : kernel_.parameters)
        scopes_[0].symbols[p.name] = {Space::Param,
                                      reinterpret_cast<u64>(&kernel_.parameter_bytes[p.offset])};
    place_shared_variables(entry);
    body(entry);
    while (!pending_calls_.empty()) {
        const std::string name = pending_calls_.back().second;
        pending_calls_.pop_back();
        Called& called = called_.at(name);
        if (called.entry != ~0u) continue;
        called.entry = static_cast<u32>(kernel_.code.size());
        const Function& function = *function_named(name);
        scopes_.push_back({0, {}, {}, {}, {}});
        scope_ = static_cast<int>(scopes_.size()) - 1;
        for (size_t i = 0; i < function.parameters.size(); i++)
            scopes_.back().symbols[function.parameters[i].name] = called.parameters[i];
        for (size_t i = 0; i < function.results.size(); i++)
            scopes_.back().symbols[function.results[i].name] = called.results[i];
        body(function);
    }
    resolve_branches();
    for (u32 i = 0; i < kernel_.code.size(); i++) kernel_.code[i].index = i;
}

void KernelBuilder::body(const Function& function) {
    const int outer = scope_;
    scopes_.push_back({outer, {}, {}, {}, {}});
    scope_ = static_cast<int>(scopes_.size()) - 1;
    for (const Item& item : function.body) {
        if (auto* s = std::get_if<Statement>(&item)) {
            statement(*s);
        } else if (auto* l = std::get_if<Label>(&item)) {
            scopes_[static_cast<size_t>(scope_)].labels[l->name] = static_cast<u32>(kernel_.code.size());
        } else if (auto* d = std::get_if<Declaration>(&item)) {
            if (d->space != Space::Shared || d->is_register)
                declare(*d);  // shared arrays have their place already
            else if (!find_symbol(d->name))
                throw Error("shared array inside a function: " + d->name);
        } else if (auto* t = std::get_if<BranchTargets>(&item)) {
            scopes_[static_cast<size_t>(scope_)].tables[t->name] = t->labels;
        } else if (std::get_if<ScopeOpen>(&item)) {
            scopes_.push_back({scope_, {}, {}, {}, {}});
            scope_ = static_cast<int>(scopes_.size()) - 1;
        } else {
            scope_ = scopes_[static_cast<size_t>(scope_)].parent;
        }
    }
    Statement end;
    end.text = end.opcode = "ret";
    statement(end);
    scope_ = outer;
}

void KernelBuilder::statement(const Statement& s) {
    kernel_.code.emplace_back();
    Instruction in;
    in.text = s.text;
    in.at = s.at;
    if (!s.guard.empty()) {
        const Register* guard = find_register(s.guard);
        if (!guard || guard->type != Type::Pred) throw Error("not a predicate: " + s.text);
        in.guard = static_cast<int>(guard->slot);
        in.guard_negated = s.guard_negated;
    }
    const Instruction blank = in;
    try {
        auto found = opcodes().find(s.opcode);
        if (found == opcodes().end()) throw Error("unknown opcode " + s.opcode);
        Decode decode(*this, s, in);
        found->second(decode);
        decode.finish();
        if (in.flow == Flow::Next && !in.run) throw Error("no handler for these types");
    } catch (const Error& error) {
        in = blank;
        in.run = stop_unsupported;
        kernel_.problems.push_back(
            format("line %d: %s (%s)", s.at.line, shortened(s.text, 200).c_str(), error.what()));
    }
    kernel_.code.back() = std::move(in);
}

const Function* KernelBuilder::function_named(const std::string& name) const {
    for (const Function& f : module_.text.functions)
        if (!f.is_kernel && f.name == name) return &f;
    return nullptr;
}

void KernelBuilder::branch_to(const std::string& label, Instruction&) {
    fixups_.push_back({static_cast<u32>(kernel_.code.size()) - 1, scope_, label, false});
}

void KernelBuilder::branch_table(const std::string& name, Instruction&) {
    fixups_.push_back({static_cast<u32>(kernel_.code.size()) - 1, scope_, name, true});
}

u32 KernelBuilder::label(int scope, const std::string& name) const {
    for (int s = scope; s >= 0; s = scopes_[static_cast<size_t>(s)].parent) {
        auto found = scopes_[static_cast<size_t>(s)].labels.find(name);
        if (found != scopes_[static_cast<size_t>(s)].labels.end()) return found->second;
    }
    throw Error("no label " + name);
}

void KernelBuilder::resolve_branches() {
    for (const Fixup& fixup : fixups_) {
        Instruction& in = kernel_.code[fixup.instruction];
        if (in.flow == Flow::Next) continue;  // could not be decoded
        if (!fixup.table) {
            in.target = in.flow == Flow::Call ? called_.at(fixup.name).entry : label(fixup.scope, fixup.name);
            continue;
        }
        for (int s = fixup.scope; s >= 0; s = scopes_[static_cast<size_t>(s)].parent) {
            auto found = scopes_[static_cast<size_t>(s)].tables.find(fixup.name);
            if (found == scopes_[static_cast<size_t>(s)].tables.end()) continue;
            for (const std::string& name : found->second) in.targets.push_back(label(fixup.scope, name));
            break;
        }
        if (in.targets.empty()) throw Error("no branch table " + fixup.name);
    }
}

// `call (results), name, (parameters)` of a function in this module: values travel through per-thread memory
void KernelBuilder::call(const std::vector<std::string>& operands, Instruction& in) {
    std::vector<std::string> results, arguments;
    std::string name;
    for (const std::string& o : operands) {
        if (o[0] != '(')
            name = name.empty() ? o : name;
        else
            (name.empty() ? results : arguments) = split(o.substr(1, o.size() - 2), ',');
    }
    const Function* function = function_named(name);
    if (!function) throw Error("call of " + name);
    auto [found, fresh] = called_.emplace(name, Called{~0u, {}, {}, true});
    Called& called = found->second;
    if (fresh) {
        for (const Declaration& d : function->parameters) called.parameters.push_back(local_variable(d));
        for (const Declaration& d : function->results) called.results.push_back(local_variable(d));
        pending_calls_.push_back({0, name});
    }
    auto copies = [&](const std::vector<std::string>& actual, const std::vector<Symbol>& formal,
                      const std::vector<Declaration>& d, bool into) {
        if (actual.size() != formal.size()) throw Error("argument count of " + name);
        std::vector<std::array<u32, 3>> list;
        for (size_t i = 0; i < actual.size(); i++) {
            const Symbol* symbol = find_symbol(actual[i]);
            if (!symbol || symbol->space != Space::Local) throw Error("argument " + actual[i]);
            const u32 theirs = static_cast<u32>(formal[i].value), ours = static_cast<u32>(symbol->value);
            list.push_back({into ? ours : theirs, into ? theirs : ours, static_cast<u32>(d[i].size())});
        }
        return list;
    };
    in.copies_in = copies(arguments, called.parameters, function->parameters, true);
    in.copies_out = copies(results, called.results, function->results, false);
    fixups_.push_back({static_cast<u32>(kernel_.code.size()) - 1, scope_, name, false});
}

}  // namespace ptxsim
