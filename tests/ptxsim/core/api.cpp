// The C interface that the Python front end and the stand-in CUDA runtime use. One simulator per process, one
// launch at a time.
#include "api.h"

#include <algorithm>
#include <cstring>
#include <mutex>

#include "decoder.h"
#include "launch.h"

using namespace ptxsim;

namespace {

struct State {
    std::recursive_mutex mutex;
    Memory memory;
    Options options;
    std::string error, text;
    std::map<std::string, ptxsim::Module*> replacements;
    int grid_delta = 0;                // added to the first grid dimension of replaced kernels
    std::vector<std::string> results;  // one JSON object per launch since the last reset
};
State& state() {
    static State& s = *new State;  // never destroyed: host libraries unregister their modules at exit
    return s;
}

using Lock = std::lock_guard<std::recursive_mutex>;

std::string quoted(const std::string& text) {
    std::string out = "\"";
    for (char c : text) {
        if (c == '"' || c == '\\') out += '\\';
        if (static_cast<unsigned char>(c) >= 32) out += c;
    }
    return out + "\"";
}

unsigned long long number(u64 value) { return value; }

void load_variables(ptxsim::Module& module) {
    for (const Declaration& d : module.text.variables) {
        if (d.space != Space::Global && d.space != Space::Const) continue;
        auto storage = std::make_unique<u8[]>(d.size() + 256);
        u8* at = reinterpret_cast<u8*>((reinterpret_cast<u64>(storage.get()) + 127) & ~u64{127});
        std::memcpy(at, d.initial.data(), d.initial.size());
        // constants are read through ld.const, which takes host addresses
        const bool constant = d.space == Space::Const;
        const bool tags = state().memory.tags;
        if (constant) state().memory.tags = false;
        module.symbols[d.name] = state().memory.add(reinterpret_cast<u64>(at), d.size(), !constant, false,
                                                    false, "__device__ " + d.name);
        state().memory.keep(module.symbols[d.name]);
        state().memory.tags = tags;
        module.storage.push_back(std::move(storage));
    }
}

Kernel& kernel_of(ptxsim::Module& module, const char* name) {
    auto found = module.kernels.find(name);
    if (found != module.kernels.end()) return *found->second;
    for (const Function& f : module.text.functions) {
        if (!f.is_kernel || f.name != name) continue;
        auto kernel = std::make_unique<Kernel>();
        kernel->name = f.name;
        KernelBuilder(module, *kernel).build(f);
        return *(module.kernels[name] = std::move(kernel));
    }
    throw Error("no kernel named " + shortened(name, 200));
}

u64 sectors(const std::vector<u8>& bitmap) {
    u64 n = 0;
    for (u8 b : bitmap) n += static_cast<u64>(__builtin_popcount(b));
    return n;
}

std::string findings_json(const Launch& launch) {
    std::string out = "[";
    for (const Finding& f : launch.findings) {
        if (out.size() > 1) out += ",";
        out += "{\"kind\":" + quoted(f.kind) + ",\"message\":" + quoted(f.message) +
               ",\"file\":" + quoted(f.file) + ",\"instruction\":" + quoted(f.instruction) +
               ",\"kernel\":" + quoted(f.kernel) +
               format(",\"line\":%d,\"block\":[%u,%u,%u],\"thread\":%u,\"times\":%llu}", f.line, f.block[0],
                      f.block[1], f.block[2], f.thread, number(f.times));
    }
    return out + "]";
}

std::string counters_json(const Counters& c) {
    const std::pair<const char*, u64> entries[] = {{"blocks", c.blocks},
                                                   {"warp_instructions", c.warp_instructions},
                                                   {"thread_instructions", c.thread_instructions},
                                                   {"barriers", c.barriers},
                                                   {"mma", c.mma},
                                                   {"atomics", c.atomics},
                                                   {"async_copies", c.async_copies},
                                                   {"load_requests", c.load_requests},
                                                   {"load_sectors", c.load_sectors},
                                                   {"load_ideal_sectors", c.load_ideal},
                                                   {"load_bytes", c.load_bytes},
                                                   {"store_requests", c.store_requests},
                                                   {"store_sectors", c.store_sectors},
                                                   {"store_ideal_sectors", c.store_ideal},
                                                   {"store_bytes", c.store_bytes},
                                                   {"shared_requests", c.shared_requests},
                                                   {"shared_waves", c.shared_waves},
                                                   {"shared_ideal_waves", c.shared_ideal}};
    std::string out = "{";
    for (auto& [name, value] : entries)
        out += format("%s\"%s\":%llu", out.size() > 1 ? "," : "", name, number(value));
    return out + "}";
}

std::string tensors_json(std::vector<Region>& regions) {
    std::string out = "{";
    for (const Region& r : regions) {
        u64 missing = 0;
        if (r.output) missing = static_cast<u64>(std::count(r.written.begin(), r.written.end(), false));
        if (r.permanent && r.read_sectors.empty() && r.write_sectors.empty()) continue;
        out += (out.size() > 1 ? "," : "") + quoted(r.name) +
               format(":{\"read\":%llu,\"written\":%llu,\"unwritten\":%llu}",
                      number(sectors(r.read_sectors) * 32), number(sectors(r.write_sectors) * 32),
                      number(missing));
    }
    return out + "}";
}

std::string lines_json(const Launch& launch, const Kernel& kernel) {
    std::string out = "[";
    for (size_t i = 0; i < kernel.code.size(); i++) {
        const LineCounters& c = launch.lines[i];
        const Instruction& in = kernel.code[i];
        if (!c.warps) continue;
        auto file = kernel.files->find(in.at.file);
        if (out.size() > 1) out += ",";
        out += format(
            "{\"index\":%zu,\"line\":%d,\"file\":%s,\"text\":%s,\"warps\":%llu,\"lanes\":%llu,\"requests\":%"
            "llu,"
            "\"sectors\":%llu,\"ideal_sectors\":%llu,"
            "\"waves\":%llu,\"ideal_waves\":%llu}",
            i, in.at.line, quoted(file == kernel.files->end() ? "" : file->second).c_str(),
            quoted(shortened(in.text, 160)).c_str(), number(c.warps), number(c.lanes), number(c.requests),
            number(c.sectors), number(c.ideal_sectors), number(c.waves), number(c.ideal_waves));
    }
    return out + "]";
}

template <class F>
auto guarded(F body, decltype(body()) failure) {
    Lock lock(state().mutex);
    try {
        return body();
    } catch (const std::exception& error) {
        state().error = error.what();
        return failure;
    }
}

}  // namespace

