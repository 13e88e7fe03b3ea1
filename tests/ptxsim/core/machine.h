// What a kernel is once decoded, and the state of the warps and the block that execute it.
#pragma once
#include <array>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "parser.h"
#include "types.h"

namespace ptxsim {

struct Warp;
struct Block;
struct Launch;
struct Instruction;
using Handler = void (*)(Warp&, const Instruction&, Mask);

enum class Flow : u8 { Next, Branch, Table, Return, Call, Barrier, Trap };
// Which lanes must execute an instruction together; a part of them waits for the others and is reported if it
// can't.
enum Combine : u32 { kNone, kPopc, kAnd, kOr };  // Instruction::mode of bar.red
enum class Converge : u8 { None, Live, Full, Members };

struct Instruction {
    Handler run = nullptr;
    Flow flow = Flow::Next;
    Converge converge = Converge::None;
    Space space = Space::Generic;
    Type type = Type::B32;
    int guard = -1;
    bool guard_negated = false;
    bool negate_a = false, negate_b = false, negate_c = false;  // predicate operands written as !%p
    bool wide_address = true;                                   // 64-bit register in an address
    bool strong = false;             // volatile, relaxed, acquire, release: not a data race
    bool result = true;              // false: red, or a destination of `_`
    u8 bytes = 4, vector = 1;        // of one element; elements per lane
    u32 d = 0, e = 0;                // destinations: slots in the register file
    u32 a = 0, b = 0, c = 0, x = 0;  // sources
    u32 members = 0;                 // slot of a membermask
    u32 mode = 0;                    // meaning belongs to the handler
    i64 offset = 0;
    std::vector<u32> slots;    // vector operands
    std::vector<u8> widths;    // bytes of each slot's register; 0: `_`
    u32 target = 0;            // Branch, Call
    std::vector<u32> targets;  // Table
    std::vector<std::array<u32, 3>> copies_in,
        copies_out;  // Call: from, to, bytes in the per-thread parameter space
    u32 index = 0;
    Position at;
    std::string text;
};

struct Parameter {
    std::string name;
    u32 offset, bytes;
};

// Slots of the special registers, in this order.
enum Special {
    TidX,
    TidY,
    TidZ,
    NtidX,
    NtidY,
    NtidZ,
    CtaidX,
    CtaidY,
    CtaidZ,
    NctaidX,
    NctaidY,
    NctaidZ,
    LaneId,
    WarpId,
    LanemaskEq,
    LanemaskLt,
    LanemaskLe,
    LanemaskGt,
    LanemaskGe,
    Carry,
    Trash,
    kSpecials
};

struct Constant {
    u32 slot;
    u8 bytes;
    u64 value;
};

struct Kernel {
    std::string name;
    std::vector<Parameter> parameters;
    std::vector<u8> parameter_bytes;  // filled at launch; ld.param reads here
    std::vector<Instruction> code;
    std::vector<Constant> constants;
    u32 special[kSpecials] = {};
    u32 register_bytes = 0, shared_static = 0, local_bytes = 0;
    std::vector<std::string>
        problems;  // instructions that could not be decoded: they stop the launch when reached
    const std::map<int, std::string>* files = nullptr;
};

struct Module {
    ModuleText text;
    std::map<std::string, std::unique_ptr<Kernel>> kernels;  // decoded on first use
    std::map<std::string, u64> symbols;                      // __device__ and __constant__ variables
    std::vector<std::unique_ptr<u8[]>> storage;
};

// Lanes that share a program counter.
struct Fragment {
    enum State : u8 { Ready, Converging, AtBarrier };
    u32 pc = 0;
    Mask mask = 0;
    State state = Ready;
    u32 barrier = 0;
    int frame = -1;       // call stack: index into Block::frames
    bool worked = false;  // has executed something since other lanes began to wait for it
};

struct AsyncCopy {  // one lane's cp.async that has not been waited for
    u32 shared_offset, group;
    const u8* source;
    u32 instruction;
    u8 bytes, source_bytes, lane;
};

struct MatrixProduct {  // a wgmma.mma_async that has not been waited for
    const Instruction* instruction;
    u64 a, b;  // descriptors
    bool accumulate;
    u32 group;
};

struct Warp {
    u8* registers = nullptr;
    Block* block = nullptr;
    u32 id = 0;
    Mask alive = 0;
    Mask passed_by =
        0;         // lanes that worked on and ended while others waited for them at a warp-wide instruction
    u32 step = 0;  // memory instructions executed
    std::vector<Fragment> fragments;
    std::vector<AsyncCopy> copies;
    u32 groups[kLanes] = {};  // cp.async groups committed by each lane
    std::vector<MatrixProduct> products;
    u32 product_group = 0;  // wgmma groups committed
    u64 backward = 0;       // instructions spent in backward branches (budget)

    template <class T>
    T* reg(u32 slot) {
        return reinterpret_cast<T*>(registers + slot);
    }
    Mask predicate(u32 slot, bool negated) {
        Mask value = *reg<Mask>(slot);
        return negated ? ~value : value;
    }
    void set_predicate(u32 slot, Mask value, Mask lanes) {
        Mask& p = *reg<Mask>(slot);
        p = (p & ~lanes) | (value & lanes);
    }
    Launch& launch();
};

struct Frame {
    u32 return_pc;
    int caller;
    const Instruction* call;
};

struct Block {
    Launch* launch = nullptr;
    Kernel* kernel = nullptr;
    u32 index = 0, threads = 0;
    u32 id[3] = {};
    std::vector<Warp> warps;
    std::vector<u8> shared, local;
    u32 local_stride = 0;
    std::vector<Frame> frames;
    std::vector<u32> clocks;  // [warp][warp]: what each warp knows of the others
    u32 arrived[16] = {};     // bar.arrive
    std::vector<u32> arrived_clock[16];

    u32& clock(u32 warp, u32 other) { return clocks[warp * warps.size() + other]; }
};

inline Launch& Warp::launch() { return *block->launch; }

}  // namespace ptxsim
