#include "launch.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <string_view>

namespace ptxsim {

void Launch::report(Warp& warp, const Instruction& in, int lane, const char* kind,
                    const std::string& message) {
    const u64 key = static_cast<u64>(in.index) << 32 ^ std::hash<std::string_view>()(kind) >> 32;
    auto [found, fresh] = finding_of.emplace(key, findings.size());
    if (!fresh) {
        if (found->second < findings.size()) findings[found->second].times++;
        return;
    }
    if (findings.size() >= options.max_reports) {
        found->second = ~size_t{0};
        return;
    }
    const Kernel& kernel = *warp.block->kernel;
    Finding f;
    f.kind = kind;
    f.message = message;
    f.instruction = shortened(in.text, 160);
    f.kernel = shortened(kernel.name, 64);
    f.line = in.at.line;
    auto file = kernel.files->find(in.at.file);
    if (file != kernel.files->end()) f.file = file->second;
    std::copy(warp.block->id, warp.block->id + 3, f.block);
    f.thread = warp.id * kLanes + static_cast<u32>(lane);
    findings.push_back(std::move(f));
}

namespace {

struct AlignedDelete {
    void operator()(u8* p) const { std::free(p); }
};

void set_special_registers(Warp& w, const Kernel& kernel, const u32 grid[3], const u32 block[3]) {
    auto slot = [&](int special) { return w.reg<u32>(kernel.special[special]); };
    for (u32 l = 0; l < kLanes; l++) {
        const u32 thread = w.id * kLanes + l;
        slot(TidX)[l] = thread % block[0];
        slot(TidY)[l] = thread / block[0] % block[1];
        slot(TidZ)[l] = thread / block[0] / block[1];
        for (int d = 0; d < 3; d++) {
            slot(NtidX + d)[l] = block[d];
            slot(NctaidX + d)[l] = grid[d];
        }
        slot(LaneId)[l] = l;
        slot(WarpId)[l] = w.id;
        slot(LanemaskEq)[l] = 1u << l;
        slot(LanemaskLt)[l] = (1u << l) - 1;
        slot(LanemaskLe)[l] = (2u << l) - 1;
        slot(LanemaskGt)[l] = ~((2u << l) - 1);
        slot(LanemaskGe)[l] = ~((1u << l) - 1);
    }
    for (const Constant& constant : kernel.constants)
        for (int l = 0; l < kLanes; l++) {
            u8* at = w.registers + constant.slot + l * constant.bytes;
            std::memset(at, 0, constant.bytes);
            std::memcpy(at, &constant.value, std::min<size_t>(constant.bytes, 8));
        }
}

}  // namespace

void Launch::run(Kernel& kernel, const u32 grid[3], const u32 block[3], u32 dynamic_shared) {
    Block b;
    b.launch = this;
    b.kernel = &kernel;
    const u64 threads = static_cast<u64>(block[0]) * block[1] * block[2];
    const bool sane = threads && threads <= 1024 && block[2] <= 64 && grid[0] && grid[1] && grid[2] &&
                      grid[1] <= 65535 && grid[2] <= 65535;
    if (!sane)
        throw Error(format("invalid launch: grid (%u,%u,%u), block (%u,%u,%u)", grid[0], grid[1], grid[2],
                           block[0], block[1], block[2]));
    b.threads = static_cast<u32>(threads);
    const u32 warps = (b.threads + kLanes - 1) / kLanes;
    b.shared.resize(dynamic_shared ? ((kernel.shared_static + 15) & ~15u) + dynamic_shared
                                   : kernel.shared_static);
    if (b.shared.size() > kMaxShared) throw Error(format("%zu bytes of shared memory", b.shared.size()));
    shared_shadow.reset(b.shared.size());
    b.local_stride = (kernel.local_bytes + 15) & ~15u;
    b.local.resize(static_cast<size_t>(b.local_stride) * warps * kLanes);
    b.warps.resize(warps);
    lines.assign(kernel.code.size(), LineCounters());

    const size_t stride = (kernel.register_bytes + 127) & ~size_t{63};
    std::unique_ptr<u8, AlignedDelete> registers(static_cast<u8*>(std::aligned_alloc(64, stride * warps)));
    // Registers that nothing has written hold a NaN in every floating type, and a large number.
    std::fill_n(reinterpret_cast<u16*>(registers.get()), stride * warps / 2, u16{0x7fff});
    for (u32 i = 0; i < warps; i++) {
        Warp& w = b.warps[i];
        w.registers = registers.get() + stride * i;
        w.block = &b;
        w.id = i;
        set_special_registers(w, kernel, grid, block);
    }

    const u64 blocks = static_cast<u64>(grid[0]) * grid[1] * grid[2];
    // a fixed permutation of the blocks for each seed: multiples of a step that shares no factor with their
    // number
    u64 step = options.schedule ? 7919 + 2 * (options.schedule % 1000) : 1;
    auto gcd = [](u64 x, u64 y) {
        while (y) std::swap(x %= y, y);
        return x;
    };
    while (gcd(step, blocks) != 1) step++;
    for (u64 i = 0; i < blocks; i++) {
        const u64 index = (i % blocks * (step % blocks) + options.schedule) % blocks;
        b.index = static_cast<u32>(index);
        b.id[0] = static_cast<u32>(index % grid[0]);
        b.id[1] = static_cast<u32>(index / grid[0] % grid[1]);
        b.id[2] = static_cast<u32>(index / grid[0] / grid[1]);
        run_block(*this, b);
        counters.blocks++;
    }
}

}  // namespace ptxsim
