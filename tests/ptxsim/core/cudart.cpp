// Stand-in for the CUDA runtime calls that nvcc's host code makes: kernel<<<>>>() runs the PTX of the fat
// binary in the simulator. Linked into each host library (-Bsymbolic), so it never meets a real libcudart in
// the same process. One device, no streams: everything happens in order, at the call.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <string>
#include <vector>

#include "api.h"

namespace {

using Status = int;
constexpr Status kSuccess = 0, kInvalidValue = 1, kMemoryAllocation = 2, kInvalidConfiguration = 9,
                 kInvalidSymbol = 13, kInvalidFunction = 98, kNoKernelImage = 209, kLaunchFailure = 719;

struct Dim3 {
    unsigned x, y, z;
};
struct FatBinary {
    const char* data;
    void* module = nullptr;
};
struct Function {
    FatBinary* binary;
    std::string name;
    int dynamic_shared = 0;  // granted by cudaFuncSetAttribute
};
struct Configuration {
    Dim3 grid, block;
    size_t shared;
    void* stream;
};
struct Device {  // what the stand-in says of itself; ptxsim_device() sets it
    int capability = 80, processors = 108, shared_optin = 166912, threads_per_processor = 2048;
};

std::map<const void*, Function>& functions() {
    static std::map<const void*, Function> table;
    return table;
}
std::map<const void*, Function>& variables() {
    static std::map<const void*, Function> table;
    return table;
}
std::vector<Configuration> configurations;
Device device;
Status last_error = kSuccess;

Status fail(Status status) { return last_error = status; }
void* host(const void* pointer) {
    return reinterpret_cast<void*>(ptxsim_host_address(reinterpret_cast<uint64_t>(pointer)));
}

template <class T>
T field(const char* at) {
    T value;
    std::memcpy(&value, at, sizeof value);
    return value;
}

// The fat binary: a header, then entries (kind 1: PTX) with a header size, a payload size and flags.
void* module_of(FatBinary* binary) {
    if (binary->module) return binary->module;
    const char* p = binary->data;
    if (field<uint32_t>(p) != 0xBA55ED50) return nullptr;
    const char* end = p + field<uint16_t>(p + 6) + field<uint64_t>(p + 8);
    for (p += field<uint16_t>(p + 6); p < end; p += field<uint32_t>(p + 4) + field<uint64_t>(p + 8)) {
        if (field<uint16_t>(p) != 1) continue;
        if (field<uint64_t>(p + 40) & 0xA000) {
            std::fprintf(stderr, "ptxsim: compressed PTX in the fat binary; build with --no-compress\n");
            return nullptr;
        }
        const std::string source(p + field<uint32_t>(p + 4), field<uint64_t>(p + 8));
        binary->module = ptxsim_load(source.c_str());
        if (!binary->module) std::fprintf(stderr, "ptxsim: %s\n", ptxsim_error());
        return binary->module;
    }
    std::fprintf(stderr,
                 "ptxsim: no PTX in the fat binary; build with -gencode arch=compute_80,code=compute_80\n");
    return nullptr;
}

Status symbol_address(void** out, const void* symbol) {
    auto found = variables().find(symbol);
    void* module = found == variables().end() ? nullptr : module_of(found->second.binary);
    *out = module ? reinterpret_cast<void*>(ptxsim_symbol(module, found->second.name.c_str())) : nullptr;
    return *out ? kSuccess : fail(kInvalidSymbol);
}

}  // namespace

