// C interface of the simulator. Functions that return a pointer or -1 on failure leave the reason in
// ptxsim_error().
#pragma once
#include <cstdint>

// undefined: bytes count as garbage until written; output: bytes that stay so are counted
enum { kPtxsimWritable = 1, kPtxsimUndefined = 2, kPtxsimOutput = 4 };

extern "C" {
const char* ptxsim_error();
void* ptxsim_load(const char* source);
void ptxsim_unload(void* module);
const char* ptxsim_describe(void* module);  // JSON: kernels, parameters, unsupported instructions
const char* ptxsim_opcodes();               // space-separated
uint64_t ptxsim_symbol(void* module, const char* name);
// host memory that kernels may touch; returns the tagged address to hand to them
uint64_t ptxsim_register(uint64_t address, uint64_t bytes, int flags, const char* name);
void ptxsim_unregister(uint64_t address);
void ptxsim_clear();
uint64_t ptxsim_host_address(uint64_t address);
int ptxsim_option(const char* name, int64_t value);
// number of findings, or -1 if the kernel could not go on
int ptxsim_launch(void* module, const char* kernel, const uint32_t* grid, const uint32_t* block,
                  uint32_t shared, void** arguments);
// launches of this kernel by any module run another module's kernel of that name instead (null: no longer)
void ptxsim_replace(const char* kernel, void* module);
const char* ptxsim_results();  // JSON list of all launches since the last call
}
