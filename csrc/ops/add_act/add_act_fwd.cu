// Launch of add_act's forward kernel.
#include "ops/add_act/add_act_kernel.cuh"

namespace dl4ds {

int launch_add_act_fwd(const AddActFwdParams& p, void* stream) {
    const bool vectors = aligned16(p.x) && aligned16(p.residual) && aligned16(p.out);
    return dispatch_vec(p.dtype, vectors, [&](auto type, auto vec) {
        using T = typename decltype(type)::type;
        constexpr int kVec = decltype(vec)::value;
        return launch(add_act_fwd_kernel<T, kVec>, grid_blocks(ceil_div(p.numel, kVec)), kThreads, stream, p);
    });
}

}  // namespace dl4ds