extern "C" {

void ptxsim_device(int capability, int processors, int shared_optin) {
    device.capability = capability;
    device.processors = processors;
    device.shared_optin = shared_optin;
}

// --- what the compiler's generated code calls
void** __cudaRegisterFatBinary(void* wrapper) {
    return reinterpret_cast<void**>(new FatBinary{field<const char*>(static_cast<char*>(wrapper) + 8)});
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void** handle) {
    auto* binary = reinterpret_cast<FatBinary*>(handle);
    if (binary->module) ptxsim_unload(binary->module);
    delete binary;
}
char __cudaInitModule(void**) { return 1; }
void __cudaRegisterFunction(void** handle, const char* stub, char*, const char* name, int, void*, void*,
                            void*, void*, int*) {
    functions()[stub] = {reinterpret_cast<FatBinary*>(handle), name};
}
void __cudaRegisterVar(void** handle, char* variable, char*, const char* name, int, size_t, int, int) {
    variables()[variable] = {reinterpret_cast<FatBinary*>(handle), name};
}
unsigned __cudaPushCallConfiguration(Dim3 grid, Dim3 block, size_t shared, void* stream) {
    configurations.push_back({grid, block, shared, stream});
    return 0;
}
Status __cudaPopCallConfiguration(Dim3* grid, Dim3* block, size_t* shared, void* stream) {
    const Configuration c = configurations.back();
    configurations.pop_back();
    *grid = c.grid;
    *block = c.block;
    *shared = c.shared;
    std::memcpy(stream, &c.stream, sizeof c.stream);
    return kSuccess;
}

// --- launches
Status cudaLaunchKernel(const void* stub, Dim3 grid, Dim3 block, void** arguments, size_t shared, void*) {
    auto found = functions().find(stub);
    if (found == functions().end()) return fail(kInvalidFunction);
    void* module = module_of(found->second.binary);
    if (!module) return fail(kNoKernelImage);
    if (shared > 49152 && shared > static_cast<size_t>(found->second.dynamic_shared)) {
        std::fprintf(stderr,
                     "ptxsim: %zu bytes of dynamic shared memory, but cudaFuncSetAttribute granted %d\n",
                     shared, found->second.dynamic_shared);
        return fail(kInvalidValue);
    }
    const uint32_t g[3] = {grid.x, grid.y, grid.z}, b[3] = {block.x, block.y, block.z};
    for (int i = 0; i < 3; i++)
        if (!g[i] || !b[i]) return fail(kInvalidConfiguration);
    return ptxsim_launch(module, found->second.name.c_str(), g, b, static_cast<uint32_t>(shared), arguments) <
                   0
               ? fail(kLaunchFailure)
               : kSuccess;
}
Status __cudaGetKernel(const void** kernel, const void* stub) {
    *kernel = stub;
    return kSuccess;
}
Status __cudaLaunchKernel(const void* kernel, Dim3 grid, Dim3 block, void** arguments, size_t shared,
                          void* stream) {
    return cudaLaunchKernel(kernel, grid, block, arguments, shared, stream);
}
struct LaunchConfig {
    Dim3 grid, block;
    size_t shared;
    void* stream;
    void* attributes;
    unsigned count;
};
Status cudaLaunchKernelExC(const LaunchConfig* c, const void* kernel, void** arguments) {
    return cudaLaunchKernel(kernel, c->grid, c->block, arguments, c->shared, c->stream);
}

// --- functions and occupancy
Status cudaFuncSetAttribute(const void* stub, int attribute, int value) {
    auto found = functions().find(stub);
    if (found == functions().end()) return fail(kInvalidFunction);
    if (attribute == 8) {  // maximum dynamic shared memory
        if (value < 0 || value > device.shared_optin) return fail(kInvalidValue);
        found->second.dynamic_shared = value;
    }
    return kSuccess;
}
Status cudaFuncGetAttributes(void* out, const void* stub) {
    auto found = functions().find(stub);
    if (found == functions().end()) return fail(kInvalidFunction);
    struct {
        size_t shared, constant, local;
        int threads, registers, ptx, binary, cache, dynamic_shared;
    } attributes{0,
                 0,
                 0,
                 1024,
                 64,
                 device.capability,
                 device.capability,
                 0,
                 found->second.dynamic_shared ? found->second.dynamic_shared : 49152};
    std::memcpy(out, &attributes, sizeof attributes);
    return kSuccess;
}
// threads and dynamic shared memory only: there is no register count here
Status cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* blocks, const void*, int threads,
                                                              size_t shared, unsigned) {
    const int by_threads = threads > 0 ? device.threads_per_processor / threads : 0;
    const int by_memory =
        static_cast<int>((static_cast<size_t>(device.shared_optin) + 1024) / (shared + 1024));
    *blocks = by_threads < by_memory ? by_threads : by_memory;
    if (*blocks > 32) *blocks = 32;
    return kSuccess;
}
Status cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void* stub, int threads,
                                                     size_t shared) {
    return cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(blocks, stub, threads, shared, 0);
}

