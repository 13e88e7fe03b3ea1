#include "ops/local_response_norm/local_response_norm_cpu.h"

#include <torch/csrc/stable/library.h>

#include "common/cpu/output.h"
#include "common/cpu/parallel.h"

namespace dl4ds {
namespace {

constexpr int64_t kColumns = 128;  // of a block: 96 to 256 channels of it stay in a core's second-level cache
constexpr int64_t kPixelBytes = 32 << 10;  // of one piece of work over pixels

struct Norm {
    int64_t size;
    double alpha, beta, k;
};

/// pow() knows more of negative numbers than a square root does.
LrnPower power_for(const Norm& norm) {
    return norm.alpha < 0 || norm.k < 0 ? LrnPower::kAny
           : norm.beta == 0.75          ? LrnPower::kThreeQuarters
           : norm.beta == 0.5           ? LrnPower::kHalf
           : norm.beta == 1.0           ? LrnPower::kOne
                                        : LrnPower::kAny;
}

void check_input(const char* op, const char* name, const TensorInfo& x) {
    DL4DS_CHECK(x.dim >= 3 && x.dim <= kMaxDims, op, ": ", name,
                ": expected 3 to 5 dims (N, C, ...), got shape ", x.shape());
    DL4DS_CHECK(is_floating(x.dtype), op, ": ", name,
                ": expected dtype float32, float64, float16 or bfloat16, got ", dtype_name(x.dtype));
}

Tensor in_format(const Tensor& t, const TensorInfo& info, Format format) {
    const auto strides = dense_strides(info.sizes, info.dim, format);
    return same_strides(info.strides, strides.data(), info.sizes, info.dim)
               ? t
               : copy_with_strides(t, info, strides.data());
}

/// out, laid out as x suggests: the normalised x, or its gradient where dout is given.
Tensor run(const char* op, const Tensor& x, const Tensor* dout, const Norm& norm) {
    const TensorInfo xi = tensor_info(x);
    const Format format = suggest_format(xi);
    Tensor out = empty_cpu(xi.sizes, dense_strides(xi.sizes, xi.dim, format).data(), xi.dim, xi.dtype);
    DL4DS_CHECK(norm.size >= 1, op, ": size: expected a positive number, got ", norm.size);
    if (xi.numel == 0) {
        return out;
    }
    const Tensor x_dense = in_format(x, xi, format);
    const Tensor dout_dense = dout == nullptr ? x_dense : in_format(*dout, tensor_info(*dout), format);
    const int64_t channels = xi.sizes[1], spatial = xi.numel / (xi.sizes[0] * channels);
    const bool columns = format == Format::kContiguous && spatial > 1;

    LrnArgs whole{};
    whole.x = tensor_info(x_dense).data;
    whole.dout = tensor_info(dout_dense).data;
    whole.out = tensor_info(out).data;
    whole.channels = channels;
    whole.pitch = spatial;
    // A window longer than two times the channels holds all of them wherever it stands.
    whole.before = std::min(norm.size / 2, channels);
    whole.after = std::min((norm.size - 1) / 2, channels);
    whole.scale = norm.alpha / static_cast<double>(norm.size);
    whole.beta = norm.beta;
    whole.k = norm.k;
    whole.power = power_for(norm);

    const auto& table = dout == nullptr ? lrn_kernels().fwd : lrn_kernels().bwd;
    const auto kernel = table[static_cast<int>(xi.dtype)][columns];
    const int64_t element = dtype_size(xi.dtype), acc = dtype_size(acc_dtype(xi.dtype));
    const int64_t pieces_a_plane = columns ? (spatial + kColumns - 1) / kColumns : 1;
    const int64_t pixels = xi.numel / channels;
    const Blocks blocks = fixed_blocks(pixels, channels * element, kPixelBytes, 1, int64_t{1} << 40);
    const int64_t pieces = columns ? xi.sizes[0] * pieces_a_plane : blocks.count;
    const int64_t room =
        lrn_scratch_elements(channels, whole.before + 1 + whole.after, columns ? kColumns : 0);
    // Square roots and divisions: some eight times the time of a copy.
    parallel_for(pieces, 8 * xi.numel * element, [&](int64_t first, int64_t last) {
        Scratch scratch(room * acc);
        LrnArgs p = whole;
        p.scratch = scratch.as<void>();
        for (int64_t i = first; i < last; ++i) {
            int64_t at = 0;
            if (columns) {
                const int64_t j = i % pieces_a_plane * kColumns;
                at = i / pieces_a_plane * channels * spatial + j;
                p.count = std::min(kColumns, spatial - j);
            } else {
                at = blocks.begin(i) * channels;
                p.count = blocks.end(i) - blocks.begin(i);
            }
            p.x = static_cast<const char*>(whole.x) + at * element;
            p.dout = static_cast<const char*>(whole.dout) + at * element;
            p.out = static_cast<char*>(whole.out) + at * element;
            kernel(p);
        }
    });
    return out;
}

}  // namespace

Tensor local_response_norm_fwd_cpu(Tensor x, int64_t size, double alpha, double beta, double k) {
    constexpr const char* kOp = "local_response_norm";
    check_input(kOp, "x", tensor_info(x));
    return run(kOp, x, nullptr, {size, alpha, beta, k});
}

Tensor local_response_norm_bwd_cpu(Tensor dout, Tensor x, int64_t size, double alpha, double beta, double k) {
    constexpr const char* kOp = "local_response_norm_bwd";
    const TensorInfo xi = tensor_info(x), di = tensor_info(dout);
    check_input(kOp, "x", xi);
    check_same_shape(kOp, "dout", di, xi);
    check_dtype(kOp, "dout", di, xi.dtype);
    check_same_device(kOp, "dout", di, xi);
    return run(kOp, x, &dout, {size, alpha, beta, k});
}

STABLE_TORCH_LIBRARY_IMPL(dl4ds_kernels, CPU, m) {
    m.impl("local_response_norm", TORCH_BOX(&local_response_norm_fwd_cpu));
    m.impl("local_response_norm_bwd", TORCH_BOX(&local_response_norm_bwd_cpu));
}

}  // namespace dl4ds
