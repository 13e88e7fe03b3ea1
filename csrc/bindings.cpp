// The pybind11 module `_C`: host facts only, no tensor crosses here. Loading it also runs the static
// registrations of the CPU kernels (csrc/ops/*/*_cpu.cpp).
#include <pybind11/pybind11.h>

#include <string>
#include <tuple>
#include <utility>

#include "common/cpu/isa.h"
#include "common/cpu/pool.h"
#include "module_snapshot.h"
#include "ops/conv_bn_act/conv_train_cpu.h"

namespace py = pybind11;

namespace {

py::dict build_info() {
    py::dict info;
    info["version"] = DL4DS_VERSION;
    info["compiler"] = __VERSION__;
    info["cplusplus"] = static_cast<long>(__cplusplus);
    info["torch_target_version"] = static_cast<unsigned long long>(TORCH_TARGET_VERSION);
    return info;
}

py::dict cpu_features() {
    py::dict features;
    features["isa"] = dl4ds::isa_name(dl4ds::active_isa());
    features["l2_bytes"] = dl4ds::cache_sizes().l2_bytes;
    features["llc_bytes"] = dl4ds::cache_sizes().llc_bytes;
    return features;
}

/// The GPU architectures that `_cuda` was built for at the same time, as TORCH_CUDA_ARCH_LIST spells them.
std::string cuda_archs() { return DL4DS_CUDA_ARCHS; }

py::dict pool_stats() {
    const dl4ds::PoolStats stats = dl4ds::pool_stats();
    py::dict result;
    result["limit_bytes"] = stats.limit_bytes;
    result["used_bytes"] = stats.used_bytes;
    result["idle_bytes"] = stats.idle_bytes;
    result["peak_used_bytes"] = stats.peak_used_bytes;
    result["hits"] = stats.hits;
    result["misses"] = stats.misses;
    result["evictions"] = stats.evictions;
    return result;
}

using Pair = std::pair<int64_t, int64_t>;

/// The algorithm code of ops/conv_bn_act.py for a convolution of these sizes.
int conv_choose(int64_t n, int64_t channels, int64_t height, int64_t width, int64_t channels_out, Pair kernel,
                Pair stride, Pair padding, Pair dilation, int64_t groups, int64_t threads, bool exact) {
    return static_cast<int>(dl4ds::conv_choose(
        {n, channels, height, width, channels_out, kernel.first, kernel.second, stride.first, stride.second,
         padding.first, padding.second, dilation.first, dilation.second, groups},
        threads, exact));
}

/// Whether the algorithm of a code other than 0 can run it.
bool conv_supports(int algorithm, int64_t n, int64_t channels, int64_t height, int64_t width,
                   int64_t channels_out, Pair kernel, Pair stride, Pair padding, Pair dilation,
                   int64_t groups) {
    return dl4ds::conv_supports(
        static_cast<dl4ds::ConvAlgorithm>(algorithm),
        {n, channels, height, width, channels_out, kernel.first, kernel.second, stride.first, stride.second,
         padding.first, padding.second, dilation.first, dilation.second, groups});
}

/// Algorithm codes of a training step: forward, gradient of the input, gradient of the weight.
std::tuple<int, int, int> conv_train_choose(int64_t n, int64_t channels, int64_t height, int64_t width,
                                            int64_t channels_out, Pair kernel, Pair stride, Pair padding,
                                            Pair dilation, int64_t groups) {
    const dl4ds::TrainChoice choice = dl4ds::conv_train_choose(
        {n, channels, height, width, channels_out, kernel.first, kernel.second, stride.first, stride.second,
         padding.first, padding.second, dilation.first, dilation.second, groups});
    return {static_cast<int>(choice.forward), static_cast<int>(choice.dgrad), static_cast<int>(choice.wgrad)};
}

}  // namespace

PYBIND11_MODULE(_C, m) {
    m.doc() = "Host facts of dl4ds_kernels' compiled part.";
    m.def("build_info", &build_info, "Facts of the build: version, compiler, libtorch stable ABI target.");
    m.def("cpu_features", &cpu_features, "Instruction set in use and cache sizes in bytes.");
    m.def("cuda_archs", &cuda_archs, "GPU architectures of the CUDA part, empty without one.");
    m.def("conv_choose", &conv_choose,
          "Algorithm for a convolution: 0 library, 1 direct, 2 F(2x2), 3 depthwise, 4 F(4x4), 6 F(6x6), 7 "
          "Strassen, 8 dot products.");
    m.def("conv_train_choose", &conv_train_choose,
          "Algorithms of a training step: forward, gradients of input and weight.");
    m.def("conv_supports", &conv_supports,
          "Whether an algorithm (a code but 0) can run a convolution of these sizes.");
    m.def("module_snapshot", &dl4ds::module_snapshot, py::arg("module"), py::arg("keep"),
          "What a recorded forward of this tree of modules relies on, and the cache lines it lies in.");
    m.def("prefetch_lines", &dl4ds::prefetch_lines, py::arg("lines"), "Asks for cache lines.");
    m.def("module_unchanged", &dl4ds::module_unchanged, py::arg("module"), py::arg("snapshot"),
          "Whether the tree still is what the snapshot saw.");
    m.def("pool_stats", &pool_stats, "Counters of the output pool, bytes and calls.");
    m.def("pool_trim", &dl4ds::pool_trim, "Give idle blocks back to the operating system; returns bytes.");
    m.def("pool_set_limit", &dl4ds::pool_set_limit, py::arg("bytes"),
          "Most idle bytes the pool keeps; 0 = off.");
}