extern "C" {

const char* ptxsim_error() { return state().error.c_str(); }

void* ptxsim_load(const char* source) {
    return guarded(
        [&]() -> void* {
            auto module = std::make_unique<ptxsim::Module>();
            module->text = parse_module(source);
            load_variables(*module);
            return module.release();
        },
        nullptr);
}

void ptxsim_unload(void* handle) {
    Lock lock(state().mutex);
    auto* module = static_cast<ptxsim::Module*>(handle);
    for (auto& [name, address] : module->symbols) state().memory.remove(address);
    delete module;
}

const char* ptxsim_describe(void* handle) {
    return guarded(
        [&]() -> const char* {
            auto& module = *static_cast<ptxsim::Module*>(handle);
            std::string out = "{";
            for (const Function& f : module.text.functions) {
                if (!f.is_kernel) continue;
                const Kernel& kernel = kernel_of(module, f.name.c_str());
                out += (out.size() > 1 ? "," : "") + quoted(f.name) +
                       format(":{\"instructions\":%zu,\"static_shared\":%u,\"local\":%u,\"parameters\":[",
                              kernel.code.size(), kernel.shared_static, kernel.local_bytes);
                for (size_t i = 0; i < f.parameters.size(); i++)
                    out += format("%s[\"%s\",%u]", i ? "," : "", info(f.parameters[i].type).name,
                                  static_cast<u32>(f.parameters[i].size()));
                out += "],\"unsupported\":[";
                for (size_t i = 0; i < kernel.problems.size(); i++)
                    out += (i ? "," : "") + quoted(kernel.problems[i]);
                out += "]}";
            }
            state().text = out + "}";
            return state().text.c_str();
        },
        nullptr);
}

const char* ptxsim_opcodes() {
    Lock lock(state().mutex);
    state().text.clear();
    for (auto& [name, decode] : opcodes()) state().text += name + " ";
    return state().text.c_str();
}

uint64_t ptxsim_symbol(void* handle, const char* name) {
    auto& symbols = static_cast<ptxsim::Module*>(handle)->symbols;
    auto found = symbols.find(name);
    return found == symbols.end() ? 0 : found->second;
}

uint64_t ptxsim_register(uint64_t address, uint64_t bytes, int flags, const char* name) {
    Lock lock(state().mutex);
    return state().memory.add(address, bytes, flags & kPtxsimWritable, flags & kPtxsimUndefined,
                              flags & kPtxsimOutput, name);
}

void ptxsim_unregister(uint64_t address) {
    Lock lock(state().mutex);
    state().memory.remove(address);
}

void ptxsim_clear() {
    Lock lock(state().mutex);
    state().memory.clear();
}

uint64_t ptxsim_host_address(uint64_t address) { return host_address(address); }

int ptxsim_option(const char* name, int64_t value) {
    Lock lock(state().mutex);
    Options& o = state().options;
    const std::string key = name;
    if (key == "races")
        o.races = value;
    else if (key == "traffic")
        o.traffic = value;
    else if (key == "lazy_copies")
        o.lazy_copies = value;
    else if (key == "schedule")
        o.schedule = static_cast<u32>(value);
    else if (key == "max_reports")
        o.max_reports = static_cast<u32>(value);
    else if (key == "budget")
        o.budget = static_cast<u64>(value);
    else if (key == "limit")
        o.limit = static_cast<u64>(value);
    else if (key == "grid_delta")
        state().grid_delta = static_cast<int>(value);
    else if (key == "tags")
        state().memory.tags = value;
    else
        return -1;
    return 0;
}

int ptxsim_launch(void* handle, const char* name, const uint32_t* grid, const uint32_t* block,
                  uint32_t shared, void** arguments) {
    Launch launch;
    launch.memory = &state().memory;
    Kernel* kernel = nullptr;
    std::string stopped;
    const int count = guarded(
        [&] {
            launch.options = state().options;
            auto* module = static_cast<ptxsim::Module*>(handle);
            u32 blocks[3] = {grid[0], grid[1], grid[2]};
            auto replaced = state().replacements.find(name);
            if (replaced != state().replacements.end()) {
                module = replaced->second;
                blocks[0] += static_cast<u32>(state().grid_delta);
            }
            kernel = &kernel_of(*module, name);
            for (size_t i = 0; i < kernel->parameters.size(); i++)
                std::memcpy(&kernel->parameter_bytes[kernel->parameters[i].offset], arguments[i],
                            kernel->parameters[i].bytes);
            state().memory.start_launch();
            launch.run(*kernel, blocks, block, shared);
            return static_cast<int>(launch.findings.size());
        },
        -1);
    Lock lock(state().mutex);
    if (count < 0) stopped = state().error;
    std::string result = "{\"kernel\":" + quoted(name) +
                         format(",\"grid\":[%u,%u,%u],\"block\":[%u,%u,%u],\"shared\":%u", grid[0], grid[1],
                                grid[2], block[0], block[1], block[2], shared);
    result += ",\"stopped\":" + quoted(stopped) + ",\"findings\":" + findings_json(launch) +
              ",\"counters\":" + counters_json(launch.counters);
    if (kernel) {
        if (launch.lines.empty()) launch.lines.resize(kernel->code.size());
        result += ",\"tensors\":" + tensors_json(state().memory.regions());
        if (launch.options.traffic) result += ",\"lines\":" + lines_json(launch, *kernel);
    }
    state().results.push_back(result + "}");
    return count;
}

void ptxsim_replace(const char* kernel, void* module) {
    Lock lock(state().mutex);
    if (module)
        state().replacements[kernel] = static_cast<ptxsim::Module*>(module);
    else
        state().replacements.erase(kernel);
}

const char* ptxsim_results() {
    Lock lock(state().mutex);
    std::string& out = state().text;
    out = "[";
    for (const std::string& r : state().results) out += (out.size() > 1 ? "," : "") + r;
    out += "]";
    state().results.clear();
    return out.c_str();
}
}