// --- memory: addresses are tagged, and like device memory reach the host through cudaMemcpy only
Status cudaMalloc(void** out, size_t bytes) {
    const size_t padded = (bytes + 511) / 256 * 256;
    void* memory = std::aligned_alloc(256, padded);
    if (!memory) return fail(kMemoryAllocation);
    std::memset(memory, 0xFF, padded);
    *out = reinterpret_cast<void*>(
        ptxsim_register(reinterpret_cast<uint64_t>(memory), bytes, kPtxsimWritable, "cudaMalloc"));
    return kSuccess;
}
Status cudaFree(void* pointer) {
    if (pointer) ptxsim_unregister(reinterpret_cast<uint64_t>(pointer)), std::free(host(pointer));
    return kSuccess;
}
Status cudaMallocAsync(void** out, size_t bytes, void*) { return cudaMalloc(out, bytes); }
Status cudaFreeAsync(void* pointer, void*) { return cudaFree(pointer); }
Status cudaMemcpy(void* to, const void* from, size_t bytes, int) {
    std::memcpy(host(to), host(from), bytes);
    return kSuccess;
}
Status cudaMemcpyAsync(void* to, const void* from, size_t bytes, int kind, void*) {
    return cudaMemcpy(to, from, bytes, kind);
}
Status cudaMemset(void* to, int value, size_t bytes) {
    std::memset(host(to), value, bytes);
    return kSuccess;
}
Status cudaMemsetAsync(void* to, int value, size_t bytes, void*) { return cudaMemset(to, value, bytes); }
Status cudaGetSymbolAddress(void** out, const void* symbol) { return symbol_address(out, symbol); }
Status cudaMemcpyToSymbol(const void* symbol, const void* from, size_t bytes, size_t offset, int) {
    void* to;
    const Status status = symbol_address(&to, symbol);
    if (status == kSuccess) std::memcpy(static_cast<char*>(host(to)) + offset, host(from), bytes);
    return status;
}
Status cudaMemcpyToSymbolAsync(const void* symbol, const void* from, size_t bytes, size_t offset, int kind,
                               void*) {
    return cudaMemcpyToSymbol(symbol, from, bytes, offset, kind);
}

Status cudaMemcpyFromSymbol(void* to, const void* symbol, size_t bytes, size_t offset, int) {
    void* from;
    const Status status = symbol_address(&from, symbol);
    if (status == kSuccess) std::memcpy(host(to), static_cast<char*>(host(from)) + offset, bytes);
    return status;
}

// --- errors, device, streams
Status cudaGetLastError() {
    const Status status = last_error;
    last_error = kSuccess;
    return status;
}
Status cudaPeekAtLastError() { return last_error; }
const char* cudaGetErrorString(Status status) {
    switch (status) {
        case kSuccess:
            return "no error";
        case kInvalidValue:
            return "invalid argument";
        case kMemoryAllocation:
            return "out of memory";
        case kInvalidConfiguration:
            return "invalid configuration argument";
        case kInvalidSymbol:
            return "invalid device symbol";
        case kInvalidFunction:
            return "invalid device function";
        case kNoKernelImage:
            return "no kernel image is available for execution on the device";
        case kLaunchFailure:
            return "the kernel stopped in the simulator";
        default:
            return "unknown error";
    }
}
const char* cudaGetErrorName(Status status) { return cudaGetErrorString(status); }
Status cudaDeviceSynchronize() { return last_error; }
Status cudaStreamSynchronize(void*) { return last_error; }
Status cudaStreamIsCapturing(void*, int* capturing) {
    *capturing = 0;
    return kSuccess;
}
Status cudaGetDevice(int* index) {
    *index = 0;
    return kSuccess;
}
Status cudaSetDevice(int) { return kSuccess; }
Status cudaGetDeviceCount(int* count) {
    *count = 1;
    return kSuccess;
}
Status cudaRuntimeGetVersion(int* version) {
    *version = 13000;
    return kSuccess;
}
Status cudaDriverGetVersion(int* version) { return cudaRuntimeGetVersion(version); }
Status cudaDeviceGetAttribute(int* value, int attribute, int) {
    switch (attribute) {  // cudaDeviceAttr
        case 1:
        case 2:
        case 3:
            *value = 1024;
            break;
        case 4:
            *value = 64;
            break;
        case 5:
            *value = 2147483647;
            break;
        case 6:
        case 7:
            *value = 65535;
            break;
        case 8:
            *value = 49152;
            break;
        case 10:
            *value = 32;
            break;
        case 12:
        case 82:
            *value = 65536;
            break;
        case 16:
            *value = device.processors;
            break;
        case 39:
            *value = device.threads_per_processor;
            break;
        case 75:
            *value = device.capability / 10;
            break;
        case 76:
            *value = device.capability % 10;
            break;
        case 81:
            *value = device.shared_optin + 1024;
            break;
        case 97:
            *value = device.shared_optin;
            break;
        case 106:
            *value = 32;
            break;
        default:
            std::fprintf(stderr, "ptxsim: device attribute %d is not modelled\n", attribute);
            return fail(kInvalidValue);
    }
    return kSuccess;
}
}
