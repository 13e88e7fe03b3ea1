// An implicit-GEMM convolution of CUTLASS (sm_80 tensor cores, NHWC) with a ReLU, behind one C function; not
// ours, but the kind of kernel that a simulator must be able to run. -DKIND=0: fp16, 1: bfloat16, 2: float
// through TF32.
// clang-format off: the order matters
#include "cutlass/cutlass.h"
#include "cutlass/conv/kernel/default_conv2d_fprop.h"
#include "cutlass/conv/device/implicit_gemm_convolution.h"
#include "cutlass/epilogue/thread/linear_combination_relu.h"
// clang-format on

namespace {

using cutlass::gemm::GemmShape;

template <typename T, typename BlockTile, typename WarpTile, typename Instruction, int Stages>
struct Convolution {
    using Layout = cutlass::layout::TensorNHWC;
    static constexpr int kVector = 16 / sizeof(T);
    using Epilogue = cutlass::epilogue::thread::LinearCombinationRelu<T, kVector, float, float>;
    using Swizzle = cutlass::gemm::threadblock::GemmIdentityThreadblockSwizzle<4>;
    using Kernel = typename cutlass::conv::kernel::DefaultConv2dFprop<
        T, Layout, T, Layout, T, Layout, float, cutlass::arch::OpClassTensorOp, cutlass::arch::Sm80,
        BlockTile, WarpTile, Instruction, Epilogue, Swizzle, Stages, cutlass::arch::OpMultiplyAdd,
        cutlass::conv::IteratorAlgorithm::kOptimized, cutlass::conv::StrideSupport::kStrided, kVector,
        kVector>::Kernel;
    using Device = cutlass::conv::device::ImplicitGemmConvolution<Kernel>;

    static int run(void* x, void* weight, void* out, const cutlass::conv::Conv2dProblemSize& size) {
        const auto tensor = [](void* data, int n, int h, int w, int c) {
            return cutlass::TensorRef<T, Layout>(static_cast<T*>(data), Layout::packed({n, h, w, c}));
        };
        const auto result = tensor(out, size.N, size.P, size.Q, size.K);
        typename Device::Arguments arguments{size,
                                             tensor(x, size.N, size.H, size.W, size.C),
                                             tensor(weight, size.K, size.R, size.S, size.C),
                                             result,
                                             result,
                                             {1.0f, 0.0f}};
        Device device;
        cutlass::Status status = Device::can_implement(arguments);
        if (status == cutlass::Status::kSuccess) status = device.initialize(arguments);
        if (status == cutlass::Status::kSuccess) status = device();
        return static_cast<int>(status);
    }
};

#if KIND == 0
using Chosen =
    Convolution<cutlass::half_t, GemmShape<128, 128, 32>, GemmShape<64, 64, 32>, GemmShape<16, 8, 16>, 4>;
#elif KIND == 1
using Chosen =
    Convolution<cutlass::bfloat16_t, GemmShape<64, 64, 32>, GemmShape<32, 32, 32>, GemmShape<16, 8, 16>, 3>;
#else
using Chosen = Convolution<float, GemmShape<128, 64, 16>, GemmShape<64, 32, 16>, GemmShape<16, 8, 8>, 3>;
#endif

}  // namespace

/// out[n, p, q, k] = relu(sum of x[n, h, w, c] * weight[k, r, s, c]); 0, or CUTLASS' status.
extern "C" int cutlass_conv(void* x, void* weight, void* out, int n, int h, int w, int c, int k, int r, int p,
                            int q, int pad, int stride, int dilation) {
    return Chosen::run(
        x, weight, out,
        cutlass::conv::Conv2dProblemSize(n, h, w, c, k, r, r, p, q, pad, pad, stride, stride, dilation,
                                         dilation, cutlass::conv::Mode::kCrossCorrelation, 1, 1));
}
